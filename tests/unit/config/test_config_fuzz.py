"""Whatever is in a file or on a command line: a configuration, or a UserError of one line."""

import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchtitan_mtp.config import JobConfig, load_toml, parse_args, to_toml
from torchtitan_mtp.config.setting import options
from torchtitan_mtp.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = [path.read_bytes() for path in sorted((ROOT / "train_configs").glob("*.toml"))]
KEYS = [option for option in options(JobConfig).values() if not option.is_table]
# What mutations put in: syntax, values of every type, and bytes that are not text.
PIECES = [
    *(
        b'"',
        b"'",
        b"[",
        b"]",
        b"=",
        b"\n",
        b"#",
        b".",
        b",",
        b"{",
        b"}",
        b"\\u0000",
        b"\xff",
        b"\0",
    ),
    *(b"true", b"-1", b"0", b"1e999", b"nan", b"inf", b'""', b"[[]]", b"1979-05-27", b"[mtp]\n"),
]


def outcome(content: bytes) -> JobConfig | str:
    """The configuration of a file of this content, or the message that refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_bytes(content)
        try:
            return load_toml(path)
        except UserError as error:
            assert "\n" not in str(error) and "\r" not in str(error)
            return str(error)


@st.composite
def mutated_recipes(draw):
    """A recipe with a few spans deleted, replaced or moved."""
    content = draw(st.sampled_from(RECIPES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 30)))
        piece = draw(st.sampled_from([b"", *PIECES]) | st.binary(max_size=4))
        content = content[:start] + piece + content[end:]
    return content


@settings(max_examples=200, deadline=None)
@given(mutated_recipes())
def test_a_mutated_recipe(content):
    config = outcome(content)
    if isinstance(config, JobConfig):
        assert outcome(to_toml(config).encode()) == config


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KEYS),
    st.sampled_from(PIECES) | st.integers().map(lambda i: str(i).encode()),
)
@example(options(JobConfig)["training.steps"], b"1" * 400)
@example(options(JobConfig)["optimizer.lr"], b"1" * 400)
def test_any_value_in_any_key(option, value):
    table = ".".join(option.path[:-1]).encode()
    config = outcome(b"[%s]\n%s = %s\n" % (table, option.path[-1].encode(), value))
    assert isinstance(config, (JobConfig, str))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([f"--{option.name}" for option in KEYS])
        | st.sampled_from(
            ["true", "0", "-1", "1e999", "a,b", "", "--", "--a.b=c", "--mtp", "=", "\n"]
        )
        | st.text(max_size=6).filter(lambda word: word != "-h"),
        max_size=4,
    )
)
@example(["--job.config_file", "\n"])
@example(["--job.config_file", "\0"])
@example(["--a\nb"])
def test_any_command_line(argv):
    try:
        assert isinstance(parse_args(argv), JobConfig)
    except UserError as error:
        assert "\n" not in str(error)

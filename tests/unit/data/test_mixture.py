import itertools
import json
import logging
from collections import Counter

import numpy as np
import pytest

from torchtitan_mtp.config import JobConfig, check, load_toml, parse_args, to_toml
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.mixture import Mixture, source_from_config
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.distributed.ranks import shared_settings
from torchtitan_mtp.errors import UserError

S, N = 16, 2
SHARES = [(0.7, 0.3), (0.9, 0.1), (0.5, 0.3, 0.2), (0.98, 0.01, 0.01)]


def corpus(folder, letter, field="text", count=40):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({field: letter * (7 + 5 * i)}) for i in range(count)]
    (folder / f"{letter}.jsonl").write_text("\n".join(lines))
    return folder / f"{letter}.jsonl"


def config_of(*arguments):
    config = parse_args([])
    config.training.mixture = list(arguments)
    check(config)
    return config


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("lanes", [64, 48, 8, 1])
def test_batches_and_lanes_have_the_shares(shares, lanes):
    class Named:
        name = fingerprint = "x"

    mixture = Mixture([Named()] * len(shares), shares)
    rounds = 8192 // lanes
    picks = np.array([mixture.pick(g % lanes, g // lanes) for g in range(rounds * lanes)])
    counts = np.cumsum(picks[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, len(picks) + 1)[:, None] * shares
    for batch in (8, 64, 512):
        errors = np.diff((counts - wanted)[batch - 1 :: batch], axis=0)
        whole_rounds = lanes == 64 and batch <= 64
        assert np.abs(errors).max() < (1 if whole_rounds else 6)
    by_lane = (picks.reshape(rounds, lanes, 1) == np.arange(len(shares))).cumsum(0)
    drift = by_lane - np.arange(1, rounds + 1)[:, None, None] * np.array(shares)
    assert np.abs(drift).max() < 4


def loader(source, **kwargs):
    options = {"seed": 1, "split": "all", "prefetch": 0, **kwargs}
    return DataLoader(source, ByteTokenizer(), S, N, 1, **options)


def letters(window):
    return {chr(t) for t in window.tokens[0].tolist() if t < 256}


def test_each_source_is_read_as_if_it_were_alone(tmp_path):
    paths = [str(corpus(tmp_path, "a")), str(corpus(tmp_path, "b"))]
    sources = [build_source("x", path) for path in paths]
    mixed = loader(Mixture(sources, [0.75, 0.25]))
    lanes = mixed.state_dict()["num_lanes"]
    alone = [loader(source) for source in sources]
    queues = [
        [[made.next_window().tokens.tolist() for _ in range(lanes)] for _ in range(40)]
        for made in alone
    ]
    turns = Counter()
    for g in range(40 * lanes):
        window = mixed.next_window()
        (letter,) = letters(window)
        source = "ab".index(letter)
        assert window.tokens.tolist() == queues[source][turns[source, g % lanes]][g % lanes]
        turns[source, g % lanes] += 1
    drawn = Counter()
    for (source, _), count in turns.items():
        drawn[source] += count
    assert abs(drawn[0] - 0.75 * 40 * lanes) < 3


def test_other_shares_on_resume_keep_the_places(tmp_path, caplog):
    sources = [build_source("x", str(corpus(tmp_path, letter))) for letter in "ab"]
    before = loader(Mixture(sources, [0.75, 0.25]))
    for _ in range(100):
        before.next_window()
    state = before.state_dict()
    after = loader(Mixture(sources, [0.25, 0.75]))
    with caplog.at_level(logging.WARNING):
        after.load_state_dict(state)
    assert "from window 100 on the sources' shares are [0.25, 0.75]" in caplog.text
    assert after.state_dict()["lanes"] == state["lanes"]
    drawn = Counter(letter for _ in range(640) for letter in letters(after.next_window()))
    assert abs(drawn["a"] - 160) < 8
    with pytest.raises(UserError, match=r"has source .* put back training\.dataset, dataset_path"):
        loader(Mixture(sources[::-1], [0.75, 0.25])).load_state_dict(state)


def test_ranks_may_find_a_mixture_in_other_places_but_agree_on_shares(tmp_path):
    sources = [build_source("x", str(corpus(tmp_path, letter))) for letter in "ab"]
    elsewhere = [build_source("y", str(corpus(tmp_path / "y", letter))) for letter in "ab"]
    identities = [loader(Mixture(x, [0.6, 0.4])).identity for x in (sources, elsewhere)]
    assert identities[0] == identities[1] != loader(Mixture(sources, [0.4, 0.6])).identity
    assert "training.mixture" not in shared_settings(JobConfig())


def test_held_out_documents_are_each_sources_own(tmp_path):
    sources = [build_source("x", str(corpus(tmp_path, letter))) for letter in "ab"]
    mixed = Mixture(sources, [0.8, 0.2])
    options = {"infinite": False, "split": "validation", "validation_fraction": 0.2}
    for world in (1, 2):
        tokens = Counter()
        for rank in range(world):
            for window in loader(mixed, dp_rank=rank, dp_world=world, **options):
                tokens.update(window.tokens[0, :S].tolist())
        alone = Counter()
        for source in sources:
            for window in loader(source, **options):
                alone.update(window.tokens[0, :S].tolist())
        assert {k: tokens[k] for k in (97, 98, 256)} == {k: alone[k] for k in (97, 98, 256)}
        assert tokens[97] and tokens[98]
    first = [letters(w) for w in itertools.islice(loader(mixed, **options), 8)]
    assert {"a"} in first and {"b"} in first  # a pass that is cut short sees both


def test_a_mixture_in_a_file_and_on_the_command_line(tmp_path, caplog):
    first = corpus(tmp_path, "a", "body")
    corpus(tmp_path / "more", "b", "body")
    entries = [f"0.7 {first}", f"0.3 {tmp_path}/more/*.jsonl"]
    config = parse_args(["--training.mixture", ",".join(entries), "--training.text_field", "body"])
    assert config.training.mixture == entries
    (tmp_path / "c.toml").write_text(to_toml(config))
    again = load_toml(tmp_path / "c.toml")
    check(again)
    with caplog.at_level(logging.INFO):
        mixed = source_from_config(again, again.training)
    assert [round(share, 6) for share in mixed.shares] == [0.7, 0.3]
    assert [len(source) for source in mixed.sources] == [40, 40]
    assert mixed.sources[1][0].text == "b" * 7
    assert f"dataset {first}: 70% of the windows" in caplog.text
    config.validation.dataset_path, config.validation.text_field = str(first), "body"
    assert len(source_from_config(config, config.validation)) == 40


def test_a_single_dataset_with_another_text_field(tmp_path):
    config = JobConfig()
    config.training.dataset_path = str(corpus(tmp_path, "a", "body"))
    config.training.text_field = "body"
    assert source_from_config(config, config.training)[1].text == "a" * 12
    config.training.text_field = "text"
    with pytest.raises(UserError, match=r"string 'text'"):
        source_from_config(config, config.training)[1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ["0 python_stdlib", "1 c4"],
            r"training\.mixture: found '0 python_stdlib', expec",
        ),
        (["-0.5 python_stdlib"], r"training\.mixture: found '-0\.5 python_stdlib'"),
        (["nan python_stdlib"], r"training\.mixture: found 'nan python_stdlib'"),
        (["python_stdlib"], r"training\.mixture: found 'python_stdlib'"),
        (["0.5"], r"training\.mixture: found '0\.5'"),
        (["0.5 python_stdlib", "0.2 python_stdlib"], r"weights are 0\.7 in all, expected 1"),
        (
            ["0.5 python_stdlib", "0.5 nowhere"],
            r"'nowhere' is not a dataset here.* as training\.mixture",
        ),
        (["0.5 python_stdlib", "0.5 /nowhere/*.txt"], r"glob match at training\.mixture '/now"),
    ],
)
def test_what_a_mixture_cannot_be(entries, message):
    with pytest.raises(UserError, match=message) as error:
        config = config_of(*entries)
        source_from_config(config, config.training)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("dataset", "c4"), ("dataset_path", "/data")])
def test_one_dataset_and_a_mixture(key, value):
    config = JobConfig()
    config.training.mixture = ["1 python_stdlib"]
    setattr(config.training, key, value)
    message = rf'training\.mixture and training\.{key} = "{value}": both say what to train on'
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_mixture_in_the_place_of_a_recipes_dataset():
    recipe = ["--job.config_file", "finetune_native_mtp.toml", "--training.mixture", "1 c4"]
    config = parse_args([*recipe, "--training.dataset=", "--training.dataset_path="])
    assert config.training.mixture == ["1 c4"] and not config.training.dataset_path

"""scripts/generate.py on a run that was just trained."""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import json
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from transformers import AutoTokenizer

import formats_run
from small_tokenizers import sentencepiece
from torchtitan_mtp.cli.converse import fitted
from torchtitan_mtp.data.tokenizer import ByteTokenizer, HFTokenizer, NoTokenizer
from torchtitan_mtp.inference import Stats, decoding, generate
from torchtitan_mtp.models.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("torchtitan_mtp.cli.generate")


@pytest.fixture
def run(trained_run: Path) -> Path:
    return trained_run


parallel = pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)


@parallel
def test_the_command_of_the_quickstart(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = "--prompt", "def ", "--max_new_tokens", "20", "--speculative", "--compare"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(run), *command])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert not ended.value.code and printed.startswith("def ")
    for word in ("plain", "speculative", "tokens/step", "t+2", "t+3", "identical"):
        assert word in printed


def test_the_text_goes_to_stdout_alone(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("import os\n", encoding="utf-8")
    outputs = []
    for extra in ([], ["--speculative"], ["--speculative", "--num_draft", "1"]):
        arguments = [str(run), "--prompt_file", str(file), "--max_new_tokens", "12", *extra]
        assert script.main(arguments) == 0
        out, err = capsys.readouterr()
        assert out.startswith("import os\n") and "tokens/s" in err and "tokens/s" not in out
        outputs.append(out)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("way", [[], ["--speculative"]])
def test_sampling_depends_on_the_seed(
    script: ModuleType, run: Path, way: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*extra: str) -> str:
        sampled = "--temperature", "1.0", "--top_k", "200", "--top_p", "0.99"
        arguments = [str(run), "--prompt", "x", "--max_new_tokens", "12", *way, *sampled, *extra]
        assert script.main(arguments) == 0
        return str(capsys.readouterr().out)

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")


def test_several_prompts_are_compared_each(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--max_new_tokens", "9", "--compare"
    assert script.main([str(run), "--prompt", "def ", "--prompt", "import os\n", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- 1 of 2\ndef ") and "\n--- 2 of 2\nimport os\n" in out
    assert "for 2 of 2 prompts" in out
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "def "}\n\n{"prompt": "import os\\n", "completion": "x"}\n')
    assert script.main([str(run), "--prompt_file", str(file), *options]) == 0
    texts = out[: out.index("\u250f")]  # before the tables
    assert capsys.readouterr().out.startswith(texts)
    assert script.main([str(run), "--prompt", "def ", *options]) == 0
    alone = capsys.readouterr().out
    assert texts.startswith("--- 1 of 2\n" + alone[: alone.index("\u250f")])


@pytest.mark.parametrize("sampled", [[], ["--temperature", "1"]])
def test_what_is_shown_is_the_text_and_what_was_counted(
    script: ModuleType,
    run: Path,
    tmp_path: Path,
    sampled: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown, generations = [], []

    def seen(*arguments: Any, show: Any = script.show) -> Any:
        shown.append(show(*arguments))
        return shown[-1]

    def generated(*arguments: Any, **options: Any) -> Any:
        generations.append(generate(*arguments, **options))
        return generations[-1]

    monkeypatch.setattr(script, "show", seen)
    monkeypatch.setattr(script, "generate", generated)
    page = tmp_path / "page.html"
    arguments = [str(run), "--prompt", "é ", "--max_new_tokens", "40", "--speculative", *sampled]
    assert script.main(arguments) == 0
    plain = capsys.readouterr().out
    assert script.main([*arguments, "--show", "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    ((spans,), counts, stats) = shown.pop()
    kept = "".join(span.text for span in spans if not span.rejected)
    assert kept + "\n" == plain and stats is generations[-1].stats
    # A single row drafts nothing beyond its end.
    assert [count.tokens for count in counts[1:]] == stats.right
    assert sum(count.tokens for count in counts) == stats.tokens == 40
    drafted = sum(len(step.drafts) for step in generations[-1].steps[0])
    assert sum(count.tokens + count.rejected for count in counts[1:]) == drafted
    assert out.endswith(f"in {stats.steps} steps\n")
    assert f"head 2 (x²): {stats.right[0]}, " in out and f"wrote {page}" in err
    assert f"<title>{stats.tokens_per_step:.2f} tokens a step: " in page.read_text("utf-8")


@parallel
def test_several_texts_and_stop_strings_are_shown(
    script: ModuleType,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(
        script, "show", lambda *a, show=script.show: shown.append(show(*a)) or shown[0]
    )
    arguments = [str(run), "--max_new_tokens", "20", "--prompt", "def ", "--prompt", "import os\n"]
    arguments += ["--speculative", "--stop", "e"]
    assert script.main(arguments) == 0
    plain = capsys.readouterr().out
    page = tmp_path / "page.html"
    assert script.main([*arguments, "--html", str(page)]) == 0
    assert capsys.readouterr().out == plain, "without --show the text stays as it is"
    texts = ["".join(span.text for span in spans if not span.rejected) for spans in shown[0].texts]
    assert plain == "".join(f"--- {i} of 2\n{text}\n" for i, text in enumerate(texts, start=1))
    assert page.read_text("utf-8").count("<pre") == 2


def test_what_is_typed_is_continued_as_one_text(
    script: ModuleType,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def typed(lines: str, *extra: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        arguments = [str(run), "--interactive", "--max_new_tokens", "6", *extra]
        assert script.main(arguments) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    def continued(text: str) -> str:
        assert script.main([str(run), "--prompt", text, "--max_new_tokens", "6"]) == 0
        return str(capsys.readouterr().out).removesuffix("\n")

    first = continued("def ")
    second = continued(first + "\nab")
    fresh = continued("x")
    out, err = typed("def \nab\n\nx\n")
    assert out == f"{first}\n{second[len(first) + 1 :]}\n{fresh}\n"
    assert err.count("tokens/s]") == 3 and "6 tokens, 1.00 tokens/step" in err
    assert typed("def \nab\n\nx\n", "--speculative")[0] == out
    assert typed("") == ("", "")
    # The seed after torch's last is its first.
    sampled = "--temperature", "1", "--seed"
    fresh = typed("x\n", *sampled, "0")[0]
    assert typed("def \n\nx\n", *sampled, str(2**64 - 1))[0].endswith(f"\n{fresh}")


def test_what_is_typed_is_cut_behind_the_prefix(chat: Chat) -> None:
    args, tokenizer = argparse.Namespace(special_tokens=False), ByteTokenizer()
    assert fitted(args, tokenizer, None, "abcdef", 4) == [256, *b"def"]
    assert fitted(args, tokenizer, None, "abc", 4) == [256, *b"abc"]
    tokenizer.prefix = ()
    assert fitted(args, tokenizer, None, "abcdef", 4) == [*b"cdef"]
    # Of a conversation, whole messages.
    own = HFTokenizer(chat.run.parent / "tokenizer" / "tokenizer.json")
    for turns, most in ((TURNS, 100), (TURNS[2:], 30), (TURNS[2:], 1)):
        typed = list(TURNS)
        ids = chat.theirs.apply_chat_template(turns, return_dict=False, add_generation_prompt=True)
        assert fitted(args, own, chat.theirs, typed, most) == ids and typed == turns


@parallel
def test_what_is_typed_must_be_text(
    script: ModuleType,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert script.main([str(run), "--interactive"]) == 1
    expected = "error: --interactive: the input can't be read as utf-8: invalid start byte; "
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("asked", [["--interactive"], ["--chat", "--prompt", "a"]])
def test_a_model_without_a_tokenizer_is_told(
    script: ModuleType,
    asked: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "load_for_inference", lambda *_: (None, NoTokenizer(), None))
    assert script.main(["-", *asked]) == 1
    assert "the model has no tokenizer; name a folder" in capsys.readouterr().err


def test_a_word_keeps_the_space_before_it(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SentencePiece's decoders take the first space of a text for none of it: an answer is no text
    of its own, nor is a second line."""
    tokens = sentencepiece("<unk>", "<s>", "</s>", front="<s>")
    tokens.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    model, config = formats_run.write_run(tmp_path / "run", **formats_run.SMALL)
    words = [i for token, i in tokens.get_vocab().items() if token.startswith("▁")]
    model.output.weight[[i for i in range(320) if i not in words]] = 0
    loaded = model, HFTokenizer(tmp_path / "tokenizer.json"), config
    monkeypatch.setattr(script, "load_for_inference", lambda *_: loaded)
    assert script.main(["-", "--prompt", "cat", "--max_new_tokens", "6"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("cat ")
    assert script.main(["-", "--prompt", f"{whole}the", "--max_new_tokens", "6"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("cat\nthe\n"))
    second = capsys.readouterr().out
    assert script.main(["-", "--interactive", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == second


TEMPLATE = (
    "{% set use = tools[0].name if tools else '' %}{{ bos_token }}"
    "{% for m in messages %}<{{ m['role'] }}{{ use }}>{{ m['content'] | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant{{ use }}>{% endif %}"
)
TURNS = [
    {"role": "user", "content": " the cat"},
    {"role": "assistant", "content": "the"},
    {"role": "user", "content": "</s>cat"},
]
TOOLS = [{"name": "abc"}]


def write_chat_run(place: Path) -> tuple[Any, Path]:
    """A run whose tokenizer has a chat template: its model, and the tokenizer's folder."""
    folder = place / "tokenizer"
    folder.mkdir()
    sentencepiece("<unk>", "<s>", "</s>", front="<s>").save(str(folder / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    changes = formats_run.SMALL | {"model.hf_assets_path": str(folder)}
    model, _ = formats_run.write_run(place / "run", **changes)
    return model, folder


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    """A model, and the ids that transformers gives it for messages, and for a text."""
    model, folder = write_chat_run(tmp_path)
    return Chat(tmp_path / "run", model, AutoTokenizer.from_pretrained(folder))


class Chat(NamedTuple):
    run: Path
    model: Transformer
    theirs: Any

    def answer(self, messages: list[dict[str, str]], **options: Any) -> str:
        options = {"add_generation_prompt": True} | options
        ids = self.theirs.apply_chat_template(messages, return_dict=False, **options)
        return self.continued(ids)

    def continued(self, ids: list[int]) -> str:
        tokens = generate(self.model, [ids], 6, eos_id=2).tokens[0]
        return str(self.theirs.decode([*ids, *tokens], skip_special_tokens=True))[
            len(self.theirs.decode(ids, skip_special_tokens=True)) :
        ]


def test_conversations_in_the_words_of_the_template(
    script: ModuleType,
    chat: Chat,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"messages": TURNS}, {"messages": TURNS[:2]}, {"prompt": " the cat"}]
    lines += [{"prompt": " the cat", "tools": json.dumps(TOOLS)}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(chat.run), "--chat", "--max_new_tokens", "6"]
    assert script.main([*arguments, "--prompt_file", str(file)]) == 0
    begun = {"continue_final_message": True, "add_generation_prompt": False}
    expected = [chat.answer(TURNS), chat.answer(TURNS[:2], **begun), chat.answer(TURNS[:1])]
    expected.append(chat.answer(TURNS[:1], tools=TOOLS))
    assert expected[2] != expected[3]
    marked = "".join(f"--- {i} of 4\n{text}\n" for i, text in enumerate(expected, start=1))
    assert capsys.readouterr().out == marked
    monkeypatch.setattr("sys.stdin", io.StringIO(" the cat\nthe\n\n the cat\n"))
    assert script.main([*arguments, "--interactive"]) == 0
    first = {"role": "assistant", "content": expected[2]}
    second = chat.answer([TURNS[0], first, {"role": "user", "content": "the"}])
    assert capsys.readouterr().out == f"{expected[2]}\n{second}\n{expected[2]}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(" the cat" * 100 + "\n"))
    assert script.main([*arguments, "--interactive"]) == 0
    assert re.search(
        r"^note: \d{3} tokens, the model was trained on ", capsys.readouterr().err, re.M
    )


def test_a_template_lies_in_the_tokenizers_folder(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of Meta's original/tokenizer.model."""
    _, folder = write_chat_run(tmp_path)
    file, prompts = folder / "original" / "tokenizer.model", tmp_path / "prompts.jsonl"
    file.parent.mkdir()
    file.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    formats_run.write_run(
        tmp_path / "run", **formats_run.SMALL, **{"model.hf_assets_path": str(file)}
    )
    prompts.write_text('{"prompt": "a"}\n')
    arguments = [str(tmp_path / "run"), "--chat", "--max_new_tokens", "2"]
    assert script.main([*arguments, "--prompt", "a"]) == 0, capsys.readouterr().err
    arguments += ["--prompt_file", str(prompts), "--output", str(tmp_path / "answers.jsonl")]
    assert script.main(arguments) == 0, capsys.readouterr().err


def test_special_tokens_are_text_unless_asked_for(
    script: ModuleType, chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<s>the</s> cat"
    found = []
    for options in ([], ["--special_tokens"]):
        arguments = [str(chat.run), "--max_new_tokens", "6", "--prompt", text, *options]
        assert script.main(arguments) == 0
        found.append(capsys.readouterr().out)
    plain, special = found
    assert plain.startswith(text)
    ids = chat.theirs.encode(text, add_special_tokens=False)
    shown = chat.theirs.decode(ids, skip_special_tokens=True)
    assert special == f"{shown}{chat.continued(ids)}\n"


@parallel
def test_a_model_without_a_template_is_told(
    script: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(run), "--chat", "--prompt", "a"]) == 1
    err = capsys.readouterr().err
    assert "tokenizer byte: no chat template" in err and err.count("\n") == 1


@pytest.mark.parametrize("way", [[], ["--speculative", "--compare"]])
def test_a_stop_string_ends_the_text(
    script: ModuleType,
    run: Path,
    way: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(run), "--max_new_tokens", "20"]
    assert script.main([*arguments, "--prompt", "def "]) == 0
    whole = capsys.readouterr().out[len("def ") :]
    stop = whole[9:12]
    ended = "def " + whole[: whole.find(stop)] + "\n"
    assert script.main([*arguments, "--prompt", "def ", "--stop", "@@", "--stop", stop, *way]) == 0
    assert capsys.readouterr().out.startswith(ended + "\u250f" if way else ended)
    monkeypatch.setattr("sys.stdin", io.StringIO("def \n"))
    assert script.main([*arguments, "--interactive", "--stop", stop, *way[:1]]) == 0
    assert capsys.readouterr().out == ended


def test_a_head_that_was_never_compared_has_no_rate(script: ModuleType) -> None:
    stats = Stats(checked=[3, 0], right=[0, 0], drafted=[3, 2], agreed=[0, 2])
    console = Console(width=100, file=io.StringIO())
    console.print(script.acceptance_table(stats))
    rows = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (third,) = (row for row in rows if "t+3" in row)
    assert "never compared" in third and "100.0% of 2" in third


@parallel
def test_one_token_has_no_speed(
    script: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(run), "--prompt", "a", "--max_new_tokens", "1", "--compare"]) == 0
    assert "identical" in capsys.readouterr().out


@parallel
def test_what_is_timed_is_compiled_before(
    script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of 256 and of 128 positions are two compilations."""
    lengths: list[int] = []
    monkeypatch.setattr(decoding, "_compiled", lambda step: step)
    plan = decoding.Decoder.plan
    monkeypatch.setattr(
        decoding.Decoder,
        "plan",
        lambda decoder, count: lengths.append(decoder.positions.max_len) or plan(decoder, count),
    )
    assert script.main([str(run), "--prompt", "a", "--max_new_tokens", "140", "--compile"]) == 0
    assert set(lengths) == {256}


@parallel
def test_samples_are_not_judged_by_the_margin(
    script: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--max_new_tokens", "20", "--temperature", "2", "--compare"
    assert script.main([str(run), "--prompt", "def ", *options]) == 0
    assert "two samples of one distribution" in capsys.readouterr().out


@parallel
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt: can't be read"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens = 0"),
        (["--prompt", "a", "--max_new_tokens", str(10**18)], f"{10**18} for 1 prompt(s): needs "),
        (["--interactive", "--max_new_tokens", str(10**12)], f"{10**12}: needs "),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0"),
        (["--prompt", "a", "--temperature", "1", "--seed", str(10**30)], f"seed = {10**30}: "),
        (["--prompt", "a", "--speculative", "--num_draft", "9"], "num_draft = 9"),
        (["--prompt", "a", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--device", "teapot"], "--device teapot"),
        (["--prompt", "a", "--device", "meta"], "--device meta: can't be used: it has no numbers"),
        (["--interactive", "--compare"], "--interactive goes without --compare"),
        (["--interactive", "--speculative", "--num_draft", "9"], "num_draft = 9"),
        (["--interactive", "--max_new_tokens", "-5"], "max_new_tokens = -5"),
        (["--prompt", "a", "--stop", ""], "--stop: the text is empty"),
        (["--prompt", "a", "--num_draft", "1"], "--num_draft: needs --speculative"),
        (["--prompt", "a", "--show"], "--show: needs --speculative"),
        (["--prompt", "a", "--html", "a.html"], "--html: needs --speculative"),
        (["--interactive", "--speculative", "--show"], "--show goes without --interactive"),
    ],
)
def test_errors_are_one_line(
    script: ModuleType,
    run: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main([str(run), *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


DEEP = '{"prompt": ' + "[" * 100_000


def test_a_byte_order_mark_is_no_part_of_a_prompt(script: ModuleType, tmp_path: Path) -> None:
    """As editors on Windows begin a file."""
    for name, text in (("a.jsonl", '{"prompt": "def"}\n'), ("a.txt", "def")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        arguments = script.parse_arguments(["x", "--prompt_file", str(tmp_path / name)])
        assert script.read_prompts(arguments) == ["def"]


NO_MESSAGES = ['{"messages": 3}', '{"messages": [{"role": "user"}]}', '{"messages": ["a"]}']


@pytest.mark.parametrize(
    ("line", "options"),
    [
        *[(line, []) for line in ("import os", '{"text": "a"}', "[1]", '{"prompt": 3}', DEEP)],
        ('{"prompt": ""}', []),
        ('{"messages": []}', ["--chat"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', []),
        *[(line, ["--chat"]) for line in NO_MESSAGES],
    ],
)
def test_a_line_that_is_no_record_is_named(
    script: ModuleType,
    tmp_path: Path,
    line: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert script.main([str(tmp_path), "--prompt_file", str(file), *options]) == 1
    assert f"{file}:2: expected " in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path / "none"), "--prompt", "a"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_difference_is_judged_by_the_margin(script: ModuleType) -> None:
    import torch

    from torchtitan_mtp.models.args import ModelArgs
    from torchtitan_mtp.models.transformer import build_model

    model = build_model(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=5, multiple_of=8))
    model.to_empty(device="cpu")
    model.init_buffers()
    with torch.no_grad():
        for param in model.parameters():
            torch.nn.init.normal_(param)
        model.output.weight[1] = model.output.weight[0]  # tokens 0 and 1 tie everywhere
    assert script.comparison(model, [1], [3, 4], [3, 4], True).startswith("identical")
    different = script.comparison(model, [1], [3, 4], [3, 2], False)
    assert different.startswith("different from new token 2 on: two samples")
    with torch.no_grad():
        model.output.weight.zero_()
    assert "a tie in float32" in script.comparison(model, [1], [3, 4], [3, 2], True)
    with torch.no_grad():
        model.output.weight[0, 0], model.output.weight[1, 0] = 5.0, -5.0
    assert "more than rounding explains" in script.comparison(model, [1], [3], [2], True)

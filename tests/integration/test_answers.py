"""scripts/generate.py --output: a model's own answers, to train heads on."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import config_of, train
from test_generate import TOOLS, TURNS, write_chat_run
from torchtitan_mtp.cli import answers
from torchtitan_mtp.cli.generate import main
from torchtitan_mtp.data.document import Document
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.inference import generate, load_for_inference

PROMPTS = ["def ", "x", "import os\nimport ", 'a "quoted" \u00e9', "x", "for i in "]
SAMPLED = ["--temperature", "1", "--seed", "3"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n\n" for text in PROMPTS))
    return file


def written(run: Path, prompts: Path, name: str, *options: str) -> Path:
    file = prompts.with_name(f"{name}.jsonl")
    arguments = [str(run), "--prompt_file", str(prompts), "--output", str(file)]
    assert main([*arguments, "--max_new_tokens", "7", *options]) == 0
    return file


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("way", [[], ["--speculative"]], ids=["plain", "drafts"])
def test_answers_are_those_of_each_prompt_alone(
    trained_run: Path, prompts: Path, way: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(trained_run, prompts, "answers", "--batch_size", "4", *way)
    assert "answered 6 of 6" in capsys.readouterr().err
    model, tokenizer, _ = load_for_inference(trained_run)
    expected = []
    for text in PROMPTS:
        ids = [tokenizer.bos_id, *text.encode()]
        (new,) = generate(model, [ids], 7, eos_id=tokenizer.eos_ids).tokens
        ended = "stop" if new[-1] == tokenizer.eos_id else "length"
        answer = {"prompt": text, "completion": tokenizer.decode(new), "tokens": len(new)}
        expected.append(answer | {"finish_reason": ended})
    assert records(file) == expected


@pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)
def test_a_stop_string_ends_an_answer(trained_run: Path, prompts: Path) -> None:
    whole = records(written(trained_run, prompts, "whole"))
    stop = whole[0]["completion"][3:5]
    ended = records(written(trained_run, prompts, "ended", "--stop", stop))
    for one, other in zip(whole, ended, strict=True):
        text, found, _ = one["completion"].partition(stop)
        assert other["completion"] == text
        assert other["finish_reason"] == ("stop" if found else one["finish_reason"])
    assert ended[0]["tokens"] == whole[0]["completion"].index(stop) + 2


@pytest.mark.parametrize("trained_run", ["sequential"], indirect=True)
@pytest.mark.parametrize("way", [[], [*SAMPLED, "--speculative"]], ids=["greedy", "sampled"])
def test_whatever_a_kill_leaves_is_gone_on_with_to_the_same_bytes(
    trained_run: Path, prompts: Path, way: list[str]
) -> None:
    """A killed program leaves the beginning of the file, up to any byte."""
    options = "--batch_size", "3", *way
    whole = written(trained_run, prompts, "whole", *options).read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 6
    part = prompts.with_name("part.jsonl")
    third = sum(map(len, lines[:3]))
    for size in (0, 5, len(lines[0]) - 1, len(lines[0]), third - 2, third, len(whole) - 1):
        part.write_bytes(whole[:size])
        assert written(trained_run, prompts, "part", *options).read_bytes() == whole


@pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)
def test_each_batch_is_written_when_it_is_done(
    trained_run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(trained_run, prompts, "whole", "--batch_size", "2").read_bytes()
    calls: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(answers, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(trained_run, prompts, "part", "--batch_size", "2")
    part = prompts.with_name("part.jsonl")
    assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    calls[:] = [0] * 3
    assert written(trained_run, prompts, "part", "--batch_size", "2").read_bytes() == whole
    assert calls == [0, 0, 0, 2]  # what was there isn't answered again
    monkeypatch.setattr(answers, "generate", None)
    assert written(trained_run, prompts, "part", "--batch_size", "2").read_bytes() == whole


@pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)
def test_a_sample_depends_on_its_own_prompt_and_place(trained_run: Path, prompts: Path) -> None:
    one = records(written(trained_run, prompts, "one", "--batch_size", "1", *SAMPLED))
    four = records(written(trained_run, prompts, "four", "--batch_size", "4", *SAMPLED))
    assert one == four
    assert one[1]["prompt"] == one[4]["prompt"] and one[1] != one[4]
    other = written(trained_run, prompts, "other", *SAMPLED[:3], "4")
    assert records(other)[0] != one[0]


@pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)
def test_a_training_reads_them_back(trained_run: Path, prompts: Path, tmp_path: Path) -> None:
    file = written(trained_run, prompts, "answers", "--max_new_tokens", "40")
    source = build_source("own", str(file))
    said = [Document(r["completion"], r["prompt"]) for r in records(file)]
    assert [source[i] for i in range(len(source))] == said
    keys = {"training.dataset": "own", "training.dataset_path": str(file), "training.steps": 2}
    losses = torch.tensor(train(config_of(tmp_path / "run", keys)).losses)
    assert losses.shape == (2, 3) and losses.isfinite().all()


def test_conversations(tmp_path: Path) -> None:
    _, folder = write_chat_run(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"messages": TURNS, "tools": json.dumps(TOOLS)}, {"messages": TURNS[:2]}]
    lines += [{"prompt": " the cat"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = written(tmp_path / "run", prompts, "answers", "--chat")
    whole, found = file.read_bytes(), records(file)
    asked = [[*TURNS, {"role": "assistant", "content": ""}], TURNS[:2], TURNS[:1]]
    asked[2] = [*asked[2], {"role": "assistant", "content": ""}]
    for given, answer in zip(asked, found, strict=True):
        *before, last = answer["messages"]
        assert before == given[:-1] and last["role"] == "assistant"
        assert last["content"].startswith(given[-1]["content"])
        assert len(last["content"]) > len(given[-1]["content"])
    assert [answer.get("tools") for answer in found] == [TOOLS, None, None]
    for size in (len(whole) - 3, whole.index(b"\n") + 30):
        file.write_bytes(whole[:size])
        assert written(tmp_path / "run", prompts, "answers", "--chat").read_bytes() == whole
    keys = {"training.dataset": "own", "training.dataset_path": str(file), "training.steps": 2}
    keys |= {"model.hf_assets_path": str(folder), "training.seq_len": 64}
    losses = torch.tensor(train(config_of(tmp_path / "trained", keys)).losses)
    assert losses.shape == (2, 3) and losses.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a.jsonl", "--prompt", "x"], "--output: answers a --prompt_file FILE.jsonl"),
        (["--output", "a.jsonl", "--interactive"], "--output: answers a --prompt_file FILE.jsonl"),
        (["--output", "a.jsonl", "P", "--compare"], "--output: answers a --prompt_file FILE.jsonl"),
        (["--output", "a.jsonl", "--prompt_file", "p.txt"], "--output: answers a --prompt_file"),
        (["--output", "a.jsonl", "P", "--special_tokens"], "goes without --special_tokens"),
        (["--output", "a.txt", "P"], "--output a.txt: expected FILE.jsonl"),
        (["--output", "a.jsonl", "P", "--batch_size", "0"], "--batch_size 0: expected 1 or more"),
        (["P", "--batch_size", "2"], "--batch_size: needs --output"),
        (["--output", "none/a.jsonl", "P"], "--output none/a.jsonl: can't be written: No such"),
        (["--output", "full.jsonl", "P"], "--output full.jsonl: expected a file, found a folder"),
        (["--output", "a.jsonl", "P", "--top_p", "2", "--temperature", "1"], "top_p = 2.0"),
        (["--output", "a.jsonl", "P", "--max_new_tokens", "0"], "max_new_tokens = 0"),
        (["--output", "a.jsonl", "P", "--num_draft", "9", "--speculative"], "num_draft = 9"),
    ],
)
@pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)
def test_errors_are_one_line(
    trained_run: Path,
    prompts: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(prompts.parent)
    Path("full.jsonl").symlink_to("/dev/full")
    given = [x for a in arguments for x in (["--prompt_file", prompts.name] if a == "P" else [a])]
    assert main([str(trained_run), *given]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


LINE = json.dumps({"prompt": "def ", "completion": "a"}) + "\n"


@pytest.mark.parametrize(
    ("content", "number", "expected"),
    [
        ("notes\n", 1, "an answer to prompt 1"),
        ("notes", 1, "an answer to prompt 1"),
        (LINE + '{"prompt": "y", "completion": "a"}\n', 2, "an answer to prompt 2"),
        (LINE + LINE[:-3] + "\n", 2, "an answer to prompt 2"),  # no JSON
        (LINE + '{"prompt": "x"', 2, "an answer to prompt 2"),
        (LINE + "\n", 2, "an answer to prompt 2"),
        (LINE * 2, 2, "at most 1 lines"),
        (LINE + "{", 2, "at most 1 lines"),
    ],
)
def test_what_is_no_output_of_these_prompts_stays_as_it_is(
    tmp_path: Path, content: str, number: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "mine.jsonl"
    lines = ["def "] if expected.startswith("at most") else ["def ", "xy"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in lines))
    file.write_text(content)
    arguments = ["no model is loaded", "--prompt_file", str(prompts), "--output", str(file)]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert f"{file}:{number}: expected {expected}" in err and err.count("\n") == 1
    assert file.read_text() == content


def test_one_process_writes_to_a_file(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    with open(file, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(["none", "--prompt_file", str(prompts), "--output", str(file)]) == 1
    assert f"--output {file}: another process writes to it" in capsys.readouterr().err


@pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(
    trained_run: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = written(trained_run, prompts, "whole").read_bytes()
    write = answers.os.write
    left = [100]  # bytes on the disk

    def limited(file: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        left[0] -= (count := write(file, data[: left[0]]))
        return count

    monkeypatch.setattr(answers.os, "write", limited)
    part = prompts.with_name("part.jsonl")
    arguments = [str(trained_run), "--prompt_file", str(prompts), "--output", str(part)]
    assert main([*arguments, "--max_new_tokens", "7"]) == 1
    assert f"--output {part}: can't be written: No space left" in capsys.readouterr().err
    assert part.read_bytes() == whole[:100]
    left[0] = 1 << 20
    assert written(trained_run, prompts, "part").read_bytes() == whole

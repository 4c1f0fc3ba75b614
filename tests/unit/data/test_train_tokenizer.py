import sys

import pytest

from torchtitan_mtp.cli import train_tokenizer
from torchtitan_mtp.data.tokenizer import build_tokenizer

TEXT = "the cat sat on the mat, then the rat ate the cat's hat 1234 naïve 漢字\n\n    again\n" * 20


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *map(str, arguments)])
        train_tokenizer.main()

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_writes_a_tokenizer_that_reads_back(run, text, tmp_path, capsys):
    output = tmp_path / "new" / "small.tiktoken"
    run("--source", text, "--vocab_size", 300, "--output", output)
    printed = capsys.readouterr().out
    assert f"wrote {output}: vocabulary 300" in printed
    tokenizer = build_tokenizer(str(output.parent))
    assert tokenizer.vocab_size == 300
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert f"{len(TEXT.encode()) / len(ids):.3f} bytes per token in {len(ids)} tokens" in printed
    assert len(ids) < len(TEXT.encode()) / 2
    assert len(tokenizer.encode(" the")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size", 200], "--vocab_size 200: .* at least 258"),
        (["--vocab_size", 10**18], f"--vocab_size {10**18}: needs .* lower it"),
        (["--vocab_size", 9999], "--vocab_size 9999: the text of .* only makes"),
        (["--vocab_size", 300, "--source", "c4_test"], "'c4_test' is not a dataset here"),
        (["--vocab_size", 300, "--output", "/dev/null/x"], "can't be written"),
    ],
)
def test_errors_are_one_line_and_a_status(run, text, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run("--source", text, "--output", tmp_path / "x.tiktoken", *arguments)


def test_a_source_without_text_writes_nothing(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 2)
    output = tmp_path / "x.tiktoken"
    with pytest.raises(SystemExit, match=r"^error: --source .*a\.jsonl: no document has any text$"):
        run("--source", tmp_path / "a.jsonl", "--vocab_size", 258, "--output", output)
    assert not output.exists()


def test_text_that_is_not_read_back_has_no_ratio(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n' * 64)  # 128, every 2nd read
    run("--source", tmp_path / "a.jsonl", "--vocab_size", 258, "--output", tmp_path / "x.tiktoken")
    told = capsys.readouterr().out
    assert told.startswith("wrote ") and "per token" not in told


def test_conversations_are_no_text(run, tmp_path):
    talk = '{"messages": [{"role": "assistant", "content": "a"}]}'
    (tmp_path / "a.jsonl").write_text(talk)
    options = ["--vocab_size", 300, "--output", tmp_path / "x.tiktoken"]
    with pytest.raises(SystemExit, match=r"^error: --source .*a\.jsonl: conversations"):
        run("--source", tmp_path / "a.jsonl", *options)

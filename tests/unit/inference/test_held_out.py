"""Which documents an evaluation takes, and what it makes of their text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import formats_run
from torchtitan_mtp.config import JobConfig, load_toml
from torchtitan_mtp.data.sources import find_source
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.training import config_of_hf
from torchtitan_mtp.inference.held_out import WHOLE, Text, find_text

BYTES = ByteTokenizer()
TEXTS = ["".join(chr(33 + (7 * i + j) % 90) for j in range(20 + 3 * i)) for i in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture
def run(corpus: Path) -> JobConfig:
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "corpus", str(corpus)
    config.training.seed, config.training.validation_fraction = 3, 0.3
    config.validation.enable = True
    return config


def documents(text: Text) -> list[str]:
    """What one pass over the windows reads, document by document."""
    tokens = []
    for window in text.windows(BYTES, 1, 16, 2):
        for row, ids in zip(window.tokens, window.doc_ids, strict=True):
            tokens += row[:16][ids[:16] >= 0].tolist()
    pieces = "".join("|" if t == BYTES.bos_id else BYTES.decode([t]) for t in tokens)
    return pieces.split("|")[1:]


def test_by_default_what_the_run_held_out(
    run: JobConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = documents(find_text(run, None))
    assert 3 < len(held_out) < 25 and set(held_out) < set(TEXTS)
    # Named, however it is spelled, the source of the training is no other text.
    monkeypatch.chdir(corpus.parent)
    (corpus.parent / "link").symlink_to(corpus)
    for name in (str(corpus), "corpus.jsonl", "./corpus.jsonl", "link"):
        assert documents(find_text(run, name)) == held_out
    run.training.dataset_path = "*.jsonl"
    assert documents(find_text(run, f"{corpus.parent}/*.jsonl")) == held_out
    # With a path the dataset's name is a label, and what has that name another text.
    run.training.dataset, run.training.dataset_path = "python_stdlib", str(corpus)
    assert find_text(run, "python_stdlib").about == "python_stdlib"
    assert len(find_text(run, "python_stdlib").source.sizes()) > len(TEXTS)
    run.training.seed = 4
    assert documents(find_text(run, None)) != held_out
    assert "held out" in find_text(run, None).about


def test_skipped_records_are_not_evaluated(run: JobConfig, corpus: Path) -> None:
    whole = documents(find_text(run, None))
    corpus.write_text(corpus.read_text().replace(json.dumps(whole[1]), "1"))
    run.training.bad_records = "skip"
    text, left = find_text(run, None), [whole[0], *whole[2:]]
    assert documents(text) == left
    assert text.prompts(BYTES, len(whole), 1000) == [BYTES.prompt(x) for x in left]


def test_a_run_on_a_mixture_held_something_out_of_each(run: JobConfig, corpus: Path) -> None:
    alone = documents(find_text(run, None))
    other = corpus.with_name("other.jsonl")
    other.write_text(corpus.read_text().replace('"text": "', '"text": "-'))
    run.training.dataset, run.training.dataset_path = JobConfig().training.dataset, None
    run.training.mixture = [f"0.6 {corpus}", f"0.4 {other}"]
    spelled = f"{corpus.parent}/./{corpus.name}"
    assert documents(find_text(run, str(corpus))) == documents(find_text(run, spelled)) == alone
    text = find_text(run, None)
    held_out = documents(text)  # in turn: of the same numbers of documents, the same ones
    assert [piece for piece in held_out if not piece.startswith("-")] == alone
    assert [piece[1:] for piece in held_out if piece.startswith("-")] == alone
    assert held_out[0] == alone[0] and held_out[1] == "-" + alone[0]
    assert str(corpus) in text.about and str(other) in text.about
    assert len(text.prompts(BYTES, 4, 12)) == 4


def test_any_other_source_is_taken_whole(run: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "other" / name).write_text(name)
    for name in ("other", "other/*.txt"):
        text = find_text(run, str(tmp_path / name))
        assert documents(text) == ["a.txt", "b.txt"] and text.about == str(tmp_path / name)


def test_a_run_with_a_validation_set_of_its_own(run: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("validation")
    run.validation.dataset_path = str(tmp_path / "validation.txt")
    assert documents(find_text(run, None)) == ["validation"]
    # The training text was then trained on, all of it.
    assert "trained on" in find_text(run, str(run.training.dataset_path)).about


def test_a_run_without_validation_held_nothing_out(run: JobConfig) -> None:
    run.validation.enable = False
    text = find_text(run, None)
    assert documents(text) == TEXTS and "trained on" in text.about


def test_without_the_seed_nobody_knows(run: JobConfig) -> None:
    run.training.seed = None
    for run.validation.enable in (True, False):
        with pytest.raises(UserError, match=r"--source: .*training\.seed"):
            find_text(run, None)
    with pytest.raises(UserError, match="not a dataset"):
        find_text(run, "nowhere")


def test_an_imported_model_trained_on_nothing_that_is_known(tmp_path: Path) -> None:
    """Its config.toml has the defaults of every run, the training's data set among them."""
    formats_run.write_run(tmp_path / "run", **formats_run.SMALL)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "llama_hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "imported", "llama_hf")
    for config in (load_toml(tmp_path / "imported" / "config.toml"), config_of_hf(tmp_path / "hf")):
        default = config.training.dataset
        assert find_text(config, default).about == default
        with pytest.raises(UserError, match=r"--source: .*imported"):
            find_text(config, None)


def test_prompts_are_from_the_middle_of_documents_all_over_the_text(run: JobConfig) -> None:
    run.validation.enable = False
    text = find_text(run, None)
    prompts = [BYTES.decode(prompt) for prompt in text.prompts(BYTES, 10, 12)]
    assert len(prompts) == 10 and all(len(prompt) == 12 for prompt in prompts)
    for i, prompt in enumerate(prompts):
        whole = TEXTS[4 * i]
        assert prompt == whole[(len(whole) + 1 - 12) // 2 - 1 :][:12]
    many = text.prompts(BYTES, 100, 12)  # two or three of each
    assert len(many) == 100 and len({tuple(prompt) for prompt in many}) > 40
    assert BYTES.decode(many[-1]) == TEXTS[-1][(len(TEXTS[-1]) + 1 - 12) * 3 // 4 - 1 :][:12]
    assert len(text.prompts(BYTES, 100, 1000)) == 40  # a whole document is there once
    (short,) = text.prompts(BYTES, 1, 100)
    assert short == [BYTES.bos_id, *BYTES.encode(TEXTS[0]).tolist()]


def test_a_text_without_a_token_gives_no_prompt(corpus: Path) -> None:
    corpus.write_text('{"text": ""}\n{"text": "ab"}\n')
    tokenizer = ByteTokenizer()
    tokenizer.prefix = ()
    text = Text(find_source(str(corpus)), WHOLE, "corpus")
    assert text.prompts(tokenizer, 2, 8) == [[97, 98]]
    with pytest.raises(UserError, match=r"corpus: not a token in 1 document.* --prompts"):
        text.prompts(tokenizer, 1, 8)

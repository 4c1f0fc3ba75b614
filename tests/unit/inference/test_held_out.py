"""Which documents an evaluation takes, and what it makes of their text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.small import small_model
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.data.targets import IGNORE, Window, make_batch
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.held_out import Text, count_bytes, find_text, measure_text
from torchtitan_mtp.models.transformer import Transformer

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


def test_by_default_what_the_run_held_out(run: JobConfig, corpus: Path) -> None:
    held_out = documents(find_text(run, None))
    assert 3 < len(held_out) < 25 and set(held_out) < set(TEXTS)
    # Named, the source of the training is no other text.
    for name in (str(corpus), "corpus"):
        assert documents(find_text(run, name)) == held_out
    run.training.seed = 4
    assert documents(find_text(run, None)) != held_out
    assert "held out" in find_text(run, None).about


def test_a_run_on_a_mixture_held_something_out_of_each(run: JobConfig, corpus: Path) -> None:
    alone = documents(find_text(run, None))
    other = corpus.with_name("other.jsonl")
    other.write_text(corpus.read_text().replace('"text": "', '"text": "-'))
    run.training.dataset, run.training.dataset_path = JobConfig().training.dataset, None
    run.training.mixture = [f"0.6 {corpus}", f"0.4 {other}"]
    assert documents(find_text(run, str(corpus))) == alone
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
    assert "trained on" in find_text(run, "corpus").about


def test_a_run_without_validation_held_nothing_out(run: JobConfig) -> None:
    run.validation.enable = False
    text = find_text(run, None)
    assert documents(text) == TEXTS and "trained on" in text.about


def test_without_the_seed_nobody_knows(run: JobConfig) -> None:
    run.training.seed = None
    with pytest.raises(UserError, match=r"training\.seed.*--source"):
        find_text(run, None)
    with pytest.raises(UserError, match="not a dataset"):
        find_text(run, "nowhere")


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


def test_bytes_are_counted_document_by_document() -> None:
    text, other = list("né€".encode()), list(b"abc")
    labels = torch.tensor([*text, BYTES.eos_id, IGNORE, *other, BYTES.eos_id, IGNORE, IGNORE])
    assert count_bytes(labels, BYTES) == 6 + 3
    assert count_bytes(torch.tensor([IGNORE]), BYTES) == 0


def naive_losses(model: Transformer, texts: list[str], seq_len: int, n: int) -> list[list[float]]:
    """Every head's loss at every target, in windows of the stream of documents."""
    stream = [t for text in texts for t in [BYTES.bos_id, *text.encode(), BYTES.eos_id]]
    ids = [i for i, text in enumerate(texts) for _ in range(len(text.encode()) + 2)]
    losses: list[list[float]] = [[] for _ in range(n)]
    for start in range(0, len(stream) - 1, seq_len):
        width = seq_len + n
        row = torch.tensor((stream[start:] + [0] * width)[:width]).unsqueeze(0)
        doc = torch.tensor((ids[start:] + [-1] * width)[:width]).unsqueeze(0)
        batch = make_batch(Window(row, doc), n)
        for k, h in enumerate(model(batch)):
            logits = 5.0 * torch.tanh(model.output(h)[0] / 5.0)
            labels = batch.labels[0, :, k]
            found = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
            losses[k] += found[labels != IGNORE].tolist()
    return losses


@pytest.mark.parametrize("heads", ["parallel", "sequential", None])
def test_losses_and_bits_per_byte(heads: str | None, tmp_path: Path) -> None:
    texts = ["ein Text über €", "b", "and a third one, which is longer than a window"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    mtp = None
    if heads is not None:
        mtp = MTP(num_future_tokens=3)
        mtp.heads = "sequential" if heads == "sequential" else "parallel"
    model = small_model(mtp, vocab_size=259).requires_grad_(False)
    text, n = find_text(JobConfig(), str(tmp_path)), 1 if mtp is None else 3
    found = measure_text(model, text.windows(BYTES, n, 12, 2), BYTES, softcap=5.0)
    expected = naive_losses(model, texts, 12, n)
    assert found.targets == [len(part) for part in expected]
    assert found.losses == pytest.approx([sum(part) / len(part) for part in expected], rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found.num_bytes == num_bytes
    assert found.bits_per_byte == pytest.approx(sum(expected[0]) / math.log(2) / num_bytes)
    assert len(found.acceptance.drafted) == n - 1
    first = measure_text(model, text.windows(BYTES, n, 12, 2), BYTES, batches=1)
    assert first.targets[0] < 24 < found.targets[0]


def test_a_text_without_windows_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        measure_text(small_model(), [], BYTES)

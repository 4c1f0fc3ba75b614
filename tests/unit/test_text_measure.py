"""What is measured on a text: losses, bits per byte, the bytes themselves."""

from __future__ import annotations

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
from torchtitan_mtp.inference.held_out import find_text
from torchtitan_mtp.models.transformer import Transformer
from torchtitan_mtp.validation import count_bytes, evaluate_windows

BYTES = ByteTokenizer()


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
    found = evaluate_windows(model, text.windows(BYTES, n, 12, 2), BYTES, softcap=5.0)
    expected = naive_losses(model, texts, 12, n)
    assert found.targets == [len(part) for part in expected]
    assert found.losses == pytest.approx([sum(part) / len(part) for part in expected], rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found.num_bytes == num_bytes
    assert found.bits_per_byte == pytest.approx(sum(expected[0]) / math.log(2) / num_bytes)
    assert len(found.acceptance.drafted) == n - 1
    first = evaluate_windows(model, text.windows(BYTES, n, 12, 2), BYTES, batches=1)
    assert first.targets[0] < 24 < found.targets[0]


def test_a_text_without_windows_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        evaluate_windows(small_model(), [], BYTES)

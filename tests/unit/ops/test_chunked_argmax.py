"""`chunked_argmax` against the arg max of whole logits."""

from __future__ import annotations

import pytest
import torch

from torchtitan_mtp.ops import chunked, chunked_argmax


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_whole_logits(chunk_rows: int | None, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(53, 8, dtype=dtype), torch.randn(31, 8, dtype=dtype)
    found = chunked_argmax(hidden, weight, chunk_rows)
    assert found.dtype == torch.int64
    assert torch.equal(found, (hidden @ weight.T).argmax(1))


def test_half_precision_is_judged_by_unrounded_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits 256 and 257 are one number in bfloat16, and two here, unless the CPU multiplies in
    bfloat16, which rounds them."""
    monkeypatch.setattr(chunked, "_cpu_multiplies", lambda dtype: False)
    hidden = torch.ones(3, 2, dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, 0.0], [256.0, 1.0], [0.0, 0.0]]).bfloat16()
    assert chunked_argmax(hidden, weight).tolist() == [1, 1, 1]
    assert (hidden @ weight.T).argmax(1).tolist() == [0, 0, 0]


def test_under_autocast_it_takes_the_dtype_of_the_loss() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_argmax(hidden, weight)
    assert torch.equal(found, (hidden @ weight.T).argmax(1))


def test_no_rows_and_no_gradient() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    found = chunked_argmax(hidden, weight)
    assert found.shape == (0,) and not found.requires_grad


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    empty = torch.empty

    def counting(*size: int, **options: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*size, **options)  # type: ignore[call-overload]
        seen.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    chunked_argmax(torch.randn(1000, 4), torch.randn(50, 4), chunk_rows=10)
    assert max(seen) == 1000  # [1000] tokens, and 10 * 50 logits

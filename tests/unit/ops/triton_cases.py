"""Cases of the loss by Triton's passes and their right values; a program that runs them in Triton's
interpreter, which has to be chosen before Triton is imported:

    TRITON_INTERPRET=1 python triton_cases.py OUT
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from loss_inputs import IGNORE, OPTIONS
from torch import Tensor

from tests.naive_loss import naive_loss
from torchtitan_mtp.ops import LossOptions, accumulation_dtype, chunked, head_loss_and_grad
from torchtitan_mtp.ops.soft_targets import TARGET_LOSSES

VOCABS = (1, 7, 512, 1000, 32000, 128256)
# Inputs, products, bfloat16 logits.
DTYPES = [
    (torch.float64, torch.float64, False),
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float16, torch.float16, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.bfloat16, torch.float32, True),
]
MOST = [DTYPES[1], DTYPES[2], DTYPES[4]]  # at every size
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


class Case(NamedTuple):
    vocab: int = 1000
    dtypes: tuple[torch.dtype, torch.dtype, bool] = DTYPES[1]
    options: dict[str, Any] = OPTIONS[0]
    weighted: bool = False
    ignored: bool = False  # every row
    filled: float | None = None  # two logits of each row
    need_grad: bool = True
    target_loss: str | None = None  # against a teacher


def cases() -> Iterator[Case]:
    options = itertools.cycle(OPTIONS)
    for vocab, dtypes in itertools.product(VOCABS, DTYPES):
        if vocab == 1000 or dtypes in MOST:
            yield Case(vocab, dtypes, next(options), weighted=vocab % 3 == 1)
    for some in OPTIONS:
        yield Case(1000, DTYPES[0], some, weighted=True)
    yield Case(1000, DTYPES[0], OPTIONS[-1], need_grad=False)
    for kind in TARGET_LOSSES:
        yield Case(1000, DTYPES[0], OPTIONS[0], target_loss=kind)
        yield Case(1000, DTYPES[0], OPTIONS[0], need_grad=False, target_loss=kind)
        yield Case(7, DTYPES[0], OPTIONS[-1], weighted=True, target_loss=kind)
        yield Case(32000, DTYPES[2], next(options), target_loss=kind)
    yield Case(5001, DTYPES[2], OPTIONS[-1], target_loss="kl")  # rows of no whole 16 elements
    yield Case(ignored=True)
    yield Case(ignored=True, target_loss="lk")
    for value in NOT_FINITE:
        yield Case(filled=value)


def inputs(case: Case) -> dict[str, Any]:
    """Arguments of `head_loss_and_grad`: hidden states that are unit vectors, so that the weight's
    rows are logits and its gradient the logits'. Of 5 rows one is ignored, one is right, and one
    has the label's logit twice. A row's teacher is the row after it."""
    generator = torch.Generator().manual_seed(case.vocab)
    logits = 3 * torch.randn(5, case.vocab, generator=generator)
    labels = torch.randint(case.vocab, (5,), generator=generator)
    labels[0] = logits[0].argmax()
    labels[1] = IGNORE
    if case.vocab > 1:
        labels[2] = 0
        logits[2, :: case.vocab - 1] = logits[2].max() + 1
    if case.filled is not None:
        logits[:, [3, 500]] = case.filled
        labels[3] = 500
    if case.ignored:
        labels.fill_(IGNORE)
    dtype, mm, bf16_logits = case.dtypes
    acc = accumulation_dtype(dtype)
    weights = torch.tensor([0.5, 1.0, -2.0, 0.0, 0.3], dtype=acc)
    options = LossOptions(**case.options, bf16_logits=bf16_logits, passes="triton", chunk_rows=3)
    if case.target_loss is not None:
        options = options._replace(target_loss=case.target_loss, target_weight=0.6)
    return {
        "hidden": torch.eye(5, dtype=dtype),
        "weight": logits.t().to(dtype),
        "labels": labels,
        "scale": torch.tensor(0.375, dtype=acc),
        "options": options,
        "teacher": torch.eye(5, dtype=dtype).roll(-1, 0) if case.target_loss else None,
        "row_weights": weights if case.weighted else None,
        "need_d_hidden": case.need_grad,
        "d_weight": torch.zeros(case.vocab, 5, dtype=acc) if case.need_grad else None,
        "mm": mm,
    }


def run(case: Case, passes: str = "triton", device: str = "cpu") -> list[Tensor | None]:
    """[loss sum, valid, correct, the hidden states' gradient, the logits']."""
    given = inputs(case)
    options = given["options"]._replace(passes=passes)
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    losses, d_hidden = head_loss_and_grad(**arguments | {"options": options})
    return [*losses, d_hidden, arguments["d_weight"]]


def expected(case: Case) -> list[Tensor]:
    """The same from whole logits in float64."""
    given = inputs(case)
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    weights = given["row_weights"]
    out = naive_loss(
        [hidden],
        weight,
        given["labels"].unsqueeze(1),
        given["scale"].double().unsqueeze(0),
        given["options"],
        row_weights=None if weights is None else weights.double(),
        teacher=None if given["teacher"] is None else hidden.detach(),
        first=1,
    )
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    return [out.loss_sum[0], out.valid[0], out.correct[0], *gradients]


def check(case: Case, results: list[Tensor | None]) -> None:
    """That what `run` found of finite logits is right."""
    found = [None if result is None else result.cpu() for result in results]
    (loss_sum, valid, correct, *got), exact = found, expected(case)
    assert loss_sum is not None
    tolerance = 1e-12 if loss_sum.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss_sum.double(), exact[0], rtol=tolerance, atol=1e-30)
    assert (valid, correct) == (exact[1], exact[2]), case
    assert exact[2] >= (not case.ignored)
    if not case.need_grad:
        assert got == [None, None]
        return
    for gradient, right in zip(got, exact[3:], strict=True):
        assert gradient is not None
        # (A whole unit of the last place: the interpreter cuts off where a GPU rounds.)
        eps = max(torch.finfo(dtype).eps for dtype in (case.dtypes[1], gradient.dtype))
        assert (gradient.double() - right).norm() <= max(tolerance, eps) * right.norm(), case


def all_rows(labels: Tensor, ignore_index: int, chunk: int) -> Iterator[slice]:
    """As on a GPU, where ignored rows are masked and not left out."""
    yield from (slice(i, min(i + chunk, len(labels))) for i in range(0, len(labels), chunk))


if __name__ == "__main__":
    chunked._row_chunks = all_rows
    torch.save([run(case) for case in cases()], sys.argv[1])

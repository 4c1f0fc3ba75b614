"""Losses of a head's distribution q against a teacher's p, from the logits of both.

    kl  sum_v p_v log(p_v / q_v), the forward Kullback-Leibler divergence
    tv  1 - a, total variation (arXiv 2606.12370, equation 10)
    lk  -log a (LK losses, arXiv 2602.23881: the one without a hyperparameter)

with a = sum_v min(p_v, q_v), the probability that speculative sampling accepts a token drawn from
q (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_mtp.ops.vocabulary import VocabularyShard, over_ranks

TARGET_LOSSES = ("kl", "lk", "tv")
_CACHED = 2**17  # logits: 1.5 MiB with what is computed of them


def target_losses(
    log_q: Tensor, log_p: Tensor, kind: str | None, vocabulary: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """Losses [C, 1] and their gradient [C, V] in the head's logits, from logarithms of both
    distributions [C, V]; kind: of `TARGET_LOSSES`; vocabulary: whose tokens these are, None: all.

    With m_v = [q_v <= p_v], the gradients of kl and tv in logit j are
    q_j - p_j  and  q_j (sum_v m_v q_v - m_j); that of lk is tv's over a.
    """
    q, p = log_q.exp(), log_p.exp()
    below = q * (q <= p)
    terms = [p * (log_p - log_q)] if kind == "kl" else [torch.minimum(p, q), below]
    sums = over_ranks("sum", [u.sum(1, keepdim=True) for u in terms], vocabulary)
    if kind == "kl":
        return sums[0], q - p
    accepted, grad = sums[0], q * sums[1] - below
    if kind == "tv":
        return 1 - accepted, grad
    accepted = accepted.clamp(min=torch.finfo(accepted.dtype).tiny)
    return -accepted.log(), grad / accepted


class Taught(NamedTuple):
    """A teacher's p in a chunk of rows: p_v = exps_v / sums. cross: sum_v p_v (log p_v - x_v), of
    kl alone."""

    exps: Tensor  # [C, V]
    sums: Tensor  # [C, 1]
    cross: Tensor | None  # [C, 1]


def rows_at_once(logits: Tensor) -> int:
    """Rows of a chunk [C, V] that are compared at a time: few, so that what a pass leaves is small
    beside the chunk; on a CPU so few that they stay in its cache through all passes."""
    few = -(-len(logits) // 8)
    return min(few, max(1, _CACHED // logits.shape[1])) if logits.device.type == "cpu" else few


def read_teacher_(
    teacher: Tensor, logits: Tensor, room: Tensor, kind: str | None, softcap: float | None
) -> Taught:
    """The same in place, first half, from the logits of both; the teacher's [C, V] are overwritten,
    and `room`, as many."""
    if softcap is not None:
        teacher.div_(softcap).tanh_().mul_(softcap)
    teacher.sub_(teacher.amax(1, keepdim=True))
    if kind != "kl":
        return Taught(teacher.exp_(), teacher.sum(1, keepdim=True), None)
    exps = torch.exp(teacher, out=room[: len(teacher)])
    sums = exps.sum(1, keepdim=True)
    distance = teacher.sub_(logits).mul_(exps).sum(1, keepdim=True)
    return Taught(exps, sums, distance / sums - sums.log())


def compare_(
    exps: Tensor, sums: Tensor, lse: Tensor, taught: Taught, kind: str | None
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Second half, once e = exps [C, V] with sums s [C, 1] are what q is made of: losses, f and g
    [C, 1], and t in the place of `taught.exps`, with which the gradient is (f e_j - g t_j) / s."""
    t, ratio = taught.exps, sums / taught.sums
    if taught.cross is not None:
        return taught.cross + lse, 1.0, ratio
    tiny = torch.finfo(sums.dtype).tiny
    torch.minimum(exps, t.mul_(ratio), out=t)
    accepted = (t.sum(1, keepdim=True) / sums).clamp_(min=tiny)
    below = t.eq_(exps).mul_(exps).sum(1, keepdim=True) / sums  # t = m e
    below.clamp_(min=tiny)  # a divisor, and 0 only where t is
    if kind == "tv":
        return 1 - accepted, below, torch.ones_like(sums)
    return -accepted.log(), below / accepted, 1 / accepted

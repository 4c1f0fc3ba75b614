"""Losses of a head's distribution q against a teacher's p, from the logits of both.

    kl  sum_v p_v log(p_v / q_v), the forward Kullback-Leibler divergence
    tv  1 - a, total variation (arXiv 2606.12370, equation 10)
    lk  -log a (LK losses, arXiv 2602.23881: the one without a hyperparameter)

with a = sum_v min(p_v, q_v), the probability that speculative sampling accepts a token drawn from
q (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

TARGET_LOSSES = ("kl", "lk", "tv")
_PARTS = 8  # of a chunk of logits: one of them is what `read_teacher_` needs beside two chunks


def target_losses(
    logits: Tensor, teacher: Tensor, kind: str | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses [C, 1] and their gradient [C, V] in `logits`.

    logits: [C, V], after the soft cap; teacher: [C, V], before it; kind: of `TARGET_LOSSES`.

    With m_v = [q_v <= p_v], the gradients of kl and tv in logit j are
    q_j - p_j  and  q_j (sum_v m_v q_v - m_j); that of lk is tv's over a.
    """
    if softcap is not None:
        teacher = softcap * torch.tanh(teacher / softcap)
    log_q, log_p = logits.log_softmax(1), teacher.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "kl":
        return (p * (log_p - log_q)).sum(1, keepdim=True), q - p
    below = q * (q <= p)
    grad = q * below.sum(1, keepdim=True) - below
    accepted = torch.minimum(p, q).sum(1, keepdim=True)
    if kind == "tv":
        return 1 - accepted, grad
    accepted = accepted.clamp(min=torch.finfo(accepted.dtype).tiny)
    return -accepted.log(), grad / accepted


def read_teacher_(logits: Tensor, teacher: Tensor, softcap: float | None) -> Tensor:
    """The same in place, first half: p in the place of the teacher's logits. Returns
    sum_v p_v (log p_v - x_v) [C, 1]."""
    rows = -(-len(logits) // _PARTS)
    cross, buffer = logits.new_empty(len(logits), 1), torch.empty_like(teacher[:rows])
    for x, t, total in zip(*(z.split(rows) for z in (logits, teacher, cross)), strict=True):
        if softcap is not None:
            t.div_(softcap).tanh_().mul_(softcap)
        log_p = torch.log_softmax(t, 1, out=buffer[: len(t)])
        torch.exp(log_p, out=t)
        torch.sum(log_p.sub_(x).mul_(t), 1, keepdim=True, out=total)
    return cross


def compare_(
    exps: Tensor, sums: Tensor, lse: Tensor, p: Tensor, cross: Tensor, kind: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Second half, once e = exps [C, V] with sums s [C, 1] are what q is made of: losses, f and g
    [C, 1], and t in the place of p, with which the gradient is (f e_j - g t_j) / s."""
    if kind == "kl":
        return cross + lse, torch.ones_like(sums), sums
    tiny = torch.finfo(sums.dtype).tiny
    torch.minimum(exps, p.mul_(sums), out=p)
    accepted = (p.sum(1, keepdim=True) / sums).clamp_(min=tiny)
    below = p.eq_(exps).mul_(exps).sum(1, keepdim=True) / sums  # t = m e
    below.clamp_(min=tiny)  # a divisor, and 0 only where t is
    if kind == "tv":
        return 1 - accepted, below, torch.ones_like(sums)
    return -accepted.log(), below / accepted, 1 / accepted

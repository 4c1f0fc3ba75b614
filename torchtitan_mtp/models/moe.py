"""Mixture of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), balanced without a loss.

With s_e(u) the router's score of expert e for token u, and b_e the expert's bias,

    chosen  = the top k experts by s_e + b_e, within the best groups of experts
    g_e     = s_e / sum over the chosen of s, times route_scale          (the bias is not in it)
    mixture = sum over the chosen of g_e FFN_e(u) + FFN_shared(u)

No token is ever dropped: rows are sorted by expert, and every expert takes as many as it gets.
After a step, b_e rises by gamma for experts that had fewer tokens than the mean and falls for those
that had more (Wang et al. 2024, arXiv 2408.15664): `torchtitan_mtp.distributed.balance` does that
with the counts that are gathered here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_mtp.models.args import MoEArgs
from torchtitan_mtp.models.context_parallel import SequenceRanks
from torchtitan_mtp.models.layers import FeedForward
from torchtitan_mtp.ops.grouped_linear import grouped_linear

if TYPE_CHECKING:
    from torchtitan_mtp.models.expert_parallel import ExpertParallel


class Router(nn.Module):
    """Chooses each token's experts and weighs them, in float32 whatever the model computes in."""

    def __init__(self, dim: int, args: MoEArgs) -> None:
        super().__init__()
        self.args = args
        self.gate = nn.Linear(dim, args.num_experts, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D], and bias [E], which moves the choice and has no gradient -> scores [N, E],
        experts chosen [N, K] and their weights [N, K]."""
        args, dtype = self.args, torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), self.gate.weight.to(dtype))
        scores = logits.sigmoid() if args.score_func == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            chosen = self._within_best_groups(scores + bias).topk(args.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if args.route_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, chosen, weights * args.route_scale

    def _within_best_groups(self, scores: Tensor) -> Tensor:
        """scores [N, E], -inf in all groups but those whose two best experts have most together."""
        args = self.args
        if args.num_limited_groups == args.num_expert_groups:
            return scores
        groups = scores.unflatten(-1, (args.num_expert_groups, -1))  # [N, G, E / G]
        best = groups.topk(2, dim=-1).values.sum(-1).topk(args.num_limited_groups, dim=-1).indices
        kept = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=scores.device)
        kept = kept.scatter(-1, best, True)  # [N, G]
        return groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)


class Experts(nn.Module):
    """E SwiGLU feed-forwards, their matrices stacked. (Where ranks share the experts, these are
    DTensors, and the forward is that of this rank's own.)"""

    def __init__(self, dim: int, args: MoEArgs) -> None:
        super().__init__()
        count, hidden = args.num_experts, args.hidden_dim
        self.w1 = nn.Parameter(torch.empty(count, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(count, hidden, dim))

    def forward(self, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Rows x [R, D], sorted by expert (whose rows end at `offsets`, int32 [E]), times their
        weights [R]: [R, D]."""
        ws = (self.w1, self.w2, self.w3)
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in ws)
        hidden = F.silu(grouped_linear(x, w1, offsets)) * grouped_linear(x, w3, offsets)
        # The weight belongs to the output, but the map is linear and its input narrower.
        hidden = hidden * weights.unsqueeze(-1).to(hidden.dtype)
        return grouped_linear(hidden, w2, offsets)


class SumRows(torch.autograd.Function):
    """x [R, D], index [M, J], back [R, I] -> [M, D]: the sum of the rows index[m] of x.

    Rows back[r] are those that x's row r is summed into, and their gradients' sum is its own:
    nothing is scattered, so the bits are always the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _sum_rows(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_rows(grad, *ctx.saved_tensors), None, None


def _sum_rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index.squeeze(1)] if index.shape[1] == 1 else x[index].sum(1)


class _AddLoss(torch.autograd.Function):
    """Passes `x` through, and in the backward adds a loss to what is minimised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


def sequence_balance_loss(
    scores: Tensor, chosen: Tensor, ranks: SequenceRanks | None = None
) -> Tensor:
    """Equations 17 to 20 without alpha, summed over sequences: scores [B, S, E], chosen [B, S, K].

    A sequence whose tokens spread evenly over the experts has 1, one that sends all of them to the
    same K has up to E / K. Of a sequence that is spread over `ranks`, each has its tokens' share.
    """
    size, count, top_k = scores.shape[1], scores.shape[2], chosen.shape[2]
    hits = torch.zeros_like(scores).scatter(-1, chosen, 1.0).sum(1)
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)  # P_i [B, E]
    if ranks is not None:
        size, hits, probability = size * ranks.size, ranks.sum(hits), probability / ranks.size
    frequency = hits * (count / (top_k * size))  # f_i [B, E]
    return (frequency * probability).sum()


class MoE(nn.Module):
    """Routed and shared experts in the place of a block's feed-forward.

    expert_bias [E] float32 is part of a checkpoint; tokens_per_expert [E] int64 counts since the
    last `balance_experts`; aux_loss_scale: the weight of a sequence's balance loss in the total.
    """

    expert_bias: Tensor
    tokens_per_expert: Tensor
    aux_loss_scale: Tensor
    sequence_ranks: SequenceRanks | None = None  # those that sequences are spread over
    expert_parallel: ExpertParallel | None = None  # the ranks that the experts are dealt to

    def __init__(self, dim: int, args: MoEArgs) -> None:
        super().__init__()
        self.args = args
        self.router = Router(dim, args)
        self.experts = Experts(dim, args)
        self.shared_experts = None
        if args.num_shared_experts:
            self.shared_experts = FeedForward(dim, args.num_shared_experts * args.hidden_dim)
        self.register_buffer("expert_bias", torch.zeros(args.num_experts))
        counts = torch.zeros(args.num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        self.register_buffer("aux_loss_scale", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        tokens, top_k = x.flatten(0, 1), self.args.top_k  # [N, D], N = B * S
        scores, chosen, weights = self.router(tokens, self.expert_bias)
        if self.args.aux_loss_coeff and torch.is_grad_enabled():
            s, c = (t.unflatten(0, x.shape[:2]) for t in (scores, chosen))
            loss = self.aux_loss_scale * sequence_balance_loss(s, c, self.sequence_ranks)
            weights = _AddLoss.apply(weights, loss)
        expert, order = chosen.flatten().sort(stable=True)  # [N * K]
        token = order.unsqueeze(1) // top_k  # [N * K, 1], of each row
        place = order.argsort().unflatten(0, (-1, top_k))  # [N, K], the rows of each token
        experts = torch.arange(self.args.num_experts, device=x.device)
        offsets = torch.searchsorted(expert, experts, right=True, out_int32=True)  # [E]
        # Activations are computed a second time inside of a backward, and not counted then. (The
        # compiler recomputes without side effects.)
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
        if self.training and torch.is_grad_enabled() and not again:
            # (.data: a checkpointed block takes the buffer as an input, and may not see it change.)
            self.tokens_per_expert.data.add_(counts)
        rows, weights = SumRows.apply(tokens, token, place), weights.flatten()[order]
        if self.expert_parallel is None:
            rows = self.experts(rows, weights, offsets)
        else:
            rows = self.expert_parallel.run(self.experts, rows, weights, counts)
        out = SumRows.apply(rows, place, token)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view(x.shape)

    def init_buffers(self) -> None:
        """Zero all buffers, on the device that they are on; biases are float32 in any model."""
        for name, buffer in self.named_buffers(recurse=False):
            dtype = buffer.dtype if name == "tokens_per_expert" else torch.float32
            setattr(self, name, torch.zeros_like(buffer, dtype=dtype))

"""The model, its heads and its loss written a second time, as plainly as the papers state them.

Nothing is shared with the package but parameter names: one sequence at a time, one position's mask
at a time, whole logits, complex rotations. Every fast path is held against this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale


def rotate(x: Tensor, theta: float) -> Tensor:
    """x [S, H, hd]: pair j at position s turns by s * theta ** (-2j / hd)."""
    seq, _, width = x.shape
    angles = torch.outer(
        torch.arange(seq, dtype=x.dtype), theta ** (-torch.arange(0, width, 2).to(x.dtype) / width)
    )
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def attention(p: Parameters, prefix: str, x: Tensor, documents: Tensor, args) -> Tensor:
    seq = len(x)
    q, k, v = (x @ p[f"{prefix}{name}.weight"].T for name in ("wq", "wk", "wv"))
    if args.qkv_bias:
        q, k, v = q + p[prefix + "wq.bias"], k + p[prefix + "wk.bias"], v + p[prefix + "wv.bias"]
    q = rotate(q.unflatten(-1, (args.n_heads, -1)), args.rope_theta)
    k = rotate(k.unflatten(-1, (args.kv_heads, -1)), args.rope_theta)
    v = v.unflatten(-1, (args.kv_heads, -1))
    apart = args.attn_mask_type == "block_causal"
    docs = documents.tolist()
    unseen = torch.tensor(
        [[j > i or (apart and docs[i] != docs[j]) for j in range(seq)] for i in range(seq)]
    )
    outputs = []
    for h in range(args.n_heads):
        g = h // (args.n_heads // args.kv_heads)
        scores = q[:, h] @ k[:, g].T / args.head_dim**0.5
        scores = scores.masked_fill(unseen, -torch.inf)
        outputs.append(scores.softmax(-1) @ v[:, g])
    return torch.cat(outputs, -1) @ p[prefix + "wo.weight"].T


def latent_attention(p: Parameters, prefix: str, x: Tensor, documents: Tensor, args) -> Tensor:
    """DeepSeek-V2, equations 37 to 47 of its appendix C, a head and a query at a time."""
    shape, eps = args.latent, args.norm_eps
    c = x @ p[prefix + "wkv_a.weight"].T
    c, k_rope = c[:, : shape.kv_lora_rank], c[:, None, shape.kv_lora_rank :]
    k_rope = rotate(k_rope, args.rope_theta)[:, 0]
    c = rms_norm(c, p[prefix + "kv_norm.weight"], eps)
    if shape.q_lora_rank:
        q = rms_norm(x @ p[prefix + "wq_a.weight"].T, p[prefix + "q_norm.weight"], eps)
        q = q @ p[prefix + "wq_b.weight"].T
    else:
        q = x @ p[prefix + "wq.weight"].T
    q = q.unflatten(-1, (args.n_heads, -1))
    q_nope, q_rope = q[..., : shape.qk_nope_head_dim], q[..., shape.qk_nope_head_dim :]
    q_rope = rotate(q_rope, args.rope_theta)
    kv = (c @ p[prefix + "wkv_b.weight"].T).unflatten(-1, (args.n_heads, -1))
    k, v = kv[..., : shape.qk_nope_head_dim], kv[..., shape.qk_nope_head_dim :]
    scale = (shape.qk_nope_head_dim + shape.qk_rope_head_dim) ** -0.5
    rows = []
    for i in range(len(x)):
        seen = [
            j
            for j in range(i + 1)
            if args.attn_mask_type == "causal" or documents[i] == documents[j]
        ]
        heads = []
        for h in range(args.n_heads):
            scores = k[seen, h] @ q_nope[i, h] + k_rope[seen] @ q_rope[i, h]
            heads.append((scores * scale).softmax(-1) @ v[seen, h])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ p[prefix + "wo.weight"].T


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def chosen_experts(scores: Tensor, moe) -> list[int]:
    """Scores with biases [E] of one token: sort, group by group, and take the first."""
    size = moe.num_experts // moe.num_expert_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(moe.num_expert_groups)]
    best = sorted(groups, key=lambda g: -sum(sorted(scores[g].tolist())[-2:]))
    allowed = [e for group in best[: moe.num_limited_groups] for e in group]
    return sorted(allowed, key=lambda e: -scores[e].item())[: moe.top_k]


def mixture(p: Parameters, prefix: str, x: Tensor, moe) -> Tensor:
    """DeepSeek-V3, equations 12 to 16, a token at a time."""
    w1, w2, w3 = (p[f"{prefix}experts.w{i}"] for i in (1, 2, 3))
    rows = []
    for token in x:
        scores = p[prefix + "router.gate.weight"] @ token
        scores = scores.sigmoid() if moe.score_func == "sigmoid" else scores.softmax(-1)
        chosen = chosen_experts(scores.detach() + p[prefix + "expert_bias"], moe)
        total = sum(scores[e] for e in chosen) if moe.route_norm else 1.0
        out = torch.zeros_like(token)
        for e in chosen:
            out = out + moe.route_scale * scores[e] / total * swiglu(token, w1[e], w2[e], w3[e])
        rows.append(out)
    out = torch.stack(rows)
    if moe.num_shared_experts:
        shared = (p[f"{prefix}shared_experts.w{i}.weight"] for i in (1, 2, 3))
        out = out + swiglu(x, *shared)
    return out


def block(p: Parameters, prefix: str, x: Tensor, documents: Tensor, args) -> Tensor:
    normed = rms_norm(x, p[prefix + "attention_norm.weight"])
    attend = attention if args.latent is None else latent_attention
    x = x + attend(p, prefix + "attention.", normed, documents, args)
    y = rms_norm(x, p[prefix + "ffn_norm.weight"])
    if prefix + "moe.expert_bias" in p:
        return x + mixture(p, prefix + "moe.", y, args.moe)
    f = prefix + "feed_forward."
    gated = F.silu(y @ p[f + "w1.weight"].T) * (y @ p[f + "w3.weight"].T)
    return x + gated @ p[f + "w2.weight"].T


def head_logits(p: Parameters, tokens: Tensor, documents: Tensor, args, mtp) -> list[Tensor]:
    """Logits [S, V] of heads 1..n for one sequence of S + n tokens."""
    n = mtp.num_future_tokens
    seq = len(tokens) - n
    docs = documents[:seq]
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("layers."))
    unembed = p["tok_embeddings.weight"] if args.tied_embeddings else p["output.weight"]
    x = p["tok_embeddings.weight"][tokens[:seq]]
    for i in range(layers - 1):
        x = block(p, f"layers.{i}.", x, docs, args)
    last = block(p, f"layers.{layers - 1}.", x, docs, args)
    h = rms_norm(last, p["norm.weight"])
    logits = [h @ unembed.T]
    for k in range(2, n + 1):
        if mtp.heads == "parallel":
            z = x.detach() if mtp.detach_trunk else x
            scale = p["norm.weight"].detach() if mtp.detach_trunk else p["norm.weight"]
            h = rms_norm(block(p, f"mtp.heads.{k - 2}.", z, docs, args), scale)
        elif mtp.heads == "medusa":
            z = rms_norm(last, p["norm.weight"])
            z = z.detach() if mtp.detach_trunk else z
            h = z + F.silu(z @ p[f"mtp.heads.{k - 2}.linear.weight"].T)
        else:
            m = f"mtp.heads.{0 if mtp.share_weights else k - 2}."
            emb = p["tok_embeddings.weight"][tokens[k - 1 : k - 1 + seq]]
            if mtp.detach_trunk:
                emb = emb.detach()
            below = last if k == 2 and mtp.trunk_state == "raw" else h
            if mtp.detach_trunk and k == 2:
                below = below.detach()
            e, g = rms_norm(emb, p[m + "enorm.weight"]), rms_norm(below, p[m + "hnorm.weight"])
            joined = torch.cat((e, g), -1) @ p[m + "eh_proj.weight"].T
            h = rms_norm(block(p, m + "block.", joined, docs, args), p[m + "norm.weight"])
        logits.append(h @ (unembed.detach() if mtp.detach_trunk else unembed).T)
    return logits


def head_loss_sums(
    p: Parameters, tokens: Tensor, documents: Tensor, args, mtp
) -> tuple[list[Tensor], list[int]]:
    """Summed losses and number of targets of heads 1..n, over windows [B, S + n]: cross-entropy, or
    for heads 2..n what `mtp.target` says."""
    n = mtp.num_future_tokens
    sums: list[Tensor] = [torch.zeros((), dtype=p["norm.weight"].dtype) for _ in range(n)]
    valid = [0] * n
    for row, of_row in zip(tokens, documents, strict=True):
        all_logits = head_logits(p, row, of_row, args, mtp)
        docs = of_row.tolist()
        for k in range(1, n + 1):
            for i in range(len(row) - n):
                inside = all(docs[i] == docs[j] for j in range(i, i + k + 1)) and docs[i] >= 0
                taught = k > 1 and mtp.target == "trunk"
                if not inside or (taught and i + k - 1 >= len(row) - n):
                    continue
                loss = -all_logits[k - 1][i].log_softmax(-1)[row[i + k]]
                if taught:
                    trunk = all_logits[0][i + k - 1].detach()
                    soft = distance(trunk, all_logits[k - 1][i], mtp.target_loss)
                    loss = mtp.target_weight * soft + (1 - mtp.target_weight) * loss
                sums[k - 1] = sums[k - 1] + loss
                valid[k - 1] += 1
    return sums, valid


def distance(teacher: Tensor, student: Tensor, kind: str) -> Tensor:
    """From logits [..., V]: KL(p || q), total variation as half the L1 distance, or -log of its
    rest; [...]."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if kind == "kl":
        return (p * (p / q).log()).sum(-1)
    variation = (p - q).abs().sum(-1) / 2
    return variation if kind == "tv" else -(1 - variation).log()


def total_loss(
    p: Parameters, tokens: Tensor, documents: Tensor, args, mtp
) -> tuple[Tensor, list[float]]:
    """CE_1 + scale * reduce_k CE_k, and the CE_k: the loss of a whole step in one process."""
    sums, valid = head_loss_sums(p, tokens, documents, args, mtp)
    losses = [s / max(v, 1) for s, v in zip(sums, valid, strict=True)]
    weights = list(mtp.loss_weights) or [1.0] * (mtp.num_future_tokens - 1)
    rest = sum((w * loss for w, loss in zip(weights, losses[1:], strict=True)), torch.tensor(0.0))
    if mtp.loss_reduction == "mean" and len(losses) > 1:
        rest = rest / (len(losses) - 1)
    return losses[0] + mtp.loss_scale * rest, [loss.item() for loss in losses]

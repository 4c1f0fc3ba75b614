"""Tables about multi-token prediction and its loss."""

from dataclasses import dataclass
from typing import Literal

from torchtitan_mtp.config.setting import setting

TrunkState = Literal["normalized", "raw"]


@dataclass
class MTP:
    """The heads that predict further tokens; in effect when model.converters contains "mtp"."""

    heads: Literal["parallel", "sequential", "medusa"] = "parallel"
    """"parallel": one block a head on the shared trunk (Gloeckle et al. 2024, arXiv 2404.19737);
    "sequential": a causal chain of modules after the model (DeepSeek-V3, arXiv 2412.19437);
    "medusa": one residual linear layer a head on the model's state (arXiv 2401.10774)."""

    num_future_tokens: int = setting(4, at_least=1, at_most=1000)
    """Future tokens that each position predicts (n); head 1 is the next-token head, so 1 is plain
    next-token prediction."""

    loss_scale: float = setting(1.0, at_least=0)
    """Factor of the loss of heads 2..n; head 1 always counts once."""

    loss_reduction: Literal["sum", "mean"] = "sum"
    """How the losses of heads 2..n are combined: their sum (Meta) or their mean (DeepSeek)."""

    loss_weights: list[float] = setting(list, at_least=0)
    """Weight of each of heads 2..n within the reduction; empty: as loss_decay says."""

    loss_decay: float = setting(1.0, above=0, at_most=1)
    """Head k's weight becomes loss_decay^(k-2), scaled so that heads 2..n have a mean weight of 1;
    with loss_reduction = "mean" their loss is then FastMTP's (arXiv 2509.18362: 0.6)."""

    target: Literal["labels", "trunk"] = "labels"
    """What heads 2..n learn: the tokens themselves ("labels"), or what the trunk's own head 1 makes
    of the position before each, without a gradient to it ("trunk"; not at a window's last k - 1
    positions for head k). Head 1 learns labels. Held-out losses are of labels."""

    target_loss: Literal["kl", "lk", "tv"] = "kl"
    """Loss between the trunk's distribution p and a head's q: "kl": KL(p || q); "lk": -log a (arXiv
    2602.23881), "tv": 1 - a (arXiv 2606.12370), where a = sum min(p, q) is the rate at which
    speculative sampling accepts the head's drafts."""

    target_weight: float = setting(1.0, above=0, at_most=1)
    """Share of the loss against the trunk; the rest is the cross-entropy of labels."""

    loss_scale_schedule: Literal["constant", "linear", "step"] = "constant"
    """loss_scale over the run: constant, a line to loss_scale_final, or one step down to it."""

    loss_scale_final: float = setting(0.1, at_least=0)
    """loss_scale at the end of a "linear" or after the step of a "step" schedule."""

    loss_scale_boundary: float = setting(0.67, at_least=0, at_most=1)
    """Fraction of training.steps after which a "step" schedule drops."""

    curriculum: Literal["none", "forward", "reverse"] = "none"
    """Heads trained over the run: all; one more at a time from 1 to n ("forward"); or one fewer at
    a time from n to 1 ("reverse")."""

    curriculum_fraction: float = setting(1.0, above=0, at_most=1)
    """Fraction of training.steps that the curriculum takes."""

    engine: Literal["head_by_head", "joint"] = "head_by_head"
    """"head_by_head": one head's loss and backward after another, with memory flat in n and nothing
    computed twice (sequential heads keep a state each and compute their blocks twice). "joint": one
    graph; every head keeps a state and computes its block twice; not for sequential heads. The
    gradients are the same."""

    share_weights: bool = False
    """Apply one sequential module n - 1 times instead of training n - 1 modules."""

    trunk_state: TrunkState = "normalized"
    """What the first sequential head reads of the trunk: its state after the final norm
    (DeepSeek-V3, GLM) or before it ("raw": MiMo)."""

    match_parameters: bool = False
    """Take one layer off the trunk for every parallel head that is added, so that the model has as
    many parameters as without heads."""

    init: Literal["random", "copy_last_layer"] = "random"
    """Where the weights of new heads start: at random, or as copies of the trunk's last layer."""

    train: Literal["all", "heads", "trunk"] = "all"
    """Train the whole model; heads 2..n with the trunk frozen; or the trunk with heads 2..n frozen,
    through which their losses reach it."""

    detach_trunk: bool = False
    """Keep the gradients of heads 2..n out of the trunk."""


@dataclass
class Loss:
    """The linear cross-entropy that every head goes through."""

    chunk_rows: int | None = setting(None, at_least=1)
    """Tokens of one chunk; None: chosen from the sizes."""

    passes: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """What runs the passes over a chunk's logits: torch's operations, torch.compile, or one Triton
    kernel on CUDA devices. "auto": "compiled" where compile.components has "loss", else "eager"."""

    bf16_logits: bool = False
    """Round a chunk's logits to bfloat16: less memory and traffic, and an error that grows with the
    logits (docs/loss_ops.md). Needs "compiled" or "triton" passes."""

    z_loss: float = setting(0.0, at_least=0)
    """Factor of the squared log-partition, which keeps logits small (PaLM, arXiv 2204.02311)."""

    softcap: float | None = setting(None, above=0)
    """Logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118)."""

    label_smoothing: float = setting(0.0, at_least=0, below=1)
    """Share of each target that is spread evenly over the vocabulary."""

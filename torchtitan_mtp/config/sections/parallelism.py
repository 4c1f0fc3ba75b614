"""Tables about how the model is spread over ranks and what its blocks keep or recompute."""

from dataclasses import dataclass
from typing import Literal

from torchtitan_mtp.config.setting import setting


@dataclass
class Parallelism:
    """How ranks share the work. The degrees but expert_parallel_degree multiply to the number
    of processes."""

    data_parallel_replicate_degree: int = setting(1, at_least=1)
    """Replicas of the (sharded) model."""

    data_parallel_shard_degree: int = setting(-1, at_least=1, special=(-1,))
    """Ranks with data of their own, over which FSDP2 shards parameters; -1: all that remain."""

    context_parallel_degree: int = setting(1, at_least=1)
    """Ranks that share each sequence, a part for each; parameters are sharded over them too. What
    is said of a rank's sequences and batches is of all of these together."""

    tensor_parallel_degree: int = setting(1, at_least=1)
    """Ranks that share the work on the same tokens: each has a part of every layer's heads, hidden
    units and of the vocabulary."""

    expert_parallel_degree: int = setting(1, at_least=1)
    """Of the ranks that shard parameters, and those of tensor parallelism, how many share the
    experts of a layer, each with experts of its own, to which the others send their tokens."""

    pipeline_parallel_degree: int = setting(1, at_least=1)
    """Ranks that have a part of the layers each, and hand on micro-batches."""

    pipeline_parallel_schedule: Literal[
        "1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"
    ] = "1F1B"
    """The order of the micro-batches' forwards and backwards: torch's, by name."""

    pipeline_parallel_layers_per_stage: int | None = setting(None, at_least=1)
    """Layers of a stage; unset, a rank has one stage, or two where the schedule has several."""

    pipeline_parallel_first_stage_less_layers: int | None = setting(None, at_least=0)
    """How many layers fewer the first stage has, for the embedding; unset, none."""

    pipeline_parallel_last_stage_less_layers: int | None = setting(None, at_least=0)
    """How many layers fewer the last stage has, for output and heads; unset, what their work is
    in layers, as far as a layer is left."""

    pipeline_parallel_microbatch_size: int = setting(1, at_least=1)
    """Sequences of a micro-batch; a step's are those of training.local_batch_size, as often as
    training.global_batch_size has them."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether a block's gathered parameters are freed after its forward; "default": unless it is
    in a pipeline, which runs it for many micro-batches."""


@dataclass
class ActivationCheckpoint:
    """Which activations of a block are kept for the backward, and which are recomputed."""

    mode: Literal["selective", "full", "none"] = "selective"
    """"full" recomputes each block; "selective" what selective_ac_option says; "none" nothing.
    Heads 2..n are recomputed whole in any mode, but for parallel and Medusa ones
    with mtp.engine = "head_by_head"."""

    selective_ac_option: str = "2"
    """"op": keep the results of costly operations in every block; a number: recompute every
    so-many-th block in full."""

    early_stop: bool = False
    """Stop a recomputation as soon as all that is needed is there."""


@dataclass
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile the components."""

    components: list[Literal["model", "loss"]] = setting(lambda: ["model", "loss"], distinct=True)
    """What is compiled: "model" is each transformer block, "loss" the passes of the loss over
    a chunk's logits (not worth it on CPUs)."""

    backend: str = "inductor"
    """torch.compile's backend."""

"""Tables about how the model is spread over ranks and what its blocks keep or recompute."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_mtp.config.setting import rule, setting


@dataclass
class Parallelism:
    """How ranks share the work. Degrees multiply to the number of processes."""

    data_parallel_replicate_degree: int = setting(
        1, at_least=1, renamed_from=("training.data_parallel_replicate_degree",)
    )
    """Replicas of the (sharded) model."""

    data_parallel_shard_degree: int = setting(
        -1, at_least=1, special=(-1,), renamed_from=("training.data_parallel_shard_degree",)
    )
    """Ranks over which FSDP2 shards parameters; -1: all that remain."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether a block's gathered parameters are freed after its forward."""

    tensor_parallel_degree: int = setting(
        1,
        unsupported="use data_parallel_shard_degree",
        renamed_from=("training.tensor_parallel_degree",),
    )
    """Ranks over which each matrix is split."""

    disable_loss_parallel: bool = False
    """No effect while tensor_parallel_degree is 1."""

    enable_async_tensor_parallel: bool = setting(
        False,
        unsupported="there is no tensor parallelism",
        renamed_from=("experimental.enable_async_tensor_parallel",),
    )
    """Overlap the communication of tensor parallelism."""

    enable_compiled_autograd: bool = setting(
        False,
        unsupported="compile.enable compiles each block's forward and backward",
        renamed_from=("experimental.enable_compiled_autograd",),
    )
    """Compile the backward across blocks."""

    context_parallel_degree: int = setting(
        1,
        unsupported="use data_parallel_shard_degree",
        renamed_from=("experimental.context_parallel_degree",),
    )
    """Ranks over which each sequence is split."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = setting(
        "allgather", renamed_from=("experimental.context_parallel_rotate_method",)
    )
    """No effect while context_parallel_degree is 1."""

    context_parallel_load_balancer: str = "headtail"
    """No effect while context_parallel_degree is 1."""

    expert_parallel_degree: int = setting(
        1, unsupported="experts are sharded like all parameters, by data_parallel_shard_degree"
    )
    """Ranks over which experts are spread."""

    expert_tensor_parallel_degree: int = setting(
        1, unsupported="experts are sharded like all parameters, by data_parallel_shard_degree"
    )
    """Ranks over which each expert's matrices are split."""

    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """No effect while expert_parallel_degree is 1."""

    module_fqns_per_model_part: list[list[str]] | None = field(
        default=None, metadata=rule(unsupported="there is no pipeline parallelism")
    )
    """Modules of each pipeline stage."""

    pipeline_parallel_degree: int = setting(
        1,
        unsupported="use data_parallel_shard_degree",
        renamed_from=("experimental.pipeline_parallel_degree",),
    )
    """Ranks over which the layers are spread."""

    pipeline_parallel_first_stage_less_layers: int = 1
    """No effect while pipeline_parallel_degree is 1."""

    pipeline_parallel_last_stage_less_layers: int = 1
    """No effect while pipeline_parallel_degree is 1."""

    pipeline_parallel_layers_per_stage: int | None = None
    """No effect while pipeline_parallel_degree is 1."""

    pipeline_parallel_schedule: str = setting(
        "1F1B", renamed_from=("experimental.pipeline_parallel_schedule",)
    )
    """No effect while pipeline_parallel_degree is 1."""

    pipeline_parallel_schedule_csv: str = ""
    """No effect while pipeline_parallel_degree is 1."""

    pipeline_parallel_microbatch_size: int = 1
    """No effect while pipeline_parallel_degree is 1."""

    pipeline_parallel_expert_parallel_overlap: bool = True
    """No effect while pipeline_parallel_degree is 1."""


@dataclass
class ActivationCheckpoint:
    """Which activations of a block are kept for the backward, and which are recomputed."""

    mode: Literal["selective", "full", "none"] = setting(
        "selective",
        unsupported_values={"memory_budget": 'use "selective" with selective_ac_option = "op"'},
    )
    """"full" recomputes each block; "selective" what selective_ac_option says; "none" nothing.
    Heads 2..n are recomputed whole in any mode, but for parallel ones with mtp.engine =
    "sequential"."""

    selective_ac_option: str = "2"
    """"op": keep the results of costly operations in every block; a number: recompute every
    so-many-th block in full."""

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(
        default_factory=lambda: ["moe.router.gate"],
        metadata=rule(unsupported="every second product is recomputed, whatever its layer"),
    )
    """Linear layers whose products are recomputed, with "op"."""

    early_stop: bool = False
    """Stop a recomputation as soon as all that is needed is there."""

    memory_budget: float = setting(0.5, at_least=0, at_most=1)
    """No effect: activation_checkpoint.mode = "memory_budget" is not supported."""

    visualize_memory_budget_pareto: bool = setting(
        False, unsupported='activation_checkpoint.mode = "memory_budget" is not supported'
    )
    """Draw time against memory over memory budgets."""

    preserve_rng_state: bool = True
    """No effect: nothing random is recomputed."""

    determinism_check: str = setting("default", unsupported="leave it unset")
    """How a recomputation is compared with the first computation."""

    debug: bool = setting(False, unsupported="leave it unset")
    """Record where recomputed tensors came from."""


@dataclass
class Compile:
    """torch.compile."""

    enable: bool = setting(False, renamed_from=("training.compile",))
    """Compile the components."""

    components: list[Literal["model", "loss"]] = field(
        default_factory=lambda: ["model", "loss"], metadata=rule(distinct=True)
    )
    """What is compiled: "model" is each transformer block, "loss" the passes of the default loss
    backend over a chunk's logits (not worth it on CPUs)."""

    backend: str = "inductor"
    """torch.compile's backend."""

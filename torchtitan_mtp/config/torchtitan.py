"""TorchTitan v0.2's keys that have no counterpart here: its files have them, no program reads them.

They are accepted, so that its files run unchanged, and dropped.
"""

from typing import Any

from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.setting import NO_RULE, Option, Rule, options

_DEGREE = "use data_parallel_shard_degree"
_EXPERTS = "experts are sharded like all parameters, by data_parallel_shard_degree"
_WORKERS = "each rank reads its data in its own process"

# Keys that have to stay at their default: the default, and what to do instead.
HELD: dict[str, tuple[Any, str]] = {
    "job.save_config_file": (None, "use --job.print_config"),
    "job.custom_config_module": ("", "add the keys to torchtitan_mtp/config/sections"),
    "training.debug_moe_force_load_balance": (
        False,
        "model.args.moe.load_balance_coeff balances experts",
    ),
    "training.dataloader.num_workers": (0, _WORKERS),
    "training.dataloader.persistent_workers": (False, _WORKERS),
    "training.dataloader.pin_memory": (False, "leave it unset"),
    "training.dataloader.prefetch_factor": (None, _WORKERS),
    "optimizer.early_step_in_backward": (False, "gradients are clipped by their global norm"),
    "lr_scheduler.total_steps": (None, "set training.steps"),
    "validation.dataloader.num_workers": (0, _WORKERS),
    "validation.dataloader.persistent_workers": (False, _WORKERS),
    "validation.dataloader.pin_memory": (False, "leave it unset"),
    "validation.dataloader.prefetch_factor": (None, _WORKERS),
    "parallelism.tensor_parallel_degree": (1, _DEGREE),
    "parallelism.enable_async_tensor_parallel": (False, "there is no tensor parallelism"),
    "parallelism.enable_compiled_autograd": (
        False,
        "compile.enable compiles each block's forward and backward",
    ),
    "parallelism.context_parallel_degree": (1, _DEGREE),
    "parallelism.expert_parallel_degree": (1, _EXPERTS),
    "parallelism.expert_tensor_parallel_degree": (1, _EXPERTS),
    "parallelism.module_fqns_per_model_part": (None, "there is no pipeline parallelism"),
    "parallelism.pipeline_parallel_degree": (1, _DEGREE),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        ["moe.router.gate"],
        "every second product is recomputed, whatever its layer",
    ),
    "activation_checkpoint.visualize_memory_budget_pareto": (
        False,
        'activation_checkpoint.mode = "memory_budget" is not supported',
    ),
    "activation_checkpoint.determinism_check": ("default", "leave it unset"),
    "activation_checkpoint.debug": (False, "leave it unset"),
    "debug.moe_force_load_balance": (False, "model.args.moe.load_balance_coeff balances experts"),
    "debug.deterministic_warn_only": (False, "set training.deterministic or leave it unset"),
    "memory_estimation.enable": (False, "run a few steps and read the memory metrics"),
    "fault_tolerance.enable": (False, "resume from a checkpoint after a failure"),
    "experimental.custom_import": ("", "import the package from your own entry point"),
    "experimental.custom_args_module": ("", "add the keys to torchtitan_mtp/config/sections"),
}

# Keys that have no effect while the ones above are at their defaults, by table.
WITHOUT_EFFECT: dict[str, str] = {
    "checkpoint": "enable_ft_dataloader_checkpoints initial_load_in_hf_quantized",
    "parallelism": "disable_loss_parallel context_parallel_rotate_method "
    "context_parallel_load_balancer expert_parallel_comm_backend "
    "pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers "
    "pipeline_parallel_layers_per_stage pipeline_parallel_schedule "
    "pipeline_parallel_schedule_csv pipeline_parallel_microbatch_size "
    "pipeline_parallel_expert_parallel_overlap",
    "activation_checkpoint": "memory_budget preserve_rng_state",
    "quantize.linear.mx": "mxfp8_dim1_cast_kernel_choice recipe_name filter_fqns",
    "quantize.grouped_mm.float8": "fqns",
    "quantize.grouped_mm.mx": "recipe_name fqns",
    "memory_estimation": "disable_fake_mode",
    "fault_tolerance": "process_group process_group_timeout_ms replica_id group_size "
    "min_replica_size semi_sync_method sync_steps should_quantize fragment_sync_delay "
    "fragment_update_alpha module_fqns_per_model_fragment num_fragments",
}


def known_options() -> dict[str, Option]:
    """`options(JobConfig)`, and TorchTitan's tables and keys above with their `Rule`s."""
    found = options(JobConfig)
    others = {name: (default, Rule(held=instead)) for name, (default, instead) in HELD.items()}
    for table, keys in WITHOUT_EFFECT.items():
        others |= {f"{table}.{key}": (None, Rule(without_effect=True)) for key in keys.split()}
    for name, (default, rule) in others.items():
        path = tuple(name.split("."))
        for end in range(1, len(path)):
            parent = Option(path[:end], None, None, NO_RULE, is_table=True)
            found.setdefault(parent.name, parent)
        kind = type(default) if isinstance(default, (bool, int)) else str
        found[name] = Option(path, kind, default, rule)
    return found

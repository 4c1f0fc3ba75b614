"""TorchTitan v0.2's keys that have no counterpart here: its files have them, no program reads them.

They are accepted, so that its files run unchanged, and dropped.
"""

from typing import Any

from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.setting import NO_RULE, Option, Rule, options

_EXPERTS = (
    "each expert is whole on a rank: expert_parallel_degree takes those of tensor parallelism"
)
_BALANCE = "model.args.moe.load_balance_coeff balances experts"
_WORKERS = "each rank reads its data in its own process"
_DATALOADER: dict[str, tuple[Any, str]] = {
    "dataloader.num_workers": (0, _WORKERS),
    "dataloader.persistent_workers": (False, _WORKERS),
    "dataloader.pin_memory": (False, "leave it unset"),
    "dataloader.prefetch_factor": (None, _WORKERS),
}

# Keys that have to stay at their default: the default, and what to do instead.
HELD: dict[str, tuple[Any, str]] = {
    "job.save_config_file": (None, "use --job.print_config"),
    "job.custom_config_module": ("", "add the keys to torchtitan_mtp/config/sections"),
    "training.mixed_precision_reduce": ("float32", "gradients are summed in it"),
    "training.debug_moe_force_load_balance": (False, _BALANCE),
    **{f"training.{key}": row for key, row in _DATALOADER.items()},
    "optimizer.early_step_in_backward": (False, "gradients are clipped by their global norm"),
    "lr_scheduler.total_steps": (None, "set training.steps"),
    **{f"validation.{key}": row for key, row in _DATALOADER.items()},
    "parallelism.disable_loss_parallel": (False, "logits are never whole, so nothing is gained"),
    "parallelism.enable_async_tensor_parallel": (False, "collectives are waited for"),
    "parallelism.enable_compiled_autograd": (False, "compile.enable compiles backwards too"),
    "parallelism.context_parallel_rotate_method": ("allgather", "keys and values are gathered"),
    "parallelism.context_parallel_load_balancer": ("headtail", "each rank has two such chunks"),
    "parallelism.expert_tensor_parallel_degree": (1, _EXPERTS),
    "parallelism.expert_parallel_comm_backend": ("standard", "rows go by all_to_all_single"),
    "parallelism.module_fqns_per_model_part": (None, "set pipeline_parallel_layers_per_stage"),
    "parallelism.pipeline_parallel_schedule_csv": ("", "set pipeline_parallel_schedule"),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        ["moe.router.gate"],
        "every second product is recomputed, whatever its layer",
    ),
    "activation_checkpoint.visualize_memory_budget_pareto": (False, "there is no memory budget"),
    "activation_checkpoint.determinism_check": ("default", "leave it unset"),
    "activation_checkpoint.debug": (False, "leave it unset"),
    "comm.mode": ("default", "every run communicates; for a dry run, scripts/estimate.py"),
    "debug.moe_force_load_balance": (False, _BALANCE),
    "debug.deterministic_warn_only": (False, "set training.deterministic or leave it unset"),
    "memory_estimation.enable": (False, "scripts/estimate.py CONFIG --ranks N estimates it"),
    "fault_tolerance.enable": (False, "resume from a checkpoint after a failure"),
    "experimental.custom_import": ("", "import the package from your own entry point"),
    "experimental.custom_args_module": ("", "add the keys to torchtitan_mtp/config/sections"),
}

# Keys that have no effect while the ones above are at their defaults, by table.
WITHOUT_EFFECT: dict[str, str] = {
    "checkpoint": "enable_ft_dataloader_checkpoints initial_load_in_hf_quantized",
    "parallelism": "pipeline_parallel_expert_parallel_overlap",
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
    """`options(JobConfig)`, and TorchTitan's tables and keys above."""
    found = options(JobConfig)
    defaults = {name: default for name, (default, _) in HELD.items()}
    for table, keys in WITHOUT_EFFECT.items():
        defaults |= {f"{table}.{key}": None for key in keys.split()}
    for name, default in defaults.items():
        path = tuple(name.split("."))
        for end in range(1, len(path)):
            parent = Option(path[:end], None, None, NO_RULE, is_table=True)
            found.setdefault(parent.name, parent)
        kind = type(default) if isinstance(default, (bool, int)) else str
        found[name] = Option(path, kind, default, Rule(dropped=True))
    return found

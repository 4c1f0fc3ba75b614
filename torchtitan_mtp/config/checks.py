"""Configurations that can't be, whatever the model, the data and the machine."""

import math
import re
from collections.abc import Collection

from torchtitan_mtp.config.job_config import JobConfig
from torchtitan_mtp.config.sections.quantize import AUTO_FILTER
from torchtitan_mtp.config.sections.training import Training
from torchtitan_mtp.config.setting import Option, options
from torchtitan_mtp.config.values import show
from torchtitan_mtp.errors import UserError


def check(config: JobConfig, given: Collection[str] = ()) -> None:
    """Raises a UserError for the first thing in `config` that can't be.

    `given` holds the dotted names of the tables and keys that the user wrote, where that is known.
    """
    for option in options(JobConfig).values():
        if not option.is_table:
            _check_key(option, option.get(config))
    _check_model(config)
    _check_loss(config)
    _check_run(config)
    _check_context_parallel(config)
    _check_pipeline_parallel(config)
    _check_expert_parallel(config)
    _check_tensor_parallel(config)
    _check_float8(config)
    if "mtp" in config.model.converters:
        _check_mtp(config)
    else:
        _check_mtp_is_meant(config, given)


def _check_key(option: Option, value: object) -> None:
    """One key alone: inside its range."""
    rule = option.rule
    for item in value if isinstance(value, list) else [value]:
        if expected := rule.range_error(item):
            raise UserError(f"{option.name} = {show(value)}: expected {expected}")
    if rule.distinct and isinstance(value, list) and len(set(value)) < len(value):
        raise UserError(f"{option.name} = {show(value)}: an entry is there twice; remove one")


def _check_model(config: JobConfig) -> None:
    model = config.model
    if model.name != "hf":
        return
    if model.args.given() or model.vocab_size is not None:
        key = f"args.{next(iter(model.args.given()))}" if model.args.given() else "vocab_size"
        raise UserError(
            f'model.{key}: model.name = "hf" takes all sizes from config.json in '
            "model.hf_assets_path; unset it"
        )
    if model.attn_type != "flex":
        raise UserError(
            f'model.attn_type = {show(model.attn_type)}: model.name = "hf" attends as transformers '
            "does; unset it"
        )
    if model.hf_assets_path in ("", "byte"):
        raise UserError(
            f'model.hf_assets_path = {show(model.hf_assets_path)}: model.name = "hf" needs the '
            "folder of a model, with its config.json; name it"
        )


def _check_loss(config: JobConfig) -> None:
    if config.loss.bf16_logits and config.loss_passes == "eager":
        raise UserError(
            'loss.bf16_logits = true: expected loss.passes "compiled" or "triton", found "eager", '
            "which would only copy them; set one of the two keys"
        )
    degree = config.parallelism.tensor_parallel_degree
    if config.loss.passes == "triton" and degree > 1:
        raise UserError(
            'loss.passes = "triton": its kernel reads whole rows of logits, which '
            f"parallelism.tensor_parallel_degree = {degree} spreads over ranks; expected "
            '"compiled" or "eager", set it'
        )


def _check_run(config: JobConfig) -> None:
    training, profiling, checkpoint = config.training, config.profiling, config.checkpoint
    local, total = training.local_batch_size, training.global_batch_size
    if total != -1 and total % local:
        raise UserError(
            f"training.global_batch_size = {total}: expected -1 or a multiple of "
            f"training.local_batch_size = {local}"
        )
    for key in ("dataset", "dataset_path"):
        if training.mixture and getattr(training, key) not in (getattr(Training, key), "", None):
            raise UserError(
                f"training.mixture and training.{key} = {show(getattr(training, key))}: both say"
                " what to train on; keep one of them"
            )
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise UserError(
            f"profiling.profile_freq = {profiling.profile_freq}: expected at least "
            f"profiler_warmup + profiler_active = {cycle}"
        )
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        raise UserError(
            "checkpoint.initial_load_in_hf = true: such a folder holds the weights only; set "
            "checkpoint.initial_load_model_only = true"
        )
    for key in ("create_seed_checkpoint", "initial_load_in_hf", "initial_load_path"):
        if (value := getattr(checkpoint, key)) and not checkpoint.enable:
            raise UserError(
                f"checkpoint.{key} = {show(value)}: needs checkpoint.enable = true (with "
                "checkpoint.load_only = true nothing is saved); set it, or unset this"
            )
    every = config.activation_checkpoint.selective_ac_option
    if every != "op" and not (re.fullmatch("[0-9]{1,9}", every) and int(every) >= 1):
        raise UserError(
            f'activation_checkpoint.selective_ac_option = {show(every)}: expected "op" or a '
            'positive number in quotes, such as "2"'
        )


def _check_context_parallel(config: JobConfig) -> None:
    degree, mtp = config.parallelism.context_parallel_degree, config.mtp
    key = f"parallelism.context_parallel_degree = {degree}"
    if degree == 1:
        return
    if config.model.name == "hf":
        raise UserError(f'{key}: model.name = "hf" has attention of its own; expected 1, set it')
    for table, length in _lengths(config).items():
        if length % (2 * degree):
            nearest = max(round(length / (2 * degree)), 1) * 2 * degree
            raise UserError(
                f"{table}.seq_len = {length}: expected a multiple of {2 * degree}, for {key} gives "
                f"each rank two chunks of a sequence; the nearest is {nearest}"
            )
        if mtp.target == "trunk" and config.num_future_tokens - 1 > length // (2 * degree):
            raise UserError(
                f'mtp.num_future_tokens = {mtp.num_future_tokens}: with mtp.target = "trunk" and '
                f"{key}, the last head looks no further than the next of {2 * degree} chunks of "
                f"{table}.seq_len = {length}; expected at most {length // (2 * degree) + 1}"
            )


def _check_pipeline_parallel(config: JobConfig) -> None:
    parallelism, training = config.parallelism, config.training
    key = f"parallelism.pipeline_parallel_degree = {parallelism.pipeline_parallel_degree}"
    if parallelism.pipeline_parallel_degree == 1:
        return
    if config.model.name == "hf":
        raise UserError(f'{key}: model.name = "hf" runs in one piece; expected 1, set it')
    size, local = parallelism.pipeline_parallel_microbatch_size, training.local_batch_size
    if local % size:
        nearest = max(d for d in range(1, local + 1) if local % d == 0 and d <= max(size, 1))
        raise UserError(
            f"parallelism.pipeline_parallel_microbatch_size = {size}: expected a divisor of "
            f"training.local_batch_size = {local}; the nearest below is {nearest}"
        )
    schedule, compiled = parallelism.pipeline_parallel_schedule, config.compile
    if schedule.endswith("ZeroBubble") and compiled.enable and "model" in compiled.components:
        raise UserError(
            f'parallelism.pipeline_parallel_schedule = "{schedule}": splits the backwards of '
            'blocks, which a compiled one does not; take "model" out of compile.components'
        )
    if config.mtp.train == "heads" and "mtp" in config.model.converters:
        raise UserError(
            f'mtp.train = "heads": with {key} nothing of the trunk has a backward to wait for; '
            "use data_parallel_shard_degree"
        )


def _check_expert_parallel(config: JobConfig) -> None:
    degree = config.parallelism.expert_parallel_degree
    if degree != 1 and config.model.name == "hf":
        raise UserError(
            f'parallelism.expert_parallel_degree = {degree}: model.name = "hf" has experts of its '
            "own; expected 1, set it"
        )


def _check_tensor_parallel(config: JobConfig) -> None:
    degree, context = (
        getattr(config.parallelism, f"{name}_parallel_degree") for name in ("tensor", "context")
    )
    key = f"parallelism.tensor_parallel_degree = {degree}"
    if degree == 1:
        return
    if config.model.name == "hf":
        raise UserError(f'{key}: model.name = "hf" has blocks of its own; expected 1, set it')
    # Chunks of context parallelism are cut once more, each into as many pieces.
    pieces = degree if context == 1 else context * math.lcm(2, degree)
    for table, length in _lengths(config).items():
        if length % pieces:
            nearest = max(round(length / pieces), 1) * pieces
            also = "" if context == 1 else f" and context_parallel_degree = {context}"
            raise UserError(
                f"{table}.seq_len = {length}: expected a multiple of {pieces}, for {key}{also} "
                f"give each rank as many positions; the nearest is {nearest}"
            )


def _lengths(config: JobConfig) -> dict[str, int]:
    """Lengths of sequences by table."""
    lengths = {"training": config.training.seq_len}
    return lengths | ({"validation": config.validation.seq_len} if config.validation.enable else {})


def _check_float8(config: JobConfig) -> None:
    float8 = config.quantize.linear.float8
    if "quantize.linear.float8" not in config.model.converters:
        return
    if float8.enable_fsdp_float8_all_gather and float8.recipe_name not in (None, "tensorwise"):
        raise UserError(
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true: needs recipe_name = "
            f'"tensorwise", found {show(float8.recipe_name)}'
        )
    if AUTO_FILTER in float8.filter_fqns and float8.recipe_name == "rowwise_with_gw_hp":
        raise UserError(
            f'quantize.linear.float8.filter_fqns has "{AUTO_FILTER}": torchao knows no sizes for '
            'recipe_name = "rowwise_with_gw_hp"; take it out, or take "tensorwise" or "rowwise"'
        )


def _check_mtp_is_meant(config: JobConfig, given: Collection[str]) -> None:
    """Keys of [mtp] without the converter would silently train without heads."""
    if config.mtp.num_future_tokens == 1 and config.mtp.train != "heads":
        return  # plain next-token prediction either way
    written = sorted(name for name in given if name.split(".")[0] == "mtp")
    own = options(type(config.mtp), ("mtp",)).values()
    written += [option.name for option in own if option.get(config) != option.default]
    if written:
        raise UserError(
            f"{written[-1]} is set but model.converters = {show(config.model.converters)} lacks "
            '"mtp"; add it, or remove [mtp]'
        )


# Keys and values that one family of heads has, and why.
_FAMILY = [
    ("share_weights", True, "sequential", "parallel heads with one module would say one token"),
    ("trunk_state", "raw", "sequential", "parallel heads read the state under the last layer"),
    ("match_parameters", True, "parallel", "its heads have the size of the layers they replace"),
]


def _check_mtp(config: JobConfig) -> None:
    mtp, n = config.mtp, config.mtp.num_future_tokens
    for table, length in _lengths(config).items():
        if n > length:
            message = f"mtp.num_future_tokens = {n}: expected at most {table}.seq_len = {length}"
            raise UserError(message)
    if n > 1 and mtp.engine == "joint" and mtp.heads == "sequential":
        raise UserError(
            'mtp.engine = "joint": mtp.heads = "sequential" has one way; '
            'set mtp.engine = "head_by_head"'
        )
    for key, value, heads, why in _FAMILY:
        if getattr(mtp, key) == value and mtp.heads != heads:
            needs = f'mtp.{key} = {show(value)}: needs mtp.heads = "{heads}"'
            raise UserError(f"{needs}: {why}; set it, or leave mtp.{key} unset")
    if mtp.loss_weights and len(mtp.loss_weights) != n - 1:
        raise UserError(
            f"mtp.loss_weights has {len(mtp.loss_weights)} entries: expected none, or one for each "
            f"of heads 2..n, num_future_tokens - 1 = {n - 1}"
        )
    if mtp.loss_weights and mtp.loss_decay != 1:
        raise UserError(
            f"mtp.loss_decay = {show(mtp.loss_decay)}: mtp.loss_weights = {show(mtp.loss_weights)} "
            "has the weights of heads 2..n already; unset one of them"
        )
    for key in ("target_loss", "target_weight"):
        if mtp.target == "labels" and getattr(mtp, key) != getattr(type(mtp), key):
            raise UserError(
                f"mtp.{key} = {show(getattr(mtp, key))}: is of heads that learn from the trunk; "
                f'set mtp.target = "trunk", or leave mtp.{key} unset'
            )
    if mtp.train == "trunk" and mtp.detach_trunk:
        raise UserError(
            "mtp.detach_trunk = true: nothing would learn from heads 2..n, which are frozen by "
            'mtp.train = "trunk"; unset one of them, or set mtp.loss_scale = 0 for the first'
        )
    if mtp.train == "heads" and n == 1:
        raise UserError('mtp.train = "heads": needs mtp.num_future_tokens of at least 2, found 1')


_SCHEDULE = "loss_scale_schedule"
# Keys of [mtp] that other values than their default need of another key, and why.
_NEEDS = [
    ("loss_scale_final", _SCHEDULE, ("linear", "step"), "a constant one ends as it begins"),
    ("loss_scale_boundary", _SCHEDULE, ("step",), "no other has a step"),
    ("curriculum_fraction", "curriculum", ("forward", "reverse"), "without one it says nothing"),
    ("curriculum", "train", ("all", "trunk"), "while head 1 is alone, nothing would train"),
    ("init", "heads", ("parallel", "sequential"), "light heads have nothing of a layer"),
]


def check_new_run(config: JobConfig) -> None:
    """Raises a UserError for the first key of [mtp] that would do nothing, or leave nothing to
    train. Not of a run that goes on: its beginning was taken, maybe by an earlier version."""
    mtp = config.mtp
    if "mtp" not in config.model.converters:
        return
    for key, other, values, why in _NEEDS:
        value = getattr(mtp, key)
        if value != getattr(type(mtp), key) and getattr(mtp, other) not in values:
            needs = f"needs mtp.{other} = {' or '.join(map(show, values))}: {why}"
            message = f"mtp.{key} = {show(value)}: {needs}; set it, or leave mtp.{key} unset"
            raise UserError(message)
    last = mtp.loss_scale if mtp.loss_scale_schedule == "constant" else mtp.loss_scale_final
    if mtp.train == "heads":
        key = "loss_weights" if mtp.loss_weights and not any(mtp.loss_weights) else "loss_scale"
        if key == "loss_weights" or not (mtp.loss_scale or last):
            told = f"mtp.{key} = {show(getattr(mtp, key))}"
            raise UserError(f'{told}: with mtp.train = "heads" nothing trains; raise it')

"""Which layers each stage of a pipeline has, and a model cut into them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

from torch import nn

from torchtitan_mtp.config import Parallelism
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk

# Those of torch with one stage a rank; in the last two a stage's backward is in two parts, one for
# what is sent on and one for the weights, which fills what is else a bubble.
ONE_STAGE = ("1F1B", "GPipe")
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble")
V_SHAPED = "ZBVZeroBubble"  # its first and last stage are on the same rank

_KEY = "parallelism.pipeline_parallel"


def layers_of_stages(parallelism: Parallelism, layers: int, heads_cost: float) -> list[range]:
    """The layers of every stage, as TorchTitan v0.2 deals them: with the first stage's embedding
    and the last one's heads counted as so many layers more.

    heads_cost: what stands behind the trunk's layers, in layers' worth of work; it counts where
    `pipeline_parallel_last_stage_less_layers` does not say, as far as a layer is left.

    Errors: more stages than layers, or another number of stages than the schedule has.
    """
    first = parallelism.pipeline_parallel_first_stage_less_layers or 0
    given = parallelism.pipeline_parallel_last_stage_less_layers
    last = round(heads_cost) if given is None else given
    stages = _number_of_stages(parallelism, layers, layers + first + (given or 0))
    counts, least = _deal(layers, stages, first, last), (first, last)
    while min(counts) < 1:
        least = (least[0] - 1, least[1]) if counts[0] < 1 else (least[0], least[1] - 1)
        counts = _deal(layers, stages, *least)
    for end, asked, nearest in zip(("first", "last"), (first, given), least, strict=True):
        if asked is not None and asked != nearest:
            raise UserError(
                f"{_KEY}_{end}_stage_less_layers = {asked}: leaves the {end} of {stages} stages no "
                f"layer of {layers}; the nearest that does is {nearest}"
            )
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _number_of_stages(parallelism: Parallelism, layers: int, work: int) -> int:
    """work: layers, and what counts as so many more. Errors: those of `layers_of_stages`."""
    ranks, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    each = parallelism.pipeline_parallel_layers_per_stage
    a_rank = 1 if schedule in ONE_STAGE else 2
    least = ranks * a_rank
    if least > layers:
        raise UserError(
            f"{_KEY}_degree = {ranks}: {least} stages of a model of {layers} layers, expected at "
            f"most as many as layers; lower it to {max(layers // a_rank, 1)}, or take a deeper "
            "flavor"
        )
    if each is None:
        return least
    fixed = schedule in ONE_STAGE or schedule == V_SHAPED
    fit = range(least, least + 1 if fixed else layers + 1, ranks)
    stages = math.ceil(work / each)
    if stages not in fit:
        # The fewest and the most layers that give as many stages.
        ends = [
            d for n in fit for d in (-(-work // n), (work - 1) // (n - 1)) if -(-work // d) == n
        ]
        nearest = min(ends, key=lambda d: abs(d - each), default=None)
        raise UserError(
            f"{_KEY}_layers_per_stage = {each}: {stages} stages on {ranks} ranks, expected "
            f"{least if fixed else f'a multiple of {ranks} from {least} to {layers}'} for "
            f'{_KEY}_schedule = "{schedule}"; '
            + (f"the nearest is {nearest}" if nearest else "no number gives that: leave it unset")
        )
    return stages


def _deal(layers: int, stages: int, first: int, last: int) -> list[int]:
    each, rest = divmod(layers + first + last, stages)
    counts = [each + (i < rest) for i in range(stages)]
    counts[0] -= first
    counts[-1] -= last
    return counts


def check_schedule(parallelism: Parallelism, model: Trunk, count: int, window: int = 1) -> None:
    """Error: the schedule does not take `count` micro-batches a step, a multiple of those in a
    loader's `window`, or has the first and the last stage on one rank, where the model would need
    the embedding twice."""
    ranks, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if schedule == V_SHAPED and has_copy(model):
        what = "tied embeddings" if model.args.tied_embeddings else 'mtp.heads = "sequential"'
        raise UserError(
            f'{_KEY}_schedule = "{schedule}": has the first and the last stage on one rank, and '
            f"{what} would need the embedding on both; take InterleavedZeroBubble"
        )

    def fits(n: int) -> bool:
        if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
            return n >= ranks and n % (n // ranks) == 0
        return schedule != "1F1B" or n >= ranks

    if not fits(count):
        nearest = next(n for n in range(count, count + ranks * window + 1, window) if fits(n))
        raise UserError(
            f'{_KEY}_schedule = "{schedule}" on {ranks} ranks: a step has {count} micro-batches, '
            f"the next number that it takes is {nearest}; set training.global_batch_size to so "
            f"many times {_KEY}_microbatch_size on each data rank"
        )


def stages_of_rank(rank: int, ranks: int, stages: int, schedule: str) -> list[int]:
    """The stages of a rank of the pipeline: every so-many-th one, or in a V, down and up again."""
    if schedule == V_SHAPED:
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, ranks))


def has_copy(model: Trunk) -> bool:
    """Whether the last stage has the embedding too: for future tokens, or tied to `output`."""
    reads = model.mtp is not None and model.mtp.reads_future_tokens
    return reads or model.args.tied_embeddings


def cut(model: Trunk, layers: Sequence[range], own: Sequence[int]) -> dict[int, Trunk]:
    """The stages `own` of a model on the meta device, each with its layers under their own names;
    the first has the embedding, the last one norm, `output` and heads."""
    twice, parts = has_copy(model), {}
    whole = _names(model)
    for i in own:
        blocks = {str(number): model.layers[str(number)] for number in layers[i]}
        first, last = i == 0, i == len(layers) - 1
        embeds = first or (last and twice)
        parts[i] = _with_modules(
            model,
            {
                "tok_embeddings": model.tok_embeddings if embeds else None,
                "layers": nn.ModuleDict(blocks),
                "norm": model.norm if last else None,
                "output": model.output if last else None,
                "mtp": model.mtp if last else None,
            },
        )
        parts[i].whole = whole
    return parts


def _names(model: Trunk) -> dict[str, set[str]]:
    """The names of a model's tensors, each with all names of the same one."""
    named = model.state_dict(keep_vars=True).items()
    names: dict[int, set[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), set()).add(name)
    return {name: names[id(tensor)] for name, tensor in named}


def join(model: Trunk, parts: Sequence[Trunk]) -> Trunk:
    """One model of a rank's stages, for what goes by names and parameters; it has no forward."""
    if len(parts) == 1:
        return parts[0]
    modules = {}
    for name in model._modules:
        found = [part._modules[name] for part in parts if part._modules[name] is not None]
        modules[name] = found[0] if found else None
    modules["layers"] = nn.ModuleDict({i: b for part in parts for i, b in part.layers.items()})
    joined = _with_modules(model, modules)
    joined.whole = parts[0].whole
    return joined


def _with_modules(model: Trunk, modules: Mapping[str, nn.Module | None]) -> Trunk:
    """The model with other modules at its top; all else is shared."""
    part = copy.copy(model)
    part._modules = dict(modules)
    part._buffers = dict(model._buffers)
    return part

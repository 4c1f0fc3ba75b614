"""Layers dealt to the stages of a pipeline, and a model cut into them."""

from __future__ import annotations

import pytest

from tests.small import ARGS
from torchtitan_mtp.config import MTP, Parallelism
from torchtitan_mtp.distributed.stages import (
    check_schedule,
    cut,
    has_copy,
    join,
    layers_of_stages,
    stages_of_rank,
)
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads


def keys(degree: int, **others) -> Parallelism:
    named = {f"pipeline_parallel_{name}": value for name, value in others.items()}
    return Parallelism(pipeline_parallel_degree=degree, **named)


def counts(parallelism: Parallelism, layers: int, cost: float = 0.0) -> list[int]:
    stages = layers_of_stages(parallelism, layers, cost)
    assert [i for stage in stages for i in stage] == [*range(layers)]
    return [len(stage) for stage in stages]


def test_layers_are_dealt_as_torchtitan_deals_them():
    """Three of its `generate_llm_fqn_per_model_part`: (stages, layers, weights) as its docstring
    and tests have them, and Llama 3 8B with its defaults."""
    ends = {"first_stage_less_layers": 1, "last_stage_less_layers": 1}
    assert counts(keys(2, **ends), 3) == [2, 1]
    two = {"first_stage_less_layers": 2, "last_stage_less_layers": 2}
    assert counts(keys(2, **two), 3) == [2, 1]
    assert counts(keys(4, **ends), 32) == [8, 9, 8, 7]
    assert counts(keys(4, **ends, schedule="Interleaved1F1B"), 32) == [4, 5, 4, 4, 4, 4, 4, 3]


def test_heads_count_as_layers_of_the_last_stage():
    assert counts(keys(4), 32) == [8, 8, 8, 8]
    assert counts(keys(4), 32, 4.4) == [9, 9, 9, 5]
    assert counts(keys(4), 8, 2.6) == [3, 2, 2, 1]  # a layer is left
    assert counts(keys(4, last_stage_less_layers=0), 8, 2.6) == [2, 2, 2, 2]
    assert counts(keys(2, layers_per_stage=2, schedule="LoopedBFS"), 8) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("parallelism", "layers", "told"),
    [
        (keys(4), 3, "degree = 4: 4 stages of a model of 3 layers.* to 3,"),
        (keys(2, schedule="ZBVZeroBubble"), 3, "4 stages of a model of 3 layers.* to 1,"),
        (keys(2, last_stage_less_layers=9), 4, "last of 2 stages no layer of 4; .* is 2$"),
        (keys(2, first_stage_less_layers=9), 4, "first of 2 stages no layer of 4; .* is 3$"),
        (keys(2, layers_per_stage=1), 4, "= 1: 4 stages on 2 ranks, .* nearest is 2$"),
        (keys(2, layers_per_stage=2, schedule="GPipe"), 8, "= 2: 4 stages .* nearest is 4$"),
        (keys(2, layers_per_stage=4, schedule="LoopedBFS"), 8, "from 4 to 8 .* nearest is 2$"),
        (keys(2, layers_per_stage=8, schedule="GPipe"), 8, "= 8: 1 stages .* nearest is 7$"),
        (keys(4, layers_per_stage=3), 6, "= 3: 2 .* expected 4 for .* gives that: leave it unset$"),
    ],
)
def test_what_does_not_fit_names_the_nearest_that_does(parallelism, layers, told):
    with pytest.raises(UserError, match=f"^parallelism.pipeline_parallel.*{told}"):
        layers_of_stages(parallelism, layers, 0.0)


@pytest.mark.parametrize(
    ("schedule", "fits", "refused"),
    [
        ("1F1B", (4, 5), {3: 4}),
        ("GPipe", (1, 3), {}),
        ("Interleaved1F1B", (4, 7, 8, 10), {2: 4, 9: 10}),
        ("InterleavedZeroBubble", (4, 8), {11: 12}),
    ],
)
def test_the_schedules_take_so_many_micro_batches(schedule, fits, refused):
    parallelism, model = keys(4, schedule=schedule), build_model(ARGS)
    for count in fits:
        check_schedule(parallelism, model, count)
    for count, nearest in refused.items():
        with pytest.raises(UserError, match=f"has {count} micro-batches, .* takes is {nearest}; "):
            check_schedule(parallelism, model, count)


def test_the_number_of_micro_batches_that_is_named_is_of_whole_windows():
    """Of windows with two each: 16 is no multiple of 16 // 3, and 15 no number of whole windows."""
    parallelism, model = keys(3, schedule="Interleaved1F1B"), build_model(ARGS)
    with pytest.raises(UserError, match=r"has 14 micro-batches, .* takes is 18; "):
        check_schedule(parallelism, model, 14, 2)


def test_stages_of_ranks():
    assert [stages_of_rank(r, 2, 6, "Interleaved1F1B") for r in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert [stages_of_rank(r, 2, 4, "ZBVZeroBubble") for r in (0, 1)] == [[0, 3], [1, 2]]


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_parts_have_the_names_of_the_whole(heads):
    model = add_heads(build_model(ARGS), MTP(num_future_tokens=3, heads=heads))
    layers = [range(1), range(1, 2), range(2, 3)]
    parts = [cut(model, layers, [i])[i] for i in range(3)]
    named = [{name for name, _ in part.named_parameters()} for part in parts]
    whole = {name for name, _ in model.named_parameters()}
    assert set.union(*named) == whole == {*parts[0].whole}
    copy = {"tok_embeddings.weight"} if heads == "sequential" else set()
    assert has_copy(model) == bool(copy) and named[0] & named[2] == copy
    assert not named[0] & named[1] and not named[1] & named[2]
    assert {name.split(".")[0] for name in named[1]} == {"layers"}
    joined = join(model, [parts[0], parts[2]])
    assert {name for name, _ in joined.named_parameters()} == named[0] | named[2]
    assert [name for name, _ in joined.named_blocks()][:2] == ["layers.0", "layers.2"]


def test_the_embedding_is_not_twice_on_a_rank():
    model = add_heads(build_model(ARGS), MTP(num_future_tokens=2, heads="sequential"))
    with pytest.raises(UserError, match=r"ZBVZeroBubble.*would need the"):
        check_schedule(keys(2, schedule="ZBVZeroBubble"), model, 4)
    check_schedule(keys(2, schedule="ZBVZeroBubble"), build_model(ARGS), 4)

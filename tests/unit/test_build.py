"""From a configuration to sizes to a model, and back."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
import torch

from tests.formats_run import DEEPSEEK, LLAMA_3_1, PARALLEL, SEQUENTIAL, SMALL, YARN, make_config
from tests.small import ARGS
from torchtitan_mtp import build
from torchtitan_mtp.config import MTP, JobConfig
from torchtitan_mtp.config.sections import model as tables
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models import args as shapes
from torchtitan_mtp.models.args import ModelSpec
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads

CASES = {
    "trunk": SMALL,
    "scaled": SMALL | LLAMA_3_1 | PARALLEL,
    "matched": SMALL | PARALLEL | {"model.args.n_layers": 5, "mtp.match_parameters": True},
    "chain": SMALL | SEQUENTIAL | {"mtp.share_weights": True, "mtp.trunk_state": "raw"},
    "experts": DEEPSEEK | YARN | SEQUENTIAL,
}


@pytest.mark.parametrize("name", CASES)
def test_a_models_sizes_are_those_that_its_configuration_tells(name):
    config = make_config(**CASES[name])
    rows = config.model.vocab_size or 320
    config.model.vocab_size = rows
    model = build.model_from_config(config, 259, torch.bfloat16)
    told = build.spec_from_config(config, rows)
    longest = max(config.training.seq_len, config.validation.seq_len)
    assert model.spec == replace(told, args=replace(told.args, max_seq_len=longest))
    assert model.args.n_layers == len(model.layers)
    heads = 0 if model.mtp is None else len(model.mtp.heads)
    assert (told.num_modules, bool(told.heads)) == (heads, heads > 0)
    assert build.parameter_shapes(told) == {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not (name == "output.weight" and told.args.tied_embeddings)
    }
    # A configuration that is written from the sizes builds the same model again.
    again = JobConfig()
    build.write_spec_to_config(again, told)
    found = build.spec_from_config(again, rows)
    assert build.differing_sizes(found.args, told.args) == []
    assert replace(found, args=told.args) == told
    assert build.parameter_shapes(found) == build.parameter_shapes(told)


def test_one_layer_less_for_every_head_but_the_first():
    """Gloeckle et al. 2024, section 3: n - 1 = 2 of 5 layers become heads."""
    model = add_heads(build_model(replace(ARGS, n_layers=5)), MTP(match_parameters=True))
    assert (model.args.n_layers, model.spec.num_modules) == (2, 3)


def test_without_the_converter_there_is_one_future_token():
    config = make_config(**SMALL | PARALLEL)
    assert config.num_future_tokens == 3
    config.model.converters = []
    assert (config.num_future_tokens, config.mtp.num_future_tokens) == (1, 3)
    assert build.model_from_config(config, 259, torch.float32).mtp is None


def test_a_family_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r'mtp.heads = "eagle": expected one of parallel, seq'):
        build.parameter_shapes(ModelSpec(ARGS, "eagle", 3))


def test_every_key_of_model_args_is_a_size():
    """The table's keys, and its tables' keys, are fields of the shapes that they set."""
    for table, shape in (
        (tables.ModelArgs, shapes.ModelArgs),
        (tables.LatentArgs, shapes.LatentArgs),
        (tables.MoEArgs, shapes.MoEArgs),
    ):
        assert {f.name for f in fields(table)} <= {f.name for f in fields(shape)}
    scalings = {key for kind in shapes.ROPE_SCALINGS.values() for key in asdict(kind())}
    assert {f.name for f in fields(tables.RoPEScalingArgs)} == scalings | {"rope_type"}

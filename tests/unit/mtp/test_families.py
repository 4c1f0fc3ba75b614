"""What every family has to have, wherever its name or class is looked up."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from tests.small import ARGS
from torchtitan_mtp.build import parameter_shapes
from torchtitan_mtp.config import MTP
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.drafting import DRAFTERS
from torchtitan_mtp.models.args import ModelSpec
from torchtitan_mtp.mtp.transform import FAMILIES


def test_a_family_has_its_word_and_its_drafter():
    assert get_args(get_type_hints(MTP)["heads"]) == tuple(FAMILIES)
    assert set(FAMILIES.values()) == set(DRAFTERS)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_heads_have_names_of_their_own(name):
    """The trunk keeps its names, and nothing of it is named a second time."""
    trunk, whole = parameter_shapes(ModelSpec(ARGS)), parameter_shapes(ModelSpec(ARGS, name, 3))
    own = whole.keys() - trunk.keys()
    assert {key: whole[key] for key in trunk} == trunk
    assert own and all(key.startswith(("mtp.heads.0.", "mtp.heads.1.")) for key in own)


def test_an_unknown_family_is_refused_by_name():
    told = 'mtp.heads = "eagle": expected one of parallel, sequential, medusa'
    with pytest.raises(UserError, match=told):
        parameter_shapes(replace(ModelSpec(ARGS), heads="eagle", num_future_tokens=3))

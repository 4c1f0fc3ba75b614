"""Light heads beyond what all families have in common: how they start, and what can't hold them."""

from __future__ import annotations

import pytest
import torch

from formats_run import PARALLEL, SMALL, write_run
from tests.small import ARGS, small_window
from torchtitan_mtp.config import MTP, parse_args
from torchtitan_mtp.data.targets import make_batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import FORMATS, export_checkpoint
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import ENGINES, add_heads
from torchtitan_mtp.ops import LossOptions

N = 3


def test_heads_start_as_head_1_and_learn_from_there():
    """Cai et al. 2024, section 2.1.1: W_1 is zero to begin with. It does not stay so: silu's slope
    at zero is a half."""
    model = add_heads(build_model(ARGS), MTP(heads="medusa", num_future_tokens=N))
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    assert [name for name, _ in model.mtp.named_parameters()] == [
        f"heads.{j}.linear.weight" for j in range(N - 1)
    ]
    batch = make_batch(small_window(2, 12 + N), N)
    first, *others = model(batch)
    assert all(torch.equal(h, first) for h in others)
    ENGINES["head_by_head"](model, batch, torch.ones(N), LossOptions(), True)
    assert all(p.grad.count_nonzero() > 0 for p in model.mtp.parameters())


def test_no_other_format_holds_them(tmp_path):
    run, keys = tmp_path / "run", PARALLEL | {"mtp.heads": "medusa", "mtp.num_future_tokens": N}
    write_run(run, **(SMALL | keys))
    for name in FORMATS.keys() - {"medusa"}:
        with pytest.raises(UserError, match=r"medusa heads .*--drop_heads|is for models|takes"):
            export_checkpoint(run, tmp_path / name, name)
    with pytest.raises(UserError, match=r"can't hold the 2 medusa heads .*; try medusa, or leave"):
        export_checkpoint(run, tmp_path / "out", "llama_hf")
    assert export_checkpoint(run, tmp_path / "out", "llama_hf", drop_heads=True).heads == ""


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--mtp.share_weights", "mtp.share_weights = true: needs"),
        ("--mtp.trunk_state=raw", 'mtp.trunk_state = "raw": needs'),
        ("--mtp.match_parameters", "mtp.match_parameters = true: needs"),
    ],
)
def test_keys_of_other_families_are_refused(option, told):
    with pytest.raises(UserError, match=told):
        parse_args(["--model.converters=mtp", "--mtp.heads=medusa", option])

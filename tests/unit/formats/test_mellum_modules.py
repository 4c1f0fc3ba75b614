"""Mellum's module is a layer of the kind that config.json says, with full attention or a window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_native_modules import INDEX, config_of, files_of, loaded, write_run

from native_folders import LAYERS, write_native
from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint


def change_config(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changes))


def without_module(folder: Path) -> set[str]:
    """Take the module out; the names that it had."""
    file, index = folder / "model-00003-of-00003.safetensors", folder / INDEX
    names, told = set(load_file(file)), json.loads(index.read_text())
    told["weight_map"] = {k: f for k, f in told["weight_map"].items() if k not in names}
    index.write_text(json.dumps(told))
    file.unlink()
    change_config(folder, num_nextn_predict_layers=0)
    return names


def check_drafts(folder: Path, model: Any) -> None:
    """transformers' `MtpModel` on the folder has our heads' states, beyond a window of 5, too."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    tokens = torch.randint(3, 200, (1, 20))
    batch = make_batch(Window(tokens, torch.zeros_like(tokens)), 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    size = batch.tokens.shape[1]
    with torch.no_grad():
        ours = model(batch)
        state = theirs(batch.tokens, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(state, ours[0], rtol=0, atol=2e-5)
        cache = MtpCache(config=theirs.config.get_mtp_config())
        state = MtpModel.from_pretrained(theirs).forward_layer(
            0, state, batch.positions, cache, input_ids=tokens[:, 1 : 1 + size]
        )
    torch.testing.assert_close(state, ours[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("told", [{}, {"mtp_layer_types": ["sliding_attention"]}])
def test_a_module_slides_and_comes_back(told: dict[str, Any], tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    write_native(source, "mellum")
    change_config(source, **told)
    config = config_of(source, 2, False)
    model = loaded(source, config)
    assert model.head_layer == LAYERS - 2
    check_drafts(source, model)
    export_checkpoint(write_run(tmp_path / "run", model, config), out, "same")
    assert files_of(out) == files_of(source)


def test_a_new_module_is_told_of(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    write_native(source, "mellum")
    names = without_module(source)
    config = config_of(source, 2, False)
    model = loaded(source, config)
    assert model.head_layer == LAYERS - 1
    export_checkpoint(write_run(tmp_path / "run", model, config), out, "same")
    assert set(load_file(out / "model-mtp.safetensors")) == names
    told = json.loads((out / "config.json").read_text())
    assert told["num_nextn_predict_layers"] == 1
    assert told["mtp_layer_types"] == ["full_attention"]
    assert told["mtp_mlp_layer_types"] == ["sparse"]
    check_drafts(out, model)


def test_a_module_that_no_layer_is_like(tmp_path: Path) -> None:
    source = tmp_path / "model"
    write_native(source, "mellum")
    change_config(source, layer_types=["full_attention"] * LAYERS)
    with pytest.raises(UserError) as error:
        loaded(source, config_of(source, 2, False))
    assert str(error.value) == (
        f"{source}: config.json: mtp_layer_types = ['sliding_attention'], and the trunk has no "
        "such layer to copy; exclude mtp from loading"
    )
    loaded(source, config_of(source, 2, False), ("mtp",))

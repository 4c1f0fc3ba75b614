"""One module for several drafts: an export says where vLLM applies it otherwise than training."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_native_modules import config_of, loaded, write_run

import formats_run
from native_folders import write_native
from torchtitan_mtp.formats import export_checkpoint
from torchtitan_mtp.formats.native_modules import applied_otherwise
from torchtitan_mtp.models.args import ModelArgs, ModelSpec

TOLD = (
    "mtp.share_weights: the module was trained to read its own state after its norm, vLLM's "
    "Glm4MoeForCausalLM hands it the one before; look at how often second drafts are accepted"
)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "mtp.share_weights" in text]


@pytest.mark.parametrize(
    ("architecture", "n", "share", "differs"),
    [
        ("DeepseekV3ForCausalLM", 3, True, True),
        ("Glm4MoeForCausalLM", 4, True, True),
        ("Glm4MoeForCausalLM", 2, True, False),  # applied once
        ("Glm4MoeForCausalLM", 3, False, False),  # a module for each
        ("Qwen3NextForCausalLM", 3, True, False),
        ("Qwen3_5ForCausalLM", 3, True, False),
        ("MellumForCausalLM", 3, True, False),
        ("MiMoForCausalLM", 3, True, False),
        ("LlamaForCausalLM", 3, True, False),
    ],
)
def test_where_it_differs(architecture: str, n: int, share: bool, differs: bool) -> None:
    spec = ModelSpec(ModelArgs(), "sequential", n, share)
    assert bool(applied_otherwise(spec, architecture)) == differs


def test_exports_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = formats_run.SMALL | formats_run.SEQUENTIAL | {"mtp.share_weights": True}
    formats_run.write_run(tmp_path / "own", **changes)
    export_checkpoint(tmp_path / "own", tmp_path / "glm", "glm4_moe_hf")
    assert told(caplog) == [f"{tmp_path / 'glm'}: {TOLD}"]
    caplog.clear()
    write_native(tmp_path / "model", "glm4_moe")
    config = config_of(tmp_path / "model", 3, False, share_weights=True)
    run = write_run(tmp_path / "run", loaded(tmp_path / "model", config), config)
    export_checkpoint(run, tmp_path / "same", "same")
    assert told(caplog) == [f"{tmp_path / 'same'}: {TOLD}"]

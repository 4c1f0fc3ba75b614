"""Triton's passes over logits: in its interpreter against whole logits in float64, and compiled for
GPUs that need not be there."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from loss_inputs import OPTIONS, make_inputs
from torch import Tensor
from triton_cases import cases, check, inputs

from tests.allocations import most_alive
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.ops import LossOptions, head_loss_and_grad, linear_cross_entropy

triton = pytest.importorskip("triton")  # there is none but for Linux
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[Tensor | None]]:
    """Of every case what the interpreter computed."""
    out = tmp_path_factory.mktemp("triton") / "found.pt"
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    program = [sys.executable, "-W", "ignore", str(HERE / "triton_cases.py"), str(out)]
    subprocess.run(program, env=environment, check=True)
    return torch.load(out)


def test_a_table_of_shapes_dtypes_and_options(found):
    for case, results in zip(cases(), found, strict=True):
        if case.filled is None:
            check(case, results)


def test_not_finite_logits_are_what_they_are_in_torchs_operations(found):
    for case, results in zip(cases(), found, strict=True):
        if case.filled is not None:
            given = inputs(case)
            losses, d_hidden = head_loss_and_grad(
                **given | {"options": given["options"]._replace(passes="eager")}
            )
            eager = [*losses, d_hidden, given["d_weight"]]
            torch.testing.assert_close(results, eager, equal_nan=True)


def compiled(
    logits: str, arch: int, options: dict[str, Any], loss: str | None, vocab: int
) -> tuple[str, str]:
    """The kernel for one architecture: its PTX, and what ptxas says of it. loss: to a teacher."""
    triton_losses = importlib.import_module("torchtitan_mtp.ops.triton_losses")
    kernel = triton_losses._row_kernel
    constants = {
        "IGNORE": -100,
        "Z_LOSS": options["z_loss"],
        "SOFTCAP": options["softcap"],
        "SMOOTHING": options["label_smoothing"],
        "TARGET": loss,
        "SHARE": 0.6 if loss else 0.0,
        "NEED_GRAD": True,
        "BLOCK": triton_losses.columns_at_a_time(vocab, loss is not None),
    } | ({} if loss else {"teacher": None})
    sizes = ("logits_stride", "grad_stride", "vocab")
    types = {"logits": logits, "teacher": logits, "grad": "*bf16"}
    types |= {"labels": "*i64", "correct": "*i32"}
    types |= dict.fromkeys(sizes, "i32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and not (vocab % 16 and name in sizes)
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    warps = constants["BLOCK"] // 256
    ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    assembler = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    named = re.search(r"\.target (\w+)", ptx)
    assert assembler is not None and named is not None
    command = [assembler.path, "-v", f"-arch={named[1]}", "-", "-o", os.devnull]
    told = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    return ptx, told.stderr


# What takes the most registers is in every suite, the rest in the exhaustive one.
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
@pytest.mark.parametrize(
    ("options", "loss", "vocab"),
    [
        (OPTIONS[-1], None, 128256),
        (OPTIONS[-1], "kl", 128256),
        pytest.param(OPTIONS[0], None, 128256, marks=pytest.mark.exhaustive),
        pytest.param(OPTIONS[0], "kl", 128256, marks=pytest.mark.exhaustive),
        pytest.param(OPTIONS[0], "lk", 128256, marks=pytest.mark.exhaustive),
        pytest.param(OPTIONS[-1], "lk", 128256, marks=pytest.mark.exhaustive),
        pytest.param(OPTIONS[-1], None, 151669, marks=pytest.mark.exhaustive),
        pytest.param(OPTIONS[-1], "kl", 151669, marks=pytest.mark.exhaustive),
        pytest.param(OPTIONS[-1], "lk", 151669, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_compiled_ahead_of_time_without_spills(
    arch, logits, options, loss, vocab, tmp_path, monkeypatch, record_property
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, told = compiled(logits, arch, options, loss, vocab)
    assert "0 bytes spill stores, 0 bytes spill loads" in told
    registers = re.search(r"Used (\d+) registers", told)
    # Of 65,536, with 1,024 threads or 512.
    assert registers and int(registers[1]) <= (128 if loss and vocab % 16 else 64)
    record_property("registers", int(registers[1]))
    assert ".rn.bf16" in ptx  # gradients are rounded
    assert "ld.global.nc" not in ptx  # a cache that would not see the row being overwritten


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_no_memory(monkeypatch, logits):
    """It starts where each row of logits does."""
    kernel = MagicMock()
    module = importlib.import_module("torchtitan_mtp.ops.triton_losses")
    monkeypatch.setattr(module, "_row_kernel", kernel)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    x, y = torch.zeros(16, 4096, dtype=logits), torch.zeros(16, dtype=torch.int64)
    arguments = (x, y, LossOptions(), None, None, torch.bfloat16)
    assert most_alive(lambda: module.triton_token_losses(*arguments)) < 1024
    _, gradient = module.triton_token_losses(*arguments)
    assert gradient.shape == x.shape and gradient.dtype == torch.bfloat16
    for row, of_row in zip(x, gradient, strict=True):
        assert row.data_ptr() == of_row.data_ptr()
    assert kernel.__getitem__.call_args.args == ((16,),)  # a program a row


def test_errors_say_what_to_do(monkeypatch):
    hiddens, weight, labels = make_inputs(n=2, dtype=torch.float32)
    with pytest.raises(UserError, match=r"triton.* logits are on cpu; expected a CUDA device"):
        linear_cross_entropy(hiddens, weight, labels, passes="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "torchtitan_mtp.ops.triton_losses", raising=False)
    with pytest.raises(UserError, match="triton is not installed; pip install triton"):
        linear_cross_entropy(hiddens, weight, labels, passes="triton")

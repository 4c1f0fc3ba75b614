"""The cases of `benchmark.py gpu`: each runs in a process of its own and gives rows."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from benchmarks import decode, loss
from benchmarks.measure import measure_here, synchronize
from benchmarks.report import Rows
from benchmarks.train import built_trainer, train
from torchtitan_mtp.config import MTP
from torchtitan_mtp.data.targets import list_documents
from torchtitan_mtp.models import packed
from torchtitan_mtp.models.attention import attend
from torchtitan_mtp.models.flavors import model_args
from torchtitan_mtp.models.init import init_weights
from torchtitan_mtp.models.transformer import build_model
from torchtitan_mtp.mtp import add_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOP_KERNELS = 25


def sustained(call: Callable[[], object], seconds: float) -> float:
    """Seconds a call, over as many in a row as fill `seconds`: clocks fall under load."""
    call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    count = max(2, int(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


# ---------------------------------------------------------------- products and attention


def products(sizes: dict[str, tuple[int, int, int]], kind: str, seconds: float) -> Rows:
    """Sustained rates of products [m, k] x [k, n] by name. kind: a dtype, or float8's "tensorwise"
    or "rowwise" scales."""
    return [
        {"product": name, "m, k, n": f"{m}, {k}, {n}", "kind": kind}
        | {"TFLOP/s": 2e-12 * m * k * n / sustained(_product(kind, m, k, n), seconds)}
        for name, (m, k, n) in sizes.items()
    ]


def _product(kind: str, m: int, k: int, n: int) -> Callable[[], object]:
    a, b = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    if kind not in ("tensorwise", "rowwise"):
        left, right = a.to(getattr(torch, kind)), b.to(getattr(torch, kind)).t()
        return lambda: left @ right
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    shapes = ((m, 1), (1, n)) if kind == "rowwise" else ((), ())
    scales = [torch.ones(shape, device=DEVICE) for shape in shapes]
    return lambda: torch._scaled_mm(a8, b8, *scales, out_dtype=torch.bfloat16)


def attention(kind: str, shape: dict[str, Any], seconds: float) -> Rows:
    """Forward and backward of one layer's attention. kind: "causal", or within documents "mask",
    "flex", "flex as torch sets it" or "varlen". FLOPs are those that the mask leaves."""
    batch, seq, heads, kv, width, value = (
        shape[key] for key in ("batch", "seq", "heads", "kv", "width", "value")
    )
    torch.manual_seed(0)
    ids = (torch.rand(batch, seq) < 1 / shape["document"]).long().cumsum(1)
    documents = list_documents(ids)
    lengths = documents.starts.diff() if kind != "causal" else torch.full((batch,), seq)
    mask = _mask(kind, ids.to(DEVICE))
    options: dict[str, Any] = {"device": DEVICE, "dtype": getattr(torch, shape["dtype"])}
    q, k, v, grad = (
        torch.randn(batch, h, seq, w, **options).requires_grad_()
        for h, w in ((heads, width), (kv, width), (kv, value), (heads, value))
    )

    def step() -> None:
        attend(q, k, v, mask).backward(grad)
        q.grad = k.grad = v.grad = None

    found = sustained(step, seconds)
    # Half of the scores and values, forward 2 products, backward 5 (Dao 2023, section 4.1).
    flops = 3.5 * heads * 2 * (width + value) * lengths.double().square().sum().item() / 2
    backend = _backend(q, k, v) if kind == "causal" else ""
    return [
        {"documents": len(lengths), "backend": backend, "ms": 1e3 * found}
        | {"TFLOP/s": 1e-12 * flops / found}
    ]


def _mask(kind: str, ids: torch.Tensor) -> packed.PackedMask | None:
    if kind == "causal":
        return None
    if kind == "varlen":
        starts, longest = list_documents(ids.cpu())
        return packed.Documents(starts.to(ids.device), longest)
    if kind == "flex as torch sets it":
        packed.WIDE_OPTIONS = None
    return packed.dense_mask(ids) if kind == "mask" else packed.block_mask(ids)


def _backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """What `scaled_dot_product_attention` takes of such queries, keys and values."""
    gqa = q.shape[1] != k.shape[1]
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=gqa)).name


# ---------------------------------------------------------------- the loss


def loss_op(op: str, shape: dict[str, Any], repeats: int) -> Rows:
    """One op of loss_peers.py, compiled for this shape alone."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    return [
        {"heads": shape["n"]}
        | asdict(measure_here(loss.prepare, repeats, None, {"op": op, **shape}))
    ]


def loss_roof(shape: dict[str, Any], seconds: float) -> Rows:
    """The loss's own three products and no more: logits, gradients of states and of weight."""
    n_rows, dim, vocab, dtype = (shape[key] for key in ("n_rows", "dim", "vocab", "dtype"))
    options: dict[str, Any] = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    h, w = torch.randn(n_rows, dim, **options), torch.randn(vocab, dim, **options)
    g = torch.empty(n_rows, vocab, **options)

    def step() -> None:
        torch.mm(h, w.t(), out=g)
        torch.mm(g, w)
        torch.mm(g.t(), h)

    return [{"heads": 1, "wall_s": sustained(step, seconds)}]


# ---------------------------------------------------------------- training and decoding


def training(arguments: list[str], layers: int | None, steps: int, warmup: int) -> Rows:
    """As `benchmark.py train`."""
    return [train(arguments, layers, steps, warmup)]


def decoding(sizes: dict[str, Any], mode: str, new: int, repeats: int) -> Rows:
    """Plain and speculative decoding of an untrained model with parallel heads: its drafts are
    hardly ever right, so what a step costs is the figure, and not the speed-up."""
    args = model_args(**sizes["model"])
    dtype = getattr(torch, sizes["dtype"])
    model = add_heads(build_model(args, dtype), MTP(num_future_tokens=sizes["n"]))
    model.to_empty(device=DEVICE)
    model.tie_weights()
    init_weights(model, seed=0)
    model.eval().requires_grad_(False)
    text = torch.randint(args.vocab_size or 1, (64,), generator=torch.Generator().manual_seed(0))
    return [decode.row(model, [text.tolist()], new, mode, sizes["n"] - 1, repeats)]


# ---------------------------------------------------------------- the profile of a step


def traced(arguments: list[str], layers: int | None, steps: int, path: Path) -> Rows:
    """Ranges and the longest kernels (on CPUs: operators) of a step, after some that warm up; the
    whole trace goes to `path`, in Chrome's format, gzipped."""
    with built_trainer(arguments, layers, 100) as trainer:
        for _ in range(3):
            trainer.train_step()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
        synchronize()
        with profile(activities=kinds) as found:
            for _ in range(steps):
                trainer.train_step()
            synchronize()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.json")
        found.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target)
    return _rows_of_profile(found, steps)


def _rows_of_profile(found: profile, steps: int) -> Rows:
    ranges, kernels = [], []
    for event in found.key_averages():
        cuda = event.device_type == torch.autograd.DeviceType.CUDA
        if event.key.startswith("FSDP::"):
            continue
        if event.is_user_annotation and cuda == (DEVICE == "cuda"):
            microseconds = event.device_time_total if cuda else event.cpu_time_total
            ranges.append(("range", event.key, event.count, microseconds))
        elif not event.is_user_annotation and cuda == (DEVICE == "cuda"):
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append(("kernel", event.key, event.count, microseconds))
    kernels.sort(key=lambda kernel: -kernel[3])
    total = sum(kernel[3] for kernel in kernels) or 1
    return [
        {"what": what, "name": name[:80], "calls": count / steps, "ms": us / 1e3 / steps}
        | {"% of kernels": 100 * us / total}
        for what, name, count, us in [*ranges, *kernels[:TOP_KERNELS]]
    ]

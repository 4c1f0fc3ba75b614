"""Linear cross-entropy for several heads without whole logits: gradients inside the forward.

The problem. A head's logits are [N, V]: with n heads, N = 8192 tokens and V = 128k, that is
n * 4 GiB in fp32, and autograd would keep them (or their softmax) until the backward. Yet they are
needed for nothing but three numbers a row and two matrix products.

The idea. Cross-entropy's gradient in its logits, ``softmax(logits) - onehot(label)``, needs no
more than the logits. So take one head after another and, of each, chunks of rows; for each chunk

    logits = h @ W.T                        [C, V]    2 C D V FLOPs
    loss, and G = d loss / d logits         [C, V]    in place, a few passes over the chunk
    dh     = G @ W                          [C, D]    2 C D V
    dW    += G.T @ h                        [V, D]    2 C D V

and forget the logits. Everything is computed once: 6 n N D V FLOPs, the same as a whole
backward, with no recomputation (recomputing logits in the backward would make it 8). What stays
alive is one fp32 ``dW`` [V, D] for ALL heads, the ``dh`` [N, D] of each head and one chunk's
logits [C, V]; the memory does not grow with n but for the ``dh``, which are the heads' own
gradients. The backward multiplies by grad_output.

The softmax is never normalised: with e = exp(logits - max) and s = sum(e), the gradient is
``(e - s * onehot) / s``, and the division by s, the scale of the head, the z-loss factor and the
mask of ignored labels are all factors of a ROW. They go to the rows of ``dh`` and ``h``, which are
[C, D], and not over [C, V] (in low precision: into the pass that rounds G; compiled: into the one
that makes G).

Ignored labels: on the CPU their rows are left out; on other devices, where the number of valid rows
is not known without a synchronisation, they are computed and multiplied by 0.

Precision. Matrix products run in the dtype of the inputs (under autocast: in autocast's), all else
in fp32. A CPU without bf16 units multiplies bf16 hundreds of times slower than fp32, so there the
operands are upcast tile by tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_mtp.ops.token_losses import LossOptions, LossSums, chunk_losses
from torchtitan_mtp.ops.vocabulary import VocabularyShard, first_of_the_best

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_TILE_ROWS = 4096  # rows of the weight that are upcast at a time
_CPU_CHUNK_ROWS = 512
_GPU_MIN_CHUNK_ROWS = 1024
_GPU_TILE_ROWS = 128  # of a matrix product


class LossOutput(NamedTuple):
    """Result of `linear_cross_entropy`; only `loss` carries a gradient.

    A NamedTuple of tensors, so that FSDP2 finds them among a module's outputs.

    Attributes:
        loss: [] sum_k head_scales[k] * loss_sum[k]; float32 (float64 for float64 inputs).
        loss_sum: [n] sum of each head's token losses over its valid labels, times row_weights,
            unscaled.
        valid: [n] int64, labels that are not ignore_index.
        correct: [n] int64, valid labels whose logit is above every other of its row.
    """

    loss: Tensor
    loss_sum: Tensor
    valid: Tensor
    correct: Tensor


@torch.no_grad()
def head_loss_and_grad(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    options: LossOptions,
    *,
    row_weights: Tensor | None = None,
    teacher: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    ahead: int = 0,
    need_d_hidden: bool = True,
    in_place: bool = False,
    d_weight: Tensor | None = None,
    mm: torch.dtype | None = None,
    vocabulary: VocabularyShard | None = None,
) -> tuple[LossSums, Tensor | None]:
    """Loss of one head, and the gradient [N, D] of ``scale * loss_sum`` in its hidden, outside
    autograd.

    hidden [N, D]; weight [V, D]; labels [N]; row_weights [N], factors of the rows' losses.
    teacher: [N, D], states of the same unembedding, whose row i + ahead has the distribution that
        row i learns (`LossOptions.target_loss`), for every row with a label; or with teacher_rows
        [N] its row teacher_rows[i] + ahead, of any number.
    scale: [] factor of the gradients, None for 1. ``loss_sum`` is not scaled.
    in_place: the gradient overwrites ``hidden``.
    d_weight: [V, D] in `accumulation_dtype(weight.dtype)`; the weight's gradient is ADDED to it.
        None: it is not computed.
    mm: dtype of the matrix products; None: `matmul_dtype(hidden)`.
    vocabulary: of which `weight` has a rank's rows, and whose ranks' gradients are to be summed.
    """
    acc, mm = accumulation_dtype(hidden.dtype), mm or matmul_dtype(hidden)
    device, need_grad = hidden.device, need_d_hidden or d_weight is not None
    if not need_grad and options.passes == "compiled":  # a loss alone is not worth compiling
        options = options._replace(passes="eager", bf16_logits=False)
    weight, buffer = _weight_and_buffer(hidden, weight, mm, options)
    teachers = torch.empty_like(buffer if teacher is not None else buffer[:0])
    dtypes = (acc, torch.int64, torch.int64)
    losses = LossSums(*(torch.zeros((), dtype=dtype, device=device) for dtype in dtypes))
    d_hidden = None
    if need_d_hidden:
        empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
        d_hidden = hidden.detach() if in_place else empty(hidden)
    with torch.autocast(device.type, enabled=False):  # `mm` has decided
        for rows in _row_chunks(labels, options.ignore_index, len(buffer)):
            h = hidden[rows].to(mm)  # [C, D]
            logits = project(h, weight, buffer[: h.shape[0]])  # [C, V]
            weights = None if row_weights is None else row_weights[rows].to(acc)  # [C]
            taught = None  # [C, V]
            if teacher is not None:
                t = _rows_ahead(teacher, rows, ahead, teacher_rows).to(mm)  # [C, D]
                taught = project(t, weight, teachers[: t.shape[0]])
            how = (options, scale, weights, mm, need_grad, taught, vocabulary)
            part, grad, factor = chunk_losses(logits, labels[rows], *how)
            for total, of_chunk in zip(losses, part, strict=True):
                total += of_chunk
            if d_weight is not None:
                _accumulate(d_weight, grad, h if factor is None else h * factor)
            if d_hidden is not None:  # last, for `h` may be a view of what it overwrites
                d_h = _times_weight(grad, weight)
                d_hidden[rows] = (d_h if factor is None else d_h * factor).to(hidden.dtype)
            del grad  # [C, V], before the next chunk's is made
    if d_hidden is not None and device.type == "cpu":  # where such rows are left out
        d_hidden.masked_fill_((labels == options.ignore_index).unsqueeze(1), 0)
    return losses, d_hidden


@torch.no_grad()
def chunked_argmax(
    hidden: Tensor,
    weight: Tensor,
    chunk_rows: int | None = None,
    vocabulary: VocabularyShard | None = None,
) -> Tensor:
    """`(hidden @ weight.T).argmax(-1)` [N] int64, from hidden [N, D] and the unembedding [V, D], or
    this rank's rows of it, of a `vocabulary`.

    Chunks and products are those of the loss, so that what is most likely here is what the loss
    counts as correct. A soft cap of the logits changes nothing.
    """
    mm = matmul_dtype(hidden)
    weight, buffer = _weight_and_buffer(hidden, weight, mm, LossOptions(chunk_rows=chunk_rows))
    best = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for h, tokens in zip(hidden.split(len(buffer)), best.split(len(buffer)), strict=True):
            logits = project(h.to(mm), weight, buffer[: h.shape[0]])  # [C, V]
            torch.argmax(logits, dim=1, out=tokens)
            if vocabulary is not None:
                tokens.copy_(first_of_the_best(logits, tokens, vocabulary))
    return best


def _weight_and_buffer(
    hidden: Tensor, weight: Tensor, mm: torch.dtype, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The weight as products in `mm` take it, and room for a chunk's logits [C, V]."""
    if weight.dtype != mm and weight.dtype not in _LOW_PRECISION:
        weight = weight.to(mm)  # autocast: one narrower copy
    dtype = torch.bfloat16 if options.bf16_logits else accumulation_dtype(hidden.dtype)
    # The gradient, in `mm`, takes the logits' place or one of its own.
    in_place = mm == dtype or options.passes == "triton"
    logit_bytes = dtype.itemsize + (0 if in_place else mm.itemsize)
    rows = options.chunk_rows or default_chunk_rows(hidden, logit_bytes)
    rows = min(rows, max(hidden.shape[0], 1))
    return weight, torch.empty(rows, weight.shape[0], dtype=dtype, device=hidden.device)


def _row_chunks(labels: Tensor, ignore_index: int, chunk: int) -> Iterator[slice | Tensor]:
    """Ranges of rows; where some labels are ignored, on the CPU, indices of the valid rows."""
    n_rows = labels.shape[0]
    if labels.device.type == "cpu":
        valid = (labels != ignore_index).nonzero().squeeze(1)  # [n_valid]
        if len(valid) < n_rows:
            yield from valid.split(chunk) if len(valid) else ()
            return
    for start in range(0, n_rows, chunk):
        yield slice(start, min(start + chunk, n_rows))


def _rows_ahead(teacher: Tensor, rows: slice | Tensor, ahead: int, places: Tensor | None) -> Tensor:
    """Rows [C, D] of `teacher`; where it ends before, the last one, for rows without a label."""
    if places is not None:
        rows = places[rows]
    elif isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=teacher.device)
    return teacher[(rows + ahead).clamp(max=len(teacher) - 1)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses and of the weight's gradient: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the matrix products: the hidden's, autocast's under autocast, never emulated."""
    device = hidden.device.type
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype in _LOW_PRECISION and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for `dtype` (else a product is hundreds of times slower)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def default_chunk_rows(hidden: Tensor, logit_bytes: int) -> int:
    """Rows of a chunk of hidden [N, D]: enough for full matrix-product speed, few enough for little
    memory. logit_bytes: of a logit and its gradient.

    On CPUs 512 rows reach the speed of larger chunks. On GPUs every chunk reads and writes the
    weight's gradient once, in fp32, so few large chunks are better: as many rows as take 3/4 of
    that gradient's 4 V D bytes (D / 2 rows of fp32 logits with a bf16 gradient beside them), spread
    evenly over the chunks. Under 1024 rows the matrix products slow down.

    The free memory has no say: a chunk's rows are summed in another order than two chunks' are, and
    a run resumed beside another process would not repeat its losses to the bit.
    """
    if hidden.device.type == "cpu":
        return _CPU_CHUNK_ROWS
    most = max(_GPU_MIN_CHUNK_ROWS, 3 * hidden.shape[1] // logit_bytes)
    chunks = max(1, -(-hidden.shape[0] // most))
    even = -(-hidden.shape[0] // chunks)
    return -(-even // _GPU_TILE_ROWS) * _GPU_TILE_ROWS


def _tiles(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Row ranges of `weight`: one where no cast is needed, else small ones."""
    step = weight.shape[0] if weight.dtype == dtype else _TILE_ROWS
    return [slice(v, min(v + step, weight.shape[0])) for v in range(0, weight.shape[0], step)]


def project(h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``h @ weight.T`` [C, V] into `out`, in its dtype."""
    if h.is_cuda and h.dtype in _LOW_PRECISION and out.dtype == torch.float32:
        return torch.mm(h, weight.t(), out_dtype=out.dtype, out=out)
    for v in _tiles(weight, h.dtype):
        if h.dtype == out.dtype:
            torch.mm(h, weight[v].to(h.dtype).t(), out=out[:, v])
        else:
            out[:, v] = h @ weight[v].to(h.dtype).t()
    return out


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight`` [C, D]."""
    first, *others = _tiles(weight, grad.dtype)
    product = grad[:, first] @ weight[first].to(grad.dtype)
    for v in others:
        product.addmm_(grad[:, v], weight[v].to(grad.dtype))
    return product


def _accumulate(d_weight: Tensor, grad: Tensor, h: Tensor) -> None:
    """``d_weight += grad.T @ h`` [V, D], in `d_weight`'s dtype."""
    if grad.dtype == d_weight.dtype:
        d_weight.addmm_(grad.t(), h)
    elif grad.is_cuda:
        torch.addmm(d_weight, grad.t(), h, out_dtype=d_weight.dtype, out=d_weight)
    else:
        for v in range(0, d_weight.shape[0], _TILE_ROWS):
            d_weight[v : v + _TILE_ROWS] += grad[:, v : v + _TILE_ROWS].t() @ h


def fp16_gradient_scale(head_scales: Tensor, hidden: Tensor) -> Tensor | None:
    """Gradient scale [] for float16 inputs or products, undone in the backward; None for others.

    Head scales are about 1 / valid tokens, which would underflow in float16. So gradients are
    computed with head scales divided by the largest one, which the backward multiplies in.
    """
    if torch.float16 not in (hidden.dtype, matmul_dtype(hidden)):
        return None
    largest = head_scales.abs().amax()
    return largest.masked_fill(largest == 0, 1)

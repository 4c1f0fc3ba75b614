"""Tables about the data and how the weights are updated."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from torchtitan_mtp.config.setting import setting


@dataclass
class Optimizer:
    """How a gradient changes the weights."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Adam with decoupled ("AdamW") or coupled ("Adam") weight decay."""

    lr: float = setting(8e-4, above=0)
    """Peak learning rate."""

    beta1: float = setting(0.9, at_least=0, below=1)
    """Decay of the running mean of gradients."""

    beta2: float = setting(0.95, at_least=0, below=1)
    """Decay of the running mean of squared gradients."""

    eps: float = setting(1e-8, at_least=0)
    """Added to the denominator of the update."""

    weight_decay: float = setting(0.1, at_least=0)
    """Weight decay."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """torch's implementation of the step: "fused" is the fastest, "for-loop" the plainest."""


@dataclass
class LRScheduler:
    """Learning rate over the run: warmup, plateau, decay."""

    warmup_steps: int = setting(200, at_least=0)
    """Steps over which the learning rate rises linearly from 0 to optimizer.lr."""

    decay_ratio: float | None = setting(None, at_least=0, at_most=1)
    """Fraction of the run, at its end, over which the learning rate decays; None: the whole run
    after the warmup."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Curve of the decay."""

    min_lr_factor: float = setting(0.0, at_least=0, at_most=1)
    """Learning rate at the end, as a fraction of optimizer.lr."""


@dataclass
class Training:
    """Data, batch, length and precision of the training."""

    dataset: str = "python_stdlib"
    """Source of the training documents."""

    dataset_path: str | None = setting(None, path=True)
    """File, folder or glob of the source, where it needs one."""

    bad_records: Literal["stop", "skip"] = "stop"
    """What is done about records of training and validation data that are no JSON, no UTF-8,
    without text or messages, or that the tokenizer or its chat template refuses: "stop" at the
    first one, before training (but for what is refused), or "skip" and count them."""

    accept_changed_data: bool = False
    """Resume at the checkpoint's place in the data though files have changed since (a record was
    mended), where there are as many records as before, skipped ones included."""

    text_field: str = "text"
    """Of a record (.jsonl, .parquet, the hub's), the field that holds its text, or its messages if
    they are not in "messages"."""

    mixture: list[str] = field(default_factory=list)
    """Several sources instead of one: of each its share of the tokens, a space, and a dataset,
    file, folder or glob, as in ["0.7 python_stdlib", "0.3 /data/code/**/*.jsonl"]."""

    validation_fraction: float = setting(0.05, above=0, below=1)
    """Fraction of the documents held out for validation, where that is on and names no data of
    its own."""

    local_batch_size: int = setting(8, at_least=1)
    """Sequences of one micro-batch on one rank."""

    global_batch_size: int = setting(-1, at_least=1, special=(-1,))
    """Sequences of one step over all ranks and micro-batches; -1: one micro-batch a rank."""

    reduce_every_micro_batch: bool = True
    """Add each micro-batch's gradients to the sharded ones at once, as TorchTitan does; false:
    reduce them once a step, and keep whole ones in float32 on every rank until then (4 bytes for
    each parameter of the model)."""

    seq_len: int = setting(2048, at_least=1)
    """Tokens of one sequence."""

    max_norm: float = setting(1.0, above=0, special=(inf,))
    """Gradients are scaled down to this global L2 norm; inf: never."""

    skip_nonfinite: int = setting(0, at_least=0)
    """Steps in a row whose update may be skipped because the loss or the gradient norm is not
    finite on some rank; one more stops the run."""

    steps: int = setting(10000, at_least=1)
    """Optimizer steps of the run."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Type that parameters, gradients and optimizer states are kept in."""

    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """Type that the forward and backward compute in; "auto": bfloat16 where the device multiplies
    it faster than float32, else float32, and what a run began with when it is resumed."""

    gc_freq: int = setting(50, at_least=1)
    """Steps from one garbage collection of Python to the next."""

    gc_debug: bool = False
    """Collect garbage at every step and report cycles that hold tensors."""

    seed: int | None = setting(None, at_least=0, at_most=2**63 - 1, also_named=("debug.seed",))
    """Seed of weights and data order; None: one is drawn for the run (its config.toml has it)."""

    deterministic: bool = setting(False, also_named=("debug.deterministic",))
    """Use deterministic algorithms; slower."""


@dataclass
class Validation:
    """Loss on held-out documents."""

    enable: bool = False
    """Validate during training."""

    dataset: str = ""
    """Source of the validation documents; empty: the held-out documents of training.dataset."""

    dataset_path: str | None = setting(None, path=True)
    """File or folder of the source, where it needs one."""

    text_field: str = "text"
    """Of a record, the field that holds its text or messages."""

    local_batch_size: int = setting(8, at_least=1)
    """Sequences of one validation batch on one rank."""

    seq_len: int = setting(2048, at_least=1)
    """Tokens of one validation sequence."""

    freq: int = setting(10, at_least=1)
    """Training steps from one validation to the next."""

    steps: int = setting(-1, at_least=1, special=(-1,))
    """Batches of one validation on each rank; -1: all of the validation data."""

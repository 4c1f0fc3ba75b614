"""Tables about what is trained, on what data, and how the weights are updated."""

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from torchtitan_mtp.config.setting import rule, setting


@dataclass
class RoPEScalingArgs:
    """Llama 3.1's scaling of rotary frequencies, in place of the flavor's."""

    factor: float | None = setting(None, above=0)
    """Divisor of the frequencies whose wavelength exceeds the old context; None: the flavor's
    scaling, or none."""

    low_freq_factor: float = setting(1.0, above=0)
    """original_max_seq_len over this: wavelengths from there on are divided in full."""

    high_freq_factor: float = setting(4.0, above=0)
    """original_max_seq_len over this: wavelengths up to there stay."""

    original_max_seq_len: int = setting(8192, at_least=1)
    """Context of the pre-training, in tokens."""


@dataclass
class ModelArgs:
    """Sizes to set over the flavor's; a key left out is the flavor's."""

    dim: int | None = setting(None, at_least=1)
    """Width of the model."""

    n_layers: int | None = setting(None, at_least=1)
    """Transformer blocks of the trunk."""

    n_heads: int | None = setting(None, at_least=1)
    """Attention heads."""

    n_kv_heads: int | None = setting(None, at_least=1)
    """Key-value heads, a divisor of n_heads."""

    head_size: int | None = setting(None, at_least=2)
    """Width of one attention head; where the flavor has none either: dim / n_heads."""

    hidden_dim: int | None = setting(None, at_least=1)
    """Width of the feed-forward layer."""

    norm_eps: float | None = setting(None, above=0)
    """Epsilon of every RMSNorm."""

    rope_theta: float | None = setting(None, above=0)
    """Base of the rotary frequencies."""

    tied_embeddings: bool | None = None
    """Whether the embedding is also the unembedding."""

    qk_norm: bool | None = None
    """Whether the heads of queries and keys are normalised (Qwen3)."""

    rope_scaling: RoPEScalingArgs = field(default_factory=RoPEScalingArgs)
    """Rotary scaling."""

    def given(self) -> dict[str, Any]:
        """What is set, by name; rope_scaling as a dict of its keys."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.rope_scaling.factor is None:
            del values["rope_scaling"]
        return values


@dataclass
class Model:
    """The model before and after its converters."""

    name: str = "llama3"
    """Model family."""

    flavor: str = "debugmodel"
    """Size within the family; "custom" where [model.args] gives all of them."""

    hf_assets_path: str = setting("byte", also_named=("model.tokenizer_path",))
    """Tokenizer: a folder with Hugging Face's files, a tokenizer file, or the word "byte"."""

    vocab_size: int | None = setting(None, at_least=1)
    """Rows of the embedding; None: the flavor's, or the tokenizer's where the flavor is open."""

    attn_mask_type: Literal["causal", "block_causal"] = "causal"
    """Whether a token sees all earlier tokens, or only those of its own document."""

    converters: list[Literal["mtp", "quantize.linear.float8"]] = field(
        default_factory=list,
        metadata=rule(
            distinct=True,
            also_spelled={"float8": "quantize.linear.float8"},
            unsupported_values={
                "mx": "use quantize.linear.float8",
                "quantize.linear.mx": "use quantize.linear.float8",
                "quantize.grouped_mm.float8": "there are no expert layers to quantize",
                "quantize.grouped_mm.mx": "there are no expert layers to quantize",
            },
        ),
    )
    """Changes applied to the model, in order: "mtp" adds the heads of [mtp],
    "quantize.linear.float8" (or "float8") trains its linear layers in float8."""

    print_after_conversion: bool = False
    """Print the model after its converters were applied."""

    args: ModelArgs = field(default_factory=ModelArgs)
    """Sizes over the flavor's."""


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

    implementation: Literal["for-loop", "foreach", "fused"] = setting(
        "fused", renamed_from=("optimizer.fused",)
    )
    """torch's implementation of the step: "fused" is the fastest, "for-loop" the plainest."""

    early_step_in_backward: bool = setting(
        False, unsupported="gradients are clipped by their global norm, known after the backward"
    )
    """Update each weight during the backward."""


@dataclass
class LRScheduler:
    """Learning rate over the run: warmup, plateau, decay."""

    warmup_steps: int = setting(200, at_least=0, renamed_from=("training.warmup_steps",))
    """Steps over which the learning rate rises linearly from 0 to optimizer.lr."""

    total_steps: int | None = setting(None, at_least=1, unsupported="set training.steps")
    """Length of the schedule where it differs from training.steps."""

    decay_ratio: float | None = setting(None, at_least=0, at_most=1)
    """Fraction of the run, at its end, over which the learning rate decays; None: the whole run
    after the warmup."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Curve of the decay."""

    min_lr_factor: float = setting(
        0.0, at_least=0, at_most=1, renamed_from=("lr_scheduler.lr_min",)
    )
    """Learning rate at the end, as a fraction of optimizer.lr."""


@dataclass
class DataLoader:
    """TorchTitan's loader processes. Here a rank reads its data in its own process."""

    num_workers: int = setting(0, unsupported="each rank reads its data in its own process")
    """Loader processes."""

    persistent_workers: bool = setting(False, unsupported="there are no loader processes")
    """Keep loader processes between epochs."""

    pin_memory: bool = setting(False, unsupported="leave it unset")
    """Load into pinned memory."""

    prefetch_factor: int | None = setting(None, unsupported="there are no loader processes")
    """Batches that each loader process reads ahead."""


@dataclass
class Training:
    """Data, batch, length and precision of the training."""

    dataset: str = "python_stdlib"
    """Source of the training documents."""

    dataset_path: str | None = None
    """File or folder of the source, where it needs one."""

    validation_fraction: float = setting(0.05, above=0, below=1)
    """Fraction of the documents held out for validation where validation.dataset is empty."""

    local_batch_size: int = setting(8, at_least=1, renamed_from=("training.batch_size",))
    """Sequences of one micro-batch on one rank."""

    global_batch_size: int = setting(-1, at_least=1, special=(-1,))
    """Sequences of one step over all ranks and micro-batches; -1: one micro-batch a rank."""

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
    it faster than float32, else float32."""

    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type that gradients are summed in over ranks."""

    gc_freq: int = setting(50, at_least=1)
    """Steps from one garbage collection of Python to the next."""

    gc_debug: bool = False
    """Collect garbage at every step and report cycles that hold tensors."""

    seed: int | None = setting(None, at_least=0, also_named=("debug.seed",))
    """Seed of weights and data order; None: a different one for each run."""

    deterministic: bool = setting(False, also_named=("debug.deterministic",))
    """Use deterministic algorithms; slower."""

    debug_moe_force_load_balance: bool = setting(
        False,
        also_named=("debug.moe_force_load_balance",),
        unsupported="there are no expert layers to balance",
    )
    """Send the same number of tokens to every expert."""

    dataloader: DataLoader = field(default_factory=DataLoader)
    """TorchTitan's loader processes."""


@dataclass
class Validation:
    """Loss on held-out documents."""

    enable: bool = False
    """Validate during training."""

    dataset: str = ""
    """Source of the validation documents; empty: the held-out documents of training.dataset."""

    dataset_path: str | None = None
    """File or folder of the source, where it needs one."""

    local_batch_size: int = setting(8, at_least=1)
    """Sequences of one validation batch on one rank."""

    seq_len: int = setting(2048, at_least=1)
    """Tokens of one validation sequence."""

    freq: int = setting(10, at_least=1)
    """Training steps from one validation to the next."""

    steps: int = setting(-1, at_least=1, special=(-1,))
    """Batches of one validation on each rank; -1: all of the validation data."""

    dataloader: DataLoader = field(default_factory=DataLoader)
    """TorchTitan's loader processes."""

"""The table about saving and loading."""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_mtp.config.setting import setting


@dataclass
class Checkpoint:
    """Checkpoints of torch.distributed.checkpoint in {job.dump_folder}/{folder}/step-N."""

    enable: bool = False
    """Save checkpoints, and resume from the latest one at the start."""

    folder: str = setting("checkpoint", path=True)
    """Folder of the checkpoints, below job.dump_folder; or a URL that fsspec knows
    ("s3://bucket/run")."""

    interval: int = setting(500, at_least=1)
    """Steps from one save to the next."""

    initial_load_path: str | None = setting(None, path=True)
    """step-N folder to start from while this run has no checkpoint of its own."""

    initial_load_model_only: bool = True
    """Load only the weights from initial_load_path; if false, also optimizer, schedule and data
    position."""

    initial_load_in_hf: bool = False
    """Read initial_load_path, or without one model.hf_assets_path, as a Hugging Face folder:
    config.json and safetensors files of the run's model."""

    last_save_model_only: bool = True
    """Save only the weights at the last step; if false, a checkpoint to resume from."""

    last_save_in_hf: bool = False
    """Save the last step as a Hugging Face folder too, step-N.hf; not for parallel heads, which
    that format can't hold."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Type of the weights in a last save of the model only."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Whether training waits for a save, or goes on while it is written."""

    keep_latest_k: int = setting(10, at_least=2, special=(0,))
    """Checkpoints kept; older ones are deleted. 0: keep all. One that is damaged is not to be the
    end of a run, so 1 is refused."""

    load_step: int = setting(-1, at_least=0, special=(-1,))
    """Step to resume from; -1: the latest."""

    verify: bool = True
    """Compare what is loaded with the checksums of what was saved."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts not to load: "model", "optimizer", "lr_scheduler", "dataloader", "train_state", "rng",
    or parameters by the beginning of their name ("mtp", "layers.0")."""

    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to see early that saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0 and exit; for one process."""

    load_only: bool = False
    """Load but never save."""

"""Tables about the run itself: where it writes, what it logs, how its processes talk."""

from dataclasses import dataclass

from torchtitan_mtp.config.setting import setting


@dataclass
class Job:
    """The run as a whole."""

    config_file: str | None = setting(None, path=True)
    """TOML file to read the configuration from, or the bare name of a recipe in train_configs/."""

    dump_folder: str = setting("./outputs", path=True)
    """Folder that receives everything the run writes."""

    description: str = "default job"
    """What this run is for; printed at the start."""

    print_config: bool = False
    """Print the resolved configuration before training."""

    debug: bool = False
    """Show the traceback of errors that are otherwise reported in one line."""


@dataclass
class Profiling:
    """Traces of torch.profiler and snapshots of accelerator memory."""

    enable_profiling: bool = False
    """Record torch.profiler traces."""

    save_traces_folder: str = setting("profile_traces", path=True)
    """Folder of the traces, below job.dump_folder."""

    profile_freq: int = setting(10, at_least=1)
    """Steps from one trace to the next; at least profiler_warmup + profiler_active."""

    profiler_active: int = setting(1, at_least=1)
    """Steps recorded in each trace."""

    profiler_warmup: int = setting(3, at_least=0)
    """Steps before each recording during which the profiler runs and its data are dropped."""

    enable_memory_snapshot: bool = False
    """Record the history of accelerator memory allocations."""

    save_memory_snapshot_folder: str = setting("memory_snapshot", path=True)
    """Folder of the memory snapshots, below job.dump_folder."""


@dataclass
class Metrics:
    """What is logged during training, and where to."""

    log_freq: int = setting(10, at_least=1)
    """Steps from one log line (and TensorBoard point) to the next."""

    enable_tensorboard: bool = False
    """Write TensorBoard event files."""

    disable_color_printing: bool = False
    """Print log lines without colours."""

    save_tb_folder: str = setting("tb", path=True)
    """Folder of the TensorBoard event files, below job.dump_folder."""

    save_for_all_ranks: bool = False
    """Write the event files of every rank, each in its own folder, instead of rank 0's alone."""

    enable_wandb: bool = False
    """Log to Weights & Biases; needs the package wandb."""


@dataclass
class Comm:
    """Communication between processes."""

    init_timeout_seconds: int = setting(300, at_least=1)
    """Timeout of a collective until the first training step is done, in seconds."""

    train_timeout_seconds: int = setting(100, at_least=1)
    """Timeout of a collective after the first training step, in seconds."""

    trace_buf_size: int = setting(20000, at_least=0)
    """Entries in the ring buffer of NCCL's flight recorder; 0 turns it off."""

    save_traces_folder: str = setting("comm_traces", path=True)
    """Folder of the flight recorder's traces, below job.dump_folder."""

    save_traces_file_prefix: str = "rank_"
    """Start of the names of the flight recorder's files."""

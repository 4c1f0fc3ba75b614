"""Save and resume a run: when, what and in which order. How, is in the files beside this one."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.stateful import Stateful

from torchtitan_mtp.checkpoint import folders
from torchtitan_mtp.checkpoint import state as states_of
from torchtitan_mtp.checkpoint.load import (
    OTHER_STATES,
    LoadReport,
    Opened,
    excluded,
    load_opened_weights,
    names_of,
    one_line,
    open_checkpoint,
    stored_model_names,
)
from torchtitan_mtp.checkpoint.manifest import FULL, MODEL_ONLY, Manifest
from torchtitan_mtp.checkpoint.record import record_of_model
from torchtitan_mtp.checkpoint.remote import RemotePath
from torchtitan_mtp.checkpoint.resume import restore
from torchtitan_mtp.checkpoint.state import RNG
from torchtitan_mtp.checkpoint.storage import SummingWriter
from torchtitan_mtp.config import Checkpoint
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.distributed.ranks import Ranks
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.models.trunk import Trunk

logger = logging.getLogger(__name__)

LoadWeights = Callable[[Path, Trunk, Ranks, Sequence[str]], LoadReport]


class Checkpointer:
    """Checkpoints of one run in `{dump_folder}/{config.folder}/step-N`. Made by all ranks together.

    Args:
        config: the [checkpoint] table.
        dump_folder: job.dump_folder.
        model: materialized, parallelized (DTensors) or plain.
        optimizer: over some or all of the model's parameters; None saves and loads none.
        extra: what else resumes, by name ("lr_scheduler", "dataloader", "train_state", ...). Every
            `state_dict()` is plain data (or tensors), the same on all ranks.
        load_hf: reads a Hugging Face folder into the model; without it `initial_load_in_hf` fails.
        tokenizer: what the model learns the ids of; its fingerprint goes into each manifest.

    Attributes:
        load_report: what the last `load` left out; None before, and when nothing was loaded.

    Error: last_save_in_hf with a folder in an object store.
    """

    def __init__(
        self,
        config: Checkpoint,
        dump_folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra: Mapping[str, Stateful] | None = None,
        load_hf: LoadWeights | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        self.folder = folders.checkpoint_folder(dump_folder, config.folder)
        if config.last_save_in_hf and isinstance(self.folder, RemotePath):
            raise UserError(
                "checkpoint.last_save_in_hf = true: needs a local folder, found "
                f"checkpoint.folder = {self.folder}; run torchtitan-mtp-export afterwards"
            )
        self.model = model
        self.optimizer = optimizer
        self.extra = dict(extra or {})
        self.load_report: LoadReport | None = None
        self._load_hf, self._tokenizer = load_hf, tokenizer
        self._ranks = Ranks(own_group=config.enable)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pinned: DefaultStager | None = None
        self._came_from: int | None = None  # where this run began to count, until its first save
        self._last_saved: tuple[int, str] | None = None  # the step and kind saved last

    # ---- saving ----

    @property
    def saves(self) -> bool:
        """Whether this run saves at all."""
        return self.config.enable and not self.config.load_only

    def should_save(self, step: int, last: bool = False) -> bool:
        """Whether `save(step, last)` saves: each interval, the last step, the first when asked."""
        first = step == 1 and self.config.enable_first_step_checkpoint
        due = last or first or (step > 0 and step % self.config.interval == 0)
        return self.saves and due

    def save(self, step: int, last: bool = False, *, force: bool = False) -> bool:
        """Save after `step` steps, if it is due; all ranks call it together.

        The last save is model-only in `export_dtype` where `last_save_model_only` says so; step 0
        (a seed) holds the weights only; all others are full. Waits for an earlier background save.

        Args:
            last: the run ends here as configured.
            force: save a full checkpoint now, due or not (a run that is being stopped).

        Returns:
            Whether step-N holds this state now, or will once it is written in the background: False
            when nothing was due, and for a seed that is there already.

        Raises:
            UserError: on every rank: no space, a failed write (now or in the background).
        """
        if self._pending is not None and self._pending.done():
            self.wait()  # a failed save is told at the next step, not at the next save
        if not (self.saves and force) and not self.should_save(step, last):
            return False
        self.wait()
        export = last and step > 0 and self.config.last_save_model_only and not force
        kind = MODEL_ONLY if export or step == 0 else FULL
        if self._last_saved in ((step, kind), (step, FULL)):
            return True
        if step == 0 and self._ranks.on_rank_0(lambda: folders.whole_kind(self.folder / "step-0")):
            logger.info("%s is there already: not saved again", self.folder / "step-0")
            return False
        states = self._states(kind, export)
        # (A DTensor's bytes are all ranks', but a stage of a pipeline has its own tensors alone.)
        own = {name: x.nbytes for name, x in states.items() if isinstance(x, torch.Tensor)}
        stages = dict(self._ranks.gather((min(own, default=""), sum(own.values()))))
        total = sum(stages.values())
        self._ranks.on_rank_0(lambda: folders.start_writing(self.folder, step, total))
        if last or force or self.config.async_mode == "disabled":
            self._write(states, step, kind)
        else:
            self._pending = self._writer.submit(self._write, self._stage(states), step, kind)
        return True

    def _states(self, kind: str, export: bool) -> dict[str, Any]:
        """What goes into a checkpoint, under its names there."""
        states: dict[str, Any] = states_of.model_state(self.model)
        if kind == MODEL_ONLY:
            dtype = getattr(torch, self.config.export_dtype)
            try:
                cast = states_of.cast_floating
                return self._ranks.on_all(lambda: cast(states, dtype)) if export else states
            except UserError as error:  # the last save of a training is not to fail
                logger.warning("checkpoint.export_dtype: %s; saved as it is trained", error)
                return states
        if self.optimizer is not None:
            states |= states_of.optimizer_state(self.model, self.optimizer)
        states |= {name: item.state_dict() for name, item in self.extra.items()}
        states[f"{RNG}.rank{self._ranks.rank}"] = states_of.rng_state()
        for name, value in states.items():
            states_of.check_plain(name, value)
        return states

    def _stage(self, states: dict[str, Any]) -> dict[str, Any]:
        """A copy of `states` in CPU memory that training does not touch."""
        pin = self.config.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        stager = self._pinned or DefaultStager(StagingOptions(pin, False, False, pin))
        staged = cast("dict[str, Any]", stager.stage(states))
        if pin:
            self._pinned = stager  # its buffers are kept from save to save
        else:
            stager.close()
        return staged

    def _write(self, states: dict[str, Any], step: int, kind: str) -> None:
        """Write step-N and put it in place; in the background of training or not."""
        start = time.perf_counter()
        ranks, folder = self._ranks, self.folder
        tmp = folders.tmp_folder(folder, step)
        writer = SummingWriter(tmp)
        try:
            states_of.quiet()
            dcp.save(
                states,
                storage_writer=writer,
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=ranks.group,
                no_dist=not ranks.distributed,
            )
            written = ranks.gather(writer.entries)
            files = {name: entry for part in written for name, entry in part.items()}
            record = record_of_model(self.model, self.optimizer)
            words = self._tokenizer.fingerprint if self._tokenizer else None
            manifest = Manifest(step, kind, ranks.world_size, files, record, words)
            after = self._came_from
            final = ranks.on_rank_0(lambda: folders.finish_writing(folder, manifest, after))
            self._came_from, self._last_saved = None, (step, kind)
        except (CheckpointException, UserError, OSError) as error:
            if ranks.rank == 0:
                with contextlib.suppress(OSError):
                    folders.remove(tmp)
            raise UserError(f"{tmp}: can't be saved: {one_line(error)}") from error
        megabytes = sum(entry.bytes for entry in files.values()) / 1e6
        seconds = time.perf_counter() - start
        logger.info("saved %s (%s, %.1f MB, %.1f s)", final, kind, megabytes, seconds)
        ranks.on_rank_0(lambda: folders.remove_old(folder, self.config.keep_latest_k, step))

    def wait(self) -> None:
        """Wait for a background save to be in place. Error: it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for a background save and give back its memory and thread. Error: it failed."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._pinned is not None:
                self._pinned.close()
                self._pinned = None

    # ---- loading ----

    def load(self) -> int | None:
        """Resume the run, or start it from `initial_load_path`; all ranks call it together.

        Without `config.load_step` the newest full checkpoint; model-only ones are never resumed
        from by themselves.

        Returns:
            The step resumed at; 0 when only weights were loaded from this run's own folder (a
            seed, or a model-only step asked for); None when there was nothing to resume from
            (after an initial load of weights, too).

        Raises:
            UserError: on every rank: no such step, a damaged file, or states that do not match.
        """
        if not self.config.enable:
            if self.config.initial_load_path:
                logger.warning("checkpoint.initial_load_path is ignored: checkpoint.enable = false")
            return None
        self.wait()
        self._came_from, self._last_saved = 0, None
        given, model_only = self.config.initial_load_path, self.config.initial_load_model_only
        own = self._ranks.on_rank_0(self._choose)
        if own is not None and given:
            logger.info("checkpoint.initial_load_path is ignored: resuming from %s", own)
        if own is None and (not given or self.config.initial_load_in_hf):
            stored: Iterable[str] = ()
            if given:
                assert self._load_hf is not None and isinstance(self.model, Trunk)
                exclude = self.config.exclude_from_loading
                self.load_report = self._load_hf(Path(given), self.model, self._ranks, exclude)
                stored = self.load_report.unexpected
            self._check_exclude(stored)
            return None
        path = own or self._ranks.on_rank_0(lambda: folders.find_checkpoint(str(given)))
        if own is None and model_only:
            self._load_weights(path, other_heads=True)
            return None
        if self._ranks.on_rank_0(lambda: folders.kind_of(path)) == FULL:
            return self._resume(path)
        if own is None:
            raise UserError(
                f"{path}: holds the model only; name a full step in checkpoint.initial_load_path, "
                "or set checkpoint.initial_load_model_only = true"
            )
        logger.warning("%s holds the model only: training starts at step 0 with it", path)
        self._load_weights(path)
        return 0

    def _choose(self) -> Path | None:
        """The checkpoint of this run's folder to load (rank 0)."""
        asked, folder = self.config.load_step, self.folder
        folders.warn_about_leftovers(folder)
        step = folders.chosen_step(folder, asked)
        newest = max(folders.finished_steps(folder), default=0)
        if asked == -1 and newest != (step or 0):
            logger.warning(
                "step-%d holds the model only and can't be resumed: %s",
                *(newest, f"resuming at step {step}" if step else "starting anew"),
            )
        elif newest > asked != -1:
            logger.warning(
                "step-%d is loaded while later steps (up to step-%d) are in %s: the first save "
                "renames them; then start without checkpoint.load_step to go on",
                *(asked, newest, folder),
            )
        return None if step is None else folders.step_folder(folder, step)

    def _load_weights(self, path: Path, other_heads: bool = False, resume: bool = False) -> Opened:
        opened = open_checkpoint(path, self._ranks, self.config.verify)
        self._check_exclude(stored_model_names(opened))
        self.load_report = load_opened_weights(
            *(opened, self.model, self._ranks, self.config.exclude_from_loading),
            other_heads=other_heads,
            resuming=resume,
            optimizer=self.optimizer,
        )
        return opened

    def _check_exclude(self, stored: Iterable[str]) -> None:
        """Every entry of exclude_from_loading means something, here or in the checkpoint."""
        states = {"model", *OTHER_STATES, *self.extra}
        names = [*names_of(self.model), *stored, "mtp.heads.0"]
        for entry in self.config.exclude_from_loading:
            if entry not in states and not any(excluded(name, (entry,)) for name in names):
                raise UserError(
                    f"checkpoint.exclude_from_loading names {entry!r}, expected one of "
                    f"{', '.join(sorted(states))}, or (the beginning of) a parameter's name"
                )

    def _resume(self, path: Path) -> int:
        """Everything, from a full checkpoint; returns the step that the run counts on from."""
        opened = self._load_weights(path, resume=True)
        exclude = self.config.exclude_from_loading
        restore(opened, self.model, self.optimizer, self.extra, self._ranks, exclude)
        step = opened.manifest.step if opened.manifest else int(path.name.rpartition("-")[2])
        self._came_from = 0 if "train_state" in exclude else step
        logger.info("resumed %s at step %d", path, self._came_from)
        return self._came_from

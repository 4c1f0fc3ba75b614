"""Build everything a run needs, then: step, log, evaluate, save."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan_mtp.build import model_from_config
from torchtitan_mtp.checkpoint import Checkpointer
from torchtitan_mtp.checkpoint.folders import step_folder
from torchtitan_mtp.checkpoint.lock import lock_folders, written_folders
from torchtitan_mtp.checkpoint.origin import completed, find_origin
from torchtitan_mtp.checkpoint.resume import LoaderState, TrainState, settings_of
from torchtitan_mtp.config import JobConfig, to_toml
from torchtitan_mtp.config.values import further_heads
from torchtitan_mtp.data.run import (
    loaders_from_config,
    micro_batches_in_window,
    micro_batches_per_step,
)
from torchtitan_mtp.data.targets import IGNORE, Batch, Window, make_batch
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.distributed.balance import (
    apart_from_training,
    balance_experts,
    weigh_balance_losses,
)
from torchtitan_mtp.distributed.float8 import convert_to_float8, float8_scales_after_step
from torchtitan_mtp.distributed.heartbeat import Heartbeat
from torchtitan_mtp.distributed.memory import check_run
from torchtitan_mtp.distributed.mesh import all_reduce, init_world, set_determinism
from torchtitan_mtp.distributed.parallelize import OnePiece, parallelize
from torchtitan_mtp.distributed.pipeline import Pipeline
from torchtitan_mtp.distributed.ranks import Ranks, agree, shared_settings
from torchtitan_mtp.distributed.shared_cores import SharedCores
from torchtitan_mtp.distributed.stopping import Stopping
from torchtitan_mtp.formats.training import hf_format, load_hf_weights, save_in_hf
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.monitoring.device import peak_flops, resolve_auto_dtype
from torchtitan_mtp.monitoring.flops import cost_in_layers, forward_backward_flops_per_token
from torchtitan_mtp.monitoring.gc import GarbageCollection
from torchtitan_mtp.monitoring.losses import MissingTargets, StepLosses
from torchtitan_mtp.monitoring.metrics import MetricsProcessor
from torchtitan_mtp.monitoring.profiling import Profiling
from torchtitan_mtp.mtp import clear_unused_gradients, copy_last_layer, head_scales, head_weights
from torchtitan_mtp.nonfinite import FiniteGuard, find_cause
from torchtitan_mtp.ops import LossOptions
from torchtitan_mtp.optimizer import build_optimizer, build_scheduler, clip_gradients
from torchtitan_mtp.transfer import send_to_host, to_device
from torchtitan_mtp.validation import compare_with_bigrams, evaluate_batches
from torchtitan_mtp.writing import written_whole

logger = logging.getLogger(__name__)


class Trainer:
    """One run: `Trainer(config).train()`, then `close()`."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        shared, folder = shared_settings(config), config.job.dump_folder
        self.world = init_world(config.parallelism, config.comm, shared, folder)
        self.ranks, self.lock = Ranks(), ExitStack()
        try:
            self.ranks.on_rank_0(lambda: lock_folders(written_folders(config), self.lock))
            model = self._build()
            self._build_training(model)
            self._load()
            self._build_monitoring()
        except BaseException:
            self.lock.close()
            raise

    # ---------------------------------------------------------------- build

    def _build(self) -> Trunk:
        """Tokenizer, data loaders, and the model on the meta device, checked against the memory."""
        self.seed, dtype, earlier = self.ranks.on_rank_0(lambda: find_origin(self.config))
        auto = dtype == "auto"
        self.param_dtype = resolve_auto_dtype(self.world.device) if auto else getattr(torch, dtype)
        config = self.config = completed(self.config, self.seed, self.param_dtype)
        training = config.training
        if config.job.description:
            logger.info(config.job.description)
        self.device, self.n = self.world.device, config.num_future_tokens
        set_determinism(training.deterministic, self.seed)
        # Files are each rank's own: what fails on one of them ends all.
        self.tokenizer = self.ranks.on_all(lambda: build_tokenizer(config.model.hf_assets_path))
        stored, vocabulary = getattr(torch, training.dtype), self.tokenizer.vocab_size
        model = model_from_config(config, vocabulary, stored, earlier=earlier)
        if config.checkpoint.last_save_in_hf:  # before the training, not after it
            hf_format(model.spec, config.model.hf_assets_path, config.loss.softcap)
        self.accumulation = micro_batches_per_step(config, self.world.data_size)
        rank, size, accumulation = self.world.data_rank, self.world.data_size, self.accumulation
        self.ranks.on_all(
            lambda: check_run(config, model, self.device, self.world.size, accumulation)
        )
        self.loader, self.validation = self.ranks.on_all(
            lambda: loaders_from_config(config, self.tokenizer, rank, size)
        )
        for name, loader in (("training", self.loader), ("validation", self.validation)):
            identity = {} if loader is None else loader.identity
            agree({f"{name} data: {key}": value for key, value in identity.items()})
        return model

    def _build_training(self, model: Trunk) -> None:
        """The parallelized model on its device, optimizer, scheduler and checkpointer."""
        config, training = self.config, self.config.training
        self.loss_options = loss_options(config, model.softcap)
        self.flops_per_token = forward_backward_flops_per_token(
            model, training.seq_len, config.target_loss is not None
        )
        self.pieces = self._parallelize(model)
        self.model = self.pieces.model
        self.float8_scales = float8_scales_after_step(config)
        self.optimizer = build_optimizer(self.model.parameters(), config.optimizer)
        self.scheduler = build_scheduler(self.optimizer, config.lr_scheduler, training.steps)
        self.state = TrainState(settings=settings_of(config))
        self.checkpointer = Checkpointer(
            *(config.checkpoint, config.job.dump_folder, self.model, self.optimizer),
            {
                "lr_scheduler": self.scheduler,
                "dataloader": LoaderState(self.loader),
                "train_state": self.state,
            },
            load_hf_weights,
            self.tokenizer,
        )

    def _build_monitoring(self) -> None:
        """Metrics, the guard against non-finite updates, signal handling and heartbeat."""
        config, training = self.config, self.config.training
        self.metrics = MetricsProcessor(
            config,
            device=self.device,
            flops_per_token=self.flops_per_token,
            peak_flops=peak_flops(self.device, self.param_dtype),
            rank=self.world.rank,
            world_size=self.world.size,
            start_step=self.state.step,
        )
        self.missing, how = MissingTargets(), (self.pieces.parts, self.pieces.forward)
        self.guard = FiniteGuard(
            self.optimizer,
            training.skip_nonfinite,
            self.state,
            functools.partial(find_cause, *how, self.loss_options, self.device),
        )
        self.stopping = Stopping()
        self.stopped_unsaved = False
        self.heartbeat = Heartbeat(config.comm.train_timeout_seconds)
        self.gc = GarbageCollection(training.gc_freq, debug=training.gc_debug, rank=self.world.rank)

    def _parallelize(self, model: Trunk) -> OnePiece | Pipeline:
        config = self.config
        if "quantize.linear.float8" in config.model.converters:
            convert_to_float8(model, config.quantize.linear.float8, config.compile.enable)
        if config.model.print_after_conversion:
            logger.info("model after conversion:\n%s", model)
        heads = sum(p.numel() for name, p in model.named_parameters() if name.startswith("mtp."))
        total = sum(p.numel() for p in model.parameters())
        logger.info(
            "%s %s: %s parameters%s; %s compute",
            *(config.model.name, config.model.flavor, f"{total:,}"),
            f", of which {heads:,} in {further_heads(self.n)}" if self.n > 1 else "",
            str(self.param_dtype).removeprefix("torch."),
        )
        how, options = (config, self.world, self.param_dtype, self.seed), self.loss_options
        if config.parallelism.pipeline_parallel_degree == 1:
            return OnePiece(parallelize(model, *how), config, self.world, options)
        cost = cost_in_layers(model, config.training.seq_len, self.flops_per_token)
        return Pipeline(model, *how, options, heads_cost=cost, windows=self.accumulation)

    def _load(self) -> None:
        """Resume or load initial weights; heads that were not loaded are initialised (mtp.init)."""
        resumed = self.checkpointer.load()
        if resumed is None and self.config.mtp.init == "copy_last_layer" and self.model.mtp:
            report = self.checkpointer.load_report
            copy_last_layer(self.model, None if report is None else report.missing)
        self.ranks.on_rank_0(self._write_config)

    def _write_config(self) -> None:
        with written_whole(Path(self.config.job.dump_folder) / "config.toml") as file:
            text = to_toml(self.config, self.config.job.dump_folder)
            file.write_text(text, encoding="utf-8")

    # ---------------------------------------------------------------- train

    def train(self) -> None:
        """Train from the run's current step to `training.steps`."""
        config, steps = self.config, self.config.training.steps
        if config.checkpoint.create_seed_checkpoint:
            self.checkpointer.save(0, force=True)
            return
        first, rank = self.state.step + 1, self.world.rank
        if self.state.step >= steps:
            logger.info(
                "nothing left to train: step %d of training.steps = %d is done in %s; raise the "
                "steps or choose another job.dump_folder",
                *(self.state.step, steps, config.job.dump_folder),
            )
        with (
            self.heartbeat,
            SharedCores(),
            self.stopping,
            Profiling(config, device=self.device, rank=rank, start_step=first - 1) as profiling,
        ):
            while self.state.step < steps and not self.stopping.signal:
                self.stopping.ask()
                self.train_step()
                step = self.state.step
                if step == first:
                    # Compilation and start-up are over: a rank that hangs is noticed sooner now.
                    self.pieces.set_timeout(config.comm.train_timeout_seconds)
                self.gc.run(step)
                # Save before validating: a crash in validation then loses no step.
                self._save(last=step == steps, stop=self.stopping.agreed())
                due = step % config.validation.freq == 0 or step == steps
                try:
                    if self.validation and due and not self.stopping.signal:
                        self.evaluate(compare=step == steps)
                        if self.stopping.agreed() and step < steps:
                            self._save(last=False, stop=True)
                finally:
                    if step == steps:
                        self._save_in_hf()
                profiling.step()

    def _save(self, last: bool, stop: bool) -> None:
        """Save if a save is due, and everything if the run is told to stop before its end."""
        step, early = self.state.step, stop and not last
        self.heartbeat.where = f"the save after step {step}"
        if early or self.checkpointer.should_save(step, last):
            self.guard.settle()
        self.checkpointer.save(step, last=last, force=early)
        if early:
            self.checkpointer.wait()
            self.stopped_unsaved = not self.checkpointer.saves
            logger.warning(
                "%s: stopped after step %d of %d, %s",
                self.stopping.signal.name if self.stopping.signal else "",
                step,
                self.config.training.steps,
                self._how_to_resume(),
            )

    def _how_to_resume(self) -> str:
        checkpoint = self.config.checkpoint
        if self.stopped_unsaved:
            return "nothing saved: checkpoint.enable = false or checkpoint.load_only = true"
        once = ["checkpoint.load_step"] if checkpoint.load_step != -1 else []
        once += ["checkpoint.exclude_from_loading"] if checkpoint.exclude_from_loading else []
        without = f" without {' and '.join(once)}" if once else ""
        return f"saved: the same command{without} goes on from here"

    def _save_in_hf(self) -> None:
        """Write the last step as a Hugging Face folder, if asked for: rank 0 reads the checkpoint
        back, no other rank waits."""
        checkpoint = self.config.checkpoint
        if not (checkpoint.last_save_in_hf and self.checkpointer.saves and self.world.rank == 0):
            return
        dtype = getattr(torch, checkpoint.export_dtype)
        save_in_hf(
            step_folder(self.checkpointer.folder, self.state.step),
            self.model,
            dtype if checkpoint.last_save_model_only else None,
        )

    def train_step(self) -> None:
        """One optimizer step over `accumulation` micro-batches on every rank."""
        state, config, training = self.state, self.config, self.config.training
        self.heartbeat.where = f"step {state.step + 1}, reading data"
        begin = time.perf_counter()
        windows = [self.loader.next_window() for _ in range(self.accumulation)]
        windows = [part for w in windows for part in w.split(micro_batches_in_window(config))]
        batches = [self._batch(w, config.target_loss is not None) for w in windows]
        data_seconds = time.perf_counter() - begin
        self.heartbeat.where = f"step {state.step + 1}"

        # Labels are data: every head's targets are counted over the whole step before its forward.
        valid = torch.stack([(b.labels != IGNORE).sum((0, 1)) for b in batches]).sum(0)  # [n]
        valid = all_reduce(to_device(valid, self.device), group=self.world.batch)
        arrive = send_to_host(valid)
        weights = head_weights(config.mtp, state.step + 1, training.steps)
        scales = head_scales(weights, valid)
        sequences = training.local_batch_size * self.accumulation * self.world.data_size
        weigh_balance_losses(self.model, weights, sequences)
        losses = StepLosses(self.n, self.device, self.world.losses)
        for out in self.pieces.step(batches, scales):
            losses.add(*out)

        beside = (self.pieces.group, self.pieces.copied)
        self.grad_norm = clip_gradients(self.model, training.max_norm, *beside)
        targets = arrive()  # this waits for no more than the step before, as the guard does
        unused = clear_unused_gradients(self.model, weights, targets)
        lr = float(self.scheduler.get_last_lr()[0])
        if self.guard.admits(state.step + 1, losses.total, self.grad_norm, targets, batches):
            self.optimizer.step()
        if self.float8_scales:
            self.float8_scales(self.model)
        self.expert_loads = balance_experts(self.model, unused, self.world.stage)
        self.scheduler.step()
        self.optimizer.zero_grad()

        state.step += 1
        tokens = self.world.batch_size * sum(b.tokens.numel() for b in batches)
        state.tokens += tokens
        self.metrics.record_step(tokens=tokens, data_seconds=data_seconds)
        if self.metrics.should_log(state.step):
            self._log(losses, lr, weights)

    def _batch(self, window: Window, from_head_1: bool = False) -> Batch:
        """What this rank has of a window's batch: all, unless other ranks share its sequences."""
        batch, ranks = make_batch(window, self.n, from_head_1), self.world.context_parallel
        return batch if ranks is None else ranks.shard(batch)

    def _log(self, step_losses: StepLosses, lr: float, weights: list[float]) -> None:
        # All that is read is under way before the host waits.
        losses, loads = step_losses.send(), self.expert_loads.send() if self.expert_loads else dict
        norm, state = send_to_host(self.grad_norm.double().view(1)), self.state
        self.guard.settle()
        values = {"grad_norm": norm()[0], "lr": lr, "n_tokens_seen": state.tokens}
        values |= {f"mtp/head_{k}_scale": weight for k, weight in enumerate(weights, 1)}
        values |= {"skipped_steps": state.skipped} if state.skipped else {}
        values |= self.pieces.gather(loads())
        heads = losses()
        self.metrics.log(state.step, heads, values)

    # ---------------------------------------------------------------- evaluate

    def evaluate(self, compare: bool = False) -> list[float]:
        """Held-out loss of every head (nats a token, over all ranks), logged with accuracies and
        with how often heads 2..n draft what head 1 would say.

        compare: also log the loss that bigram statistics of the same text would reach (bytes only:
        counts over a larger vocabulary are too sparse to mean anything).
        """
        where = self.heartbeat.where = f"validation after step {self.state.step}"
        begin = time.perf_counter()
        compare = compare and self.tokenizer.vocab_size <= 512
        seen: list[Batch] = []
        with apart_from_training(*self.pieces.parts):
            batches = self._validation_batches(seen, keep=compare)
            how = (self.loss_options, self.world.losses, self.pieces.forward)
            found = evaluate_batches(self.model, batches, self.device, *how)
        if self.stopping.signal:
            return []
        self.missing.check(where, found.targets, seen)
        self.metrics.log_validation(
            *(self.state.step, found, found.acceptance),
            tokens=found.tokens * self.world.batch_size,
            elapsed=time.perf_counter() - begin,
        )
        if compare and any(found.targets):
            table = compare_with_bigrams(found, seen, self.tokenizer.vocab_size)
            logger.info(
                "held-out text, against what one token tells about the k-th next:\n%s", table
            )
        return found.losses

    def _validation_batches(self, seen: list[Batch], keep: bool) -> Iterator[Batch]:
        """The batches of one validation, up to a signal. `seen` gets the first, with `keep` all."""
        assert self.validation is not None
        for i, window in enumerate(self.validation):
            if i == self.config.validation.steps or self.stopping.agreed():
                return
            self.stopping.ask()
            batch = self._batch(window)
            if keep or not seen:
                seen.append(batch)
            yield batch

    def close(self) -> None:
        """Wait for what is being written, stop threads, leave the process group."""
        self.checkpointer.close()
        self.metrics.close()
        self.loader.close()
        self.gc.close()
        self.lock.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def loss_options(config: JobConfig, softcap: float | None) -> LossOptions:
    """The [loss] table, the model's softcap, compilation, and what heads 2..n learn from head 1."""
    own = {"softcap": softcap, "passes": config.loss_passes, "target_loss": config.target_loss}
    own |= {"target_weight": config.mtp.target_weight, "compile_backend": config.compile.backend}
    return LossOptions(**asdict(config.loss) | own)

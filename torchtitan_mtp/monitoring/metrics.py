"""What a run reports at a logged step: a line in the log and a set of tags (docs/monitoring.md)."""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping

import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.config.values import further_heads
from torchtitan_mtp.inference.acceptance import Acceptance
from torchtitan_mtp.monitoring.backends import build_backends
from torchtitan_mtp.monitoring.device import MemoryMonitor
from torchtitan_mtp.monitoring.logging import RESET, use_color
from torchtitan_mtp.monitoring.losses import HeadLosses, LossSpikes
from torchtitan_mtp.monitoring.observer import Observer
from torchtitan_mtp.monitoring.progress import Pace, ProgressBar

logger = logging.getLogger(__name__)

COLORS = {
    "step": "\033[31m",
    "loss": "\033[32m",
    "heads": "\033[33m",
    "grad_norm": "\033[38;2;180;60;0m",
    "memory": "\033[38;2;54;234;195m",
    "tps": "\033[34m",
    "accuracy": "\033[36m",
    "acceptance": "\033[33m",
    "mfu": "\033[35m",
}


class MetricsProcessor:
    """Counts what every step did and reports it at the steps to log.

    `record_step` is called at every step, `log` at those for which `should_log` is true, both on
    every rank; losses arrive already reduced over ranks. Only rank 0 prints.

    Args:
        flops_per_token: forward and backward FLOPs (flops.py).
        peak_flops: FLOP/s of one device that count as 100% MFU, or None: MFU is left out.
        start_step: the last step that was done before (on resume).
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: JobConfig,
        *,
        device: torch.device,
        flops_per_token: float,
        peak_flops: float | None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.world_size = world_size
        self.log_freq = config.metrics.log_freq
        self.total_steps = config.training.steps
        self.target_loss = config.target_loss
        self.color = use_color(config.metrics.disable_color_printing)
        self.clock = clock
        self.memory = MemoryMonitor(device)
        self.backends = build_backends(config, rank)
        bar = functools.partial(ProgressBar, self.total_steps, start_step, self.color, rank == 0)
        self.progress = Observer("progress bar", bar)
        self.spikes = LossSpikes()
        self.step = start_step
        self.pace = Pace()
        self._start_interval()

    def _start_interval(self) -> None:
        self.steps = 0  # since the last log
        self.tokens = 0
        self.data_seconds = 0.0
        self.interval_start = self.clock()

    def should_log(self, step: int) -> bool:
        """True at step 1, at every `metrics.log_freq`-th and at the last."""
        return step == 1 or step % self.log_freq == 0 or step == self.total_steps

    def record_step(self, *, tokens: int, data_seconds: float) -> None:
        """Count one optimizer step: input tokens of ALL ranks, and the seconds waited for data."""
        self.step += 1
        self.steps += 1
        self.tokens += tokens
        self.data_seconds += data_seconds
        self.progress.update(self.step)

    def log(self, step: int, heads: HeadLosses, others: Mapping[str, float]) -> None:
        """Report the steps recorded since the last call.

        heads: of this step, of what each head learns; head 1's loss, the next token, compares with
            a run without MTP. others: further metrics by their tags, `grad_norm` among them.
        """
        self.spikes.check(step, heads.losses, others["grad_norm"])
        elapsed = max(self.clock() - self.interval_start, 1e-9)
        steps = max(self.steps, 1)
        tps = self.tokens / elapsed / self.world_size
        rate = self.flops_per_token * tps
        losses = head_metrics(heads, self.target_loss)
        metrics = {
            "loss_metrics/global_avg_loss": heads.losses[0],
            "loss_metrics/global_max_loss": heads.max_loss,
            "loss_metrics/global_total_loss": heads.total,
            **{f"loss_metrics/{tag}": value for tag, value in losses.items()},
            **others,
            "throughput(tps)": tps,
            "tflops": rate / 1e12,
            **({"mfu(%)": 100 * rate / self.peak_flops} if self.peak_flops else {}),
            "time_metrics/end_to_end(s)": elapsed / steps,
            "time_metrics/data_loading(s)": self.data_seconds / steps,
            "time_metrics/data_loading(%)": 100 * self.data_seconds / elapsed,
            **self.memory.peak(),
        }
        self._write(metrics, step)
        self.pace.add(elapsed, steps)
        self._print_step(step, metrics, format_losses(heads, self.target_loss))
        self._start_interval()
        self.memory.reset()

    def log_validation(
        self, step: int, heads: HeadLosses, acceptance: Acceptance, *, tokens: int, elapsed: float
    ) -> None:
        """Report losses on held-out text, and the acceptance of heads 2..n on it.

        `tokens` are the input tokens of all ranks, `elapsed` the seconds that validation took; they
        are taken out of the training interval, whose throughput goes on unharmed.
        """
        self.interval_start += elapsed
        tps = tokens / max(elapsed, 1e-9) / self.world_size
        metrics = {
            "loss": heads.losses[0],
            "throughput(tps)": tps,
            **{tag: peak for tag, peak in self.memory.peak().items() if "max" in tag},
            **head_metrics(heads),
            **acceptance_metrics(acceptance),
        }
        self._write({f"validation_metrics/{tag}": value for tag, value in metrics.items()}, step)
        parts = {
            "step": f"validate step: {step:2}",
            **format_losses(heads),
            "accuracy": "accuracy: " + " ".join(figure(a, ".1%", a) for a in heads.accuracies),
            "acceptance": format_acceptance(acceptance),
            "tps": f"tps: {round(tps):,}",
        }
        logger.info(self._paint(parts))
        self.memory.reset()

    def close(self) -> None:
        """Flush and close the backends and remove the progress bar."""
        self.progress.close()
        for backend in self.backends:
            backend.finish()

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        for backend in self.backends:
            backend.log(metrics, step)

    def _print_step(self, step: int, metrics: Mapping[str, float], losses: dict[str, str]) -> None:
        mfu = metrics.get("mfu(%)")
        parts = {
            "step": f"step: {step:2}",
            **losses,
            "grad_norm": f"grad_norm: {metrics['grad_norm']:7.4f}",
            "memory": f"memory: {metrics['memory/max_reserved(GiB)']:5.2f}GiB"
            f"({metrics['memory/max_reserved(%)']:.2f}%)",
            "tps": f"tps: {round(metrics['throughput(tps)']):,}",
            "mfu": f"tflops: {metrics['tflops']:,.2f}" if mfu is None else f"mfu: {mfu:.2f}%",
            "data": f"data: {metrics['time_metrics/data_loading(%)']:.1f}%",
            "eta": f"eta: {self.pace.time_left(self.total_steps - step)}",
        }
        logger.info(self._paint(parts))
        self.progress.update(step, "  ".join(parts[name] for name in ("loss", "tps", "eta")))

    def _paint(self, parts: Mapping[str, str]) -> str:
        """The non-empty parts on one line, each in its colour."""
        if not self.color:
            return "  ".join(text for text in parts.values() if text)
        painted = [COLORS.get(name, RESET) + text for name, text in parts.items() if text]
        return "  ".join(painted) + RESET


def head_metrics(heads: HeadLosses, target_loss: str | None = None) -> dict[str, float]:
    """`mtp_head_{k}_loss` and `_accuracy` for k = 1..n; `mtp_head_{k}_{target_loss}`, k = 2..n, of
    what is no cross-entropy of labels."""
    kinds = ["loss"] + [target_loss or "loss"] * (len(heads.losses) - 1)
    named = enumerate(zip(kinds, heads.losses, strict=True), 1)
    metrics = {f"mtp_head_{k}_{kind}": loss for k, (kind, loss) in named}
    return metrics | {f"mtp_head_{k}_accuracy": a for k, a in enumerate(heads.accuracies, 1)}


def acceptance_metrics(acceptance: Acceptance) -> dict[str, float]:
    """`mtp_head_{k}_acceptance`, k = 2..n, and `tokens_per_step`; heads whose
    drafts were never compared are left out."""
    rates = {f"mtp_head_{k}_acceptance": rate for k, rate in enumerate(acceptance.marginal, 2)}
    if acceptance.tokens_per_step:
        rates["tokens_per_step"] = acceptance.tokens_per_step[-1]
    return {tag: rate for tag, rate in rates.items() if not math.isnan(rate)}


def figure(value: float, form: str, of: float) -> str:
    """A loss or rate, or "-" where `of`, a head's accuracy or the rate itself, is of nothing."""
    return "-" if math.isnan(of) else format(value, form)


def format_losses(heads: HeadLosses, target_loss: str | None = None) -> dict[str, str]:
    """Head 1's loss, and those of heads 2..n if there are any."""
    pairs = zip(heads.losses, heads.accuracies, strict=True)
    first, *others = (figure(loss, ".4f", accuracy) for loss, accuracy in pairs)
    kind = f" ({target_loss})" if target_loss else ""
    further = f"{further_heads(len(heads.losses))}{kind}: {' '.join(others)}" if others else ""
    return {"loss": f"loss: {first:>7}", "heads": further}


def format_acceptance(acceptance: Acceptance) -> str:
    """Acceptance of heads 2..n, and the tokens a step that it makes. Empty without such heads."""
    if not acceptance.marginal:
        return ""
    rates = " ".join(figure(rate, ".1%", rate) for rate in acceptance.marginal)
    tokens = acceptance.tokens_per_step[-1]
    return f"acceptance: {rates}  tokens/step: {figure(tokens, '.2f', tokens)}"

"""A model as lm-evaluation-harness (EleutherAI, `pip install lm-eval`) asks for it.

The harness asks for text and gets text or likelihoods: how likely a continuation is after a context
and whether greedy decoding would write it, how likely a whole document is, and what comes after a
context up to a stop string. Likelihoods are head 1's. Generation drafts with heads 2..n where there
are any, which changes what it costs and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.targets import Batch, Window, make_batch
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.decoding import generate
from torchtitan_mtp.models.transformer import Transformer

LOGIT_ROWS = 1024  # positions whose logits are alive at a time
ROUND = 64  # tokens that are generated before stop strings are looked for
MAX_NEW_TOKENS = 256  # the harness's default for tasks that give none

# Its texts, if it is a request of its own; tokens of the context and of the continuation.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """The `lm_eval.api.model.LM` of a loaded model.

    Contexts begin with the tokenizer's prefix, as documents do in training. What is longer than the
    run's `training.seq_len` loses its beginning.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, config: JobConfig, batch_size: int = 8
    ) -> None:
        super().__init__()
        self.model, self.tok, self.batch_size = model, tokenizer, batch_size
        self.softcap, self.max_length = config.loss.softcap, config.training.seq_len
        self._device = model.norm.weight.device
        self._generations = 0

    @property
    def eot_token_id(self) -> int:
        return self.tok.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self.tok.eos_id if self.tok.bos_id is None else self.tok.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, after the prefix unless `add_special_tokens` is False."""
        ids = self.tok.prompt(string)
        return ids[len(self.tok.prefix) :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): sum of the continuation's log-probabilities, and
        whether every token of it is the most likely one."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Long ones first, so that a batch is of one length and too large a batch fails at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found = self._score([requests[i][1:] for i in chosen])
            for i, result in zip(chosen, found, strict=True):
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return results

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One forward over some (context, continuation)."""
        texts = [(c + continuation)[-self.max_length - 1 :] for c, continuation in pairs]
        counts = [len(continuation) for _, continuation in pairs]
        if max(counts) > self.max_length:
            raise UserError(
                f"a continuation has {max(counts)} tokens, but the model was trained on "
                f"{self.max_length} at a time (training.seq_len)"
            )
        tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        # Padding comes after what it could disturb.
        batch = make_batch(Window(tokens, torch.zeros_like(tokens)), 1)
        batch = Batch(*(t.to(self._device) for t in batch))
        h = self.model.norm(self.model.encode(batch)[0])  # [B, S, D], head 1's
        lasts = [len(text) - 1 for text in texts]
        states = [h[b, e - c : e] for b, (e, c) in enumerate(zip(lasts, counts, strict=True))]
        targets = torch.tensor([t for _, c in pairs for t in c], dtype=torch.int64)
        log_probs, greedy = self._log_probabilities(torch.cat(states), targets.to(self._device))
        return [
            (float(p.sum()), bool(g.all()))
            for p, g in zip(log_probs.split(counts), greedy.split(counts), strict=True)
        ]

    def _log_probabilities(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of targets [N] after hidden states [N, D]: log-probability, and whether it is the most
        likely token, [N] each on the CPU."""
        parts = []
        for h, target in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = self.model.output(h).float()  # [C, V]
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            log_probs = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
            parts.append((log_probs.double().cpu(), (logits.argmax(-1) == target).cpu()))
        log_probs, greedy = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, greedy

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole document; a long one in windows, each token once."""
        pieces: list[Scored] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, windows):
                pieces.append((None, *window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[i] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to its first stop string or `max_gen_toks` tokens."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # what is generated in the same way
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                options = requests[chosen[0]].args[1]
                found = self._continue([requests[i].args[0] for i in chosen], dict(options))
                for i, text in zip(chosen, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _continue(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        most = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        keep = max(1, self.max_length - most)
        start = [self.prefix_token_id]  # for an empty context without a prefix
        prompts = [self.tok_encode(context)[-keep:] or start for context in contexts]
        sampling = {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
        if options.get("do_sample", False):
            sampling["temperature"] = options.get("temperature", 1.0)
        new: list[list[int]] = [[] for _ in contexts]
        left = list(range(len(contexts)))  # rows without an end
        while left and (room := most - len(new[left[0]])) > 0:
            generation = generate(
                self.model,
                [prompts[b] + new[b] for b in left],
                min(ROUND, room),
                eos_id=self.tok.eos_ids,
                softcap=self.softcap,
                speculative=self.model.mtp is not None,
                seed=self._generations,
                **sampling,
            )
            self._generations += 1  # equal requests get samples of their own
            for b, tokens in zip(left, generation.tokens, strict=True):
                new[b] += tokens
            left = [b for b in left if not self._ended(new[b], until)]
        return [cut(self.tok.decode(tokens), until) for tokens in new]

    def _ended(self, tokens: list[int], until: Sequence[str]) -> bool:
        text = self.tok.decode(tokens)
        return tokens[-1] in self.tok.eos_ids or any(stop in text for stop in until if stop)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    for stop in filter(None, until):
        text = text.split(stop)[0]
    return text


Metrics = dict[str, dict[str, tuple[float, float | None]]]  # task -> metric -> value, stderr


def run_tasks(
    lm: HarnessModel,
    names: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> Metrics:
    """Run the harness's tasks.

    Args:
        names: tasks, groups or patterns as `lm_eval --tasks` takes them.
        include_path: a folder with further YAML files.
        num_fewshot: examples before each question; None: as the task says.
        limit: questions of each task.

    Raises:
        UserError: an unknown task, or a data set that can't be had.
    """
    manager = TaskManager(include_path=include_path)
    known = manager.match_tasks(list(names))
    missing = [name for name in names if "*" not in name and name not in known]
    if missing or not known:
        raise UserError(
            f"--tasks: no task {', '.join(missing or names)}; `lm_eval ls tasks` lists the names, "
            "--include_path adds a folder of your own"
        )
    try:
        results = simple_evaluate(
            lm,
            tasks=known,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )
    except (OSError, ConnectionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tasks {','.join(names)}: {reason}") from error
    return {task: _metrics(values) for task, values in results["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The harness's "acc,none": 0.5 and "acc_stderr,none": 0.1 as {"acc": (0.5, 0.1)}."""
    found = {}
    for key, value in values.items():
        name, _, rule = key.partition(",")
        if not rule or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{name}_stderr,{rule}")
        shown = name if rule == "none" else f"{name} ({rule})"
        found[shown] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    return found

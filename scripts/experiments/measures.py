"""What is measured of a trained model: figures by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.targets import Window, make_batch
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.acceptance import measure_continuation
from torchtitan_mtp.inference.held_out import find_text
from torchtitan_mtp.models.trunk import Trunk
from torchtitan_mtp.monitoring.flops import forward_backward_flops_per_token
from torchtitan_mtp.validation import evaluate_windows


class Trained(NamedTuple):
    """A run's model, ready to generate, with its tokenizer and configuration."""

    model: Trunk
    tokenizer: Tokenizer
    config: JobConfig


Measure = Callable[[Trained], dict[str, float]]


def cost(trained: Trained) -> dict[str, float]:
    """Parameters, and FLOPs of the training, as the trainer counts them."""
    model, training = trained.model, trained.config.training
    tokens = training.local_batch_size * training.seq_len * training.steps
    flops = forward_backward_flops_per_token(model.requires_grad_(True), training.seq_len, False)
    model.requires_grad_(False)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "TFLOP": flops * tokens / 1e12,
        "steps": training.steps,
    }


def held_out(trained: Trained, batches: int = 24) -> dict[str, float]:
    """On batches spread evenly over what the run held out: every head's loss, in nats a token, head
    1's bits a byte, how often head 2 says what head 1 will ("agreement 2"), and the tokens a step
    if drafting began at all positions of that text alike ("text tokens a step").

    Errors: the run held nothing out.
    """
    model, tokenizer, config = trained
    if not config.validation.enable:
        raise ValueError("validation.enable = false: the run trained on all of its text")
    n, size = model.spec.num_future_tokens, config.training.seq_len
    windows = list(find_text(config, None).windows(tokenizer, n, size, 16))
    some = windows[:: max(1, len(windows) // batches)]
    found = evaluate_windows(model, some, tokenizer, softcap=model.softcap)
    figures = {f"loss {k}": loss for k, loss in enumerate(found.losses, start=1)}
    rates = found.acceptance
    figures |= {"bits per byte": found.bits_per_byte, "text tokens a step": 1.0}
    if n > 1:
        figures |= {"agreement 2": rates.marginal[0]}
        figures |= {"text tokens a step": rates.tokens_per_step[-1]}
    return figures


def decoding(
    trained: Trained, prompts: int = 64, new: int = 96, timed: int = 3, repeats: int = 3
) -> dict[str, float]:
    """What heads 2..n are worth in greedy decoding, one held-out prompt of 64 tokens at a time.

    "acceptance k": how often head k drafts what head 1 says, if the drafts before were right, and
    "tokens a step", both on the continuations of `prompts` prompts. "speed-up": tokens a step over
    what a step with n - 1 drafts costs beside a plain one, in seconds, on `timed` of the prompts
    (the two alternate; of each prompt the fastest of `repeats` counts). "best speed-up": with the
    number of drafts that pays best, "best drafts".
    """
    model, tokenizer, config = trained
    if model.mtp is None:
        return {"tokens a step": 1.0, "speed-up": 1.0, "best speed-up": 1.0, "best drafts": 0}
    n = model.spec.num_future_tokens
    texts = find_text(config, None).prompts(tokenizer, prompts, 64)
    own = measure_continuation(model, texts, new, eos_id=tokenizer.eos_ids)
    seconds = dict.fromkeys(range(n), 0.0)  # of a step, by its drafts
    for text in texts[:: max(1, len(texts) // timed)][:timed]:
        fastest = dict.fromkeys(range(n), float("inf"))
        for _ in range(repeats):
            for count in range(n):
                most = count or None
                stats = generate(model, [text], new, speculative=count > 0, num_draft=most).stats
                spent = (stats.seconds - stats.prompt_seconds) / max(1, stats.steps)
                fastest[count] = min(fastest[count], spent)
        seconds = {count: seconds[count] + fastest[count] for count in seconds}
    gains = {m: own.tokens_per_step[m - 1] * seconds[0] / seconds[m] for m in range(1, n)}
    best = max(gains, key=lambda count: gains[count])
    rates = enumerate(own.acceptance.conditional, start=2)
    return {f"acceptance {k}": rate for k, rate in rates} | {
        "tokens a step": own.tokens_per_step[-1],
        "step cost": seconds[n - 1] / seconds[0],
        "speed-up": gains[n - 1],
        "best speed-up": gains[best],
        "best drafts": best,
    }


def completions(trained: Trained, file: Path, name: str = "right") -> dict[str, float]:
    """Share of the records of `file` whose greedy answer is the completion, to the character."""
    model, tokenizer, _ = trained
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    right = 0
    by_length: dict[int, list[dict[str, str]]] = {}
    for record in records:  # rows of a batch then need no padding
        by_length.setdefault(len(record["prompt"]), []).append(record)
    for alike in by_length.values():
        for start in range(0, len(alike), 128):
            part = alike[start : start + 128]
            longest = max(len(record["completion"]) for record in part) + 1
            asked = [tokenizer.prompt(record["prompt"]) for record in part]
            answers = generate(model, asked, longest, eos_id=tokenizer.eos_ids).tokens
            told = [tokenizer.decode([t for t in a if t not in tokenizer.eos_ids]) for a in answers]
            pairs = zip(told, part, strict=True)
            right += sum(answer == record["completion"] for answer, record in pairs)
    return {name: right / len(records)}


def words(trained: Trained, prompts: int = 1024, context: int = 128) -> dict[str, float]:
    """Of held-out documents of bytes, cut within words at even distances: the share whose word the
    model ends as the document does, greedily, after `context` bytes; and head 1's loss."""
    model, tokenizer, config = trained
    ends = {i for i in range(256) if not (chr(i).isalnum() or chr(i) == "_")}
    cut: list[tuple[list[int], list[int]]] = []
    for text in find_text(config, None).prompts(tokenizer, 8 * prompts, context + 40):
        word = next((k for k, i in enumerate(text[context:]) if i in ends), 0)
        if word > 1 and text[context - 1] not in ends:  # at least two bytes are missing
            cut.append((text[:context], text[context : context + word]))
    cut = cut[:: max(1, len(cut) // prompts)][:prompts]
    right = 0
    for start in range(0, len(cut), 128):
        part = cut[start : start + 128]
        found = generate(model, [before for before, _ in part], 40, eos_id=ends).tokens
        right += sum(a[:-1] == b for a, (_, b) in zip(found, part, strict=True))
    return {"words": right / len(cut), "tuned loss": held_out(trained)["loss 1"]}


@torch.no_grad()
def second_names(trained: Trained, file: Path) -> dict[str, float]:
    """Share of the second words of names that head 1 gets right, given the first word: where the
    story has the name already, and at its first mention, where it can't be known.

    file: a story a line; {"text": ..., "again": [...], "first": [...]}, places of those words.
    """
    model, tokenizer, _ = trained
    n, counts = model.spec.num_future_tokens, {"again": [0, 0], "first": [0, 0]}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = tokenizer.prompt(record["text"])
        before = len(prompt) - len(record["text"].split())  # begin-of-text, where there is one
        tokens = torch.tensor([prompt + [0] * n])
        hiddens = model(make_batch(Window(tokens, torch.zeros_like(tokens)), n))
        chosen = model.output.argmax(hiddens[:1])[0, :, 0].tolist()
        for kind, count in counts.items():
            for place in record[kind]:
                count[0] += chosen[before + place - 1] == prompt[before + place]
                count[1] += 1
    return {kind: right / total for kind, (right, total) in counts.items()}

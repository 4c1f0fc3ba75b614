"""A model as lm-evaluation-harness (EleutherAI, `pip install lm-eval`) asks for it.

Answers are those of the harness's own adapter for transformers (HFLM) to the model's export.
Likelihoods are head 1's. Generation drafts with heads 2..n where there are any, which changes what
it costs and nothing else.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.chat import chat_tokenizer, render
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.inference.decoding import generate, states_of
from torchtitan_mtp.inference.text_stream import TextStream
from torchtitan_mtp.models.trunk import Trunk

logger = logging.getLogger(__name__)

# What a task that says nothing gets, from the harness and from transformers.
MAX_NEW_TOKENS, TOP_K = 256, 50
# Values of options that can't be had here with which transformers does nothing.
WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1.0}

# Its texts, if it is a request of its own; tokens of the context and of the continuation.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):
    """The `lm_eval.api.model.LM` of a loaded model. What is longer than the run's
    `training.seq_len` loses its beginning."""

    tokenizer_name = ""

    def __init__(
        self, model: Trunk, tokenizer: Tokenizer, config: JobConfig, batch_size: int = 8
    ) -> None:
        super().__init__()
        self.model, self.tok, self.batch_size = model, tokenizer, batch_size
        self.softcap, self.max_length = self.model.softcap, config.training.seq_len
        self.tokenizer_name = tokenizer.place
        self._device = model.output.weight.device
        self._generations = 0

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, which has the chat template."""
        return chat_tokenizer(self.tokenizer_name)

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
        """Token ids, special tokens that the text spells too, after the tokenizer's prefix unless
        there is one, as in what a chat template wrote, or `add_special_tokens` is False."""
        ids: list[int] = self.tok.encode(string, special=True).tolist()
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        return [*self.tok.prefix, *ids] if add_special_tokens else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without its system message where the template takes none."""
        asked = add_generation_prompt
        options = {"add_generation_prompt": asked, "continue_final_message": not asked}
        try:
            return render(self.tokenizer, chat_history, **options)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            return render(self.tokenizer, others, **options)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): sum of the continuation's log-probabilities, and
        whether every token of it is the most likely one."""
        most = max((len(continuation) for _, _, continuation in requests), default=1)
        if most > self.max_length or not all(continuation for _, _, continuation in requests):
            raise UserError(f"a continuation has {most} tokens, expected 1 to {self.max_length}")
        # Of white space alone, a context has no token where the tokenizer has no prefix.
        rows = [(texts, c or [self.prefix_token_id], cont) for texts, c, cont in requests]
        if long := sum(len(c + continuation) > self.max_length + 1 for _, c, continuation in rows):
            what = "%d of %d texts lose their beginning: longer than %d tokens (training.seq_len)"
            logger.warning(what, long, len(rows), self.max_length)
        # Long ones first. What differs in its last token alone, as choices do, is one row.
        order: Any = Collator(
            rows,
            sort_fn=lambda row: (-len(row[1] + row[2]), row[1] + row[2]),
            group_fn=lambda row: row[1] + row[2][:-1],
            group_by="contexts",
        )
        results = []
        for chunk in order.get_batched(n=self.batch_size):
            inputs = [(c + cont)[-self.max_length - 1 : -1] for _, c, cont in chunk]
            states = states_of(self.model, inputs)  # [B, S, D]
            for row, (texts, context, continuation) in enumerate(chunk):
                end = len(inputs[row])
                h = states[row, end - len(continuation) : end]  # [C, D]
                logits = self.model.output(h).float()  # [C, V]
                if self.softcap is not None:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                log_probs = logits.log_softmax(-1).unsqueeze(0)
                for _, tokens, found in order.get_cache(texts, context, continuation, log_probs):
                    target = torch.tensor(tokens, device=self._device).unsqueeze(1)  # [C, 1]
                    found = found[0, -len(tokens) :]
                    total = float(found.gather(1, target).double().sum())
                    results.append((total, bool((found.argmax(-1, True) == target).all())))
        return list(order.get_original(results))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole document with its prefix; a long one in windows, each token
        once."""
        documents: list[list[Scored]] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            documents.append([(None, *make_disjoint_window(window)) for window in windows])
        found = iter(self._loglikelihood_tokens(list(itertools.chain(*documents))))
        return [sum((next(found)[0] for _ in windows), 0.0) for windows in documents]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to its first stop string or `max_gen_toks` tokens."""
        order: Any = Collator(
            [request.args for request in requests],
            sort_fn=lambda r: (-len(self.tok_encode(r[0])), r[0]),
            group_fn=lambda r: r[1],
            group_by="gen_kwargs",
        )
        results = []
        for chunk in order.get_batched(n=self.batch_size):
            results += self._continue([context for context, _ in chunk], chunk[0][1])
        return list(order.get_original(results))

    def _continue(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, MAX_NEW_TOKENS))
        until = [text for text in options.pop("until") if text]
        most = options.pop("max_gen_toks")
        temperature = float(options.pop("do_sample")) * options.pop("temperature", 0.0)
        top_k, top_p = options.pop("top_k", TOP_K) or None, options.pop("top_p", None)
        for key, value in options.items():
            if value not in (None, WITHOUT_EFFECT.get(key)):
                raise UserError(
                    f"generation_kwargs: {key} = {value!r} can't be had here; known are until, "
                    "max_gen_toks, do_sample, temperature, top_k and top_p: leave it out"
                )
        if not 0 < most < self.max_length:
            raise UserError(
                f"generation_kwargs: max_gen_toks = {most}, expected 1 to {self.max_length - 1}: "
                f"with the context, the model takes {self.max_length} (training.seq_len)"
            )
        whole = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        prompts = [maybe_truncate(ids, most, self.max_length)[0] for ids in whole]
        generation = generate(
            self.model,
            prompts,
            most,
            eos_id=self.tok.eos_ids,
            softcap=self.softcap,
            speculative=self.model.mtp is not None,
            seed=self._generations,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            texts=[TextStream(self.tok, until) for _ in contexts],
        )
        self._generations += 1  # equal requests get samples of their own
        texts = map(self.tok.decode, generation.tokens)
        return [postprocess_generated_text(text, until, None) for text in texts]

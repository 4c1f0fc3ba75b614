"""Conversations as a tokenizer's chat template spells them, by transformers, and which of their
tokens the assistant says."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError

# What in a template marks the assistant's words, as transformers finds it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "put {% generation %} and {% endgeneration %} around the assistant's words in the template"
_marking = threading.Lock()  # transformers notes the marked words in the compiled template

Spans = list[tuple[int, int]]  # characters, start..stop-1


@functools.cache
def chat_tokenizer(path: str) -> Any:
    """transformers' tokenizer of `Tokenizer.place`. Error: no chat template, or one that is no
    Jinja, no folder, or no transformers."""
    try:
        from transformers import AutoTokenizer
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        template = tokenizer.get_chat_template()
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer {path}: no chat template to be had: {reason}") from error
    try:
        render_jinja_template([], chat_template=template)  # is compiled
    except Exception as error:  # of a package that may not be there
        reason = " ".join(str(error).split())
        raise UserError(f"tokenizer {path}: no readable chat template: {reason}") from error
    return tokenizer


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The text of messages, each {"role": ..., "content": ...}, special tokens spelled out. The
    options are those of transformers' `apply_chat_template`. Error: the template refuses them."""
    with _template_errors():
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for two tokenizers whose templates spell conversations alike.

    Raises:
        UserError: no template, or one that spells today's date: other data on another day.
    """
    theirs = chat_tokenizer(tokenizer.place)
    spelled = json.dumps([theirs.chat_template, theirs.special_tokens_map], sort_keys=True)
    if "strftime_now" in spelled:
        raise UserError(
            f"tokenizer {tokenizer.place}: the chat template spells today's date (strftime_now),"
            " so a resumed run would read other data; write a date in its place"
        )
    return hashlib.sha256(spelled.encode()).hexdigest()


def encode_conversation(tokenizer: Tokenizer, conversation: str) -> tuple[np.ndarray, np.ndarray]:
    """A conversation (`Document.conversation`) as the template spells it, nothing around it.

    Returns:
        Ids, [T] int32, and which of them the assistant says, [T] bool: the words that the template
        marks, as transformers' `assistant_masks` has them (and every byte of the last character);
        of a template without marks, what an answer adds to the prompt for it, up to the token that
        ends it.

    Raises:
        UserError: the template refuses the messages, or does not say where answers are.
    """
    theirs = chat_tokenizer(tokenizer.place)
    told = json.loads(conversation)
    messages, tools, prompt = told["messages"], told["tools"], told.get("prompt", 0)
    is_marked = _GENERATION.search(theirs.get_chat_template(tools=tools))
    text, spans = (_marked if is_marked else _compared)(theirs, messages, tools, prompt)
    ids, offsets = tokenizer.encode_with_offsets(text)
    is_target = np.zeros(len(ids), np.bool_)
    for start, stop in spans:
        said = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        ends = np.flatnonzero(np.isin(ids[said], tokenizer.eos_ids))
        if len(ends) and not is_marked:  # nobody says what follows the end of an answer
            said = said[: ends[-1] + 1]
        is_target[said] = True
    return ids, is_target


def _marked(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None, prompt: int
) -> tuple[str, Spans]:
    """The text of a conversation and the spans in it that {% generation %} marks, but for those in
    the first `prompt` messages."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _marking, _template_errors():
        rendered: Any = render_jinja_template(
            [messages],
            tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    (text,), (spans,) = rendered
    before = render(tokenizer, messages[:prompt], tools=tools) if prompt else ""
    if not text.startswith(before):
        raise UserError("the chat template spells the prompt otherwise than before a completion")
    return text, [span for span in spans if span[0] >= len(before)]


def _compared(
    tokenizer: Any, messages: list[Any], tools: list[Any] | None, prompt: int
) -> tuple[str, Spans]:
    """The text of a conversation and the spans of its answers after the first `prompt` messages:
    what each adds to its prompt."""
    whole, spans = render(tokenizer, messages, tools=tools), Spans()
    for i, message in enumerate(messages):
        if i >= prompt and message["role"] == "assistant":
            if i == 0:
                raise UserError(f"no prompt comes before the assistant's first message; {_MARK}")
            before = render(tokenizer, messages[:i], tools=tools, add_generation_prompt=True)
            after = render(tokenizer, messages[: i + 1], tools=tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"the chat template spells message {i + 1} otherwise than a prompt for it and"
                    f" what comes before the next, so where its words are isn't known; {_MARK}"
                )
            spans.append((len(before), len(after)))
    return whole, spans


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template refuses the messages: {reason}") from error

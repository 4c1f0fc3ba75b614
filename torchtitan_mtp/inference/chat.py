"""Conversations as the text that a model was trained on: the tokenizer's chat template, as
transformers renders it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan_mtp.errors import UserError


def chat_tokenizer(path: str) -> Any:
    """transformers' tokenizer of `model.hf_assets_path`. Error: no chat template, no folder, or no
    transformers."""
    try:
        from transformers import AutoTokenizer

        place = Path(path).parent if Path(path).is_file() else path
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        tokenizer.get_chat_template()
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer {path}: no chat template to be had: {reason}") from error
    return tokenizer


def render(tokenizer: Any, messages: Sequence[dict[str, str]], answer: bool = True) -> str:
    """The text of messages, each {"role": ..., "content": ...}, special tokens spelled out. answer:
    with what an answer begins with after them; else the last one is left open. Error: the template
    refuses them."""
    options = {"add_generation_prompt": answer, "continue_final_message": not answer}
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template refuses the messages: {reason}") from error

"""The texts or conversations that a model is to continue, from arguments to token ids."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, NamedTuple

from torchtitan_mtp.data.chat import render
from torchtitan_mtp.data.document import tools_of
from torchtitan_mtp.data.tokenizer import Tokenizer
from torchtitan_mtp.errors import UserError

Message = dict[str, str]  # role, content


class Conversation(NamedTuple):
    """What a chat template spells. tools: whatever the template takes; None: there are none."""

    messages: list[Message]
    tools: Any = None


Prompt = str | Conversation


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The texts to continue, or with --chat the conversations.

    Errors: an unreadable file, a line that is no record, no text.
    """
    prompts: list[Prompt] = list(args.prompt)
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {args.prompt_file}: can't be read: {error}") from error
        is_records = args.prompt_file.suffix == ".jsonl"
        prompts = read_records(args.prompt_file, text, args.chat) if is_records else [text]
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty: give some text to continue")
    if args.chat:
        return [to_conversation(p) if isinstance(p, str) else p for p in prompts]
    return prompts


def read_records(file: os.PathLike[str], text: str, chat: bool) -> list[Prompt]:
    """The prompts of a file of JSON records, one a line; empty lines are passed over."""
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        record = record if isinstance(record, dict) else {}
        prompt: Any = record.get("prompt")
        if chat:
            prompt = record.get("messages", prompt)
        if not (prompt and (isinstance(prompt, str) or (chat and are_messages(prompt)))):
            wanted = '{"prompt": TEXT}'
            if chat:
                wanted += ' or {"messages": [{"role": "user", "content": TEXT}, ...]}'
            raise UserError(f"{file}:{number}: expected {wanted}, found {line[:40]}")
        prompts.append(to_conversation(prompt, tools_of(record)) if chat else prompt)
    return prompts


def to_conversation(asked: str | list[Message], tools: Any = None) -> Conversation:
    """Messages, or a text that a user says."""
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    return Conversation(asked, tools)


def are_messages(value: Any) -> bool:
    """Whether it is a list of {"role": TEXT, "content": TEXT}."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )


def encode(args: argparse.Namespace, tokenizer: Tokenizer, chat: Any, prompt: Prompt) -> list[int]:
    """The ids of a text to continue, or of a conversation in the words of its template."""
    if isinstance(prompt, str):
        return tokenizer.prompt(prompt, args.special_tokens)
    messages, tools = prompt
    answered = messages[-1]["role"] == "assistant"  # that is what is to be continued
    options = {"add_generation_prompt": not answered, "continue_final_message": answered}
    text = render(chat, messages, tools=tools, **options)
    ids: list[int] = tokenizer.encode(text, special=True).tolist()
    return ids

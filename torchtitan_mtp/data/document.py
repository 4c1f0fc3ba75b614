"""One record of a corpus."""

import contextlib
import json
from typing import Any, NamedTuple

_BOTH = "prompt and completion"
SKIPPED = -1  # the size of a record that is no document, but has a number among them


class Document(NamedTuple):
    """One record of a corpus.

    Attributes:
        text: trained on.
        prompt: comes before `text` in the same document and is read but never a target.
        conversation: instead of a text, {"messages": [...], "tools": [...] or null} as JSON; and
            "prompt": how many messages come before the first that is trained on, if any do.
    """

    text: str
    prompt: str = ""
    conversation: str = ""


def to_document(record: Any, text_field: str) -> Document:
    """The document of a record {text_field: TEXT}, {"prompt": TEXT, "completion": TEXT} (or lists
    of messages), or {"messages": [...]}; `text_field` may also name the messages. Raises
    ValueError, saying what was found, if it is none."""
    fields = record if isinstance(record, dict) else {}
    plain = text_field in fields
    if isinstance(fields.get(text_field), list):
        return _conversation(fields, text_field)
    if not plain and "messages" in fields and "completion" not in fields:
        return _conversation(fields, "messages")
    before, after = fields.get("prompt"), fields.get("completion")
    if not plain and isinstance(before, list) and isinstance(after, list):
        return _conversation(fields | {_BOTH: before + after}, _BOTH, len(before))
    text = fields[text_field] if plain else fields.get("completion")
    prompt = "" if plain else fields.get("prompt")
    if isinstance(text, str) and isinstance(prompt, str):
        return Document(_encodable(text), _encodable(prompt))
    found = str({x: type(fields[x]).__name__ for x in fields} or type(record).__name__)[:200]
    raise ValueError(
        f"expected an object with a string {text_field!r}, strings 'prompt' and 'completion', or"
        f" 'messages'; found {found}"
    )


def _conversation(fields: dict[str, Any], name: str, prompt: int = 0) -> Document:
    messages, tools = _without_nulls(fields.get(name)), tools_of(fields)
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        found = str(messages)[:200]
    elif not any(message["role"] == "assistant" for message in messages[prompt:]):
        found = "no answer of an 'assistant'"
    else:
        record = {"messages": messages, "tools": tools} | ({"prompt": prompt} if prompt else {})
        return Document("", "", _encodable(json.dumps(record, ensure_ascii=False, default=str)))
    raise ValueError(
        f"expected {name!r} to be a list of objects with 'role' and 'content'; found {found}"
    )


def tools_of(record: dict[str, Any]) -> Any:
    """The tools of a conversation's record: a list or its JSON, for columns have one type."""
    tools = _without_nulls(record.get("tools"))
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools)
    return tools


def _is_message(value: Any) -> bool:
    content = isinstance(value, dict) and {"content", "tool_calls"} & {*value}
    return bool(content) and isinstance(value.get("role"), str)


def _without_nulls(value: Any) -> Any:
    """Columns have every key that any record has, null where one lacks it."""
    if isinstance(value, dict):
        return {k: _without_nulls(x) for k, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no encoding can write: "?" instead."""
    return text.encode("utf-8", errors="replace").decode()

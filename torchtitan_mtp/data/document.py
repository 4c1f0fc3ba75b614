"""One record of a corpus."""

from typing import Any, NamedTuple

SKIPPED = -1  # the size of a record that is no document, but has a number among them


class Document(NamedTuple):
    """One record of a corpus.

    Attributes:
        text: trained on.
        prompt: comes before `text` in the same document and is read but never a target.
    """

    text: str
    prompt: str = ""


def to_document(record: Any, text_field: str) -> Document:
    """The document of a record {text_field: TEXT} or {"prompt": TEXT, "completion": TEXT}. Raises
    ValueError, saying what was found, if it is neither."""
    fields = record if isinstance(record, dict) else {}
    plain = text_field in fields
    text = fields[text_field] if plain else fields.get("completion")
    prompt = "" if plain else fields.get("prompt")
    if isinstance(text, str) and isinstance(prompt, str):
        # JSON can spell half a surrogate pair, which no encoding can write: "?" instead.
        return Document(*(x.encode("utf-8", errors="replace").decode() for x in (text, prompt)))
    found = str({x: type(fields[x]).__name__ for x in fields} or type(record).__name__)[:200]
    raise ValueError(
        f"expected an object with a string {text_field!r}, or strings 'prompt' and 'completion';"
        f" found {found}"
    )

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


def document_of(record: Any, text_field: str) -> Document | None:
    """The document of a record {text_field: TEXT} or {"prompt": TEXT, "completion": TEXT}; None if
    it is neither."""
    if not isinstance(record, dict):
        return None
    plain = text_field in record
    text = record[text_field] if plain else record.get("completion")
    prompt = "" if plain else record.get("prompt")
    if not isinstance(text, str) or not isinstance(prompt, str):
        return None
    # JSON can spell half a surrogate pair, which no encoding can write: "?" instead.
    return Document(*(x.encode("utf-8", errors="replace").decode() for x in (text, prompt)))

"""What comes token by token is what comes at once, and ends exactly where a stop string begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import random_model
from tokenizers.decoders import DecodeStream

from small_tokenizers import byte_level, sentencepiece
from torchtitan_mtp.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from torchtitan_mtp.inference import generate
from torchtitan_mtp.inference.text_stream import TextStream

BYTES = ByteTokenizer()
PIECES = {
    "llama 2": sentencepiece("<unk>", "<s>", "</s>", front="<s>"),
    "llama 2, transformers 5": sentencepiece("<unk>", "<s>", "</s>", like="metaspace", front="<s>"),
    "gemma": sentencepiece("<pad>", "<eos>", "<bos>", "<unk>", like="gemma", front="<bos>"),
    "byte level": byte_level("<|begin|>", "<|end|>", front="<|begin|>"),
}
TEXT = "the cat\n  the naïve cat, 漢字 🙂\tthecat the"


def made(name: str, folder: Path) -> HFTokenizer:
    PIECES[name].save(str(folder / "tokenizer.json"))
    eos = {"llama": "</s>", "gemma": "<eos>", "byte ": "<|end|>"}[name[:5]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return HFTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("name", PIECES)
def test_streamed_text_is_the_whole_text(name: str, tmp_path: Path) -> None:
    """After every beginning of a text as a prompt; and what tokenizers' DecodeStream gives."""
    tokenizer = made(name, tmp_path)
    ids = tokenizer.prompt(TEXT)
    whole = tokenizer.decode(ids)
    assert whole == TEXT
    for size in range(len(ids)):
        prompt, new = ids[:size], ids[size:]
        text, theirs, pieces = TextStream(tokenizer, (), prompt), DecodeStream(prompt, True), ""
        for token in new:
            text.add(token)
            pieces += theirs.step(PIECES[name], token) or ""
            assert whole.startswith(tokenizer.decode(prompt).rstrip("\N{REPLACEMENT CHARACTER}"))
        before = tokenizer.decode(prompt).rstrip("\N{REPLACEMENT CHARACTER}")
        assert before + text.finish() == whole
        assert pieces == text.text or "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(prompt)


def test_a_character_waits_for_its_last_byte() -> None:
    text, shown = TextStream(BYTES), []
    for byte in "a€b".encode():
        text.add(byte)
        shown.append(text.text)
    assert shown == ["a", "a", "a", "a€", "a€b"]
    text.add("€".encode()[0])
    assert text.text == "a€b" and text.finish() == "a€b\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("prompt", "new", "expected"),
    [
        ("a\ufffd".encode(), b"b", "b"),
        ("a\ufffd".encode(), "\ufffdb".encode(), "\ufffdb"),
        ("a\ufffd".encode() + b"\xe2", b"\x82\xac", "€"),
        (b"a\xe2", b"b", "b"),  # the prompt ends in a byte that is no character
        (b"a\xe2", b"\x82", ""),
        ("a\ufffd".encode(), b"\xe2", "\ufffd"),
    ],
)
def test_what_the_prompt_shows_is_not_repeated(prompt: bytes, new: bytes, expected: str) -> None:
    text = TextStream(BYTES, (), list(prompt))
    for byte in new:
        text.add(byte)
    assert text.finish() == expected


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["x"], "one two three"),
        (["two"], "one "),
        (["three", "two"], "one "),
        (["ne two t", "two"], "one "),  # complete first, though it begins later
        (["e tw", "two"], "on"),
        (["wo", "two"], "one "),  # complete together: the longer one
        (["threes", "hree?"], "one two three"),
        (["", "o"], ""),
        (["e"], "on"),
    ],
)
@pytest.mark.parametrize("name", ["byte", "llama 2", "byte level"])
def test_a_stop_string_and_what_follows_are_never_shown(
    name: str, stop: list[str], expected: str, tmp_path: Path
) -> None:
    tokenizer: Tokenizer = BYTES if name == "byte" else made(name, tmp_path)
    prompt = tokenizer.prompt("the")
    ids = tokenizer.encode("theone two three").tolist()
    ids = ids[len(tokenizer.encode("the")) :]
    text = TextStream(tokenizer, stop, prompt)
    for token in ids:
        ended = text.add(token)
        assert expected.startswith(text.text) and ended == text.stopped
        if ended:
            break
    assert text.finish() == expected and text.stopped == (expected != "one two three")


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_generation_ends_with_the_token_that_completes_a_stop_string(heads: str) -> None:
    """The same text with drafts, where one step may bring a stop string and more."""
    model = random_model(heads, 4, vocab=259)
    model.output.weight[128:] = 0  # single characters
    model.output.weight[:32] = 0
    prompts = [BYTES.prompt("ab"), BYTES.prompt("a longer one")]
    plain = [BYTES.decode(tokens) for tokens in generate(model, prompts, 40).tokens]
    lengths = set()
    for at in range(1, 36, 5):
        stop = [plain[0][at : at + 3], plain[1][at + 1 : at + 3]]
        expected = [min(text[: text.find(s)] for s in stop if s in text) for text in plain]
        for options in ({}, {"speculative": True}):
            shown: list[str] = []
            texts = [TextStream(BYTES, stop, prompt) for prompt in prompts]
            texts[0].show = shown.append
            found = generate(model, prompts, 40, texts=texts, **options)  # type: ignore[arg-type]
            assert [text.text for text in texts] == expected
            assert "".join(shown) == expected[0]
            for text, tokens, whole in zip(expected, found.tokens, plain, strict=True):
                ends = [len(text) + len(s) for s in stop if whole[len(text) :].startswith(s)]
                assert len(tokens) == min(ends) < 40  # the last token is the stop string's last
        lengths |= {len(text) for text in expected}
    assert len(lengths) > 5

"""Tokenizers of a few merges in the forms of published ones."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors


def byte_level(*specials: str, pattern: str | None = None, front: str | None = None) -> Tokenizer:
    """A byte-level BPE with a few merges; `front` is what its template puts before a text."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("c", "a"), ("ca", "t")]
    vocabulary |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        parts = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return finished(tokenizer, specials, front)


def sentencepiece(*specials: str, like: str = "prepend", front: str | None = None) -> Tokenizer:
    """A converted SentencePiece BPE with byte fallback: Llama 2's as transformers 4 ("prepend") or
    5 ("metaspace") writes it, or Gemma's ("gemma")."""
    tokens = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t")]
    vocabulary |= {a + b: len(tokens) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if like == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    elif like == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if like == "gemma" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*parts, *strip])
    return finished(tokenizer, specials, front)


def finished(tokenizer: Tokenizer, specials: tuple[str, ...], front: str | None) -> Tokenizer:
    tokenizer.add_special_tokens(list(specials))
    if front:
        number = tokenizer.token_to_id(front)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[front, "$A"], pair=[front, "$A", front, "$B"], special_tokens=[(front, number)]
        )
    return tokenizer

"""The tokenizer that goes with the weights, and what travels with it."""

from __future__ import annotations

import codecs
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from torchtitan_mtp.data.tokenizer import (
    LLAMA3_PATTERN,
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    model_folder,
)
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.write import write_json

GENERATION = "generation_config.json"
# A folder's tokenizer; and what lies beside one, also beside one that is given as a file.
TOKENIZERS = ("tokenizer.json", "vocab.json", "*.tiktoken", "*.model", "original/*.model")
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("tekken.json", "tokenizer.model.v*"),  # Mistral's own, which vLLM takes by default
    GENERATION,
)


def check_rows(tokenizer: Tokenizer, folder: Path, rows: int | None) -> None:
    """Error: more ids than the embedding has rows."""
    if rows is not None and (ids := tokenizer.vocab_size) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {ids} ids, the model's embedding {rows} rows: take the "
            "tokens that were added out of the tokenizer's files, or add rows with transformers: "
            f"model.resize_token_embeddings({ids})"
        )


def copy_tokenizer(path: str, out: Path, also: tuple[str, ...] = ()) -> bool:
    """Put the tokenizer that `path` names (as model.hf_assets_path does), what lies beside it and
    the files `also` into the folder `out`; whether there was one."""
    if path == "byte":
        write_tokenizer_json(ByteTokenizer(), out)
        return True
    place, wanted = Path(path), [*BESIDE, *also]
    if is_file := place.is_file():
        name = "tokenizer.json" if place.suffix == ".json" else "tokenizer.model"
        _copy(place, out / name)
        place = model_folder(place)
    else:
        wanted += TOKENIZERS
    found = [file for pattern in wanted for file in place.glob(pattern) if file.is_file()]
    for file in found:
        to = out / file.relative_to(place)
        to.parent.mkdir(exist_ok=True)
        _copy(file, to)
    return is_file or any(file.match(pattern) for file in found for pattern in TOKENIZERS)


def _copy(file: Path, to: Path) -> None:
    """JSON without a byte order mark, with which transformers refuses it."""
    data = file.read_bytes()
    to.write_bytes(data.removeprefix(codecs.BOM_UTF8) if to.suffix == ".json" else data)


def write_tokenizer_json(tokenizer: ByteTokenizer | TiktokenTokenizer, out: Path) -> None:
    """Bytes, or byte-pair ranks, as a byte-level tokenizer.json in the folder `out`: the same ids
    and prefix. What it is for says tokenizer_config.json, which is left where it is there."""
    ranks, char, merges = tokenizer.ranks, _byte_characters(), []
    text = {token: "".join(char[byte] for byte in token) for token in ranks}
    for token in sorted(ranks, key=lambda token: ranks[token]):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = ((ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks)
        merges += [(text[a], text[b]) for _, _, a, b in sorted(pairs)]
    vocabulary = {text[token]: i for token, i in ranks.items()}
    fast = FastTokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(merges)))
    cut: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    if isinstance(tokenizer, TiktokenTokenizer):
        split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        cut = pre_tokenizers.Sequence([split, cut])
    fast.pre_tokenizer, fast.decoder = cut, decoders.ByteLevel()
    fast.add_special_tokens(list(tokenizer.specials))  # their ids follow the vocabulary's
    named = {i: name for name, i in tokenizer.specials.items()}
    front = [named[i] for i in tokenizer.prefix]
    fast.post_processor = processors.TemplateProcessing(
        single=[*front, "$A"], special_tokens=list(zip(front, tokenizer.prefix, strict=True))
    )
    fast.save(str(out / "tokenizer.json"))
    if not (config := out / "tokenizer_config.json").exists():
        kinds = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        tokens = {f"{kind}_token": named[i] for kind, i in kinds.items() if i in named}
        usual = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(config, usual | tokens | {"clean_up_tokenization_spaces": False})


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: its own, or one above 255."""
    known = pre_tokenizers.ByteLevel.alphabet()
    moved = iter(sorted(char for char in known if ord(char) > 255))
    return [chr(byte) if chr(byte) in known else next(moved) for byte in range(256)]

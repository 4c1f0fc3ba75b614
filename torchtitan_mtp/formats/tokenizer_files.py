"""The tokenizer that goes with the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from torchtitan_mtp.data.tokenizer import ByteTokenizer, Tokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.write import write_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "original/tokenizer.model",
    "spiece.model",
)
_BYTE_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")


# Name some special tokens, in a folder that is imported.
CONFIGS = ("config.json", "generation_config.json")


def check_rows(tokenizer: Tokenizer, folder: Path, rows: int | None) -> None:
    """Error: more ids than the embedding has rows."""
    if rows is not None and (ids := tokenizer.vocab_size) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {ids} ids, the model's embedding {rows} rows: take the "
            "tokens that were added out of the tokenizer's files, or add rows with transformers: "
            f"model.resize_token_embeddings({ids})"
        )


def copy_tokenizer(path: str, out: Path, also: tuple[str, ...] = ()) -> bool:
    """Put the tokenizer that `path` names (as model.hf_assets_path does) into the folder `out`.

    Args:
        also: further files to take from a folder with one.

    Returns:
        Whether there was one.
    """
    if path == "byte":
        _write_byte_tokenizer(out)
        return True
    place = Path(path)
    if place.is_file():
        name = "tokenizer.json" if place.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(place, out / name)
        found = [name]
        place = place.parent
        wanted = list(FILES[1:4]) if name == "tokenizer.json" else []
    else:
        wanted, found = [*FILES, *also, *(file.name for file in place.glob("*.tiktoken"))], []
    for name in wanted:
        if (place / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(place / name, out / name)
            found.append(name)
    return any(
        name.endswith(("tokenizer.json", "vocab.json", ".model", ".tiktoken")) for name in found
    )


def _write_byte_tokenizer(out: Path) -> None:
    """The word "byte" as a tokenizer.json: byte-level BPE without any merge, the same ids."""
    byte = ByteTokenizer()
    specials = dict(zip(_BYTE_SPECIALS, (byte.bos_id, byte.eos_id, byte.pad_id), strict=True))
    vocabulary = {char: i for i, char in enumerate(_byte_characters())}
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))  # their ids follow the vocabulary's
    assert all(tokenizer.token_to_id(name) == i for name, i in specials.items())
    bos, eos, pad = _BYTE_SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, byte.bos_id)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
        },
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's bytes_to_unicode)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (i for i in range(256) if i not in shown)
    moved = {byte: chr(256 + k) for k, byte in enumerate(hidden)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]

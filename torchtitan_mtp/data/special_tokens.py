"""Which tokens begin, end and pad a text: a folder's files, read as transformers 5 reads them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torchtitan_mtp.errors import UserError

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_IDS = ("bos", "eos", "pad")
# What transformers' classes call their bos, eos and pad where no file names them.
_END = "<|endoftext|>"
_CLASSES = {
    "LlamaTokenizer": ("<s>", "</s>"),
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "GPT2Tokenizer": (_END, _END),
    "GPTNeoXTokenizer": (_END, _END, "<|padding|>"),
    "Qwen2Tokenizer": (None, _END, _END),
    "GemmaTokenizer": ("<bos>", "<eos>", "<pad>"),
    "CohereTokenizer": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>"),
}
# The class of a model where no file says; "": the plain one, whatever a file says.
_MODELS = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mamba"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "olmo2", "olmo3", "granite", "phi3", "stablelm"), ""),
    **dict.fromkeys(("glm", "glm4", "glm4_moe", "nemotron", "internlm2", "internlm3"), ""),
}


class SpecialIds(NamedTuple):
    """eos: put after documents. ends: each of them ends decoding."""

    bos: int | None
    eos: int | None
    ends: tuple[int, ...]
    pad: int | None


class SpecialTokens(NamedTuple):
    """What a folder says of its special tokens.

    named: of `KINDS`; None: a file says that there is none. tokens: all that files beside
    tokenizer.json list or name, in the order in which those that it lacks are added, and whether
    they are special. later: those that earlier versions left out. ids: of "bos", "eos" and "pad" in
    generation_config.json, else config.json.
    """

    named: dict[str, str | None]
    tokens: dict[str, bool]
    later: set[str]
    ids: dict[str, list[int]]

    def resolve(self, id_of: Callable[[str], int | None], bos: str, *eos: str) -> SpecialIds:
        """Numbers for the names; `bos` and the first known of `eos` where no file names one."""

        def known(*names: str | None) -> list[int]:
            return [i for name in names if name and (i := id_of(name)) is not None]

        def find(kind: str, *guesses: str) -> list[int]:
            if kind in self.named and self.named[kind] is None and kind != "eos":
                return []
            return known(self.named.get(kind)) + self.ids.get(kind, []) or known(*guesses)

        first = [[*found, None][0] for found in (find("bos", bos), find("eos", *eos), find("pad"))]
        ends = dict.fromkeys(self.ids.get("eos", []) + find("eos", *eos))  # in the files' order
        return SpecialIds(first[0], first[1], tuple(ends), first[2])


def read_special_tokens(
    folder: Path, has_byte_level: bool = False, padding: str | None = None
) -> SpecialTokens:
    """Errors: a file that is not a JSON object, a token or an id that is none.

    has_byte_level: tokenizer.json has such a part; its class is not Llama's then. padding: what it
    pads with, where it says that.
    """
    config, model = (_read(folder / f"{name}.json") for name in ("tokenizer_config", "config"))
    added, older = config.get("added_tokens_decoder"), {}
    if added is None:  # an older folder
        older = _read(folder / "special_tokens_map.json")
        added = {str(i): text for text, i in _read(folder / "added_tokens.json").items()}
    if not isinstance(added, dict) or not all(re.fullmatch("[0-9]{1,18}", i) for i in added):
        raise UserError(f"{folder}: added tokens are {added!r}, expected a token for each id")
    kind, given = model.get("model_type"), config.get("tokenizer_class")
    usual = _MODELS.get(str(kind))
    name = str(given or model.get("tokenizer_class") or usual or "").removesuffix("Fast")
    if usual == "" or kind == "qwen2":  # published Qwen2 folders name other classes
        name = str(usual)
    default = () if has_byte_level and name == "LlamaTokenizer" else _CLASSES.get(name, ())
    names: dict[str, Any] = {f"{key}_token": t for key, t in zip(_IDS, default, strict=False)}
    names |= config | older
    pads = "pad_token" not in names
    if pads and padding:  # GPT2Tokenizer says that it has none
        names["pad_token"] = None if name == "GPT2Tokenizer" else padding
    file = folder / "tokenizer_config.json"
    named = {
        k: _text(file, f"{k}_token", names[f"{k}_token"]) for k in KINDS if f"{k}_token" in names
    }
    tokens = {
        _text(file, "added_tokens_decoder", t): isinstance(t, dict) and bool(t.get("special"))
        for t in (added[i] for i in sorted(added, key=int))
    }
    known = {*tokens, *(t for kind, t in named.items() if kind != "pad" or not pads)}
    more = [t for k, t in names.items() if k.endswith("_token") and isinstance(t, str | dict)]
    extra, also = "extra_special_tokens", "additional_special_tokens"
    for some in (config.get(extra) or config.get(also) or older.get(also), older.get(extra)):
        if not isinstance(some, list | dict | None):
            raise UserError(f"{file}: {extra} = {some!r}, expected a list of tokens")
        more += some.values() if isinstance(some, dict) else some or []
    tokens |= dict.fromkeys([*named.values(), *(_text(file, extra, t) for t in more)], True)
    found = {text: special for text, special in tokens.items() if text}
    ids: dict[str, list[int]] = {}
    for file in (folder / "config.json", folder / "generation_config.json"):
        for key in _IDS:
            if (value := _read(file).get(f"{key}_token_id")) is not None:
                given = value if isinstance(value, list) else [value]
                ids[key] = [i for i in given if i != -1]  # which stands for none
                if not all(type(i) is int and i >= 0 for i in ids[key]):
                    raise UserError(f"{file}: {key}_token_id = {value!r}, expected an id or some")
    return SpecialTokens(named, found, {*found} - known, ids)


def _read(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        values: Any = json.loads(file.read_bytes())
        return dict(values.items())
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: not a JSON object: {e}") from e


def _text(file: Path, key: str, value: Any) -> str | None:
    """A token is a string, or an object that holds it as "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise UserError(f"{file}: {key} = {value!r}, expected a token")
    return text or None

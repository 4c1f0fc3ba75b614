"""Folders of tokenizers as they are published, each compared with transformers' AutoTokenizer."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors

from small_tokenizers import byte_level, sentencepiece
from torchtitan_mtp.data.loader import DataLoader
from torchtitan_mtp.data.sources import build_source
from torchtitan_mtp.data.tokenizer import (
    LLAMA3_PATTERN,
    ByteTokenizer,
    TiktokenTokenizer,
    build_tokenizer,
)
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats.tokenizer_files import write_tokenizer_json

TEXTS = ["the cat", "a\n the  theme: 2024!", "naïve 漢字 🙂", "x" * 50]


def padding(tokenizer: Tokenizer, token: str) -> Tokenizer:
    tokenizer.enable_padding(pad_id=1, pad_token=token)
    return tokenizer


def as_object(content: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags}


ADDED = {"__type": "AddedToken"}
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Each: tokenizer.json, the files beside it, and what config.json or generation_config.json add to
# AutoTokenizer's bos, eos and pad: eos where it has none, and the other ids that end decoding.
LAYOUTS = {
    "llama 2": (
        sentencepiece("<unk>", "<s>", "</s>", front="<s>"),
        {
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": as_object("<s>") | ADDED,
                "eos_token": as_object("</s>") | ADDED,
                "pad_token": None,
                "add_bos_token": True,
                "add_eos_token": False,
            },
            "special_tokens_map.json": {"bos_token": as_object("<s>")},
            "config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
        },
        {},
    ),
    "llama class without names": (
        sentencepiece("<unk>", "<s>", "</s>", like="metaspace", front="<s>"),
        {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}},
        {},
    ),
    "mistral, its class is not taken": (
        sentencepiece("<unk>", "<s>", "</s>", front="<s>"),
        {
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"},
            "config.json": {"model_type": "mistral"},
        },
        {},
    ),
    "gemma without names": (
        sentencepiece("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", like="gemma", front="<bos>"),
        {"config.json": {"model_type": "gemma2", "eos_token_id": [1, 4]}},
        {"ends": [1, 4]},
    ),
    "llama 3": (
        byte_level(*LLAMA3, pattern=LLAMA3_PATTERN, front="<|begin_of_text|>"),
        {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
            },
            "config.json": {"model_type": "llama", "eos_token_id": 262},
        },
        {},
    ),
    "llama 3 instruct, ranks beside": (
        byte_level(*LLAMA3, pattern=LLAMA3_PATTERN, front="<|begin_of_text|>"),
        {
            "tokenizer_config.json": {
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "added_tokens_decoder": {
                    str(261 + i): as_object(t) | {"special": True} for i, t in enumerate(LLAMA3)
                },
            },
            "config.json": {"model_type": "llama", "eos_token_id": [262, 264]},
            "generation_config.json": {"eos_token_id": [262, 263, 264]},
            "original/tokenizer.model": None,
        },
        {"ends": [262, 263, 264]},
    ),
    "qwen 3": (
        byte_level(*IM),
        {
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "add_bos_token": False,
                "bos_token": None,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
            },
            "config.json": {"model_type": "qwen3", "bos_token_id": 261, "eos_token_id": 263},
            "generation_config.json": {"eos_token_id": [263, 261], "pad_token_id": 261},
        },
        {"ends": [263, 261]},
    ),
    "qwen 2 without tokenizer_config.json": (
        byte_level(*IM),
        {"config.json": {"model_type": "qwen2", "eos_token_id": 263}},
        {"ends": [263, 261]},
    ),
    "gpt-2": (
        byte_level("<|endoftext|>"),
        {
            "tokenizer_config.json": {"model_max_length": 1024},
            "config.json": {"model_type": "gpt2", "bos_token_id": 261, "eos_token_id": 261},
        },
        {},
    ),
    "gpt-neox and olmo": (
        byte_level("<|endoftext|>", "<|padding|>"),
        {
            "tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": None},
            "config.json": {"model_type": "olmo"},
        },
        {},
    ),
    "smollm": (
        byte_level(*IM),
        {
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer",
                "add_prefix_space": False,
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
            },
            "config.json": {"model_type": "llama", "eos_token_id": 263},
        },
        {},
    ),
    "add_bos_token without a template": (
        byte_level("<s>", "</s>"),
        {"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}},
        {},
    ),
    "a template against add_bos_token": (
        byte_level("<s>", "</s>", front="<s>"),
        {
            "tokenizer_config.json": {
                "add_bos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
        },
        {},
    ),
    "eos in added_tokens_decoder alone": (
        byte_level("<s>", "</s>"),
        {
            "tokenizer_config.json": {
                "eos_token": "<|done|>",
                "added_tokens_decoder": {
                    "264": as_object("<|done|>") | {"special": True},
                    "263": as_object("<|more|>") | {"special": False},
                },
            }
        },
        {},
    ),
    "names in special_tokens_map.json alone": (
        byte_level("<s>", "</s>", "<|done|>"),
        {
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "special_tokens_map.json": {
                "eos_token": as_object("<|done|>"),
                "bos_token": "<s>",
                "pad_token": "<new>",
            },
            "added_tokens.json": {"<extra>": 264},
        },
        {},
    ),
    "special_tokens_map.json beside added_tokens_decoder": (
        byte_level("<s>", "</s>", "<|done|>"),
        {
            "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {}},
            "special_tokens_map.json": {"eos_token": "<|done|>"},
        },
        {},
    ),
    "eos in config.json alone": (
        byte_level("<s>", "</s>", "<|done|>"),
        {"config.json": {"model_type": "llama", "bos_token_id": 261, "eos_token_id": 263}},
        {"bos": 261, "eos": 263},
    ),
    "eos in generation_config.json alone": (
        byte_level("<s>", "</s>", "<|done|>"),
        {
            "config.json": {"model_type": "llama"},
            "generation_config.json": {"eos_token_id": [263, 262], "pad_token_id": 262},
        },
        {"eos": 263, "ends": [263, 262], "pad": 262},
    ),
    "no pad, as -1, and eos in config.json alone": (
        byte_level("<s>", "</s>", "<|done|>"),
        {
            "tokenizer_config.json": {"eos_token": "<|done|>"},
            "config.json": {"model_type": "llama", "eos_token_id": [65, 263], "pad_token_id": -1},
            "generation_config.json": {"pad_token_id": -1},
        },
        {"ends": [65, 263]},
    ),
    "objects": (
        byte_level("<s>", "</s>", "<|done|>", front="<s>"),
        {
            "tokenizer_config.json": {
                "bos_token": as_object("<s>") | ADDED,
                "eos_token": as_object("<|done|>") | ADDED,
            }
        },
        {},
    ),
    "additional special tokens": (
        byte_level("<s>", "</s>"),
        {
            "tokenizer_config.json": {
                "additional_special_tokens": ["</s>", "<a>", as_object("<b>") | ADDED],
                "video_token": "<video>",
                "cls_token": "<cls>",
                "eos_token": "<end>",
                "added_tokens_decoder": {"263": as_object("<more>")},
            },
            "special_tokens_map.json": {"additional_special_tokens": ["<not read>"]},
        },
        {},
    ),
    "extra special tokens in two files": (
        byte_level("<s>", "</s>"),
        {
            "tokenizer_config.json": {"extra_special_tokens": ["<a>"], "eos_token": "<end>"},
            "special_tokens_map.json": {
                "extra_special_tokens": [as_object("<b>")],
                "additional_special_tokens": ["<not read>"],
            },
        },
        {},
    ),
    "extra special tokens with names": (
        byte_level("<s>", "</s>"),
        {
            "tokenizer_config.json": {
                "extra_special_tokens": {"image_token": "<image>"},
                "eos_token": "<end>",
            },
        },
        {},
    ),
    "pad in padding alone": (
        padding(byte_level("<s>", "</s>", "<p>"), "<p>"),
        {
            "tokenizer_config.json": {"eos_token": "</s>"},
            "generation_config.json": {"pad_token_id": 261, "eos_token_id": 262},
        },
        {},
    ),
    "pad in padding alone, a new token": (
        padding(byte_level("<s>", "</s>"), "<p>"),
        {"tokenizer_config.json": {"eos_token": "<end>", "cls_token": "<cls>"}},
        {},
    ),
    "padding, and pad_token: null": (
        padding(byte_level("<s>", "</s>"), "</s>"),
        {"tokenizer_config.json": {"eos_token": "</s>", "pad_token": None}},
        {},
    ),
    "padding of a class without a pad": (
        padding(byte_level("<|endoftext|>", "<p>"), "<p>"),
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        {},
    ),
    "padding of a class with another pad": (
        padding(byte_level("<|endoftext|>", "<p>"), "<p>"),
        {"tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer"}},
        {},
    ),
}


def write(folder: Path, name: str) -> None:
    tokenizer, files, _ = LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        if content is None:
            (folder / file).write_bytes(ranks_of(tokenizer))
        else:
            (folder / file).write_text(json.dumps(content))


def ranks_of(tokenizer: Tokenizer) -> bytes:
    """The vocabulary in tiktoken's format, each token's bytes as its own decoder gives them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in shown]
    byte = {chr(i): i for i in shown} | {chr(256 + k): i for k, i in enumerate(hidden)}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    lines = (
        base64.b64encode(bytes(byte[c] for c in token)) + b" %d\n" % i
        for token, i in sorted(vocabulary.items(), key=lambda item: item[1])
    )
    return b"".join(lines)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_means_what_it_means_to_autotokenizer(tmp_path, name):
    from transformers import AutoTokenizer

    write(tmp_path, name)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), build_tokenizer(str(tmp_path))
    more = LAYOUTS[name][2]
    assert ours.bos_id == more.get("bos", theirs.bos_token_id)
    assert ours.eos_id == more.get("eos", theirs.eos_token_id)
    assert ours.pad_id == more.get("pad", theirs.pad_token_id)
    assert list(ours.eos_ids) == more.get("ends", [ours.eos_id])
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.prefix, *ids] == theirs(text)["input_ids"]
        assert ours.decode([*ours.prompt(text), ours.eos_id]) == text
    assert isinstance(ours, TiktokenTokenizer) == ("original/tokenizer.model" in LAYOUTS[name][1])


@pytest.mark.parametrize(
    ("name", "front", "eos"),
    [("qwen 3", 263, 263), ("gpt-2", 261, 261), ("llama 3 instruct, ranks beside", 261, 262)],
)
def test_documents_get_what_the_files_say_and_old_runs_go_on(tmp_path, caplog, name, front, eos):
    """What earlier versions put around documents: eos for a bos that is not there, and the bare
    ranks file's <|end_of_text|>."""
    write(tmp_path / "assets", name)
    (tmp_path / "text.txt").write_text("the cat")
    source = build_source("files", str(tmp_path / "text.txt"))
    text = build_tokenizer(str(tmp_path / "assets")).encode("the cat").tolist()

    def loader() -> DataLoader:
        tokenizer = build_tokenizer(str(tmp_path / "assets"))
        return DataLoader(source, tokenizer, len(text), 1, 1, prefetch=0, split="all")

    new, tokenizer = loader(), build_tokenizer(str(tmp_path / "assets"))
    state, document = new.state_dict(), [*tokenizer.prompt("the cat"), tokenizer.eos_id]
    assert new.next_window().tokens[0].tolist() == document[: len(text) + 1]
    assert (tokenizer.prefix, tokenizer.eos_id) != ((front,), eos)

    kind, digest, *_ = tokenizer.fingerprint.split(":")
    old = f"hf:{digest}:{front}:{eos}" if kind == "hf" else f"tiktoken:{digest}"
    place = {"epoch": 0, "index": 0, "offset": 0}
    state |= {"version": 1, "num_lanes": 1, "lanes": {"0": place}, "tokenizer": old}
    run = loader()
    run.load_state_dict(state)
    seen = [t for _ in range(4) for t in run.next_window().tokens[0, : len(text)].tolist()]
    assert seen == ([front, *text, eos] * 4)[: len(seen)]
    assert run.state_dict()["tokenizer"] == old
    assert "as the run began" in caplog.text
    with pytest.raises(UserError, match="has tokenizer"):
        run.load_state_dict(state | {"tokenizer": "hf:other"})


def test_a_fingerprint_stays_where_nothing_changed(tmp_path):
    """A checkpoint's data position holds it: sha256 of the file, what is in front, and eos."""
    write(tmp_path, "llama 2")
    digest = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert build_tokenizer(str(tmp_path)).fingerprint == f"hf:{digest}:1:2"
    more = {"bos_token": "<s>", "additional_special_tokens": ["<more>"]}  # change no text's ids
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(more))
    assert build_tokenizer(str(tmp_path)).fingerprint == f"hf:{digest}:1:2"
    ranks = tmp_path / "ranks" / "tokenizer.model"
    ranks.parent.mkdir()
    ranks.write_bytes(ranks_of(LAYOUTS["llama 3"][0]))
    digest = hashlib.sha256(ranks.read_bytes()).hexdigest()
    assert build_tokenizer(str(ranks.parent)).fingerprint == f"tiktoken:{digest}"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"eos_token_id": "</s>"}', "eos_token_id = '</s>', expected an id"),
        ("generation_config.json", "[1]", "not a JSON object"),
        ("special_tokens_map.json", "{", "not a JSON object"),
        ("tokenizer_config.json", '{"extra_special_tokens": "<a>"}', "expected a list of tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": 5}}}', "expected a"),
    ],
)
def test_files_that_say_nonsense(tmp_path, file, content, message):
    write(tmp_path, "objects")
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(file)}: .*{message}") as error:
        build_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["\N{SUPERSCRIPT TWO}", "9" * 5000])
def test_a_number_that_is_no_id(tmp_path, number):
    write(tmp_path, "objects")
    config = json.dumps({"added_tokens_decoder": {number: "<a>"}})
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match="expected a token for each id"):
        build_tokenizer(str(tmp_path))


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "GemmaTokenizer"}])
def test_an_eos_that_is_null_is_a_token_that_was_added_for_it(tmp_path, config, template):
    """Gemma's ids (its tokenizer.json): <eos> is 1, and a document's </s> is text: HTML's tag. Runs
    that took it for the end go on so."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "</s>", "a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<bos>", "$A"], special_tokens=[("<bos>", 2)]
        )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None} | config))
    ours = build_tokenizer(str(tmp_path))
    assert (ours.eos_id, ours.eos_ids, ours.prefix) == (1, (1,), (2,) if template else ())
    before = ours.fingerprint.removesuffix(":1") + ":4"
    assert ours.resume_as(before)
    assert (ours.eos_id, ours.fingerprint) == (4, before)
    for other in ("byte", before[3:], before.removesuffix(":4"), before.replace("hf:", "hf:0")):
        assert not ours.resume_as(other) and ours.fingerprint == before


@pytest.mark.parametrize("kind", ["byte", "ranks"])
def test_special_tokens_in_a_text_are_such_when_asked_for(tmp_path, kind):
    """As in transformers, which always reads them so; else they are text."""
    from transformers import AutoTokenizer

    made = ByteTokenizer()
    if kind == "ranks":
        (tmp_path / "tokenizer.model").write_bytes(ranks_of(byte_level()))
        made = TiktokenTokenizer(tmp_path / "tokenizer.model")
    write_tokenizer_json(made, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    bos, eos = theirs.bos_token, theirs.eos_token
    for text in ("the cat", f"the{eos} cat", f"{eos}{eos}é\n{bos}", ""):
        assert made.prompt(text, special=True) == theirs.encode(text)
        assert made.decode(made.encode(text).tolist()) == text
    text = f"{bos}the cat"
    assert made.prompt(text, special=True) == theirs.encode(text, add_special_tokens=False)

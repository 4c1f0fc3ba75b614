"""What lies beside the weights, from a Hugging Face folder through a run to an export: as
transformers reads it."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from formats_run import SMALL, write_run
from runs import config_of, train, write_corpus
from small_tokenizers import byte_level
from torchtitan_mtp.config import load_toml
from torchtitan_mtp.data.tokenizer import build_tokenizer
from torchtitan_mtp.formats import export_checkpoint, import_checkpoint
from torchtitan_mtp.formats.tokenizer_files import copy_tokenizer
from torchtitan_mtp.inference import generate, load_for_inference

transformers = pytest.importorskip("transformers")

TEXTS = [
    "a", " a", "  a  b", "\n", "\t\n\n", "", "def f(x):\n    return x", "import ", "naïve café",
    "日本語", "🙂🙂", "\x00\x01", "a\r\nb", "1234567890", "the then them", "x" * 99, "[gMASK]",
    "<|end_of_text", "don't", "ﬁ\u0301",
]  # fmt: skip
GENERATION = {
    "bos_token_id": 259,
    "eos_token_id": [260, 262],
    "pad_token_id": 261,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "transformers_version": "4.41.0",
}
MISTRALS = "tekken.json", "tokenizer.model.v3"  # which vLLM looks for (tokenizers/registry.py)
MESSAGES = [{"role": "user", "content": "hi"}]


def published(folder: Path) -> Path:
    """A folder as models are published: a chat template of its own and one more, an added token,
    how to sample."""
    write_run(folder / "run", **SMALL)
    export_checkpoint(folder / "run", folder / "hf", "llama_hf")
    hf = folder / "hf"
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_end|>", "<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 259)]
    )
    tokenizer.save(str(hf / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    files = {
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": names | {"additional_special_tokens": ["<tool>"]},
        "added_tokens.json": {"<tool>": 263, "<|im_end|>": 262},
        "generation_config.json": GENERATION,
    }
    for name, values in files.items():
        (hf / name).write_text(json.dumps(values))
    (hf / "chat_template.jinja").write_text("A{{ messages[0].content }}")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "rag.jinja").write_text("R{{ messages[0].content }}")
    (hf / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    for name in MISTRALS:
        (hf / name).write_text(name)
    return hf


def what_transformers_reads(folder: Path) -> dict[str, object]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {
        "generation": transformers.GenerationConfig.from_pretrained(folder).to_dict(),
        "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "rag": tokenizer.apply_chat_template(MESSAGES, chat_template="rag", tokenize=False),
        "added": tokenizer.get_added_vocab(),
        "special": tokenizer.all_special_tokens,
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "processor": (folder / "chat_template.json").read_text(),
        "Mistral's": [(folder / name).read_text() for name in MISTRALS],
    }


def test_a_round_trip_keeps_what_came_with_the_weights(tmp_path: Path) -> None:
    hf = published(tmp_path)
    import_checkpoint(hf, tmp_path / "imported", "llama_hf")
    words = str(tmp_path / "imported" / "tokenizer")
    data = write_corpus(tmp_path, "jsonl") | {"model.hf_assets_path": words}
    keys = {f"model.args.{key}": value for key, value in vars(
        load_toml(tmp_path / "imported" / "config.toml").model.args
    ).items() if isinstance(value, (int, float, bool))}  # fmt: skip
    keys |= {"model.flavor": "custom", "model.vocab_size": 320, "model.converters": []}
    keys |= {"mtp.num_future_tokens": 1, "training.steps": 1, "checkpoint.enable": True}
    start = {"checkpoint.initial_load_path": str(tmp_path / "imported")}
    train(config_of(tmp_path / "trained", data, keys, start))
    export_checkpoint(tmp_path / "trained" / "run", tmp_path / "out", "llama_hf")
    expected = what_transformers_reads(hf)
    assert expected["chat"] == "Ahi" and expected["rag"] == "Rhi"
    assert what_transformers_reads(tmp_path / "out") == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [259, [260, 262], 261]
    # The same where the run names the tokenizer's file in place of its folder.
    text = (tmp_path / "trained/run/config.toml").read_text()
    (tmp_path / "trained/run/config.toml").write_text(
        text.replace(words, f"{words}/tokenizer.json")
    )
    export_checkpoint(tmp_path / "trained" / "run", tmp_path / "again", "llama_hf")
    assert what_transformers_reads(tmp_path / "again") == expected


def test_what_ends_texts_is_added_to_what_ends_decoding(tmp_path: Path) -> None:
    """The one thing of generation_config.json that changes."""
    hf = published(tmp_path)
    (hf / "generation_config.json").write_text(json.dumps(GENERATION | {"eos_token_id": 262}))
    import_checkpoint(hf, tmp_path / "imported", "llama_hf")
    export_checkpoint(tmp_path / "imported", tmp_path / "out", "llama_hf")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == GENERATION | {"eos_token_id": [262, 260]}


def ranks(folder: Path) -> Path:
    """A file as scripts/train_tokenizer.py writes it: bytes and five merges."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"\n\n", b"12"]
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder / "tokenizer.model"


@pytest.mark.parametrize("kind", ["byte", "ranks", "ranks in original/"])
def test_an_export_gives_the_ids_of_generate(tmp_path: Path, kind: str) -> None:
    """A text, to transformers, is the same prompt as here: with the token in front."""
    path = "byte"
    if kind != "byte":
        path = str(ranks(tmp_path / "words" / kind.removeprefix("ranks in ")))
        if "original" in kind:
            names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
            (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(names))
    write_run(tmp_path / "run", **SMALL | {"model.hf_assets_path": path})
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "llama_hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, ours, _ = load_for_inference(tmp_path / "run")
    assert len(TEXTS) == 20
    assert [theirs(text).input_ids for text in TEXTS] == [ours.prompt(text) for text in TEXTS]
    assert [theirs.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    for text in TEXTS:
        prompt = theirs(text, return_tensors="pt")
        found = hf.generate(**prompt, max_new_tokens=4, do_sample=False)
        expected = generate(model, [ours.prompt(text)], 4, eos_id=ours.eos_ids).tokens[0]
        assert found[0, prompt.input_ids.shape[1] :].tolist() == expected
    import_checkpoint(tmp_path / "hf", tmp_path / "back", "llama_hf")
    again = build_tokenizer(str(tmp_path / "back" / "tokenizer"))
    assert [again.prompt(text) for text in TEXTS] == [ours.prompt(text) for text in TEXTS]
    if kind != "byte":  # a training goes on with it
        assert again.fingerprint == ours.fingerprint
        # llama.cpp's converter reads a tokenizer.model at the top as SentencePiece's, and fails.
        assert [file.parent.name for file in (tmp_path / "hf").rglob("*.model")] == ["original"]


def test_a_file_takes_along_what_lies_beside_it(tmp_path: Path) -> None:
    """Before, an export of a run with a *.model named by its file lost who ends a text."""
    file = ranks(tmp_path / "words" / "original")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    for name, values in {"tokenizer_config": names, "generation_config": {"top_p": 0.5}}.items():
        (tmp_path / "words" / f"{name}.json").write_text(json.dumps(values))
    (tmp_path / "words" / "chat_template.jinja").write_text("T{{ messages[0].content }}")
    write_run(tmp_path / "run", **SMALL | {"model.hf_assets_path": str(file)})
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "llama_hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == "Thi"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").top_p == 0.5
    shutil.rmtree(tmp_path / "words")


def test_byte_order_marks_stay_behind(tmp_path: Path) -> None:
    """Some editors write them; transformers refuses JSON that begins with one."""
    (words := tmp_path / "words").mkdir()
    byte_level("<|endoftext|>", "<|im_end|>").save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (words / "generation_config.json").write_text("{}")
    expected = transformers.AutoTokenizer.from_pretrained(words)
    ours = build_tokenizer(str(words))
    for file in words.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(ValueError, match="BOM"):
        transformers.AutoTokenizer.from_pretrained(words)
    marked = build_tokenizer(str(words))
    assert (marked.fingerprint, marked.eos_id) == (ours.fingerprint, expected.eos_token_id)
    (tmp_path / "out").mkdir()
    assert copy_tokenizer(str(words), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs(text).input_ids for text in TEXTS] == [expected(t).input_ids for t in TEXTS]

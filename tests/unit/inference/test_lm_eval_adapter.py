"""The harness's questions, answered as its own adapter for transformers answers them."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_models import head_logits, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_accelerate_available

import formats_run
from small_tokenizers import byte_level, sentencepiece
from torchtitan_mtp.cli.tasks import run_tasks
from torchtitan_mtp.config import JobConfig
from torchtitan_mtp.data.tokenizer import ByteTokenizer
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint
from torchtitan_mtp.formats.write import write_json
from torchtitan_mtp.inference import load_for_inference
from torchtitan_mtp.inference.lm_eval_adapter import HarnessModel

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and strict %}"
    "{{ raise_exception('no system') }}{% endif %}<{{ m['role'] }}>{{ m['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZERS: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (
        sentencepiece("<unk>", "<s>", "</s>", front="<s>"),
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE},
    ),
    "qwen2": (  # without bos
        byte_level("<|endoftext|>", "<|im_end|>"),
        {
            "eos_token": "<|im_end|>",
            "chat_template": "{% set bos_token, strict = '', true %}" + TEMPLATE,
        },
    ),
}
LONG = "the cat saw a naïve theme " * 8


def hflm() -> Any:
    """The harness's own. It imports accelerate for several devices, which are none here."""
    is_accelerate_available()  # and it stays so
    stub, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    for module, names in (
        (stub, ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size")),
        (utils, ("get_max_memory",)),
    ):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.__dict__.update(dict.fromkeys(names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", stub)
        patch.setitem(sys.modules, "accelerate.utils", utils)
        return importlib.import_module("lm_eval.models.huggingface").HFLM


class Pair(NamedTuple):
    ours: HarnessModel
    theirs: Any


PAIRS = ("byte", "llama", "qwen2")


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A run with heads in the adapter, its export in the harness's."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    changes = formats_run.SMALL | formats_run.PARALLEL
    if request.param in TOKENIZERS:
        tokens, words = TOKENIZERS[request.param]
        tokens.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", words)
        changes |= {"model.hf_assets_path": str(folder)}
        changes |= {"model.name": "qwen2"} if request.param == "qwen2" else {}
    formats_run.write_run(folder / "run", **changes)
    form = "qwen2_hf" if request.param == "qwen2" else "llama_hf"
    export_checkpoint(folder / "run", folder / "hf", form, drop_heads=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    theirs = hflm()(model, tokenizer=AutoTokenizer.from_pretrained(folder / "hf"), batch_size=3)
    assert theirs.max_length == 64
    ours = HarnessModel(*load_for_inference(folder / "run"), batch_size=3)
    words = [ours.tok.decode([i]) for i in range(320)]
    silent = [i for i, word in enumerate(words) if not word or not word.isprintable()]
    with torch.no_grad():  # it writes what can be read
        for weight in (ours.model.output.weight, theirs.model.lm_head.weight):
            weight[silent + [i for i, word in enumerate(words) if not word.isascii()]] = 0
    return Pair(ours, theirs)


def ask(pair: Pair, kind: str, *arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]
    ours, theirs = (getattr(lm, kind)(requests, disable_tqdm=True) for lm in pair)
    return ours, theirs


def test_loglikelihoods(pair: Pair) -> None:
    bos = pair.theirs.tok_decode(pair.theirs.prefix_token_id, skip_special_tokens=False)
    choices = [("the", " cat"), ("the", " cab"), ("the", " c"), ("the", " the")]
    ours, theirs = ask(
        pair,
        "loglikelihood",
        *choices,
        *[(LONG, choice) for _, choice in choices],  # longer than the window
        ("", "cat"),
        ("", f"{bos}cat"),
        ("the ", "cat"),
        ("the\n\n", "cat\n"),
        ("the", "cat  "),
        ("a", "é"),
        ("naï", "ve"),
        (f"{bos}the", " cat"),
        ("a", "the cat saw a naïve theme "),
        ("the", " cat"),
        *[(" ", "cat")] * (pair.ours.tok.bos_id is not None),  # theirs dies of it without bos
    )
    assert [p for p, _ in ours] == pytest.approx([p for p, _ in theirs], rel=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_greedy_continuations_are_known(pair: Pair) -> None:
    (text,), _ = ask(pair, "generate_until", ("the cat", {"max_gen_toks": 2}))
    ours, theirs = ask(pair, "loglikelihood", ("the cat", text), ("the cat", text + "a"))
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_whole_documents(pair: Pair) -> None:
    """In windows where they are long: each token once."""
    ours, theirs = ask(pair, "loglikelihood_rolling", ("the cat",), (LONG,), (LONG + "é",), ("a",))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("texts", [[""], []])
def test_nothing(pair: Pair, texts: list[str]) -> None:
    ours, theirs = ask(pair, "loglikelihood_rolling", *[(text,) for text in texts])
    assert ours == pytest.approx(theirs, rel=1e-4)


GENERATION: list[dict[str, Any]] = [
    {"max_gen_toks": 20},
    {"max_tokens": 5},
    {"max_new_tokens": 6, "max_tokens": 3},
    {"max_completion_tokens": 7, "do_sample": False, "temperature": 0.8},
    {"max_gen_toks": 63},  # one token of the prompt is left
    {"max_gen_toks": 50, "until": []},
    {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0, "top_k": 1},
    {"max_gen_toks": 9, "temperature": 0.7, "top_k": 1, "top_p": 0.9},
    {"max_gen_toks": 9, "num_beams": 1, "repetition_penalty": 1.0},
]


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        # The first with every tokenizer, others with one in turn; exhaustively with all.
        pytest.param(name, options, marks=() if i == 0 or i % 3 == j else pytest.mark.exhaustive)
        for j, name in enumerate(PAIRS)
        for i, options in enumerate(GENERATION)
    ],
    indirect=["pair"],
)
def test_generation(pair: Pair, options: dict[str, Any]) -> None:
    contexts = ["the cat", "a", LONG, "the cat\n", " the", "naï"]
    whole, theirs = ask(pair, "generate_until", *[(context, options) for context in contexts])
    assert whole == theirs and all(whole)
    pair.theirs.batch_size_per_gpu = 1  # else it goes on, and cuts at what comes later too
    pieces = re.findall("[ -~]{2}", " ".join(whole))
    for until in ([pieces[0], "not there", pieces[-1]], pieces[len(pieces) // 2]):
        stopped = options | {"until": until}
        ours, theirs = ask(pair, "generate_until", *[(text, stopped) for text in contexts])
        assert ours == theirs
    pair.theirs.batch_size_per_gpu = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_gen_toks = 256, expected 1 to 63"),
        ({"max_tokens": 64}, "max_gen_toks = 64"),
        ({"max_gen_toks": 5, "num_beams": 4}, "_kwargs: num_beams = 4 can't"),
        ({"max_gen_toks": 5, "repetition_penalty": 1.1}, "repetition_penalty = 1.1 can't"),
    ],
)
def test_what_it_can_not_do_is_named(pair: Pair, options: dict[str, Any], message: str) -> None:
    requests = [Instance("generate_until", {}, ("the cat", options), 0)]
    with pytest.raises(UserError, match=message):
        pair.ours.generate_until(requests)
    if "max_gen_toks" not in options:
        with pytest.raises(AssertionError, match="must be less than"):
            pair.theirs.generate_until(requests, disable_tqdm=True)


def test_a_continuation_longer_than_the_window(pair: Pair) -> None:
    requests = [Instance("loglikelihood", {}, ("a", LONG), 0)]
    with pytest.raises(UserError, match=r"expected 1 to 64"):
        pair.ours.loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(AssertionError):
        pair.theirs.loglikelihood(requests, disable_tqdm=True)


def test_conversations(pair: Pair) -> None:
    if pair.ours.tokenizer_name == "byte":
        with pytest.raises(UserError, match=r"byte: .*chat template"):
            pair.ours.chat_template(True)
        return
    assert pair.ours.chat_template(True) == pair.theirs.chat_template(True)
    system = {"role": "system", "content": "a theme"}
    turns = [
        {"role": "user", "content": "the cat "},
        {"role": "assistant", "content": "saw"},
        {"role": "user", "content": "a"},
    ]
    for messages, answer in ((turns, True), ([system, *turns], True), (turns[:2], False)):
        ours, theirs = (lm.apply_chat_template(messages, answer) for lm in pair)
        assert ours == theirs
        found = ask(pair, "generate_until", (ours, {"max_gen_toks": 9}))
        assert found[0] == found[1]
        found = ask(pair, "loglikelihood", (ours, "the cat"))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8}
metric_list: [{metric: bleu}, {metric: exact_match}]
""",
}
QUESTIONS = [
    {"question": f"the cat {'saw ' * i}", "choices": ["the", " theme", "é"], "gold": i % 3}
    for i in range(5)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tasks on data of their own; the harness knows no others, which saves seconds."""
    import datasets
    from lm_eval.tasks import TaskManager

    folder: Path = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, task in TASKS.items():
        head = f"task: {name}\ntest_split: test\nfewshot_split: test\ndataset_path: json\n"
        head += 'doc_to_text: "{{question}}"\n'
        data = f"dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(head + data + task)
    with pytest.MonkeyPatch.context() as patch:
        own = functools.partial(TaskManager, include_defaults=False)
        patch.setattr("torchtitan_mtp.cli.tasks.TaskManager", own)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
        yield folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_fewshot": 2},
        {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True},
        {
            "apply_chat_template": True,
            "num_fewshot": 1,
            "fewshot_as_multiturn": False,
            "system_instruction": "a theme",
        },
    ],
)
def test_tasks(pair: Pair, tasks: Path, options: dict[str, Any]) -> None:
    if pair.ours.tokenizer_name == "byte" and options.get("apply_chat_template"):
        return
    ours, theirs = (
        run_tasks(lm, list(TASKS), str(tasks), bootstrap_iters=0, **options) for lm in pair
    )
    for task in TASKS:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-4)
            assert ours["results"][task][name] == value
        asked, expected = ours["samples"][task], theirs["samples"][task]
        assert [s["arguments"] for s in asked] == [s["arguments"] for s in expected]


# ---------------------------------------------------------- what transformers' models don't have


def harness(model: Any, **options: Any) -> HarnessModel:
    config = JobConfig()
    config.training.seq_len, model.softcap = 64, 3.0
    return HarnessModel(model, ByteTokenizer(), config, **options)


def test_capped_logits() -> None:
    model = random_model("sequential", 3, vocab=259)
    (found,) = harness(model).loglikelihood([Instance("loglikelihood", {}, ("def", " foo"), 0)])
    total, text = 0.0, [ByteTokenizer.bos_id, *b"def"]
    for token in b" foo":
        logits = head_logits(model, [*text, 0, 0], 3)[0, -1]
        total += (3.0 * torch.tanh(logits / 3.0)).log_softmax(-1)[token].item()
        text.append(token)
    assert found[0] == pytest.approx(total, rel=1e-4)


def test_its_template_lies_in_the_tokenizers_folder() -> None:
    """Not beside the file that model.hf_assets_path names: Meta's is in original/."""
    model, tokenizer, config = random_model(vocab=259), ByteTokenizer(), JobConfig()
    tokenizer.place, config.model.hf_assets_path = "llama", "llama/original/tokenizer.model"
    assert HarnessModel(model, tokenizer, config).tokenizer_name == "llama"


def test_equal_requests_get_samples_of_their_own() -> None:
    model = random_model(vocab=259)
    model.output.weight[128:] = 0
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    requests = [Instance("generate_until", {}, ("ab", options), i) for i in range(8)]
    assert len(set(harness(model, batch_size=2).generate_until(requests))) == 8


def test_empty_stop_strings_stop_nothing() -> None:
    model = random_model(vocab=259)
    model.output.weight[128:] = 0
    found = []
    for until in ([], "", [None, ""]):
        request = Instance("generate_until", {}, ("ab", {"until": until, "max_gen_toks": 8}), 0)
        found += harness(model).generate_until([request])
    assert found == [found[0]] * 3 and len(found[0]) > 1

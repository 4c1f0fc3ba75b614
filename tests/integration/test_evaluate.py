"""scripts/evaluate.py on a run that was just trained."""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import formats_run
from torchtitan_mtp.errors import UserError
from torchtitan_mtp.formats import export_checkpoint
from torchtitan_mtp.inference import generate, load_for_inference, next_logits
from torchtitan_mtp.inference.held_out import find_text

SMALL = "--batches", "2", "--batch_size", "2", "--seq_len", "32"
OWN = "--prompts", "6", "--prompt_tokens", "9", "--max_new_tokens", "40"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("torchtitan_mtp.cli.evaluate")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents."""
    folder: Path = tmp_path_factory.mktemp("source")
    for i in range(8):
        (folder / f"{i}.txt").write_text(
            f"def f{i}(self, x):\n    return self.x{i} + x\n" * (i + 1)
        )
    return folder


def evaluate(script: ModuleType, out: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of a call that must succeed."""
    assert script.main([*arguments, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_it_foresees_the_tokens_a_step_of_speculative_decoding(
    script: ModuleType,
    trained_run: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = str(trained_run), "--source", str(source), *SMALL, *OWN
    plot = tmp_path / "heads.png"
    found = evaluate(script, tmp_path / "a.json", *arguments, "--plot", str(plot))
    out = capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG") and str(plot) in out
    text, own = found["text"], found["continuation"]
    assert f"{text['losses'][2]:.4f}" in out and f"{text['bits_per_byte']:.4f}" in out
    assert len(text["losses"]) == 3 and len(text["marginal"]) == len(own["conditional"]) == 2

    model, tokenizer, config = load_for_inference(trained_run)
    prompts = find_text(config, str(source)).prompts(tokenizer, 6, 9)
    for drafts in (1, 2):
        stats = generate(
            model, prompts, 40, speculative=True, num_draft=drafts, eos_id=tokenizer.eos_id
        ).stats
        assert own["tokens_per_step"][drafts - 1] == pytest.approx(stats.tokens_per_step)
        assert f"{stats.tokens_per_step:.2f}" in out
    assert own["tokens_per_step"][1] > 1.05


def test_by_default_it_reads_what_the_run_read(
    script: ModuleType, trained_run: Path, tmp_path: Path
) -> None:
    found = evaluate(script, tmp_path / "a.json", str(trained_run), *SMALL, "--prompts", "0")
    assert "python_stdlib" in found["text"]["about"] and "continuation" not in found
    assert found["text"]["targets"][0] <= 2 * 2 * 32


def test_a_hugging_face_folder_and_a_model_without_heads(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats_run.write_run(tmp_path / "run", **formats_run.SMALL)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", "llama_hf")
    arguments = "--source", str(source), *SMALL
    native, exported = (
        evaluate(script, tmp_path / "a.json", str(tmp_path / folder), *arguments)["text"]
        for folder in ("run", "hf")
    )
    assert native == exported and len(native["losses"]) == 1 and native["marginal"] == []
    plot = tmp_path / "heads.png"
    capsys.readouterr()
    assert script.main([str(tmp_path / "hf"), *arguments, "--plot", str(plot)]) == 1
    out, err = capsys.readouterr()
    assert "no heads 2..n" in err and not out and not plot.exists()


parallel = pytest.mark.parametrize("trained_run", ["parallel"], indirect=True)


@parallel
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches 0"),
        (["--batches", str(10**30)], f"--batches {10**30}: expected 1 or more"),
        (["--prompts", "-1"], "--prompts -1"),
        (["--seq_len", "999999"], "--seq_len: 999999 tokens, but the model takes"),
        (["--max_new_tokens", "999999", "--batches", "1"], "--prompt_tokens and --max_new_tokens"),
        (["--batch_size", str(10**18)], f"--batch_size {10**18}, --seq_len 32: needs "),
        (["--source", "nowhere"], "'nowhere' is not a dataset"),
        (["--source", "./nowhere"], "'./nowhere'"),
        (["--device", "teapot"], "--device teapot"),
        (["--tasks", "piqa", "--source", "x"], "--source: goes without --tasks"),
        (["--limit", "2"], "--limit: goes with --tasks"),
        (["--apply_chat_template"], "--apply_chat_template: goes with --tasks"),
        (["--no-fewshot_as_multiturn"], "--fewshot_as_multiturn: goes with --tasks"),
        (["--tasks", "piqa", "--prompts", "3"], "--prompts: goes without --tasks"),
        (["--tasks", "piqa", "--max_new_tokens", "3"], "--max_new_tokens: goes without --tasks"),
        (["--plot", "x.png", "--prompts", "0"], "--plot"),
        (["--plot", "x.bad"], "x.bad: a picture's name ends in"),
        (["--json", "no/where.json"], "--json no/where.json"),
    ],
)
def test_errors_are_one_line(
    script: ModuleType,
    trained_run: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main([str(trained_run), *arguments]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not out or "999999" in arguments  # nothing was measured in vain


@parallel
def test_memory_is_that_of_sixteen_prompts_at_a_time(
    script: ModuleType, trained_run: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, config = load_for_inference(trained_run)
    text, few = find_text(config, str(source)), ["--prompt_tokens", "9", "--max_new_tokens", "2"]
    args = script.parse_arguments(["run", "--prompts", "20", *few])
    size = 16 * 11 * 2 * model.args.n_layers * model.args.kv_heads * model.args.head_dim * 4
    total = "torchtitan_mtp.distributed.memory.total_memory"
    monkeypatch.setattr(total, lambda device: size)
    assert len(script.measure_on_continuation(args, text, model, tokenizer).tokens) == 20
    monkeypatch.setattr(total, lambda device: size - 1)
    with pytest.raises(UserError, match="--max_new_tokens 2 of 16 prompts: needs"):
        script.measure_on_continuation(args, text, model, tokenizer)


# ------------------------------------------------------------------- lm-evaluation-harness

QUESTIONS = [
    {"question": f"def f{i}(self):\n    ", "choices": ["return", "x = 3", "éé"], "gold": i % 3}
    for i in range(5)
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks on data of their own; the harness knows no others, which saves seconds."""
    import datasets
    from lm_eval.tasks import TaskManager

    adapter = "torchtitan_mtp.cli.tasks.TaskManager"
    monkeypatch.setattr(adapter, functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        head = f"task: my_{name}\ntest_split: test\ndataset_path: json\n"
        data = f"dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(head + data + task)
    return folder


def log_likelihood(model: Any, context: list[int], continuation: Sequence[int]) -> float:
    total = 0.0
    for token in continuation:
        total += next_logits(model, context).log_softmax(-1)[token].item()
        context = [*context, token]
    return total


@pytest.mark.parametrize(
    "trained_run",
    ["parallel", pytest.param("sequential", marks=pytest.mark.exhaustive)],
    indirect=True,
)
def test_tasks_of_the_harness(
    script: ModuleType,
    trained_run: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer, _ = load_for_inference(trained_run)
    correct, nats, count = 0, 0.0, 0
    records = []
    for i, question in enumerate(QUESTIONS):
        context = str(question["question"])
        prompt = [tokenizer.bos_id, *context.encode()]
        # Spaces at the end of a context are scored with each choice: that is the harness's way.
        bare, spaces = prompt[:-4], b"    "
        scores = [log_likelihood(model, bare, spaces + c.encode()) for c in question["choices"]]
        correct += max(range(3), key=scores.__getitem__) == question["gold"]
        # So is what a document begins with scored, after itself.
        nats -= log_likelihood(model, prompt[:1], [*prompt[:1], *context.encode()])
        count += len(context.encode())
        new = generate(model, [prompt], 8, eos_id=tokenizer.eos_id).tokens[0]
        right = tokenizer.decode(new).split("e")[0] if i < 2 else "something else"
        records.append(json.dumps({**question, "written": right}) + "\n")
    (tasks / "questions.jsonl").write_text("".join(records))

    names = "my_choice,my_rolling,my_writing"
    arguments = str(trained_run), "--tasks", names, "--include_path", str(tasks)
    found = evaluate(script, tmp_path / "a.json", *arguments)
    assert found["tasks"] == {
        "my_choice": {"acc": correct / 5},
        "my_rolling": {"bits_per_byte": pytest.approx(nats / math.log(2) / count, rel=1e-4)},
        "my_writing": {"exact_match": 2 / 5},
    }
    assert "my_rolling" in capsys.readouterr().out
    # Windows of 8 tokens: the second and later of a document begin with one token of it.
    short = evaluate(
        script, tmp_path / "a.json", *arguments[:2], "my_rolling", *arguments[3:], "--seq_len", "8"
    )
    nats = 0.0
    for question in QUESTIONS:
        text = [tokenizer.bos_id, tokenizer.bos_id, *str(question["question"]).encode()]
        for start in range(0, len(text) - 1, 8):
            begin = start if start + 9 <= len(text) else len(text) - 9  # the last one is full, too
            nats -= log_likelihood(model, text[begin : start + 1], text[start + 1 : start + 9])
    expected = pytest.approx(nats / math.log(2) / count, rel=1e-4)
    assert short["tasks"]["my_rolling"] == {"bits_per_byte": expected}
    limited = evaluate(script, tmp_path / "a.json", *arguments, "--limit", "2")
    assert limited["tasks"]["my_writing"] == {"exact_match": 1.0}
    assert script.main([str(trained_run), "--tasks", "nothing", "--include_path", str(tasks)]) == 1
    assert "--tasks: no task nothing" in capsys.readouterr().err


@parallel
def test_without_the_harness_it_is_named(
    script: ModuleType,
    trained_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("cli.tasks", "inference.lm_eval_adapter"):
        monkeypatch.delitem(sys.modules, f"torchtitan_mtp.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # import fails
    assert script.main([str(trained_run), "--tasks", "piqa"]) == 1
    assert "pip install lm-eval" in capsys.readouterr().err

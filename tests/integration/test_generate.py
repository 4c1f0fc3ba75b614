"""scripts/generate.py on a run that was just trained."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["parallel", "sequential"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    options = {
        "job.dump_folder": str(folder),
        "model.flavor": "quickstart",
        "model.converters": "mtp",
        "mtp.heads": request.param,
        "mtp.num_future_tokens": "3",
        "training.seq_len": "32",
        "training.local_batch_size": "2",
        "training.steps": "3",
        "training.mixed_precision_param": "float32",
        "checkpoint.enable": "true",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run(
        [sys.executable, "-m", "torchtitan_mtp.train", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    return folder


def test_the_command_of_the_quickstart(run: Path, tmp_path: Path) -> None:
    command = "--prompt", "def ", "--max_new_tokens", "20", "--speculative", "--compare"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(run), *command],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")
    for word in ("plain", "speculative", "tokens/step", "t+2", "t+3", "identical"):
        assert word in done.stdout


def test_the_text_goes_to_stdout_alone(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("import os\n", encoding="utf-8")
    outputs = []
    for extra in ([], ["--speculative"], ["--speculative", "--num_draft", "1"]):
        arguments = [str(run), "--prompt_file", str(file), "--max_new_tokens", "12", *extra]
        assert script.main(arguments) == 0
        out, err = capsys.readouterr()
        assert out.startswith("import os\n") and "tokens/s" in err and "tokens/s" not in out
        outputs.append(out)
    assert outputs[0] == outputs[1] == outputs[2]


def test_sampling_depends_on_the_seed_and_not_on_drafts(
    script: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*extra: str) -> str:
        sampled = "--temperature", "1.0", "--top_k", "200", "--top_p", "0.99"
        arguments = [str(run), "--prompt", "x", "--max_new_tokens", "12", *sampled, *extra]
        assert script.main(arguments) == 0
        return str(capsys.readouterr().out)

    assert text("--seed", "1") == text("--seed", "1", "--speculative") != text("--seed", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt: can't be read"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens = 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0"),
        (["--prompt", "a", "--speculative", "--num_draft", "9"], "num_draft = 9"),
        (["--prompt", "a", "--device", "teapot"], "--device teapot"),
    ],
)
def test_errors_are_one_line(
    script: ModuleType,
    run: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main([str(run), *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_checkpoint_that_is_not_there_is_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path / "none"), "--prompt", "a"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_difference_is_judged_by_the_margin(script: ModuleType) -> None:
    import torch

    from torchtitan_mtp.models.args import ModelArgs
    from torchtitan_mtp.models.transformer import build_model

    model = build_model(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=5, multiple_of=8))
    model.to_empty(device="cpu")
    model.init_buffers()
    with torch.no_grad():
        for param in model.parameters():
            torch.nn.init.normal_(param)
        model.output.weight[1] = model.output.weight[0]  # tokens 0 and 1 tie everywhere
    assert script.comparison(model, [1], [3, 4], [3, 4], True).startswith("identical")
    different = script.comparison(model, [1], [3, 4], [3, 2], False)
    assert different == "different from new token 2 on"
    with torch.no_grad():
        model.output.weight.zero_()
    assert "a tie in float32" in script.comparison(model, [1], [3, 4], [3, 2], True)
    with torch.no_grad():
        model.output.weight[0, 0], model.output.weight[1, 0] = 5.0, -5.0
    assert "more than rounding explains" in script.comparison(model, [1], [3], [2], True)

"""scripts/check_readme.py: which blocks it runs, and what it says when one fails."""

import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/check_readme.py"


def check(file: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    file.write_text(text, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(file), *options],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_runs_marked_blocks_in_order_in_one_copy(tmp_path: Path) -> None:
    text = """
```bash run
test -f pyproject.toml   # a copy of the checkout
echo made > made.txt
```
```bash
exit 9   # only shown
```
```toml run
not = "bash"
```
```bash run
cat made.txt
python -c 'import torchtitan_mtp; print(torchtitan_mtp.__file__)'
```
"""
    result = check(tmp_path / "doc.md", text)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "made" in lines
    (imported,) = [line for line in lines if line.endswith("torchtitan_mtp/__init__.py")]
    assert not Path(imported).is_relative_to(SCRIPT.parents[1])
    assert lines[-1] == "2 blocks in 1 files"
    assert not (SCRIPT.parents[1] / "made.txt").exists()


def test_names_file_and_line_of_the_block_that_fails(tmp_path: Path) -> None:
    text = "\n\n```bash run\nfalse\necho not reached\n```\n```bash run\necho nor this\n```\n"
    result = check(tmp_path / "doc.md", text)
    assert result.returncode == 1
    assert "doc.md:3: exited with 1" in result.stderr
    assert "\nnot reached" not in result.stdout
    assert "nor this" not in result.stdout


def test_ends_all_that_a_block_started_when_time_is_up(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = f"```bash run\n(sleep 3; touch {mark}) &\nsleep 60\n```\n"
    result = check(tmp_path / "doc.md", text, "--timeout", "1")
    assert result.returncode == 1
    assert "doc.md:1: ran out of time" in result.stderr
    time.sleep(3)
    assert not mark.exists()


def test_says_when_a_file_is_not_there(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "gone.md"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (1, "error: gone.md is not there\n")

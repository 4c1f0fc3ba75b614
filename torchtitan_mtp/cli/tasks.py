"""Tasks of lm-evaluation-harness for `evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from torchtitan_mtp.errors import UserError


def run_tasks(
    lm: LM, names: Sequence[str], include_path: str | None = None, **options: Any
) -> dict[str, Any]:
    """What the harness makes of tasks, groups or patterns, as `lm_eval --tasks` takes them.

    include_path: a folder with further YAML files. options: others of `simple_evaluate`.
    UserError: an unknown task, or a data set that can't be had.
    """
    manager = TaskManager(include_path=include_path)
    known = manager.match_tasks(list(names))
    missing = [name for name in names if "*" not in name and name not in known]
    if missing or not known:
        raise UserError(
            f"--tasks: no task {', '.join(missing or names)}; `lm_eval ls tasks` lists the names, "
            "--include_path adds a folder of your own"
        )
    try:
        return dict(simple_evaluate(lm, tasks=known, task_manager=manager, **options))
    except (OSError, ConnectionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tasks {','.join(names)}: {reason}") from error


def show(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Print the harness's table, and return each task's metrics, "acc,none": 0.5 as "acc": 0.5."""
    print(make_table(results))
    found: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        found[task] = {}
        for key, value in values.items():
            name, _, rule = key.partition(",")
            if rule and not name.endswith("_stderr") and isinstance(value, (int, float)):
                found[task][name if rule == "none" else f"{name} ({rule})"] = float(value)
    return found

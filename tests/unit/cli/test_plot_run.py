"""The picture of runs, from event files written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from torchtitan_mtp.cli.plot_run import draw, main, names_of, read_scalars

LOSSES = {1: [3.0, 2.0], 2: [4.0, 2.5]}


def write_run(folder: Path, heads: int = 2, validated: bool = True) -> Path:
    with SummaryWriter(str(folder / "tb" / "20260101-000000")) as writer:  # type: ignore[no-untyped-call]
        for head in range(1, heads + 1):
            for step, loss in enumerate(LOSSES[head], start=1):
                writer.add_scalar(f"loss_metrics/mtp_head_{head}_loss", loss, step)
                writer.add_scalar(f"loss_metrics/mtp_head_{head}_accuracy", 0.5, step)
            if validated:
                writer.add_scalar(f"validation_metrics/mtp_head_{head}_loss", head, 2)
        if validated:
            writer.add_scalar("validation_metrics/mtp_head_2_acceptance", 0.25, 2)
            writer.add_scalar("validation_metrics/tokens_per_step", 1.25, 2)
    return folder


def curves(axes: object) -> list[tuple[list[float], list[float], str]]:
    lines = [line for line in axes.get_lines() if len(line.get_xdata())]  # type: ignore[attr-defined]
    return [(list(a.get_xdata()), list(a.get_ydata()), a.get_linestyle()) for a in lines]


def test_one_run(tmp_path: Path) -> None:
    figure = draw({"run": read_scalars(write_run(tmp_path))})
    losses, acceptance, tokens = figure.axes
    assert curves(losses) == [
        ([1, 2], LOSSES[1], "-"),
        ([2], [1], "None"),
        ([1, 2], LOSSES[2], "-"),
        ([2], [2], "None"),
    ]
    assert curves(acceptance) == [([2], [0.25], "-")] and curves(tokens) == [([2], [1.25], "-")]
    legend = losses.get_legend()
    assert legend and [t.get_text() for t in legend.get_texts()] == ["head 1", "head 2"]
    assert not figure.legends


def test_a_later_start_replaces_what_follows_its_first_step(tmp_path: Path) -> None:
    """Also where the earlier one went further, or logged tags that it lacks; but not what another
    rank of the same start has."""
    logged = (
        ("1", "a", [1, 2, 3, 4, 5]),
        ("1", "b", [2, 4]),
        ("2/rank_0", "a", [3, 4]),
        ("2/rank_1", "a", [3]),
    )
    for folder, tag, steps in logged:
        with SummaryWriter(str(tmp_path / "tb" / folder)) as writer:  # type: ignore[no-untyped-call]
            for step in steps:
                writer.add_scalar(tag, int(folder[0]), step)
    assert read_scalars(tmp_path) == {"a": [(1, 1), (2, 1), (3, 2), (4, 2)], "b": [(2, 1)]}


def test_several_runs_have_lines_of_their_own(tmp_path: Path) -> None:
    """Also where one of them has fewer heads, or was not validated."""
    first, second = write_run(tmp_path / "a", heads=1), write_run(tmp_path / "b", validated=False)
    figure = draw({"a": read_scalars(first), "b": read_scalars(second)})
    assert [style for _, _, style in curves(figure.axes[0])] == ["-", "None", "--", "--"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    assert len(draw({"b": read_scalars(second)}).axes) == 1


def test_runs_are_told_apart() -> None:
    assert names_of([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert names_of([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_the_picture_or_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(write_run(tmp_path / "run")), str(tmp_path / "a.png")
    assert main([run, run, out]) == 0 and imread(out).shape[1] == 13 * 110
    assert capsys.readouterr().out.endswith(": 1 run(s)\n")
    other = str(write_run(tmp_path / "none", heads=0))
    for arguments in ([str(tmp_path / "away"), out], [run, other, out], [run, "a.doc"]):
        assert main(arguments) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert main([other, out]) == 1
    assert "none: no loss_metrics/mtp_head_1_accuracy" in capsys.readouterr().err

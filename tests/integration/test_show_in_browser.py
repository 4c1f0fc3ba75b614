"""The page of `--html` as Chromium draws it: `scripts/test.sh -m browser`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from torchtitan_mtp.cli.show import HUES, Count, Shown, Span
from torchtitan_mtp.cli.show_html import write_page
from torchtitan_mtp.inference.stats import Stats

pytestmark = pytest.mark.browser
LONG = "w" * 300
TEXT = [
    Span("def ", (0,), 0),
    *(Span(f" word{head}\n", (head,), head) for head in range(1, 9)),
    *(Span(f" no{head}\t", (head,), head, True) for head in range(2, 9)),
    Span(LONG, (2,), 9),
    Span(LONG, (3,), 10, True),
]
SHOWN = Shown([TEXT, TEXT], [Count(head, 1000, 1000) for head in range(1, 9)], Stats(tokens=8000))
GROUNDS = {"light": (1, "#ffffff"), "dark": (0, "#16181d")}


def screenshot(folder: Path, scheme: int, width: int) -> np.ndarray:
    """The page, [height, width, 3] of 0 to 255."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("no chromium on the PATH: install one (apt-get install chromium)")
    write_page(SHOWN, LONG, folder / "page.html")
    command = f"{browser} --headless --no-sandbox --disable-gpu --hide-scrollbars"
    subprocess.run(
        [
            *command.split(),
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},1400",
            f"--screenshot={folder / 'page.png'}",
            (folder / "page.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return (imread(folder / "page.png")[:, :, :3] * 255).round().astype(int)


def is_color(pixels: np.ndarray, color: str) -> np.ndarray:
    return (pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)


@pytest.mark.parametrize("scheme", GROUNDS)
@pytest.mark.parametrize("width", [600, 1200])
def test_heads_have_their_colours_and_nothing_overflows(
    scheme: str, width: int, tmp_path: Path
) -> None:
    number, ground = GROUNDS[scheme]
    pixels = screenshot(tmp_path, number, width)
    assert pixels.shape == (1400, width, 3)
    margins = np.concatenate((pixels[:, :16], pixels[:, -16:]), axis=1)
    assert is_color(margins, ground).all(), "something lies in the page's margin"
    for hue in HUES:
        behind, struck = (hue.tint, hue.middle) if scheme == "light" else (hue.shade, hue.tint)
        # A swatch, a part of the bar, and the text's own chips; lines through rejected drafts.
        assert is_color(pixels, behind).sum() > 500
        assert is_color(pixels, struck).sum() > 20

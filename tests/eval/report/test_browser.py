"""The page in a real browser, where one is installed: what a reader sees is there, and nothing is
fetched.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from eval.report.html import Sample, page
from tests.eval.report.test_pages import method, report

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def variants() -> list[dict]:
    """A method in two batch sizes and two temperatures beside its baseline."""
    plain = method(
        "autoregressive",
        1.0,
        quality={"noise": {"micro": 1.0, "ci95": [0.99, 1.01]}},
        batch_size=1,
        acceptance_by_depth=[],
    )
    lengths = [30, 20, 10]
    return [
        plain,
        method("clover", 1.6, batch_size=1, accepted_length_histogram=lengths),
        method("clover, 4 at once", 1.3, batch_size=4, accepted_length_histogram=lengths),
        method(
            "clover at 0.5", 1.4, batch_size=1, temperature=0.5, accepted_length_histogram=lengths
        ),
    ]


@pytest.mark.skipif(
    BROWSER is None, reason="no chromium is installed (Debian: apt-get install chromium)"
)
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(
        page(report(*variants()), Sample("clover", "Why?", [("Because", False), (" so", True)]))
    )
    shown = subprocess.run(
        [
            BROWSER or "",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,2600",
            f"--screenshot={tmp_path / 'shot.png'}",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert shown.stdout.count("<svg") == 6
    assert "clover, 4 at once" in shown.stdout and "<mark> so</mark>" in shown.stdout
    assert (tmp_path / "shot.png").stat().st_size > 20_000

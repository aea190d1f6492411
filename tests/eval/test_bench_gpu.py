"""`make bench-gpu` on a CPU with a tiny shape, in a Python that has PyTorch and transformers
alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval import bench_gpu
from eval.bench_gpu import Bench, Table, bench_of, main, measure, random_target
from tests.test_style import ROOT

ALONE = """
import sys
DENIED = {"lightning", "jsonargparse", "datasets", "deepspeed", "peft", "evaluate", "matplotlib",
          "rich", "scipy", "tensorboard", "pyarrow", "gguf", "starlette", "openai", "jinja2"}
from importlib.machinery import PathFinder
class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in DENIED:
            return PathFinder.find_spec(name, path, target)
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from eval.bench_gpu import main
main(sys.argv[1:])
"""
SECTIONS = ("calls", "engine", "training", "contexts")


def test_it_needs_pytorch_and_transformers_alone(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--shape", "tiny", "--output", str(tmp_path), "--sections"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *flags, *SECTIONS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["missing"] == [] and len(stored["tables"]) == len(SECTIONS)
    for table in stored["tables"]:
        assert table["rows"] and {len(row) for row in table["rows"]} == {len(table["header"])}
    page = (tmp_path / "report.md").read_text()
    assert "| EAGLE-3, 60 nodes |" in page and "break-even τ" in page and page in done.stdout


def test_graphs_leave_the_target_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.target.kernels.compiled_calls.BACKEND", "eager")
    bench = bench_of("tiny", torch.device("cpu"))
    table = bench_gpu.graphs(bench)
    assert [row[0] for row in table.rows] == ["1", "8", "64"] and bench.target.compiled is None


def test_what_does_not_fit_into_the_time_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Bench) -> Table:
        raise RuntimeError("out of\nmemory")

    quick = Table("quick", "")
    sections = {"slow": (failing, 60.0), "bad": (failing, 1.0), "good": (lambda _: quick, 1.0)}
    monkeypatch.setattr(bench_gpu, "SECTIONS", sections)
    bench = Bench(random_target("tiny", torch.device("cpu"), torch.float32), 64, 16, 64, 12, 2)
    tables, missing = measure(bench, list(sections), 0.5, time.monotonic())
    assert tables == [quick] and missing[0].startswith("slow: ")
    assert missing[1] == "bad: RuntimeError: out of memory"


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path)])
    assert caught.value.code == 2 and "no GPU is here" in capsys.readouterr().err

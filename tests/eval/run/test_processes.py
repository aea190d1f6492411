"""An evaluation shared out among processes has the report of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.evaluation import agree_on_budgets
from eval.methods.rows import Method, build_rows
from eval.run.processes import Share, shared_out
from modules.contracts.sampling import Sampling
from tests.eval.test_cli import config, report, run, tiny
from tests.fakes import tiny_target
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[3]
TIMED = {
    "seconds",
    "tokens_per_second",
    "time_to_first_token",
    "speedup",
    "ci95",
    "predicted_speedup",
    "speed_model",
    "seconds_by_phase",
    "noise",
    "peak_memory_bytes",
    "draft_seconds_per_node",
}
SCRIPTED = {
    "name": "scripted",
    "drafter": {"class_path": "tests.fakes.ScriptedDrafter", "init_args": {"depth": 2}},
}
__all__ = ["tiny"]


def launch(arguments: list[str], count: int) -> list[tuple[int, str, str]]:
    """Several processes, as torchrun would start them: exit status and what they said."""
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.eval.run.shares_worker", *arguments]
    running = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def untimed(found: Any) -> Any:
    """A report without what a clock or the memory decides."""
    if isinstance(found, list):
        return [untimed(one) for one in found]
    if isinstance(found, dict):
        return {key: untimed(value) for key, value in found.items() if key not in TIMED}
    return found


def test_two_processes_give_one_report_with_the_figures_of_one(tmp_path: Path) -> None:
    path = config(tmp_path, ["AlwaysRight", "Liar", SCRIPTED], turns="all", batch_size=2)
    ended = launch(["--config", path, "--output", "two"], 2)
    assert [status for status, *_ in ended] == [1, 1], ended
    assert "report: two/report.html" in ended[0][1] and ended[1][1] == ""
    assert run("--config", path, "--output", "one") == 1
    one, two = report(Path("one")), report(Path("two"))
    assert two["settings"] == {**one["settings"], "processes": 2}
    assert untimed(two["methods"]) == untimed(one["methods"]) and len(two["methods"]) == 4
    assert (
        two["methods"][3]["mean_accepted_tokens"] > 2
        and two["methods"][3]["by_task"]["b"]["identical_outputs"] == 6
    )
    journals = sorted(file.name for file in Path("two").glob("journal*"))
    assert journals == ["journal.0of2.jsonl", "journal.1of2.jsonl"]
    lines = [len((Path("two") / name).read_text().splitlines()) - 1 for name in journals]
    assert (
        sum(lines) == len(Path("one/journal.jsonl").read_text().splitlines()) - 1 and min(lines) > 0
    )
    assert run("--config", path, "--output", "two", "--resume") == 2
    refused = launch(["--config", path, "--output", "two"], 2)
    assert [status for status, *_ in refused] == [2, 2], refused
    words = "'two' already holds an evaluation (journal.0of2.jsonl)"
    assert all(words in said for *_, said in refused)


def test_shares_are_disjoint_and_whole() -> None:
    work = list(range(7))
    parts = [Share(rank, 3).of(work) for rank in range(3)]
    assert sorted(sum(parts, [])) == work and Share().of(work) == work
    assert Share().merged({"a": 1}) == {"a": 1} and Share().agreed(5) == 5


def test_every_process_takes_the_budgets_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        Method(**SCRIPTED, budget=2),
        Method(decoder={"class_path": "eval.methods.huggingface.HuggingFaceGenerate"}),
    ]
    rows = build_rows(methods, tiny_target(), Sampling())
    monkeypatch.setattr(Share, "agreed", lambda self, value: [0, 5, None])
    agree_on_budgets(rows, Share(1, 2))
    assert rows[1].budget == 5 == rows[1].decoder.nodes  # type: ignore[attr-defined]
    assert rows[0].decoder.nodes == 0 and rows[2].budget is None  # type: ignore[attr-defined]


def test_another_number_of_processes_cannot_resume(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert Share(1, 2).journal(path, True).name == "journal.1of2.jsonl"
    (tmp_path / "journal.0of2.previous.jsonl").touch()
    assert Share().journal(path, True) == path
    (tmp_path / "journal.0of2.jsonl").touch()
    assert Share(0, 2).journal(path, True).is_file() and Share().journal(path, False) == path
    with pytest.raises(
        ValueError, match="written by another number of processes than 1: start as many"
    ):
        Share().journal(path, True)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE 2 is set without RANK"), shared_out():
        pass

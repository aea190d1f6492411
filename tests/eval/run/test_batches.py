"""Several batch sizes and temperatures in one evaluation: really decoded together, the same tokens,
throughput.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.evaluation import small_batches
from eval.methods.rows import Method, build_rows
from eval.methods.variants import vary
from eval.run.harness import share
from eval.tasks.tasks import Prompt, Task
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder, Trace
from tests.eval.test_cli import config, methods, run, tiny
from tests.fakes import tiny_target

SCRIPTED = {
    "name": "scripted",
    "drafter": {"class_path": "tests.fakes.ScriptedDrafter", "init_args": {"right": 0.6}},
}
LOOKUP = {
    "name": "lookup",
    "decoder": {"class_path": "eval.methods.huggingface.HuggingFacePromptLookup"},
}
__all__ = ["tiny"]


def test_every_batch_size_decodes_together_and_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = SpeculativeDecoder.decode

    def spied(self: SpeculativeDecoder, prompts: list[list[int]], *rest: Any) -> list[Trace]:
        sizes.append(len(prompts))
        return original(self, prompts, *rest)

    monkeypatch.setattr(SpeculativeDecoder, "decode", spied)
    assert (
        run(
            "--config",
            config(tmp_path, [SCRIPTED, LOOKUP]),
            "--batch_size",
            "[1,3]",
            "--output",
            "out",
        )
        == 0
    )
    assert {1, 3} == set(sizes)
    rows = methods()
    assert list(rows) == [
        "autoregressive",
        "scripted",
        "lookup",
        "autoregressive, 3 at once",
        "scripted, 3 at once",
    ]
    assert all(row["lossless"] and row["identical_outputs"] == 6 for row in rows.values())
    assert rows["scripted, 3 at once"]["batch_size"] == 3 and rows["scripted"]["batch_size"] == 1
    assert (
        rows["autoregressive, 3 at once"]["tokens_per_second"]
        > rows["autoregressive"]["tokens_per_second"]
    )
    assert rows["scripted, 3 at once"]["predicted_speedup"] > 0


def test_seconds_of_a_batch_are_its_time_on_the_clock_once() -> None:
    found = share(
        [
            Trace(3, [1], seconds={"verify": 1.0, "other": 0.2}),
            Trace(3, [1], seconds={"verify": 4.0, "other": 2.0}),
        ]
    )
    assert [trace.seconds for trace in found] == [{"verify": 2.0, "other": 1.0}] * 2


def test_several_temperatures(tmp_path: Path) -> None:
    warm = {**SCRIPTED, "name": "own", "temperature": 0.5}
    path = config(tmp_path, [SCRIPTED, warm], temperature=[0, 0.5])
    assert run("--config", path, "--output", "out", "--limit", "1") == 0
    rows = methods()
    assert list(rows) == [
        "autoregressive",
        "scripted",
        "autoregressive at 0.5",
        "own",
        "scripted at 0.5",
    ]
    assert [row["rule"] for row in rows.values()] == [
        "greedy",
        "greedy",
        rows["own"]["rule"],
        "point",
        "point",
    ]
    assert rows["scripted"]["lossless"] and rows["scripted at 0.5"]["lossless"] is None


def test_a_rule_that_cannot_sample_is_refused() -> None:
    drafter: Any = SCRIPTED["drafter"]
    rows = build_rows([Method("x", drafter, rule="greedy")], tiny_target(), Sampling())
    with pytest.raises(ValueError, match="does not sample at temperature 0.5"):
        vary(rows, [Sampling(), Sampling(0.5)], [1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": []}, "batch_size [] must name"),
        ({"batch_size": [1, 1]}, "must name each value once"),
        ({"batch_size": [0, 2]}, "batch_size must be at least 1, got 0"),
        ({"temperature": [0.0, -1.0]}, "temperature must"),
        ({"batch_size": 2}, "lookup decodes one prompt at a time"),
    ],
)
def test_mistakes(
    tmp_path: Path, settings: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config(tmp_path, [SCRIPTED, LOOKUP], **settings)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_a_batch_that_no_task_can_fill_is_told() -> None:
    tasks = [
        Task(name, tuple(Prompt(str(i), name, ("?",)) for i in range(count)))
        for name, count in (("one", 1), ("two", 2))
    ]
    assert small_batches(tasks, [1, 2]) == []
    (line,) = small_batches(tasks, [1, 4])
    assert line.startswith("batch_size 4: no task has more than 2 prompts") and "--limit" in line

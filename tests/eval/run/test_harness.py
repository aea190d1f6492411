"""Interleaving, rotation, seeds, later turns and folding."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from eval.methods.rows import Row
from eval.report.summary import fold, summarise
from eval.run.harness import Harness, Unit, fitting, readable, render, units
from eval.run.journal import Journal
from eval.tasks.tasks import Prompt, Task
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder, Trace
from modules.drafters.retrieval.token_recycling import UNKNOWN, TokenRecycling
from modules.target.session import Session
from modules.target.target import Target
from tests.fakes import tiny_target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


class Recorder:
    """Answers with its name's length; remembers what it was asked, and when."""

    def __init__(self, name: str, log: list[tuple[str, list[int], int]]) -> None:
        self.name, self.log = name, log

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        self.log += [(self.name, prompt, sampling.seed) for prompt in prompts]
        seconds = {
            "prefill": 1.0,
            "verify": 2.0,
            "other": 0.0,
            "draft": 0.0,
            "accept": 0.0,
            "commit": 0.0,
        }
        said, drafted = [30, 31, 32], [False] * 3
        return [
            Trace(len(prompt), said, drafted, [1, 1], [0, 0], [0, 0], seconds, 1.0)
            for prompt in prompts
        ]


def rows(
    target: Target, log: list, names: tuple[str, ...] = ("autoregressive", "a", "b")
) -> list[Row]:
    return [Row(name, Recorder(name, log), target, Sampling(), names[0]) for name in names]


def tasks(count: int = 2, turns: tuple[str, ...] = ("hello",)) -> list[Task]:
    return [
        Task(name, tuple(Prompt(f"{name}/{i}", name, turns) for i in range(count))) for name in "xy"
    ]


def test_units_take_turns_between_tasks_and_keep_batches_within_one() -> None:
    work = units(tasks(3), batch_size=2, repeats=2)
    assert [(unit.task, len(unit.prompts)) for unit in work[:4]] == [
        ("x", 2),
        ("y", 2),
        ("x", 1),
        ("y", 1),
    ]
    assert len(work) == 8 and len({unit.key for unit in work}) == 8
    assert [unit.index for unit in work] == [0, 1, 2, 3] * 2 and [
        unit.number for unit in work
    ] == list(range(8))


def test_every_row_answers_each_prompt_before_the_next_in_rotating_order(
    target: Target, tmp_path: Path
) -> None:
    log: list[tuple[str, list[int], int]] = []
    harness = Harness(rows(target, log), 3, seed=7)
    records = harness.run(units(tasks(), 1, 1), Journal(tmp_path / "j.jsonl", {}, False))
    warm_up, measured = log[:3], log[3:]
    assert [name for name, *_ in warm_up] == ["autoregressive", "a", "b"]
    orders = [tuple(name for name, *_ in measured[i : i + 4]) for i in range(0, 16, 4)]
    assert all(sorted(order) == ["a", "autoregressive", "autoregressive", "b"] for order in orders)
    assert {order[0] for order in orders} == {"autoregressive", "a", "b"} and len(set(orders)) == 4
    seeds = [{seed for *_, seed in measured[i : i + 4]} for i in range(0, 16, 4)]
    assert all(len(seed) == 1 for seed in seeds) and len(set.union(*seeds)) == 4
    assert len(records) == 16 and sum(record.again for record in records) == 4


def test_later_turns_follow_the_baselines_answer_for_every_row(
    target: Target, tmp_path: Path
) -> None:
    log: list[tuple[str, list[int], int]] = []
    work = units(
        [Task("x", (Prompt("x/0", "x", ("hello", "more")), Prompt("x/1", "x", ("only",))))], 2, 1
    )
    records = Harness(rows(target, log), 3).run(work, Journal(tmp_path / "j.jsonl", {}, False))
    said = target.tokenizer.decode([30, 31, 32], skip_special_tokens=True)
    second = render(Prompt("x/0", "x", ("hello", "more")), [said], target)
    assert [prompt for _, prompt, _ in log[-4:]] == [second] * 4
    assert {record.prompt for record in records} == {"x/0", "x/1", "x/0#2"}
    assert all(
        record.trace.seconds["verify"] == (2.0 if "#" in record.prompt else 1.0)
        for record in records
    )


def test_progress_is_that_of_this_run_alone(target: Target, tmp_path: Path) -> None:
    """Units of an earlier run are not counted again, whose time would be taken for none."""
    work, journal = units(tasks(), 1, 1), Journal(tmp_path / "j.jsonl", {}, False)
    Harness(rows(target, []), 4).run(work[:1], journal)
    measured: list[Unit] = []
    Harness(rows(target, []), 4, finished=measured.append).run(work, journal)
    assert measured == work[1:]


def test_a_prompt_has_its_system_prompt_tools_and_arguments() -> None:
    target = tiny_target()
    target.tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        "{% if short %}ok{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "weather"}}
    prompt = Prompt("a", "a", ("b", "c"), False, None, "brief", [tool], {"short": True})
    text = "weatherok<|system|>brief<|user|>b<|assistant|>d<|user|>c"
    ids = target.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert render(prompt, ["d"], target) == ids
    target.tokenizer.chat_template = tiny_target().tokenizer.chat_template
    with pytest.raises(ValueError, match="prompt 'a': .*short.*: leave it out"):
        readable(prompt, target)


def test_a_row_that_loses_answers_is_named(target: Target, tmp_path: Path) -> None:
    def short(*_: object) -> list[Trace]:
        return []

    broken = rows(target, [])
    broken[1].decoder.decode = short  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="row 'a' gave 0 answers to 1 prompts"):
        Harness(broken, 3).run(units(tasks(), 1, 1), Journal(tmp_path / "j.jsonl", {}, False))


def test_folding_takes_medians_of_seconds_and_both_runs_of_a_baseline(
    target: Target, tmp_path: Path
) -> None:
    records = Harness(rows(target, []), 3).run(
        units(tasks(1), 1, 3), Journal(tmp_path / "j.jsonl", {}, False)
    )
    own = [record for record in records if record.row == "a" and record.task == "x"]
    timed = [
        replace(one.trace, seconds={**one.trace.seconds, "verify": v})
        for one, v in zip(own, (5, 1, 2))
    ]
    assert (
        fold([replace(one, trace=trace) for one, trace in zip(own, timed)])["x/0"].trace.seconds[
            "verify"
        ]
        == 2
    )
    summaries = summarise(rows(target, []), records)
    assert [one.figures["prompts"] for one in summaries] == [2, 2, 2]
    assert (
        summaries[0].figures["quality"]["noise"]["micro"] == 1.0
        and "noise" not in summaries[1].figures["quality"]
    )


def test_prompts_that_do_not_fit_are_left_out(target: Target) -> None:
    long = Task("z", (Prompt("z/0", "z", ("x" * 600,)),))
    kept, skipped = fitting([*tasks(1), long], rows(target, []), 10)
    assert [task.name for task in kept] == ["x", "y"] and skipped == ["z/0"]
    with pytest.raises(ValueError, match="no prompt fits"):
        fitting([long], rows(target, []), 10)


def test_a_prompt_that_the_target_cannot_read_is_named() -> None:
    target = tiny_target()
    target.tokenizer.add_tokens(["<extra>"])
    odd = Task("z", (Prompt("z/0", "z", ("why?", "and <extra>?")),))
    with pytest.raises(
        ValueError,
        match="prompt 'z/0': token 128 '<extra>' is beyond the model's vocabulary of 128",
    ):
        fitting([*tasks(1), odd], rows(target, []), 10)
    target.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="prompt 'x/0': refused by the chat template"):
        fitting(tasks(1), rows(target, []), 10)


def test_no_row_pass_or_batch_size_knows_answers_from_another(
    target: Target, tmp_path: Path
) -> None:
    """A drafter that learns needs as many calls in every pass, in every row that shares it, and
    after the warm-up.
    """
    decoder = SpeculativeDecoder(target, TokenRecycling(target.shape, tokens=20))
    plain = Row("plain", SpeculativeDecoder(target), target, Sampling(), "plain")
    shared = [plain, *(Row(name, decoder, target, Sampling(), "plain") for name in ("a", "b"))]
    prompts = tuple(Prompt(f"x/{i}", "x", (f"hello {i}",)) for i in range(2))
    calls: dict[tuple[str, str], set[int]] = {}
    for _ in range(2):
        records = Harness(shared, 24).run(
            units([Task("x", prompts)], 1, 2), Journal(tmp_path / "j", {}, False)
        )
        for record in records:
            calls.setdefault((record.row, record.prompt), set()).add(len(record.trace.accepted))
    assert len(calls) == 6 and all(len(counts) == 1 for counts in calls.values())
    assert calls["a", "x/0"] == calls["b", "x/0"]
    assert isinstance(decoder.drafter, TokenRecycling)
    assert bool((decoder.drafter.successors_VK == UNKNOWN).all())


def test_shared_prompts_are_read_once_and_counted_in_every_row(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, names = SpeculativeDecoder(target), ("autoregressive", "a", "b")
    shared = [Row(name, decoder, target, Sampling(), names[0]) for name in names]
    work, reads = units(tasks(1), 1, 1)[:1], []
    part = Session._prompt_part
    monkeypatch.setattr(
        Session, "_prompt_part", lambda *given: (reads.append(1), time.sleep(0.2), part(*given))[2]
    )
    records = Harness(shared, 3, share_prompts=True).run(work, Journal(tmp_path / "j", {}, False))
    # The first row reads it, while it warms up.
    assert len(reads) == 1 and len(records) == 4
    assert len({tuple(record.trace.ids) for record in records}) == 1
    for record in records:
        assert record.trace.seconds["prefill"] >= 0.19
        assert record.trace.time_to_first_token >= 0.19

"""Measuring rows interleaved: every prompt goes through every row before the next prompt, in
rotating order.

Drift of the machine then affects all rows alike. The autoregressive rows run twice per prompt; the
difference of the two runs is the noise of the measurement.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from data.conversations import check_ids, prompt_ids
from data.reading.files import Skipped
from data.reading.rows import Message
from eval.methods.rows import Row
from eval.run.journal import Journal, Record
from eval.tasks.tasks import Prompt, Task
from modules.constraints.grammar import json_schema
from modules.contracts.sampling import Constraint
from modules.contracts.target import Target
from modules.decoding.decoder import Decoder, SpeculativeDecoder, Trace
from modules.target.kv_cache import PromptMemory

WARM_UP_TOKENS = 8
SEEDS_PER_PROMPT = 1000
"""Sampling seeds of neighbouring prompts lie this far apart (a batch uses one per sequence)."""


@dataclass(frozen=True)
class Unit:
    """Prompts that are decoded as one batch.

    number: position over all passes, which rotates the rows. index: position within a pass, which
    determines the sampling seed.
    """

    number: int
    index: int
    repeat: int
    task: str
    prompts: tuple[Prompt, ...]
    batch_size: int = 1

    @property
    def key(self) -> str:
        """The unit's key in the journal."""
        size = f"{self.batch_size}x" if self.batch_size > 1 else ""
        return f"{size}{self.repeat}:" + "|".join(prompt.id for prompt in self.prompts)


def units(tasks: Sequence[Task], batch_size: int, repeats: int) -> list[Unit]:
    """All batches of all passes. Tasks take turns, so that an early stop leaves no task out."""
    # Batches of each task, then one of every task in turn.
    batches = [
        [task.prompts[i : i + batch_size] for i in range(0, len(task.prompts), batch_size)]
        for task in tasks
    ]
    rounds = range(max((len(batch) for batch in batches), default=0))
    mixed = [
        (task.name, batch[i])
        for i in rounds
        for task, batch in zip(tasks, batches)
        if i < len(batch)
    ]
    # Every pass repeats the same order.
    return [
        Unit(repeat * len(mixed) + i, i, repeat, name, prompts, batch_size)
        for repeat in range(repeats)
        for i, (name, prompts) in enumerate(mixed)
    ]


@dataclass
class Harness:
    """Runs rows over units.

    Args:
        rows: autoregressive rows first; every row's `baseline` is among them.
        max_new_tokens: per answer.
        seed: of sampling; each prompt has its own, the same for all rows and passes.
        finished: called after each unit that was measured (to show the progress).
        share_prompts: read a prompt once for all rows that read it in the same way. Reports count
            its seconds in each of them.
    """

    rows: Sequence[Row]
    max_new_tokens: int
    seed: int = 0
    finished: Callable[[Unit], None] = lambda unit: None
    share_prompts: bool = False

    def __post_init__(self) -> None:
        """Start the first pass with fresh decoders."""
        self._grammars: dict[tuple[str, int], Constraint] = {}
        self._prompts = PromptMemory()
        self.begin_pass()

    def begin_pass(self) -> None:
        """Reset drafters that learn while decoding: rows, passes and batch sizes see the same
        prompts, and must not profit from each other's answers."""
        self._decoders: dict[str, Decoder] = {
            row.name: row.decoder.fresh()
            if isinstance(row.decoder, SpeculativeDecoder)
            else row.decoder
            for row in self.rows
        }

    def run(self, work: Sequence[Unit], journal: Journal) -> list[Record]:
        """Measure every unit that the journal does not hold yet; returns all records.

        Raises:
            ValueError: a row returns a wrong number of answers.
        """
        # 1. Drop units of the journal that lack answers.
        for unit in work:
            if unit.key in journal.done and not self.whole(unit, journal.done[unit.key]):
                journal.drop(unit.key)
        # 2. Warm up, if anything is left to measure.
        waiting = [unit for unit in work if unit.key not in journal.done]
        if waiting:
            self.warm_up(waiting[0])
        # 3. Measure in order; every pass begins with fresh decoders.
        repeat = None
        for unit in work:
            if unit.repeat != repeat:
                self.begin_pass()
                repeat = unit.repeat
            if unit.key not in journal.done:
                journal.add(unit.key, list(self.measure(unit)))
                self.finished(unit)
        return [record for unit in work for record in journal.done[unit.key]]

    def whole(self, unit: Unit, records: Sequence[Record]) -> bool:
        """Whether the records are complete: every row, every turn, baselines twice."""
        present = Counter(
            (record.row, record.prompt, record.again, record.repeat, record.task)
            for record in records
        )
        expected = Counter(
            (row.name, _turn_name(prompt, turn), again, unit.repeat, unit.task)
            for row, again in self.schedule(0)
            for prompt in unit.prompts
            for turn in range(len(prompt.turns))
        )
        return present == expected

    def warm_up(self, unit: Unit) -> None:
        """Decode a few tokens of the first batch in every row, unmeasured, so that allocations,
        kernels and lazily built tables are ready.
        """
        for row in self.rows:
            ids = [render(prompt, [], row.target) for prompt in unit.prompts]
            with self._sharing():
                self._decoders[row.name].decode(
                    ids, row.sampling, min(WARM_UP_TOKENS, self.max_new_tokens)
                )

    def _sharing(self) -> AbstractContextManager[None]:
        """Inside, prompts are shared by rows, if that is asked for."""
        return self._prompts.used() if self.share_prompts else nullcontext()

    def schedule(self, number: int) -> list[tuple[Row, bool]]:
        """Rows in the order of one unit, each with a flag for the second run of a baseline."""
        runs = [(row, False) for row in self.rows] + [
            (row, True) for row in self.rows if row.baseline == row.name
        ]
        start = number % len(runs)
        return runs[start:] + runs[:start]

    def measure(self, unit: Unit) -> Iterator[Record]:
        """All rows on all turns of a batch. A later turn follows the answers of the row's
        autoregressive baseline, so that every row gets the same prompt.
        """
        answers: dict[str, list[list[str]]] = {
            row.name: [[] for _ in unit.prompts] for row in self.rows
        }
        for turn in range(max(len(prompt.turns) for prompt in unit.prompts)):
            # Conversations of the batch that have this turn.
            open_prompts = [i for i, prompt in enumerate(unit.prompts) if turn < len(prompt.turns)]
            records = [
                record
                for row, again in self.schedule(unit.number)
                for record in self._answers(
                    unit, turn, open_prompts, row, again, answers[row.baseline]
                )
            ]
            yield from records
            self._remember(records, open_prompts, answers)

    def _answers(
        self,
        unit: Unit,
        turn: int,
        open_prompts: list[int],
        row: Row,
        again: bool,
        earlier_answers: list[list[str]],
    ) -> list[Record]:
        # The same prompts and seeds in every row.
        prompts = [render(unit.prompts[i], earlier_answers[i], row.target) for i in open_prompts]
        sampling = replace(row.sampling, seed=self.seed + SEEDS_PER_PROMPT * unit.index)
        if any(unit.prompts[i].schema for i in open_prompts):
            schemas = [unit.prompts[i].schema for i in open_prompts]
            constraints = [self._grammar(schema, row.target) for schema in schemas]
            sampling = replace(sampling, constraint=constraints)
        forget_peak(row.target)
        with self._sharing():
            traces = self._decoders[row.name].decode(prompts, sampling, self.max_new_tokens)
        if self.share_prompts:
            traces = [as_if_read(trace, self._prompts.spared) for trace in traces]
        if len(traces) != len(prompts):
            raise ValueError(
                f"row {row.name!r} gave {len(traces)} answers to {len(prompts)} prompts: mend its "
                "decoder"
            )
        # A decoder in another process reports its own peak.
        peak = getattr(row.decoder, "peak_memory", None) or peak_memory(row.target)
        names = [_turn_name(unit.prompts[i], turn) for i in open_prompts]
        return [
            Record(row.name, name, unit.task, unit.repeat, again, ids, trace, peak)
            for name, ids, trace in zip(names, prompts, share(traces))
        ]

    def _grammar(self, schema: str, target: Target) -> Constraint | None:
        """The constraint of a JSON schema, made once; None without."""
        key = schema, id(target)
        if schema and key not in self._grammars:
            self._grammars[key] = json_schema(schema, target)
        return self._grammars.get(key)

    def _remember(
        self,
        records: Sequence[Record],
        open_prompts: list[int],
        answers: dict[str, list[list[str]]],
    ) -> None:
        for row in self.rows:
            if row.baseline == row.name:
                first_runs = [
                    record for record in records if record.row == row.name and not record.again
                ]
                for i, record in zip(open_prompts, first_runs):
                    answers[row.name][i].append(
                        row.target.tokenizer.decode(record.trace.ids, skip_special_tokens=True)
                    )


def _turn_name(prompt: Prompt, turn: int) -> str:
    """The name of a prompt's turn in records."""
    return prompt.id + (f"#{turn + 1}" if turn else "")


def render(prompt: Prompt, answers: Sequence[str], target: Target) -> list[int]:
    """Token ids of a conversation up to the next answer: the turns so far with the answers between
    them.
    """
    messages: list[Message] = []
    if prompt.system:
        messages.append({"role": "system", "content": prompt.system})
    for question, answer in zip(prompt.turns, answers):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    messages.append({"role": "user", "content": prompt.turns[len(answers)]})
    return prompt_ids(messages, target.tokenizer, prompt.tools, prompt.template)


def as_if_read(trace: Trace, spared: float) -> Trace:
    """The trace with the seconds that a recalled prompt has spared."""
    prefill = trace.seconds.get("prefill", 0.0) + spared
    return replace(
        trace,
        time_to_first_token=trace.time_to_first_token + spared,
        seconds={**trace.seconds, "prefill": prefill},
    )


def share(traces: Sequence[Trace]) -> list[Trace]:
    """Traces of one batch, each with an equal share of the batch's seconds.

    Their sum is the wall-clock time of the batch until its last answer ended, so tokens over
    seconds is throughput. The time to the first token is not divided.
    """
    longest = max(traces, key=lambda trace: sum(trace.seconds.values())).seconds
    equal = {phase: seconds / len(traces) for phase, seconds in longest.items()}
    return [replace(trace, seconds=equal) for trace in traces]


def fitting(
    tasks: Sequence[Task], rows: Sequence[Row], max_new_tokens: int
) -> tuple[list[Task], list[str]]:
    """Tasks without prompts whose turns may exceed the context, and the ids of those prompts.

    Raises:
        ValueError: no prompt fits, or one cannot be rendered or tokenised for the target.
    """
    # The widest call also needs room for its drafted nodes.
    widest = max((row.budget or 0) for row in rows)
    room = min(row.target.max_positions for row in rows) - widest
    # Every turn may add a full answer.
    long = [
        prompt.id
        for task in tasks
        for prompt in task.prompts
        if len(readable(prompt, rows[0].target)) + max_new_tokens * len(prompt.turns) > room
    ]
    tasks_left = [
        Task(task.name, tuple(p for p in task.prompts if p.id not in set(long))) for task in tasks
    ]
    tasks_left = [task for task in tasks_left if task.prompts]
    if not tasks_left:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}: no prompt fits the context of {room} tokens: lower "
            "it"
        )
    return tasks_left, long


def readable(prompt: Prompt, target: Target) -> list[int]:
    """Token ids of all turns as one question.

    Raises:
        ValueError: the chat template refuses them, or an id is outside of the target's vocabulary.
    """
    try:
        ids = render(whole(prompt), [], target)
        check_ids(ids, target.tokenizer, target.shape.vocab_size)
    except Skipped as reason:
        raise ValueError(f"prompt {prompt.id!r}: {reason}: leave it out") from None
    return ids


def whole(prompt: Prompt) -> Prompt:
    """All turns as one question: about as long as the whole conversation without its answers."""
    return replace(prompt, turns=("\n".join(prompt.turns),))


def forget_peak(target: Target) -> None:
    """Reset the GPU's peak memory; a CPU's cannot be reset."""
    if target.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target.device)


def peak_memory(target: Target) -> int:
    """Peak memory in bytes: on a GPU allocated since `forget_peak`, on a CPU resident since the
    process started. A decoder in another process reports its own (`peak_memory`)."""
    if target.device.type == "cuda":
        return torch.cuda.max_memory_allocated(target.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

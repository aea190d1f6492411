"""Closed and open loops of requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.serving.client import Question, Server, Timing
from eval.serving.settings import Load

Finished = Callable[[], None]


@dataclass(frozen=True)
class Run:
    """All answers of one point of a sweep, in the order of the requests, and its seconds from the
    first request to the last answer.
    """

    timings: Sequence[Timing]
    seconds: float

    @property
    def whole(self) -> list[Timing]:
        """The answers that arrived."""
        return [timing for timing in self.timings if not timing.trouble]


async def run_load(
    server: Server,
    questions: Sequence[Question],
    load: Load,
    seed: int = 0,
    finished: Finished = lambda: None,
) -> Run:
    """Send all questions under a load. `finished` is called after each answer."""
    begin = time.perf_counter()
    if load.rate is None:
        assert load.concurrency is not None
        timings = await _closed(server, questions, load.concurrency, finished)
    else:
        timings = await _open(server, questions, load.rate, seed, finished)
    return Run(timings, time.perf_counter() - begin)


async def _closed(
    server: Server, questions: Sequence[Question], concurrency: int, finished: Finished
) -> list[Timing]:
    timings: dict[int, Timing] = {}
    waiting = iter(enumerate(questions))

    async def work() -> None:
        # The iterator is shared: a worker whose answer is whole takes the next question.
        for number, question in waiting:
            timings[number] = await server.ask(question)
            finished()

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(questions)))))
    return [timings[number] for number in range(len(questions))]


async def _open(
    server: Server, questions: Sequence[Question], rate: float, seed: int, finished: Finished
) -> list[Timing]:
    async def one(question: Question, after: float) -> Timing:
        await asyncio.sleep(max(0.0, begin + after - time.perf_counter()))
        timing = await server.ask(question)
        finished()
        return timing

    times = arrivals(len(questions), rate, seed)
    begin = time.perf_counter()
    return list(await asyncio.gather(*(one(*each) for each in zip(questions, times, strict=True))))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` a second, from its first arrival, at 0."""
    chance, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += chance.expovariate(rate)
    return times

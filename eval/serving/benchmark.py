"""A load test: every load on every server, and the report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from checkpoints.reports import SCHEMA
from configs.command_line.redaction import redact
from eval.report.markdown import environment
from eval.serving.client import Question, Server, served_model
from eval.serving.load import Run, run_load
from eval.serving.measurement import Point, row_of
from eval.serving.server_metrics import acceptance, scrape
from eval.serving.settings import Load, Serving
from eval.tasks.tasks import Task
from modules.contracts.sampling import Sampling

SERVED, PLAIN = "served", "autoregressive"
"""Names of the rows: of the server at `--url`, and of the one without a drafter."""
_LEAST = 4
"""Requests for each one in flight."""


def measure(
    url: str,
    serving: Serving,
    tasks: Sequence[Task],
    sampling: Sampling,
    limit: int,
    extra: Mapping[str, Any] | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> tuple[list[dict[str, Any]], str]:
    """Rows of the report, and the model's name.

    Args:
        url: of the server, up to `/v1`.
        serving: the loads.
        tasks: whose first questions are asked.
        sampling: how tokens are chosen.
        limit: tokens of an answer.
        extra: fields of every request besides OpenAI's.
        show: called with a line after each load.

    Raises:
        ValueError: a server that cannot be reached, lists another model, or answers nothing.
    """
    return asyncio.run(_measure(url, serving, tasks, sampling, limit, dict(extra or {}), show))


async def _measure(
    url: str,
    serving: Serving,
    tasks: Sequence[Task],
    sampling: Sampling,
    limit: int,
    extra: dict[str, Any],
    show: Callable[[str], None],
) -> tuple[list[dict[str, Any]], str]:
    from openai import AsyncOpenAI

    # 1. The servers, plain decoding first, and their models.
    urls = {} if serving.baseline_url is None else {PLAIN: serving.baseline_url}
    urls[SERVED] = url
    if serving.ignore_eos:
        extra = {**extra, "ignore_eos": True}
    async with AsyncExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, address in urls.items():
            client = await stack.enter_async_context(
                AsyncOpenAI(
                    base_url=address, api_key=serving.key, timeout=serving.timeout, max_retries=0
                )
            )
            model = await served_model(client, serving.model, address)
            servers[name] = Server(client, model, sampling, limit, extra)
        # 2. Every load on all servers, in turn, so that drift affects them alike.
        every = [prompt for task in tasks for prompt in task.prompts]
        rows: list[dict[str, Any]] = []
        for number, load in enumerate(serving.loads):
            questions = questions_of(every, serving, load, sampling.seed)
            order = list(servers) if number % 2 == 0 else list(reversed(servers))
            points = {
                name: await _point(name, urls[name], servers[name], questions, load, serving, show)
                for name in order
            }
            plain = points.get(PLAIN)
            rows += [row_of(points[name], plain, servers[name].model, sampling) for name in servers]
    return rows, servers[SERVED].model


def questions_of(prompts: Sequence[Any], serving: Serving, load: Load, seed: int) -> list[Question]:
    """The questions of a load: prompts in order, and again from the first where they do not
    suffice; each round has its own ids.
    """
    count = serving.requests or max(len(prompts), _LEAST * (load.concurrency or 1))
    chosen = []
    for number in range(count):
        prompt, again = prompts[number % len(prompts)], number // len(prompts)
        name = f"{prompt.id} again {again}" if again else prompt.id
        said = prompt.turns[0], seed + number, prompt.system, prompt.tools, prompt.template
        chosen.append(Question(name, prompt.task, *said))
    return chosen


async def _point(
    name: str,
    url: str,
    server: Server,
    questions: Sequence[Question],
    load: Load,
    serving: Serving,
    show: Callable[[str], None],
) -> Point:
    """One load on one server, after its warm-up.

    Raises ValueError where no request is answered.
    """
    for question in questions[: serving.warm_up]:
        await server.ask(question)
    before = await asyncio.to_thread(scrape, url)
    run = await run_load(server, questions, load, server.sampling.seed)
    after = await asyncio.to_thread(scrape, url)
    if not run.whole:
        raise ValueError(
            f"url {url}: none of {len(run.timings)} requests was answered: {run.timings[0].trouble}"
        )
    show(_line(name, load, run))
    return Point(name, load, run, acceptance(before, after))


def _line(name: str, load: Load, run: Run) -> str:
    rate = sum(timing.tokens for timing in run.whole) / run.seconds
    failed = len(run.timings) - len(run.whole)
    reason = next((timing.trouble for timing in run.timings if timing.trouble), "")
    missing = f", {failed} failed: {reason}" if failed else ""
    return f"{name}{load.suffix}: {rate:.1f} tokens/s{missing}"


def report_of(
    rows: Sequence[Mapping[str, Any]], model: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The report of a load test, of the schema of every report. Size, dtype and weights of the
    target are not known to a client.
    """
    target = {"name": model, "parameters": 0, "dtype": "served", "fingerprint": "unknown"}
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "targets": [target],
        "settings": redact(dict(settings)),
        "methods": [dict(row) for row in rows],
    }

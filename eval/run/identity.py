"""The header of a journal: everything that a resumed evaluation must have in common with it.

It holds digests, by name, of everything that determines a record, so that a refusal can name what
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from checkpoints.provenance import package_versions
from eval.methods.digests import digest, plain
from eval.methods.rows import Method, Row
from eval.run.harness import render
from eval.tasks.tasks import Task

FORMAT = 2
"""Version of the journal's format; version 1 had no digests."""


def questions(tasks: Sequence[Task]) -> dict[str, str]:
    """A digest of every prompt by its id: its text, its check, and its place, which determines its
    seed and batch."""
    prompts = [prompt for task in tasks for prompt in task.prompts]
    return {prompt.id: digest([place, asdict(prompt)]) for place, prompt in enumerate(prompts)}


def known_before(
    settings: Mapping[str, Any], methods: Sequence[Method], tasks: Sequence[Task], device: str
) -> dict[str, Any]:
    """The part of a header that needs neither the target nor a drafter.

    Args:
        settings: of the evaluation, as in the report.
        methods: its rows.
        tasks: all prompts.
        device: name of the device.
    """
    named = {method.label: asdict(method) for method in methods}
    return plain(
        {
            "format": FORMAT,
            **settings,
            "device": device,
            "packages": package_versions(),
            "method": named,
            "prompt": questions(tasks),
        }
    )


def known_loaded(rows: Sequence[Row], tasks: Sequence[Task]) -> dict[str, Any]:
    """The rest of a header: the loaded rows, and the prompts as the chat template renders them."""
    rendered = [render(prompt, [], rows[0].target) for task in tasks for prompt in task.prompts]
    parts: dict[int, str] = {}
    identities = {row.name: identify(row, parts) for row in rows}
    return plain({"row": identities, "rendered_prompts": digest(rendered)})


def identify(row: Row, parts: dict[int, str] | None = None) -> dict[str, Any]:
    """The identity of a row: its settings, and digests of everything that it decodes with.

    `parts` caches digests by object id: rows at other temperatures and batch sizes share parts.
    """
    # Weights are digested once, however many rows share them.
    target, parts = row.target, {} if parts is None else parts
    for _, part in _parts(row):
        if id(part) not in parts:
            parts[id(part)] = digest(part)
    return {
        "target": target.fingerprint(),
        "dtype": str(target.dtype),
        "ends": sorted(target.eos_ids),
        "engine": row.engine,
        "rule": row.rule,
        "builder": row.builder,
        "budget": row.budget,
        "sampling": asdict(replace(row.sampling, constraint=None)),
        "constraint": digest(row.sampling.constraint),
        "batch_size": row.batch_size,
        **{name: parts[id(part)] for name, part in _parts(row)},
    }


def _parts(row: Row) -> Iterator[tuple[str, Any]]:
    """A decoder's drafter, assistant, rule, … by name: all its parts with a state, except the
    target."""
    for name, part in sorted(vars(row.decoder).items()):
        if part is not row.target and not name.startswith("_") and hasattr(part, "__dict__"):
            yield name, part

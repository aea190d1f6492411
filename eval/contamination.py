"""Whether what is asked occurs in what a drafter was trained on: runs of 13 words, as its provenance names the data.

Thirteen words are what Brown et al. 2020 (arXiv 2005.14165, appendix C) count as contamination. Case and punctuation
do not matter; a turn of fewer words has no such run and is counted apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.pretrained import PROVENANCE, find_folder
from data.conversations import local_file, read_rows
from eval.methods import Method, Row
from eval.tasks import Prompt, Task

RUN = 13
KEY = "training_overlap"
"""Of a method's `quality` in the report."""
_WORD = re.compile(r"\w+")
_SHOWN = 5


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of `RUN` words."""
    words = _WORD.findall(text.lower())
    return (tuple(words[i:i + RUN]) for i in range(len(words) - RUN + 1))


def overlapping(prompts: Iterable[Prompt], texts: Iterable[str]) -> tuple[list[str], int]:
    """Ids of the prompts that share a run with the texts, and how many prompts are too short to share one."""
    owners: dict[tuple[str, ...], set[str]] = {}
    short = 0
    for prompt in prompts:
        own = {run for turn in prompt.turns for run in runs(turn)}
        short += not own
        for run in own:
            owners.setdefault(run, set()).add(prompt.id)
    found: set[str] = set()
    for text in texts:
        found.update(*(owners[run] for run in runs(text) if run in owners))
    return sorted(found), short


def texts_of(value: Any) -> Iterator[str]:
    """Every string in a row of data, whatever its shape."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_of(part)


def training_overlap(drafter: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """What a report says of a trained drafter: its `data`, and `prompts`, `found` (ids), `short`, or why `skipped`.

    Args:
        drafter: run folder, drafter folder or Hub id.
        tasks: what is asked.
    """
    file = find_folder(drafter) / PROVENANCE
    provenance = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    source = provenance.get("data", {}).get("train")
    if not isinstance(source, str):
        return {"data": None, "skipped": "its provenance names no data"}
    try:
        if local_file(source) is None:
            return {"data": source, "skipped": "a data set on the Hub is not read for this"}
    except ValueError:
        return {"data": Path(source).name, "skipped": "the data file is not here"}
    prompts = [prompt for task in tasks for prompt in task.prompts]
    found, short = overlapping(prompts, (text for row in read_rows(source) for text in texts_of(row)))
    return {"data": Path(source).name, "prompts": len(prompts), "found": found, "short": short}


def note_overlaps(rows: Sequence[Row], methods: Sequence[Method], tasks: Sequence[Task]) -> None:
    """Put `training_overlap` into the `quality` of every row whose drafter was trained; one look per drafter."""
    sources = {method.label: method.drafter for method in methods if isinstance(method.drafter, str)}
    known = {drafter: training_overlap(drafter, tasks) for drafter in dict.fromkeys(sources.values())}
    for row in (row for row in rows if row.name in sources):
        row.quality = {**row.quality, KEY: known[sources[row.name]]}


def overlap_lines(methods: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per method whose drafter was trained."""
    return [f"training data of {method['name']}{_said(method['quality'][KEY])}"
            for method in methods if KEY in method["quality"]]


def _said(overlap: Mapping[str, Any]) -> str:
    named = f" ({overlap['data']})" if overlap["data"] else ""
    if "skipped" in overlap:
        return f"{named}: not searched for the prompts, {overlap['skipped']}"
    found, short = overlap["found"], overlap["short"]
    shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
    return (f"{named}: {len(found)} of {overlap['prompts']} prompts share {RUN} words in a row with it"
            f"{f' ({shown})' if found else ''}{f'; {short} are too short to' if short else ''}")

"""Whether prompts occur in a method's data: common runs of 13 words with the training data of its
drafter, partner, assistant and rule, as recorded in their provenance, and with the data sets of its
datastores.

Brown et al. 2020 (arXiv 2005.14165, appendix C) count thirteen words as contamination. Case and
punctuation do not matter; a turn of fewer words has no such run and is counted separately.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from checkpoints.pretrained import PROVENANCE, find_folder
from data.reading.files import Tally, local_files, read_rows
from eval.methods.rows import Method, Row
from eval.tasks.tasks import Prompt, Task
from modules.acceptance.rules import RULES
from modules.contracts.drafter import Drafter, Part
from modules.decoding.decoder import Composite, Decoder
from modules.runtime.files import read_object

RUN = 13
DATASTORE = "datastore.json"
KEY = "training_overlap"
"""Of a method's `quality` in the report."""
_WORD = re.compile(r"\w+")
_SHOWN = 5


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of `RUN` words."""
    words = _WORD.findall(text.lower())
    return (tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))


def overlapping(prompts: Iterable[Prompt], texts: Iterable[str]) -> tuple[list[str], int]:
    """Ids of the prompts that share a run with the texts, and how many prompts are too short to
    share one.
    """
    owners: dict[tuple[str, ...], set[str]] = {}
    short = 0
    for prompt in prompts:
        prompt_runs = {run for turn in prompt.turns for run in runs(turn)}
        short += not prompt_runs
        for run in prompt_runs:
            owners.setdefault(run, set()).add(prompt.id)
    overlaps: set[str] = set()
    for text in texts:
        overlaps.update(*(owners[run] for run in runs(text) if run in owners))
    return sorted(overlaps), short


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


def training_overlap(component: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The report's entry of a trained component: its `data`, and `prompts`, `found` (ids), `short`,
    or why `skipped`.

    Args:
        component: run folder, its component's folder or Hub id.
        tasks: all prompts.
    """
    file = find_folder(component) / PROVENANCE
    provenance = read_object(file) if file.is_file() else {}
    data = provenance.get("data")
    return _searched(
        data.get("train") if isinstance(data, dict) else None, "its provenance names no data", tasks
    )


def datastore_overlap(folder: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The same for a datastore: the overlap with the data set that it names as its source."""
    description = read_object(Path(folder) / DATASTORE)
    return _searched(
        description.get("source"), "its datastore does not name what it was built from", tasks
    )


def _searched(source: object, unnamed: str, tasks: Sequence[Task]) -> dict[str, Any]:
    # Only local files are searched.
    if not isinstance(source, str):
        return {"data": None, "skipped": unnamed}
    try:
        if local_files(source) is None:
            return {"data": source, "skipped": "a data set on the Hub is not read for this"}
    except ValueError:
        return {"data": Path(source).name, "skipped": "the data file is not here"}
    # Every string of every row, whatever its key.
    prompts = [prompt for task in tasks for prompt in task.prompts]
    overlaps, short = overlapping(
        prompts,
        (text for row in read_rows(source, tally=Tally()) for text in texts_of(row.content)),
    )
    return {"data": Path(source).name, "prompts": len(prompts), "found": overlaps, "short": short}


Known = tuple[Literal["trained", "datastore"], str]
"""A part of a method that may contain the prompts: its kind, and its folder or Hub id."""


def known_to(method: Method, decoder: Decoder) -> list[Known]:
    """All parts of a method that were made from data: drafter, its parts, assistant, rule,
    datastores.
    """
    parts = decoder.parts() if isinstance(decoder, Composite) else {}
    sources = [*_trained(method.drafter), *_known_in(parts), *_trained(_rule_of(method))]
    return list(dict.fromkeys(sources))


def _trained(named: object) -> list[Known]:
    return [("trained", named)] if isinstance(named, str) else []


def _rule_of(method: Method) -> str | None:
    named = method.rule.get("trained") if isinstance(method.rule, Mapping) else method.rule
    return None if named in RULES else named


def _known_in(parts: Mapping[str, Part]) -> Iterator[Known]:
    for part in parts.values():
        if isinstance(part, Drafter):
            if part.loaded_from is not None:
                yield "trained", part.loaded_from
            yield from _known_in(part.parts())
        else:
            yield "datastore" if (part / DATASTORE).is_file() else "trained", str(part)


def note_overlaps(rows: Sequence[Row], methods: Sequence[Method], tasks: Sequence[Task]) -> None:
    """Write overlaps into the `quality` of every row that was made from data. Every component is
    searched once; several of one method are reported together."""
    # 1. Components of each method, that were made from data.
    decoders = {row.name: row.decoder for row in rows}
    sources = {
        method.label: parts
        for method in methods
        if method.label in decoders and (parts := known_to(method, decoders[method.label]))
    }
    # 2. Search each of them once.
    overlaps = {
        part: (training_overlap if part[0] == "trained" else datastore_overlap)(part[1], tasks)
        for part in dict.fromkeys(itertools.chain.from_iterable(sources.values()))
    }
    # 3. Report them by row.
    for row in (row for row in rows if row.name in sources):
        row.quality = {
            **row.quality,
            KEY: together([overlaps[part] for part in sources[row.name]]),
        }


def together(overlaps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge overlaps: prompts found in any component, and the reasons of those not searched."""
    if len(overlaps) == 1:
        return dict(overlaps[0])
    # Names and reasons of all components, prompts of those that were searched.
    data = (
        ", ".join(dict.fromkeys(overlap["data"] for overlap in overlaps if overlap["data"])) or None
    )
    skipped = "; ".join(
        dict.fromkeys(overlap["skipped"] for overlap in overlaps if "skipped" in overlap)
    )
    searched = [overlap for overlap in overlaps if "skipped" not in overlap]
    if not searched:
        return {"data": data, "skipped": skipped}
    prompt_ids = sorted({prompt for overlap in searched for prompt in overlap["found"]})
    whole = {
        "data": data,
        "prompts": searched[0]["prompts"],
        "found": prompt_ids,
        "short": searched[0]["short"],
    }
    return {**whole, "unsearched": skipped} if skipped else whole


def overlap_lines(methods: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per method that was made from data."""
    return [
        f"training data of {method['name']}{_said(method['quality'][KEY])}"
        for method in methods
        if KEY in method["quality"]
    ]


def _said(overlap: Mapping[str, Any]) -> str:
    named = f" ({overlap['data']})" if overlap["data"] else ""
    if "skipped" in overlap:
        return f"{named}: not searched for the prompts, {overlap['skipped']}"
    # At most a few prompts by name.
    prompt_ids, short, unsearched = overlap["found"], overlap["short"], overlap.get("unsearched")
    shown = ", ".join(prompt_ids[:_SHOWN]) + (", …" if len(prompt_ids) > _SHOWN else "")
    too_short = f"; {short} {'is' if short == 1 else 'are'} too short for that" if short else ""
    return (
        f"{named}: {len(prompt_ids)} of {overlap['prompts']} prompts share {RUN} words in a row "
        f"with it{f' ({shown})' if prompt_ids else ''}{too_short}"
        f"{f'; not all was searched, {unsearched}' if unsearched else ''}"
    )

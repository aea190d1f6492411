"""The folder of an evaluation: who may write there, its journal, its reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from configs.command_line.outputs import claimed, write_whole
from eval.report.html import Sample, page
from eval.report.markdown import markdown
from eval.run.journal import Journal, set_aside, written_journals
from eval.run.processes import Share

JOURNAL = "journal.jsonl"
PAGE = "report.html"
REPORTS = ("report.json", "report.md", PAGE)


@contextmanager
def taken(output: Path, may_be_there: bool, share: Share) -> Iterator[None]:
    """Keep an output for this evaluation while the block lasts; the first process does so for all.

    Raises:
        ValueError: in all of them, if another run is writing there, nothing can be written there,
            or an evaluation is there and must not be.
    """
    with ExitStack() as stack:
        refusal = None
        if share.first:
            try:
                stack.enter_context(claimed(output))
                _refuse_occupied(output, may_be_there)
            except ValueError as error:
                refusal = str(error)
        refusal = share.agreed(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield


def _refuse_occupied(output: Path, may_be_there: bool) -> None:
    """ValueError for an evaluation that must not be there, or folders where its files belong."""
    for name in (JOURNAL, *REPORTS):
        if (output / name).is_dir():
            raise ValueError(
                f"output {str(output)!r} cannot be written ({name} is a folder): give "
                "another --output"
            )
    existing = written_journals(output / JOURNAL)
    existing += [output / name for name in REPORTS if (output / name).exists()]
    if existing and not may_be_there:
        raise ValueError(
            f"output {str(output)!r} already holds an evaluation ({existing[0].name}): add "
            "--resume, --overwrite, or give another --output"
        )


def begun(journal: Path, header: Mapping[str, Any], resume: bool, share: Share) -> Journal:
    """This process's journal.

    Unless an evaluation is resumed, what is there of an earlier one is taken away first: its
    reports, which would stand beside a journal that is not theirs, and journals of other numbers
    of processes.
    """
    if share.first and not resume:
        for name in REPORTS:
            (journal.parent / name).unlink(missing_ok=True)
        for earlier in written_journals(journal.parent / JOURNAL):
            set_aside(earlier)
    # The others wait until that is done.
    share.agreed(None)
    return Journal(journal, header, resume)


def write(report: Mapping[str, Any], output: Path, sample: Sample | None) -> None:
    """The three files of a report, all or none."""
    texts = json.dumps(report, indent=1) + "\n", markdown(report), page(report, sample)
    write_whole({output / name: text for name, text in zip(REPORTS, texts, strict=True)})

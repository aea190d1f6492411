"""The folder of an evaluation: its lock, journal and reports."""

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
    """Lock an output folder inside the `with` block; the first process does so for all.

    Raises:
        ValueError: in every process, if another run writes there, the folder cannot be written, or
            it holds an evaluation although `may_be_there` is false.
    """
    with ExitStack() as stack:
        # The first process locks; the others learn whether it could.
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
    """Raise ValueError for an existing evaluation, or for folders in place of its files."""
    # A folder in the place of a file cannot be replaced.
    for name in (JOURNAL, *REPORTS):
        if (output / name).is_dir():
            raise ValueError(
                f"output {str(output)!r} cannot be written ({name} is a folder): give "
                "another --output"
            )
    # An earlier evaluation needs a flag.
    existing = written_journals(output / JOURNAL)
    existing += [output / name for name in REPORTS if (output / name).exists()]
    if existing and not may_be_there:
        raise ValueError(
            f"output {str(output)!r} already holds an evaluation ({existing[0].name}): add "
            "--resume, --overwrite, or give another --output"
        )


def begun(journal: Path, header: Mapping[str, Any], resume: bool, share: Share) -> Journal:
    """This process's journal.

    Unless an evaluation is resumed, an earlier one is cleared first: its reports are deleted, and
    its journals, also those of other numbers of processes, are renamed.
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
    """Write the three files of a report, all or none."""
    texts = json.dumps(report, indent=1) + "\n", markdown(report), page(report, sample)
    write_whole({output / name: text for name, text in zip(REPORTS, texts, strict=True)})

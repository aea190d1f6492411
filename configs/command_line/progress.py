"""Progress of long work: a bar on a terminal, elsewhere a line every `EVERY` seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0
"""Seconds between two lines."""
Advance = Callable[[int], None]


@contextmanager
def progress_of(
    what: str,
    unit: str,
    done: int,
    total: int,
    visible: bool = True,
    console: Console | None = None,
) -> Iterator[Advance]:
    """A context with a function that advances the progress by a count.

    Args:
        what: name of the work.
        unit: plural of the counted things.
        done, total: counts at the start.
        visible: whether anything is shown.
        console: where; by default the standard output.
    """
    console = console or Console()
    if visible and not console.is_terminal:
        yield _lines(what, unit, done, total, console)
        return
    # On a terminal, or invisible.
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not visible) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _lines(what: str, unit: str, done: int, total: int, console: Console) -> Advance:
    """Print the count and the remaining time at the speed so far, every `EVERY` seconds and at the
    end."""
    begun = last_line = time.monotonic()
    began_at = done

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        if now - last_line < EVERY and done < total:
            return
        last_line = now
        # The remaining time at the mean speed since the start.
        left = timedelta(seconds=round((now - begun) / (done - began_at) * (total - done)))
        line = f"{what}: {done} of {total} {unit}" + (
            f", about {left} left" if done < total else ""
        )
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return advance


def quieten() -> None:
    """Keep the libraries' own progress bars and advice out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

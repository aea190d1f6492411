"""How far long work has come: a bar on a terminal, elsewhere a line every so many seconds."""

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
    what: str, unit: str, done: int, total: int, visible: bool = True
) -> Iterator[Advance]:
    """Gives a function that takes how many more are done.

    Args:
        what: is being done.
        unit: what is counted.
        done, total: counts at the beginning.
        visible: whether anything is shown.
    """
    console = Console()
    if visible and not console.is_terminal:
        yield _lines(what, unit, done, total, console)
        return
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
    """Tells the count, and how long the rest takes at the speed so far, every `EVERY` seconds and
    at the end."""
    begun = last_line = time.monotonic()
    began_at = done

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        if now - last_line < EVERY and done < total:
            return
        last_line = now
        left = timedelta(seconds=round((now - begun) / (done - began_at) * (total - done)))
        line = f"{what}: {done} of {total} {unit}" + (
            f", about {left} left" if done < total else ""
        )
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return advance

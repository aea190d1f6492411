"""One evaluation split over several processes or GPUs, as `torchrun` starts them, with one report.

    torchrun --nproc_per_node 4 eval.py --config eval/spec_bench.yaml --drafters runs/clover

Every process measures all rows on its share of the prompts, so that all rows of a prompt run on the
same device; the first process merges the records in the order of a single process. Everything that
determines tokens (the prompts of a batch, their seeds, the budgets) is independent of the number of
processes. Drafters that learn from prompt to prompt only see the prompts of their process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from eval.run.journal import written_journals

Item = TypeVar("Item")
_PATIENCE = timedelta(days=7)
"""Timeout of collectives: shares take unequal time, and all wait for the last process."""


@dataclass(frozen=True)
class Share:
    """Which part of an evaluation this process does: its `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the report and prints."""
        return self.rank == 0

    def of(self, work: Sequence[Item]) -> list[Item]:
        """This process's part of the work: every `count`-th piece."""
        return list(work[self.rank :: self.count])

    def journal(self, path: Path, resume: bool) -> Path:
        """The path of this process's journal.

        Raises:
            ValueError: the evaluation to resume ran with another number of processes.
        """
        mine = (
            path
            if self.count == 1
            else path.with_name(f"{path.stem}.{self.rank}of{self.count}{path.suffix}")
        )
        others = written_journals(path)
        if resume and others and not mine.is_file():
            raise ValueError(
                f"--resume: {others[0]} was written by another number of processes than "
                f"{self.count}: start as many as then, or add --overwrite instead of --resume"
            )
        return mine

    def merged(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """All processes' entries together, in every process."""
        if self.count == 1:
            return dict(parts)
        gathered: list[dict[str, Any]] = [{} for _ in range(self.count)]
        distributed.all_gather_object(gathered, dict(parts))
        return {key: value for part in gathered for key, value in part.items()}

    def agreed(self, value: Item) -> Item:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        held: list[Any] = [value]
        distributed.broadcast_object_list(held, src=0)
        return held[0]


@contextmanager
def shared_out() -> Iterator[Share]:
    """This process's share, from the environment variables of `torchrun`; without them the whole
    evaluation.

    Raises:
        ValueError: only some of the variables are set.
    """
    # One process needs no group.
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Share()
        return
    # An incomplete environment would hang in `init_process_group`.
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE {count} is set without {missing[0]}: start several processes with "
            f"`torchrun --nproc_per_node {count} eval.py …`, or unset WORLD_SIZE"
        )
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Share(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()

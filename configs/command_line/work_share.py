"""How several processes divide work that each piece of needs no other: by a hash, so that nobody
has to ask.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Where torchrun and SLURM say which process this is, and of how many."""


@dataclass(frozen=True)
class Share:
    """The part of the work that falls to process `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str, key: str) -> Share:
        """`I/N`, I from 0 to N - 1. ValueError names the key."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(f"{key} must be I/N with I from 0 to N - 1, got {text!r}")
        return Share(int(found[1]), int(found[2]))

    @staticmethod
    def of_process(environment: Mapping[str, str] = os.environ) -> Share:
        """This process's, where torchrun or SLURM started it; everything otherwise."""
        for rank, world in _RANKS:
            if rank in environment and world in environment:
                return Share(int(environment[rank]), int(environment[world]))
        return Share()

    def takes(self, key: str) -> bool:
        """Whether a piece with this hexadecimal hash falls to it. Every piece falls to exactly one
        share.
        """
        return int(key[:12], 16) % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"

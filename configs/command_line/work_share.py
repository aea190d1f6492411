"""Division of independent work among processes, by a hash, so that they need not communicate."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Environment variables of torchrun and SLURM with the rank and the number of processes."""


@dataclass(frozen=True)
class Share:
    """The part of the work of process `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str, key: str) -> Share:
        """The share `I/N`, with I from 0 to N - 1. Raises ValueError that names the key."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"{key} must be I/N with I from 0 to N - 1, got {text!r}")
        return Share(int(match[1]), int(match[2]))

    @staticmethod
    def of_process(environment: Mapping[str, str] = os.environ) -> Share:
        """This process's share if torchrun or SLURM started it, else all of the work."""
        for rank, world in _RANKS:
            if rank in environment and world in environment:
                return Share(int(environment[rank]), int(environment[world]))
        return Share()

    def takes(self, key: str) -> bool:
        """Whether a piece with this hexadecimal hash is in the share. Every piece is in exactly one
        share.
        """
        return int(key[:12], 16) % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"

"""The sections of a recipe of `python -m train.online`. Every field is a key and a flag."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from modules.contracts.sampling import Sampling
from train.settings import MOST_NODES

EMBEDDED = "embedded"
ONLY, ONLINE = "drafter", "online"
"""Name of a single drafter, and of the folder of states."""


@dataclass
class StreamSettings:
    """Where requests come from.

    Args:
        requests: .jsonl, .json or .parquet file of prompts or chats, answered once in their order;
            `embedded` are the prompts of this project.
        limit: of its first rows; null for all.
    """

    requests: str = EMBEDDED
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a limit without requests."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"stream.limit must be at least 1 or null, got {self.limit}")


@dataclass
class DecodingSettings:
    """How requests are answered. Verification is lossless.

    Args:
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        sample_top_k: tokens that are sampled from (0: all).
        top_p: nucleus.
        builder: tree builder {class_path, init_args}; null is the drafter's own.
        budget: drafted nodes per call; null is the drafter's own.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    sample_top_k: int = 0
    top_p: float = 1.0
    builder: dict[str, Any] | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        if self.max_new_tokens < 1:
            raise ValueError(
                f"decoding.max_new_tokens must be at least 1, got {self.max_new_tokens}"
            )
        if self.budget is not None and not 1 <= self.budget <= MOST_NODES:
            raise ValueError(
                f"decoding.budget must lie between 1 and {MOST_NODES}, got {self.budget}"
            )
        self.sampling(0)

    def sampling(self, seed: int) -> Sampling:
        """The settings of one answer."""
        return Sampling(self.temperature, self.sample_top_k, self.top_p, seed)


@dataclass
class LearningSettings:
    """When and how the drafter learns: AdamW at a constant rate.

    Args:
        interval: requests per update; 0 never updates (the curve of the drafter as it is).
        lr: learning rate. The paper's: 1e-4 with an interval of 8, 1e-5 with 1 for real chats.
        weight_decay: on matrices.
        gradient_clip_val: largest gradient norm (0: no clipping); inferred.
        positions: `wrong` learns the tokens that replaced a rejected draft, `all` every token of
            the answers. Drafters of several steps learn a later step only where its first token
            counts too, so `all` suits them better.
        bonus: whether `wrong` includes tokens after a whole accepted draft, as the release does.
        top_k: probabilities of the target that are stored per position; null stores all. (The
            release computes them a second time.)
        remainder: what they lack: `spread` evenly over all other tokens, or `drop` (the stored ones
            are scaled to a sum of 1). Both inferred.
        replay: earlier requests, drawn at random, in every update beside the new ones.
        capacity: of the earlier requests that replay draws from, the newest.
        save_every: updates between two saved states; a resumed run repeats those since then.
    """

    interval: int = 8
    lr: float = 1e-4
    weight_decay: float = 0.0
    gradient_clip_val: float = 1.0
    positions: Literal["wrong", "all"] = "wrong"
    bonus: bool = True
    top_k: int | None = 64
    remainder: Literal["spread", "drop"] = "spread"
    replay: int = 0
    capacity: int = 256
    save_every: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        # 1. Counts.
        least = {"interval": 0, "replay": 0, "capacity": 1, "save_every": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"learning.{name} must be at least {lowest}, got {getattr(self, name)}"
                )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"learning.top_k must be at least 1 or null, got {self.top_k}")
        if self.replay > self.capacity:
            raise ValueError(
                f"learning.replay is {self.replay}, but learning.capacity {self.capacity}: raise it"
            )
        # 2. Numbers of the optimiser.
        if not 0 < self.lr < math.inf:
            raise ValueError(f"learning.lr must be above 0 and finite, got {self.lr}")
        for name in ("weight_decay", "gradient_clip_val"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"learning.{name} must be at least 0 and finite, got {getattr(self, name)}"
                )


@dataclass
class RoutingSettings:
    """Several drafters, each of which learns from the requests that it serves.

    Args:
        drafters: their names; empty for a single one.
        label: key of a request's labels that names its drafter (of a row of the stream's file, or
            of `metadata` at the endpoint). The first drafter serves requests without such a label.
        classifier: instead of the label, a Hugging Face model for sequence classification (Hub id
            or folder) whose labels are the names, such as a topic or a language classifier.
    """

    drafters: list[str] = field(default_factory=list)
    label: str = "topic"
    classifier: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for names that are no folders, or a classifier without any."""
        for name in self.drafters:
            if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name == ONLINE:
                raise ValueError(
                    f"routing.drafters must be names of letters, digits, _ and -, other than "
                    f"{ONLINE}, got {name!r}"
                )
        if len(set(self.drafters)) < len(self.drafters):
            raise ValueError(f"routing.drafters names one twice: {', '.join(self.drafters)}")
        if self.classifier is not None and not self.drafters:
            raise ValueError("routing.classifier is set, but routing.drafters names none")

    @property
    def names(self) -> list[str]:
        """Names of all drafters."""
        return self.drafters or [ONLY]


@dataclass
class ServerSettings:
    """An OpenAI-compatible endpoint instead of a file of requests.

    Args:
        port: null serves the stream of the file.
        host: address that it listens on. There is no authentication.
        waiting: connections at a time; further ones are refused (status 503).
    """

    port: int | None = None
    host: str = "127.0.0.1"
    waiting: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError for numbers out of range."""
        if self.port is not None and not 0 < self.port < 1 << 16:
            raise ValueError(f"server.port must lie between 1 and 65535, got {self.port}")
        if self.waiting < 1:
            raise ValueError(f"server.waiting must be at least 1, got {self.waiting}")

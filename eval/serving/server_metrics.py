"""What a server says about its drafts at `/metrics`, in Prometheus' text format.

vLLM counts (`vllm:spec_decode_num_drafts_total`, `…_draft_tokens_total`, `…_accepted_tokens_total`,
`…_accepted_tokens_per_pos_total`); this project's endpoint has the same counters. SGLang has a
gauge of the last interval (`sglang:spec_accept_length`, the bonus token counted).
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SECONDS = 10.0
_LONGEST = 16 * 2**20
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([-+.\deE]+|NaN|[-+]?Inf)(?:\s+\d+)?$")
_POSITION = re.compile(r'position="(\d+)"')
_COUNTER = re.compile(r"\w+:spec_decode_num_(\w+?)(?:_total)?")
_LENGTH = re.compile(r"\w+:(?:spec_)?accept_length")


@dataclass(frozen=True)
class Counts:
    """Counters of speculative decoding since the server's start.

    numbers: `drafts` (calls that drafted), `draft_tokens`, `accepted_tokens`. by_position: accepted
    drafts by position in the chain. length: SGLang's mean tokens of a call.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    by_position: Mapping[int, float] = field(default_factory=dict)
    length: float | None = None


def read_counts(text: str) -> Counts | None:
    """The counters of a page; None where it has none of speculation. Engines are added up."""
    numbers: dict[str, float] = {}
    positions: dict[int, float] = {}
    lengths: list[float] = []
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        counter = _COUNTER.fullmatch(name)
        if counter is not None and counter[1] == "accepted_tokens_per_pos":
            place = _POSITION.search(labels)
            if place is not None:
                positions[int(place[1])] = positions.get(int(place[1]), 0.0) + value
        elif counter is not None:
            numbers[counter[1]] = numbers.get(counter[1], 0.0) + value
        elif _LENGTH.fullmatch(name) and value > 0:
            lengths.append(value)
    if not numbers and not lengths:
        return None
    return Counts(numbers, positions, sum(lengths) / len(lengths) if lengths else None)


def page_of(url: str) -> str:
    """The address of a server's metrics: beside its `/v1`."""
    return url.rstrip("/").removesuffix("/v1") + "/metrics"


def scrape(url: str) -> Counts | None:
    """The counters of a server now; None where it has no such page or no such counters."""
    try:
        with urllib.request.urlopen(page_of(url), timeout=_SECONDS) as answer:
            return read_counts(answer.read(_LONGEST).decode(errors="replace"))
    except (OSError, ValueError):
        return None


def acceptance(before: Counts | None, after: Counts | None) -> dict[str, Any] | None:
    """Figures of the drafts between two readings; None without drafts.

    tokens_per_call: 1 + accepted ÷ calls that drafted. by_depth: share of these calls that accepted
    the draft at each position.
    """
    if after is None:
        return None
    first = before or Counts()
    grown = {key: value - first.numbers.get(key, 0.0) for key, value in after.numbers.items()}
    calls, accepted = grown.get("drafts", 0.0), grown.get("accepted_tokens", 0.0)
    if calls > 0:
        depths = sorted(after.by_position)
        shares = [
            (after.by_position[depth] - first.by_position.get(depth, 0.0)) / calls
            for depth in depths
        ]
        return {
            "source": "counters",
            "drafted": int(grown.get("draft_tokens", 0)),
            "accepted": int(accepted),
            "tokens_per_call": 1 + accepted / calls,
            "by_depth": shares,
        }
    if after.length is None:
        return None
    return {"source": "gauge", "tokens_per_call": after.length, "by_depth": []}

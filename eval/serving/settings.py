"""What a load test asks of a server."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from configs.command_line.redaction import redacted

ENGINE = "openai"


@dataclass(frozen=True)
class Load:
    """One point of a sweep: so many requests in flight, or so many arriving a second.

    A closed loop keeps `concurrency` requests in flight. An open loop sends requests at the times
    of a Poisson process of `rate` requests a second, however many are in flight.
    """

    concurrency: int | None = None
    rate: float | None = None

    @property
    def suffix(self) -> str:
        """What distinguishes its rows' names."""
        if self.rate is not None:
            return f" at {self.rate:g} requests/s"
        return f", {self.concurrency} at once"


@dataclass(frozen=True)
class Serving:
    """The load test of `--engine openai`.

    Args:
        baseline_url: the same target served without a drafter, up to `/v1`; speedups are against
            it. Null: there is one server, and runs are compared by `--compare`.
        model: the server's name of the model; null is the first that it lists.
        concurrency: sweep of requests in flight.
        request_rate: sweep of arrivals, in requests a second.
        requests: of each point; null is every prompt, and at least four for each in flight (prompts
            repeat then).
        warm_up: requests to each server before it is measured.
        timeout: seconds for one answer.
        key_variable: environment variable with the key, if the server requires one.
        ignore_eos: let every answer have max_new_tokens tokens (vLLM and SGLang know this key).
    """

    baseline_url: str | None = None
    model: str | None = None
    concurrency: list[int] = field(default_factory=lambda: [1, 4, 16])
    request_rate: list[float] = field(default_factory=list)
    requests: int | None = None
    warm_up: int = 2
    timeout: float = 600.0
    key_variable: str = "OPENAI_API_KEY"
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for numbers out of range."""
        if not self.concurrency and not self.request_rate:
            raise ValueError(
                "serving.concurrency and serving.request_rate are both empty: give a number to one"
            )
        for name in ("concurrency", "request_rate"):
            values = getattr(self, name)
            if any(not 0 < value < math.inf for value in values) or len({*values}) < len(values):
                raise ValueError(f"serving.{name} {values} must hold numbers above 0, each once")
        if self.requests is not None and self.requests < 1:
            raise ValueError(f"serving.requests must be at least 1, got {self.requests}")
        if self.warm_up < 0 or not 0 < self.timeout < math.inf:
            raise ValueError(
                "serving.warm_up must be at least 0 and serving.timeout above 0, got "
                f"{self.warm_up} and {self.timeout}"
            )

    @property
    def loads(self) -> list[Load]:
        """All points, concurrency first."""
        return [
            *(Load(concurrency=number) for number in sorted(self.concurrency)),
            *(Load(rate=rate) for rate in sorted(self.request_rate)),
        ]

    @property
    def key(self) -> str:
        """The key to send; servers without keys accept any."""
        return os.environ.get(self.key_variable) or "none"


def check_server(url: str | None, serving: Serving) -> None:
    """Refuse addresses that cannot be asked, and a Python without the client.

    Raises:
        ValueError: the key and the fix.
    """
    if url is None:
        raise ValueError(
            "engine 'openai' measures a server: give its address, --url http://127.0.0.1:8000/v1"
        )
    for name, address in (("url", url), ("serving.baseline_url", serving.baseline_url)):
        if address is None:
            continue
        parts = urlsplit(address)
        if redacted(address) != address:
            raise ValueError(
                f"{name} {redacted(address)} holds credentials: put the key into the variable "
                f"{serving.key_variable}"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc or " " in address:
            raise ValueError(f"{name} {address!r} must begin with http:// or https://")
    if importlib.util.find_spec("openai") is None:
        raise ValueError("engine 'openai' needs the client: pip install openai")

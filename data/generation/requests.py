"""An HTTP client for untrusted servers: no redirects, which would take the key elsewhere, and
answers of bounded size.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai


class TooLong(ValueError):
    """An answer of more bytes than are read."""


LONGEST_TROUBLE = 300
"""Bytes of an error's body that are read."""


class _Bounded(httpx2.AsyncByteStream):
    """A body that is read up to `most` bytes."""

    def __init__(self, stream: Any, most: int) -> None:
        self.stream, self.most = stream, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for part in self.stream:
            read += len(part)
            if read > self.most:
                raise TooLong(f"an answer of more than {self.most >> 20} MiB")
            yield part

    async def aclose(self) -> None:
        """Close the connections to the server."""
        await self.stream.aclose()


class _Beginning(_Bounded):
    """The first bytes of a body, also of one that breaks off."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        with contextlib.suppress(httpx2.HTTPError):
            async for part in self.stream:
                yield part[: self.most - read]
                read += len(part)
                if read >= self.most:
                    return


def bounded_client(most: int, connections: int) -> httpx2.AsyncClient:
    """A client that reads at most `most` bytes of an answer, whose caller sets the time limit.

    Nothing is decompressed: a few bytes could become gigabytes.
    """

    async def bound(response: httpx2.Response) -> None:
        response.headers.pop("content-encoding", None)
        response.stream = (
            _Beginning(response.stream, LONGEST_TROUBLE)
            if response.is_error
            else _Bounded(response.stream, most)
        )

    return openai.DefaultAsyncHttpx2Client(
        follow_redirects=False,
        timeout=None,
        headers={"Accept-Encoding": "identity"},
        limits=httpx2.Limits(max_connections=connections),
        event_hooks={"response": [bound]},
    )

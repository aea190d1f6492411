"""One HTTP request to a server that may do anything: no redirects, a limit of time for the whole,
bounded answers.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import Any

from configs.command_line.redaction import redacted

LONGEST_TROUBLE = 300
"""Characters of what a server says of an error."""


class Redirected(ValueError):
    """A server sent the request to another address."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to whatever address the server names, and take its answer."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        raise Redirected(
            f"the server redirects ({code}) to {redacted(newurl)[:LONGEST_TROUBLE]}: the key is "
            "not sent there, give that address if you trust it"
        )


_OPENER = urllib.request.build_opener(_NoRedirects)


def post(
    address: str, body: bytes, headers: dict[str, str], seconds: float, most: int
) -> tuple[bytes, bool]:
    """The answer's body, cut behind `most` bytes, and whether it came whole.

    Raises:
        TimeoutError: it took longer than `seconds` in all, however it was spread.
        Redirected: the server sent the request elsewhere.
        urllib.error.HTTPError: a status of trouble.
        OSError, http.client.HTTPException: as urllib.
    """
    request = urllib.request.Request(address, body, headers)
    late = threading.Event()
    with _OPENER.open(request, timeout=seconds) as response:
        # A server that drips a byte now and then never meets the timeout of one read.
        timer = threading.Timer(seconds, _cut_off, (response, late))
        timer.daemon = True
        timer.start()
        try:
            read = response.read(most)
        except Exception:
            if late.is_set():
                raise TimeoutError(f"no whole answer within {seconds:g} seconds") from None
            raise
        finally:
            timer.cancel()
        if late.is_set():
            raise TimeoutError(f"no whole answer within {seconds:g} seconds")
        return read, not response.length


def _cut_off(response: HTTPResponse, late: threading.Event) -> None:
    """End the connection, whatever it is doing."""
    late.set()
    raw: Any = getattr(response.fp, "raw", None)
    connection = getattr(raw, "_sock", None)
    if connection is not None:
        connection.shutdown(2)


def said(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with a status, without credentials that it repeats."""
    try:
        return redacted(error.read(LONGEST_TROUBLE).decode(errors="replace"))
    except Exception as trouble:  # a connection can break in many ways here
        return f"(and nothing more: {type(trouble).__name__})"

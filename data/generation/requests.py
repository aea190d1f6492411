"""One HTTP request to an untrusted server: no redirects, a total time limit, bounded answers."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from http.client import HTTPConnection, HTTPSConnection
from typing import Any

from configs.command_line.redaction import printable, redacted

LONGEST_TROUBLE = 300
"""Characters of an error message that are shown."""


class Redirected(ValueError):
    """A server sent the request to another address."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: urllib would send the key to any address that the server names."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        place = printable(redacted(newurl))[:LONGEST_TROUBLE]
        raise Redirected(
            f"the server redirects ({code}) to {place}: the key is not sent there, give that "
            "address if you trust it"
        )


class _Deadline:
    """Closes the connections of one request `seconds` after its start.

    A server that sends a byte now and then never exceeds the timeout of a single read.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.late = seconds, threading.Event()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut_off)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, opened: socket.socket) -> None:
        """Also close this connection at the deadline."""
        self._sockets.append(opened)
        if self.late.is_set():
            self._cut_off()

    def _cut_off(self) -> None:
        self.late.set()
        for opened in self._sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise TimeoutError after the deadline."""
        if self.late.is_set():
            raise TimeoutError(f"no whole answer within {self.seconds:g} seconds")


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """An opener without redirects, whose connections are closed at the deadline."""

    # Sockets register with the deadline as soon as they are connected.
    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    class Encrypted(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Plain, req)

    class EncryptedHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Encrypted, req)

    return urllib.request.build_opener(_NoRedirects, PlainHandler, EncryptedHandler)


class Trouble(ValueError):
    """An HTTP error; the message is the status and the beginning of the body."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code


def post(
    address: str, body: bytes, headers: dict[str, str], seconds: float, most: int
) -> tuple[bytes, bool]:
    """The answer's body, truncated after `most` bytes, and whether it is complete.

    Raises:
        TimeoutError: the request took longer than `seconds` in all.
        Redirected: the server redirects.
        Trouble: an HTTP error.
        OSError, http.client.HTTPException: as urllib.
    """
    request = urllib.request.Request(address, body, headers)
    with _Deadline(seconds) as deadline:
        try:
            with _opener(deadline).open(request, timeout=seconds) as response:
                read = response.read(most)
                deadline.check()
                return read, not response.length
        except urllib.error.HTTPError as error:
            raise Trouble(error.code, _said(error)) from None
        # A connection that the deadline closed fails in many ways: report the timeout.
        except Exception:
            deadline.check()
            raise


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's body, with credentials redacted."""
    try:
        return printable(redacted(error.read(LONGEST_TROUBLE).decode(errors="replace")))
    except Exception as trouble:  # a connection can break in many ways here
        return f"(and nothing more: {type(trouble).__name__})"

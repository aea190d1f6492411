"""Ports of this machine for processes that tests start, and servers in threads."""

import os
import random
import socket
import threading
from socketserver import BaseServer


def free_port() -> int:
    """A port on which a process may listen later.

    It is below 32,768, where the ports begin that Linux gives away by itself: one of those that is
    free now may belong to some connection before the process listens. Test workers draw from
    different ranges.

    Raises:
        OSError: none of a hundred ports was free.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + 2_000 * (worker % 11)
    for _ in range(100):
        port = random.SystemRandom().randrange(first, first + 2_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("no free port for a test")


def serving(server: BaseServer) -> threading.Thread:
    """Serve in a thread, which looks for the server's end often: every test waits for that."""
    thread = threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    return thread

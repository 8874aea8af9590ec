"""The connections of a server in this process, of which there are never too many."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_MOST = 64
"""A browser opens six to one server."""

_BUSY = 4
"""How many times as many there may be while all of them are being answered."""


class Connections:
    """Open connections, no more than so many: one more ends the one that has waited longest.

    Each has a thread, and one that never sends a request would keep it for ever.

    Args:
        most: How many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: set[Any] = set()
        # In the order in which they began to wait for a request.
        self._waiting: dict[Any, None] = {}

    def opened(self, connection: Any) -> None:
        """Take a new one in."""
        with self._lock:
            while len(self._open) >= self._most and self._waiting:
                oldest = next(iter(self._waiting))
                self._forget(oldest)
                # Its thread finds the end of the stream, and closes it.
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open.add(connection)
            self._waiting[connection] = None
            if len(self._open) > _BUSY * self._most:
                # Those who take their answers slowly are no reason to start threads for ever.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def answering(self, connection: Any, busy: bool) -> None:
        """Note that a whole request has come, or that the next one is waited for."""
        with self._lock:
            self._waiting.pop(connection, None)
            if not busy and connection in self._open:
                self._waiting[connection] = None

    def closed(self, connection: Any) -> None:
        """Forget one that has ended."""
        with self._lock:
            self._forget(connection)

    def _forget(self, connection: Any) -> None:
        self._open.discard(connection)
        self._waiting.pop(connection, None)


class BoundedServer(ThreadingHTTPServer):
    """A server with a thread for each connection, and so many connections at most.

    Args:
        address: Host and port.
        handler: Answers requests. It calls `server.answering` when a whole one has come, and when
            it waits for the next.
    """

    daemon_threads = True
    # As many as connect at once wait for their turn.
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], most: int = _MOST
    ) -> None:
        self._connections = Connections(most)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: object) -> None:
        """Answer in a thread of its own, for which the longest idle connection gives up its."""
        self._connections.opened(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and free its place."""
        self._connections.closed(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: object) -> None:
        """Say nothing of a browser that went away, or of a connection that was ended here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def answering(self, request: Any, busy: bool) -> None:
        """Note whether a whole request has come over a connection and is being answered."""
        self._connections.answering(request, busy)

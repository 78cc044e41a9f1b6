"""Messages between processes over TCP: a header with two lengths, a JSON object, bytes."""

from __future__ import annotations

import json
import socket
import socketserver
import struct
from collections.abc import Callable

SEND_SECONDS = 60.0  # within which a message must be sent; small ones are at once
LONGEST_OBJECT, LONGEST_BYTES = 1 << 24, 1 << 31
LENGTHS = struct.Struct("<IQ")  # of the JSON text and of the bytes


class Silence(Exception):
    """No bytes arrived for too long."""


def listen(serve: Callable[[socket.socket], None]) -> socketserver.ThreadingTCPServer:
    """A server on a free port, over IPv6 and IPv4; it calls `serve` with each connection in a thread of its own."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 1024
        address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

        def server_bind(self):
            if self.address_family == socket.AF_INET6:  # IPv4 too
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

        def handle_error(self, request, address):
            """Print nothing: what a connection sends must not disturb the job's output."""

    return Server(("", 0), Handler)


def send(connection: socket.socket, content: dict, data: bytes = b"") -> None:
    """Send a message: a JSON object and bytes."""
    text = json.dumps(content).encode()
    connection.settimeout(SEND_SECONDS)
    connection.sendall(LENGTHS.pack(len(text), len(data)) + text + data)


def receive(connection: socket.socket, patience: float | None, longest: int | None = None) -> tuple[dict, bytes]:
    """The next message, of up to `longest` bytes.

    Raises `Silence` after `patience` seconds. Time in which this process is suspended does not count.
    """
    lengths = _read(connection, LENGTHS.size, patience)
    text, data = LENGTHS.unpack(lengths)
    if text > LONGEST_OBJECT or data > LONGEST_BYTES or (longest is not None and text + data > longest):
        raise ConnectionError("no message of this job")
    found = json.loads(_read(connection, text, patience))
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found, bytes(_read(connection, data, patience))


def _read(connection: socket.socket, size: int, patience: float | None) -> bytearray:
    slice_seconds = 1.0 if patience is None else min(1.0, patience / 10)
    found, waited = bytearray(), 0.0
    connection.settimeout(slice_seconds)
    while len(found) < size:
        try:
            piece = connection.recv(min(size - len(found), 1 << 20))
        except TimeoutError:
            waited += slice_seconds
            if patience is not None and waited >= patience:
                raise Silence(f"no sign of life for {patience:g} s") from None
            continue
        if not piece:
            raise ConnectionError("connection closed")
        found += piece
        waited = 0.0
    return found

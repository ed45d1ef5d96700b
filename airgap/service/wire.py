"""Messages between `airgap run` and the daemon: four bytes of length and one JSON object.

The client asks once a connection or several times, one after the other::

    {"op": "run", "task": "retrosynthesis", "inputs": {...}, "options": {...}, "project": "",
     "held": "", "files": ["csv", "html"]}
    {"op": "cancel"}                      while a run is under way; so does closing the connection
    {"op": "status"}

The daemon answers a run with any number of `progress` and then with the pieces of the answer and
`done`, or with one `error`; before an answer it sends nothing of what the model wrote::

    {"event": "progress", "tokens": 812, "finished": 3, "n": 32}
    {"event": "piece", "text": "..."}     of the JSON text of the answer, at most PIECE characters
    {"event": "done"}
    {"event": "error", "code": "policy.denied", "message": "...", "hint": "...", "exit": 1}
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from policy.errors import RefusedError

CODE = "service.client"
REQUEST_LIMIT = 32 << 20  # a structure file of 12 MiB, escaped
MESSAGE_LIMIT = 4 << 20  # of the daemon
PIECE = 1 << 18  # characters
ANSWER_LIMIT = 1 << 30
FILES = ("csv", "sdf", "html", "receipt")
_LENGTH = struct.Struct(">I")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message whole."""
    content = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)


def receive(connection: socket.socket, limit: int) -> dict[str, Any] | None:
    """Return the next message, None at the end; RefusedError `service.client` for what is none."""
    head = _exactly(connection, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise malformed(f"a message of {length} bytes; the limit is {limit}")
    try:
        message = json.loads(_exactly(connection, length))
    except (ValueError, RecursionError):
        raise malformed("a message is no JSON") from None
    if not isinstance(message, dict):
        raise malformed("a message is no object")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    missing = count
    while missing:
        part = connection.recv(min(missing, 1 << 16))
        if not part:
            if parts:
                raise malformed("the connection ended within a message")
            return b""
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def malformed(what: str) -> RefusedError:
    """The other end does not keep to this page."""
    return RefusedError(
        CODE, f"the service protocol: {what}", hint="use the same version on both ends"
    )

"""Messages between `airgap run` and the daemon: four bytes of length and one JSON object.

The client asks once a connection or several times, one after the other::

    {"op": "run", "task": "retrosynthesis", "inputs": {...}, "options": {...}, "project": "",
     "held": "", "files": ["csv", "html"]}
    {"op": "cancel"}                      while a run is under way; so does closing the connection
    {"op": "status"}
    {"op": "holds"}                       what is held of the caller
    {"op": "fetch", "hold": "lab/log#73", "files": ["csv"]}   her held answer, once it is released

The daemon answers a run or a fetch with any number of `progress` and then with the pieces of the
answer and `done`, or with one `error`; before an answer it sends nothing of what the model wrote::

    {"event": "progress", "tokens": 812, "finished": 3, "n": 32}
    {"event": "piece", "text": "..."}     of the JSON text of the answer, at most PIECE characters
    {"event": "done"}
    {"event": "error", "code": "policy.denied", "message": "...", "hint": "...", "exit": 1}
"""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from policy.errors import RefusedError

CODE = "service.client"
REQUEST_LIMIT = 32 << 20  # a structure file of 12 MiB, escaped
MESSAGE_LIMIT = 4 << 20  # of the daemon
PIECE = 1 << 18  # characters
ANSWER_LIMIT = 1 << 30
FILES = ("csv", "sdf", "html", "receipt")
CANCEL_LIMIT = 1 << 10  # of what may come while a run is under way
OUTSIDE_LIMIT = 1 << 16  # texts of a request, and bytes beside them
_LENGTH = struct.Struct(">I")
# Every text of a JSON document, and one that never ends: each byte is looked at once.
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message whole."""
    content = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)


def receive(
    connection: socket.socket,
    limit: int,
    *,
    within_s: float | None = None,
    outside: int | None = None,
    admit: Callable[[int], RefusedError | None] = lambda _: None,
) -> dict[str, Any] | None:
    """Return the next message, None at the end.

    Args:
        connection: Its own timeout holds for the first byte.
        limit: Bytes of a message.
        within_s: Seconds from the first byte to the last.
        outside: Its texts and the bytes beside them: each may become an object of 60 bytes.
        admit: Asked with the length before the rest is read; a refusal is raised after it was
            read and dropped.

    Raises:
        RefusedError: `service.client` for what is no message; what `admit` says.
        OSError: The connection failed, or was too slow.

    """
    head = connection.recv(_LENGTH.size)
    if not head:
        return None
    until = None if within_s is None else time.monotonic() + within_s
    head += _exactly(connection, _LENGTH.size - len(head), until)
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise malformed(f"a message of {length} bytes; the limit is {limit}")
    refusal = admit(length)
    if refusal is not None:
        for at in range(0, length, PIECE):
            _exactly(connection, min(PIECE, length - at), until)
        raise refusal
    content = _exactly(connection, length, until)
    if outside is not None and length > outside and is_crowded(content, outside):
        raise malformed(f"a message of more than {outside} texts and bytes beside them")
    try:
        message = json.loads(content.decode())  # UTF-8 alone, as `_TEXTS` reads it
    except (ValueError, RecursionError):
        raise malformed("a message is no JSON") from None
    if not isinstance(message, dict):
        raise malformed("a message is no object")
    return message


def is_crowded(content: bytes, most: int) -> bool:
    """Whether a JSON document has more than `most` texts and bytes beside them, all together."""
    beside = end = 0
    for text in _TEXTS.finditer(content):
        beside += 1 + text.start() - end
        end = text.end()
        if beside > most:
            return True
    return beside + len(content) - end > most


def _exactly(connection: socket.socket, count: int, until: float | None) -> bytes:
    parts: list[bytes] = []
    missing = count
    while missing:
        if until is not None:
            connection.settimeout(max(0.001, until - time.monotonic()))
        part = connection.recv(min(missing, 1 << 16))
        if not part:
            raise malformed("the connection ended within a message")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def malformed(what: str) -> RefusedError:
    """The other end does not keep to this page."""
    return RefusedError(
        CODE, f"the service protocol: {what}", hint="use the same version on both ends"
    )

"""`airgap run` at the daemon: the same answer, tables and files as from a broker of one's own."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from airgap.peers import find_stranger
from airgap.science import views
from airgap.science.results import Assessed, Prepared
from airgap.serve.broker import Job
from airgap.serve.present import Presented, Rendered, deliver
from airgap.service import wire
from policy.errors import CODES, AirgapError, FaultError, RefusedError, UsageError

TURN_S = 30  # seconds until the daemon takes a connection
SILENCE_S = 900.0  # longer than any part of a request may take
OnProgress = Callable[[int, int, int], None]


def run(
    path: Path, job: Job, outputs: Mapping[str, Path | None], on_progress: OnProgress
) -> Presented:
    """Have a job run by the daemon at `path`, write the files and return what to print.

    Raises:
        AirgapError: What the daemon answered; `service.absent` when there is none.

    """
    message = {
        "op": "run",
        "task": job.task,
        "inputs": dict(job.inputs),
        "options": dict(job.options),
        "project": job.project,
        "held": job.held,
    }
    return _answered(path, message, outputs, on_progress)


def fetch(
    path: Path, hold: str, outputs: Mapping[str, Path | None], on_progress: OnProgress
) -> Presented:
    """Get the answer of one's own hold that was released; as `run`."""
    return _answered(path, {"op": "fetch", "hold": hold}, outputs, on_progress)


def holds(path: Path) -> list[dict[str, Any]]:
    """Return what the daemon holds of the caller, oldest first, and how far each release is."""
    with connect(path) as connection:
        _send(connection, {"op": "holds"})
        rows = _next(connection).get("holds")
    if not isinstance(rows, list) or not all(_is_hold(row) for row in rows):
        raise wire.malformed("a list of holds that is none")
    return rows


def hold_of(path: Path, name: str) -> dict[str, Any]:
    """Return one's own hold of a reference or its number; RefusedError `hold.missing`."""
    found = [
        row
        for row in holds(path)
        if name.removeprefix("#") in {row["reference"], row["reference"].rpartition("#")[2]}
    ]
    if len(found) != 1:
        raise RefusedError(
            "hold.missing",
            f"{len(found)} of your holds answer to {name!r:.80}",
            hint="airgap hold list shows their references",
        )
    return found[0]


def status(path: Path) -> dict[str, Any]:
    """Ask the daemon whom it takes the caller for, and what runs for her."""
    with connect(path) as connection:
        _send(connection, {"op": "status"})
        return _next(connection)


def connect(path: Path) -> socket.socket:
    """Return a connection to the daemon; FaultError `service.absent`, also for an impostor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A socket that blocks waits for its turn where many come at once; one with a timeout does not.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", TURN_S, 0))
    try:
        connection.connect(str(path))
        connection.settimeout(SILENCE_S)
    except OSError as error:
        connection.close()
        raise FaultError(
            "service.absent",
            f"no daemon answers at {path}: {error.strerror}",
            hint="systemctl status airgap; are you in the group of the socket?",
        ) from error
    try:
        _require_daemon(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_daemon(connection: socket.socket, path: Path) -> None:
    """Refuse a socket that somebody else put there: it would be told what is asked."""
    uid = find_stranger(connection, path)
    if uid is not None:
        raise FaultError(
            "service.absent",
            f"uid {uid} answers at {path}, which is neither root nor the owner of its folder",
            hint="tell the administrator: the daemon does not run, and somebody took its place",
        )


def answer_of(connection: socket.socket, on_progress: OnProgress) -> Rendered:
    """Take progress and pieces until the answer is whole."""
    parts: list[str] = []
    size = 0
    while (message := _next(connection))["event"] != "done":
        match message:
            case {"event": "progress", "tokens": int(tokens), "finished": int(done), "n": int(n)}:
                on_progress(tokens, done, n)
            case {"event": "piece", "text": str(text)}:
                size += len(text)
                if size > wire.ANSWER_LIMIT:
                    raise wire.malformed("the answer is too long")
                parts.append(text)
            case _:
                raise wire.malformed("an event that is none")
    try:
        found = json.loads("".join(parts))
        header = found["header"]
        header["created"] = datetime.fromisoformat(header["created"])
        header["reasons"] = tuple(header["reasons"])
        return Rendered(
            document=found["document"],
            files=found["files"],
            header=views.Header(**header),
            prepared=Prepared.model_validate_json(json.dumps(found["prepared"])),
            assessed=Assessed.model_validate_json(json.dumps(found["assessed"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise wire.malformed(f"the answer cannot be read: {error!s:.120}") from error


def _answered(
    path: Path,
    message: dict[str, Any],
    outputs: Mapping[str, Path | None],
    on_progress: OnProgress,
) -> Presented:
    files = [kind for kind, where in outputs.items() if where is not None]
    with connect(path) as connection:
        _send(connection, message | {"files": files})
        return deliver(answer_of(connection, on_progress), outputs)


def _is_hold(row: object) -> bool:
    names = ("reference", "opened", "person", "project", "task", "stage", "state")
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a request; one that the daemon did not take to its end may have an answer all the same.

    `_next` then says which.
    """
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(connection, message)


def _next(connection: socket.socket) -> dict[str, Any]:
    """Return the next message that is no error; an error is raised as the class of its exit."""
    try:
        message = wire.receive(connection, wire.MESSAGE_LIMIT)
    except OSError as error:
        raise _gone(str(error)) from error
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            wire.send(connection, {"op": "cancel"})
        raise
    if message is None:
        raise _gone("it closed the connection")
    if not isinstance(message.get("event"), str):
        raise wire.malformed("a message names no event")
    if message["event"] == "error":
        raise _error_of(message)
    return message


def _gone(why: str) -> FaultError:
    return FaultError(
        "service.absent",
        f"the daemon gave no answer: {why:.120}",
        hint="send the request again; what was on its way is on record as not answered",
    )


def _error_of(message: dict[str, Any]) -> AirgapError:
    code = message.get("code")
    if not isinstance(code, str) or code not in CODES:
        code = wire.CODE
    kinds: dict[Any, type[AirgapError]] = {1: RefusedError, 2: UsageError}
    kind = kinds.get(message.get("exit"), FaultError)
    return kind(
        code, str(message.get("message", ""))[:4000], hint=str(message.get("hint", ""))[:2000]
    )

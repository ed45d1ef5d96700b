"""The log as a service: one owner of the files, many clients on a Unix socket (design, modes).

The same `AuditLog` serves; what differs is who owns the files and where the actor comes from. The
kernel says who a client is (SO_PEERCRED); a uid in a message does not exist. A client waits two
seconds and then denies: a service that is stopped, paused or full admits nothing.

A message is four bytes of length and one JSON object. Requests: `hello`, `append`, `store`,
`denials`. Whoever breaks the protocol is cut off.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import structlog

from airgap.audit.clock import Peer
from airgap.audit.log import MAX_OBJECT, AuditLog
from airgap.audit.payloads import MAX_BLOB, PayloadKey
from airgap.audit.receipt import Receipt, parse_receipt
from airgap.audit.record import Actor, Commit, DecisionRef, Event, Record, commitment
from airgap.peers import find_stranger
from policy.errors import CODES, AirgapError, FaultError, RefusedError, UsageError
from policy.terms import Digest

CODE: Final = "audit.service"
DEADLINE_S: Final = 2.0
IDLE_S: Final = 3_600.0
MAX_CLIENTS: Final = 256
MAX_OF_ACCOUNT: Final = 32  # a broker has one connection, and so has a command
MAX_MESSAGE: Final = MAX_BLOB * 4 // 3 + 65_536
_LENGTH: Final = struct.Struct(">I")
_CREDENTIALS: Final = struct.Struct("3i")
# What only the owner of the log may state; everything else a client reports of itself.
_OWNERS: Final = frozenset({
    "boot", "shutdown", "halt", "recovery", "heartbeat", "clock.step", "key.rotate", "export",
    "prune", "spill.purge", "import.cosign", "verify.result",
})  # fmt: skip
# Of these, what the owner's account may state from another process (`steward`), one act at a time;
# root may too where no file of the log changes.
_FOR_ACCOUNT: Final = frozenset(
    {"export", "prune", "spill.purge", "import.cosign", "verify.result"}
)
_FOR_ROOT: Final = frozenset({"export", "verify.result"})

operator = structlog.get_logger("airgap.audit.service")


class Log(Protocol):
    """What a broker needs of a log, in its own process or behind the socket."""

    @property
    def origin(self) -> str:
        """The log's name."""
        ...

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`; a client may be unable to read it."""
        ...

    def append(self, event: Event) -> Receipt:
        """Return once the event is durable and signed; see `AuditLog.append`."""
        ...

    def put_object(self, content: bytes) -> Digest:
        """Store evidence; see `AuditLog.put_object`."""
        ...

    def commit(self, payload: bytes, nonce: bytes, *, req: str, side: str) -> Commit:
        """Commit to a payload and, where the site keeps payloads, seal it first."""
        ...

    def denials(self, uid: int, since: str) -> Iterator[Record]:
        """Yield the denials of an account since a time, UTC text."""
        ...

    def __enter__(self) -> Self:
        """Use it for a while."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        ...


# -- the wire ----------------------------------------------------------------------------------


def event_to_wire(event: Event) -> dict[str, Any]:
    """Return an event as JSON; it names no uid, for a client cannot vouch for one."""
    fields = event.fields(uid=0, auth="self")
    actor = fields.pop("actor", {})
    for name in ("uid", "auth"):
        actor.pop(name, None)
    return fields | ({"actor": actor} if actor else {})


def event_from_wire(fields: dict[str, Any]) -> Event:
    """Return the event of a message; RefusedError `audit.record` for anything else."""
    try:
        actor, decision = fields.get("actor"), fields.get("decision")
        tok, error = fields.get("tok"), fields.get("err")
        known = {"kind", "phase", "req", "project", "policy", "model", "lat_ms", "label", "part"}
        extra = set(fields) - known - {"actor", "decision", "tok", "err", "in", "out", "data"}
        if extra:
            raise RefusedError("audit.record", f"an event has no field {min(extra)!r:.40}")
        return Event(
            **{name: fields[name] for name in known & fields.keys()},
            actor=Actor(**actor) if actor is not None else None,
            decision=DecisionRef(**decision) if decision is not None else None,
            in_=Commit(**fields["in"]) if "in" in fields else None,
            out=Commit(**fields["out"]) if "out" in fields else None,
            tok=(tok["in"], tok["out"]) if tok is not None else None,
            err=error["code"] if error is not None else "",
            data=fields.get("data"),
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error_:
        raise RefusedError("audit.record", f"the event is malformed: {error_!s:.80}") from None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket, limit: int) -> dict[str, Any] | None:
    """Return the next message, None at the end; RefusedError for what is none."""
    head = _exactly(connection, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise RefusedError(CODE, f"a message of {length} bytes; the limit is {limit}")
    content = _exactly(connection, length)
    try:
        message = json.loads(content)
    except (ValueError, RecursionError):
        raise RefusedError(CODE, "a message is no JSON") from None
    if not isinstance(message, dict):
        raise RefusedError(CODE, "a message is no object")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    """Return `count` bytes; fewer only as none, where the other end has closed."""
    parts: list[bytes] = []
    missing = count
    while missing:
        part = connection.recv(min(missing, 1 << 16))
        if not part:
            if parts:
                raise RefusedError(CODE, "the connection ended within a message")
            return b""
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# -- the owner of the log ----------------------------------------------------------------------


@dataclass(slots=True)
class Service:
    """Serves one open log on one socket until told to stop."""

    log: AuditLog
    path: Path
    mode: int = 0o600
    group: int = -1
    brokers: frozenset[int] = frozenset()  # accounts that may speak for others: the daemon's
    _stop: threading.Event = field(default_factory=threading.Event)
    _clients: dict[socket.socket, int] = field(default_factory=dict)  # with their accounts
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _act: str = ""  # the request of an act of the owner that is under way

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Accept clients; `ready` is called when the socket is there.

        Raises:
            RefusedError: `audit.service`; something that is no dead socket lies in the way.

        """
        server = self._bind()
        try:
            server.settimeout(0.2)
            ready()
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    self._take(connection)
        finally:
            server.close()
            self.path.unlink(missing_ok=True)
            with self._lock:
                for connection in self._clients:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """End `run`; safe in a signal handler."""
        self._stop.set()

    def _bind(self) -> socket.socket:
        """Bind the socket, in place of a dead one."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        if self.path.exists() or self.path.is_symlink():
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise RefusedError(CODE, f"{self.path} is no socket; it is left alone")
            self.path.unlink()  # The log's lock is ours, so whoever bound it is gone.
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o177)
            try:
                server.bind(str(self.path))
            finally:
                os.umask(before)
            # Mostly it is the own group already, and the unit's filter forbids to change owners.
            if self.group not in {-1, self.path.stat().st_gid}:
                os.chown(self.path, -1, self.group)
            self.path.chmod(self.mode)
            server.listen(64)
        except BaseException:
            server.close()
            raise
        return server

    def _take(self, connection: socket.socket) -> None:
        try:
            pid, uid, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
        except OSError:  # it went before its turn
            connection.close()
            return
        with self._lock:
            mine = sum(each == uid for each in self._clients.values())
            if len(self._clients) >= MAX_CLIENTS or mine >= MAX_OF_ACCOUNT:
                connection.close()
                operator.warning("audit.clients", uid=uid, connections=mine)
                return
            self._clients[connection] = uid
        threading.Thread(target=self._serve, args=(connection, Peer(uid, pid)), daemon=True).start()

    def _serve(self, connection: socket.socket, peer: Peer) -> None:
        """Answer one client until it goes; what it left open is closed as unknown."""
        opened: dict[str, tuple[str, str]] = {}
        try:
            connection.settimeout(IDLE_S)
            while (message := _receive(connection, MAX_MESSAGE)) is not None:
                _send(connection, self._answer(message, peer, opened))
        except (OSError, RefusedError) as error:
            operator.warning("audit.client", pid=peer.pid, uid=peer.uid, error=str(error)[:120])
        finally:
            with self._lock:
                self._clients.pop(connection, None)
            connection.close()
            self._close_orphans(opened, peer)

    def _answer(
        self, message: dict[str, Any], peer: Peer, opened: dict[str, tuple[str, str]]
    ) -> dict[str, Any]:
        try:
            return self._do(message, peer, opened)
        except AirgapError as error:
            return {
                "code": error.code, "message": error.message, "hint": error.hint,
                "exit": error.exit_status,
            }  # fmt: skip
        except OSError as error:
            text = f"the log's disk: {error.strerror}"
            return {"code": "host.io", "message": text, "hint": "", "exit": 3}

    def _do(
        self, message: dict[str, Any], peer: Peer, opened: dict[str, tuple[str, str]]
    ) -> dict[str, Any]:
        match message:
            case {"op": "hello"}:
                return {"origin": self.log.origin, "folder": str(self.log.folder)}
            case {"op": "append", "event": dict(fields), **rest}:
                return {"receipt": self._append(fields, self._for_whom(rest, peer), opened)}
            case {"op": "store", "content": str(text), "payload": bool(payload)}:
                return {"digest": self._store(text, payload=payload)}
            case {"op": "denials", "since": str(since), **rest}:
                found = self.log.denials(self._for_whom(rest, peer).uid, since)
                return {"records": [dict(record) for record in found]}
        return self._do_of_owner(message, peer)

    def _for_whom(self, rest: dict[str, Any], peer: Peer) -> Peer:
        """Return who a record is about: the peer, or whom a daemon names that serves many."""
        match rest:
            case {"peer": [int(uid), int(pid)]} if peer.uid in self.brokers and uid >= 0:
                return Peer(uid, pid)
            case {"peer": _}:
                raise RefusedError(CODE, f"account {peer.uid} may not speak for others")
        return peer

    def _do_of_owner(self, message: dict[str, Any], peer: Peer) -> dict[str, Any]:
        """Answer what the owner's account asks beside records; see `steward`."""
        match message:
            case {"op": "standing"}:
                return self._standing()
            case {"op": "note", "what": str(what), "size": int(size)}:
                self._require_account(peer, root=what == "export")
                return self._note(what, size)
            case {"op": "rotate", "name": str(name), "role": str(role)}:
                self._require_account(peer, root=True)
                return {"vkey": str(self.log.rotate_key(Actor(name, role)))}
        raise RefusedError(CODE, "no such request")

    def _append(
        self, fields: dict[str, Any], peer: Peer, opened: dict[str, tuple[str, str]]
    ) -> str:
        event = event_from_wire(fields)
        if event.kind in _OWNERS:
            if event.kind not in _FOR_ACCOUNT:
                raise RefusedError(CODE, f"{event.kind} is for the owner of the log to state")
            self._require_account(peer, root=event.kind in _FOR_ROOT)
        if event.phase in {"chunk", "outcome"} and event.req not in opened:
            raise RefusedError("audit.order", f"{event.req} has no open intent of this client")
        acts = event.kind in _FOR_ACCOUNT and event.phase == "intent"
        if acts:
            self._begin_act(event.req)
        try:
            receipt = self.log.append(event, peer=peer)
        except BaseException:
            if acts:
                self._end_act(event.req)
            raise
        if event.phase == "intent":
            opened[event.req] = (event.kind, event.project)
        elif event.phase == "outcome":
            opened.pop(event.req, None)
            self._end_act(event.req)
        return receipt.as_proof()

    def _require_account(self, peer: Peer, *, root: bool) -> None:
        """Return if the peer is the owner's account, or root where that is enough."""
        if peer.uid == os.getuid() or (root and peer.uid == 0):
            return
        raise RefusedError(
            CODE,
            f"that is for the account of the service, uid {os.getuid()}, not for uid {peer.uid}",
            hint="run the command as the service's account (sudo -u)",
        )

    def _begin_act(self, req: str) -> None:
        with self._lock:
            if self._act:
                raise RefusedError(
                    "audit.locked", "an export, pruning or purge is under way",
                    hint="wait for its end and run the command again",
                )  # fmt: skip
            self._act = req

    def _end_act(self, req: str) -> None:
        with self._lock:
            if self._act == req:
                self._act = ""

    def _standing(self) -> dict[str, Any]:
        """Tell what the head of any export tells."""
        exported = self.log.last_export
        return {
            "uid": os.getuid(), "size": self.log.size, "anchored": self.log.anchored,
            "ring": str(self.log.ring), "exports": exported.number, "exported": exported.size,
            "exported_at": exported.wall_s,
        }  # fmt: skip

    def _note(self, what: str, size: int) -> dict[str, Any]:
        """Take note of what an act of the owner came to."""
        if not 0 <= size <= self.log.size:
            raise RefusedError(CODE, f"{size} records; the log has {self.log.size}")
        match what:
            case "export":
                self.log.note_export(size)
            case "anchor":
                self.log.note_anchor(size)
            case "freed":
                self.log.note_freed()
            case _:
                raise RefusedError(CODE, "no such note")
        return {}

    def _store(self, text: str, *, payload: bool) -> str:
        try:
            content = base64.b64decode(text, validate=True)
        except ValueError:
            raise RefusedError(CODE, "the content is not base64") from None
        if payload:
            return str(self.log.put_payload(content))
        return str(self.log.put_object(content))

    def _close_orphans(self, opened: dict[str, tuple[str, str]], peer: Peer) -> None:
        for req, (kind, project) in opened.items():
            self._end_act(req)
            with contextlib.suppress(AirgapError):
                self.log.append(
                    Event(kind, "outcome", req=req, project=project, data={"result": "unknown"}),
                    peer=peer,
                )


# -- a client ------------------------------------------------------------------------------------


class RemoteLog:
    """The log behind a socket; a drop-in for `AuditLog` in a broker. Threads may share it."""

    def __init__(
        self, path: Path, *, payload_key: PayloadKey | None = None, deadline_s: float = DEADLINE_S
    ) -> None:
        """Connect to the service at `path`; FaultError `audit.service` when there is none."""
        self._path, self._deadline_s, self._payload_key = path, deadline_s, payload_key
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        hello = self._ask({"op": "hello"})
        self.origin = str(hello.get("origin", ""))
        self.folder = Path(str(hello.get("folder", "")))

    def append(self, event: Event, *, peer: Peer | None = None) -> Receipt:
        """Return the receipt once the event is durable and signed, within the deadline.

        `peer`: for whom a daemon speaks; the service must know the daemon's account as a broker.

        Raises:
            RefusedError: As `AuditLog.append`.
            FaultError: As there, or `audit.service`; deny the request.

        """
        message = {"op": "append", "event": event_to_wire(event)}
        answer = self._ask(message | _named(peer))
        return parse_receipt(str(answer.get("receipt", "")).encode())

    def put_object(self, content: bytes) -> Digest:
        """Store evidence; as `AuditLog.put_object`."""
        if len(content) > MAX_OBJECT:
            raise RefusedError("audit.object", f"{len(content)} bytes; the limit is {MAX_OBJECT}")
        return self._put(content, payload=False)

    def commit(self, payload: bytes, nonce: bytes, *, req: str, side: str) -> Commit:
        """Commit to a payload; where a payload key is known, seal it here and store the blob."""
        commit = commitment(payload, nonce)
        if self._payload_key is None:
            return commit
        blob = self._payload_key.seal(payload, nonce, origin=self.origin, req=req, side=side)
        return Commit(commit.commit, commit.bytes, str(self._put(blob, payload=True)))

    def denials(self, uid: int, since: str, *, peer: Peer | None = None) -> Iterator[Record]:
        """Yield one's own denials, or those of whom a daemon speaks for."""
        message = {"op": "denials", "since": since}
        for record in self._ask(message | _named(peer)).get("records", []):
            if record["actor"]["uid"] == uid:
                yield record

    def close(self) -> None:
        """Close the connection; what is open is then closed as unknown."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, content: bytes, *, payload: bool) -> Digest:
        text = base64.b64encode(content).decode()
        answer = self._ask({"op": "store", "content": text, "payload": payload})
        return Digest.parse(str(answer.get("digest", "")))

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer; a broken connection is never used again."""
        with self._lock:
            try:
                connection = self._connected()
                _send(connection, message)
                answer = _receive(connection, MAX_MESSAGE)
            except TimeoutError:
                self._drop()
                raise FaultError(
                    "audit.timeout",
                    f"the audit service gave no answer within {self._deadline_s:g} s",
                    hint="nothing is admitted without a record; see the service's own journal",
                ) from None
            except (OSError, RefusedError) as error:
                self._drop()
                raise self._gone(str(error)) from None
            if answer is None:
                self._drop()
                raise self._gone("it closed the connection")
        if "code" in answer:
            raise _error_of(answer)
        return answer

    def _connected(self) -> socket.socket:
        if self._connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(self._deadline_s)
            try:
                connection.connect(str(self._path))
                uid = find_stranger(connection, self._path)
            except BaseException:
                connection.close()
                raise
            if uid is not None:
                connection.close()
                raise RefusedError(CODE, f"uid {uid} took its place, and is told nothing")
            self._connection = connection
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _gone(self, why: str) -> FaultError:
        return FaultError(
            CODE,
            f"no audit service at {self._path}: {why[:120]}",
            hint="start it: airgap audit serve; nothing is admitted without a record",
        )


def _named(peer: Peer | None) -> dict[str, Any]:
    return {} if peer is None else {"peer": [peer.uid, peer.pid]}


def _error_of(answer: dict[str, Any]) -> AirgapError:
    """Return the error that the service answered with, as the class of its exit status."""
    code = answer.get("code")
    if not isinstance(code, str) or code not in CODES:
        code = CODE
    kinds: dict[Any, type[AirgapError]] = {1: RefusedError, 2: UsageError}
    kind = kinds.get(answer.get("exit"), FaultError)
    message, hint = str(answer.get("message", ""))[:500], str(answer.get("hint", ""))[:300]
    return kind(code, message, hint=hint)

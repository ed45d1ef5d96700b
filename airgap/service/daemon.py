"""The broker as a daemon (docs/design/architecture.md, 4): one sealed pair, one log, many people.

The kernel says who a client is; nothing that a client sends names a person. Each request is decided
for its own person, written to the log under her uid, and answered only once its outcome is durable.
A client sees its own requests and no other. A sealed process that ends while it was to serve is an
incident on record, and a new pair is started; requests meanwhile are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import structlog

from airgap.audit import Event, Receipt
from airgap.audit.clock import Peer
from airgap.audit.log import AuditLog
from airgap.audit.record import Commit, Record
from airgap.audit.service import RemoteLog
from airgap.enclave import Enclave
from airgap.inference.protocol import Forget
from airgap.serve.broker import Broker, Job
from airgap.serve.present import render
from airgap.serve.session import House, choose_project
from airgap.service import roles, wire
from airgap.service.roles import Caller
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

IDLE_S: Final = 3_600.0
SEND_S: Final = 60.0  # a client that takes nothing for so long is cut off
CLIENTS: Final = 256
CLIENTS_PER_PERSON: Final = 32
LOOK_S: Final = 0.25
RESTART_S: Final = (0.0, 1.0, 5.0, 30.0)  # before the next start, by how many failed in a row
_CREDENTIALS = struct.Struct("3i")

operator = structlog.get_logger("airgap.service")


@dataclass(frozen=True, slots=True)
class PersonLog:
    """The daemon's log as one client sees it: every record bears that client's uid."""

    log: AuditLog | RemoteLog
    peer: Peer

    @property
    def origin(self) -> str:
        """The log's name."""
        return self.log.origin

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        return self.log.folder

    def append(self, event: Event) -> Receipt:
        """Append for this client."""
        return self.log.append(event, peer=self.peer)

    def put_object(self, content: bytes) -> Digest:
        """Store evidence."""
        return self.log.put_object(content)

    def commit(self, payload: bytes, nonce: bytes, *, req: str, side: str) -> Commit:
        """Commit to a payload."""
        return self.log.commit(payload, nonce, req=req, side=side)

    def denials(self, uid: int, since: str) -> Iterator[Record]:
        """Yield the denials of this client's account."""
        if isinstance(self.log, RemoteLog):
            return self.log.denials(uid, since, peer=self.peer)
        return self.log.denials(uid, since)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the daemon's log open."""


@dataclass(slots=True)
class Pair:
    """Keeps worker and helper running: starts them, looks at them, starts new ones."""

    house: House
    log: AuditLog | RemoteLog
    _now: tuple[Enclave, Enclave] | None = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the first pair; raises as `open_broker`. Then look after it in a thread."""
        self._open()
        self._thread = threading.Thread(target=self._look, name="service-pair", daemon=True)
        self._thread.start()

    @property
    def serving(self) -> bool:
        """Whether a pair is up."""
        return self._now is not None

    def current(self) -> tuple[Enclave, Enclave]:
        """Return the pair that serves; FaultError `enclave.worker` between two pairs."""
        pair = self._now
        if pair is None or not all(each.alive for each in pair):
            raise FaultError(
                "enclave.worker",
                "the sealed worker has ended and a new one is being started",
                hint="send the request again in a while",
            )
        return pair

    def forget(self, request_set: str) -> None:
        """Let the worker drop what a person's requests left in its memory."""
        with contextlib.suppress(AirgapError):
            self.current()[0].request(Forget(request_set).encode(), 60.0)

    def close(self) -> None:
        """End the pair; its end is no incident."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._now = None
        self._stack.close()

    def _open(self) -> None:
        self._now = self._stack.enter_context(self.house.sealed_pair(self.log, lasting=True))

    def _look(self) -> None:
        failed = 0
        while not self._stop.wait(LOOK_S):
            pair = self._now
            if pair is not None and all(each.alive for each in pair):
                failed = 0
                continue
            for each in pair or ():
                if not each.alive:
                    each.close()  # its end is on record from here on, as an incident
            self._now = None
            try:
                self._stack.close()
                if self._stop.wait(RESTART_S[min(failed, len(RESTART_S) - 1)]):
                    return
                self._open()
                operator.warning("service.restarted")
            except AirgapError as error:
                failed += 1
                operator.error("service.restart", code=error.code, message=error.message[:300])


@dataclass(slots=True)
class Daemon:
    """Serves people on a listening socket until told to stop."""

    house: House
    log: AuditLog | RemoteLog
    roles_file: Path | None
    drain_s: float = 600.0
    _pair: Pair = field(init=False)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _clients: dict[socket.socket, int] = field(default_factory=dict)
    _running: Counter[int] = field(default_factory=Counter)
    _sets: dict[int, str] = field(default_factory=dict)  # of people who are connected

    def __post_init__(self) -> None:
        self._pair = Pair(self.house, self.log)

    def run(self, server: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Start the sealed pair, serve, and drain when told to stop.

        Raises:
            RefusedError: As `open_broker`: nothing was served.
            FaultError: As there.

        """
        roles.load_roles(self.roles_file, self.house.site)
        self._pair.start()
        try:
            server.settimeout(LOOK_S)
            ready()
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    self._take(connection)
            server.close()
            self._drain()
        finally:
            self._pair.close()

    def stop(self) -> None:
        """Take no new request and end once those under way have; safe in a signal handler."""
        self._stop.set()

    def _drain(self) -> None:
        until = time.monotonic() + self.drain_s
        operator.info("service.draining", requests=self._running.total())
        while self._running.total() and time.monotonic() < until:
            time.sleep(LOOK_S)
        with self._lock:
            for connection in self._clients:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _take(self, connection: socket.socket) -> None:
        pid, uid, gid = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        with self._lock:
            mine = sum(1 for each in self._clients.values() if each == uid)
            if len(self._clients) >= CLIENTS or mine >= CLIENTS_PER_PERSON:
                operator.warning("service.clients", uid=uid)
                connection.close()
                return
            self._clients[connection] = uid
            self._sets.setdefault(uid, secrets.token_hex(16))
        threading.Thread(target=self._serve, args=(connection, uid, gid, pid), daemon=True).start()

    def _serve(self, connection: socket.socket, uid: int, gid: int, pid: int) -> None:
        try:
            while True:
                connection.settimeout(IDLE_S)
                message = wire.receive(connection, wire.REQUEST_LIMIT)
                if message is None:
                    return
                connection.settimeout(SEND_S)
                try:
                    self._answer(connection, message, roles.caller_of(uid, gid, pid))
                except AirgapError as error:
                    if error.code == wire.CODE:
                        raise
                    wire.send(connection, error_message(error))
        except (OSError, AirgapError) as error:
            operator.info("service.client", uid=uid, pid=pid, error=str(error)[:120])
        except Exception as error:  # noqa: BLE001 - one client's thread; the others go on
            operator.error(
                "service.defect", uid=uid, error=f"{type(error).__name__}: {error}"[:300]
            )
        finally:
            self._leave(connection, uid)

    def _leave(self, connection: socket.socket, uid: int) -> None:
        with self._lock:
            del self._clients[connection]
            last = uid not in self._clients.values()
            gone = self._sets.pop(uid, "") if last else ""
        connection.close()
        if gone and not self._stop.is_set():
            self._pair.forget(gone)

    def _answer(self, connection: socket.socket, message: dict[str, Any], caller: Caller) -> None:
        match message:
            case {"op": "cancel"}:
                return  # it came after the end
            case {"op": "status", **rest} if not rest:
                wire.send(connection, self._status(caller))
            case {
                "op": "run",
                "task": str(task),
                "inputs": dict(inputs),
                "options": dict(options),
                "project": str(project),
                "held": str(held),
                "files": list(files),
                **rest,
            } if not rest and set(files) <= set(wire.FILES):
                with self._place(caller):
                    job = Job(task, inputs, project, options, held)
                    self._run(connection, job, files, caller)
            case _:
                raise wire.malformed("no such request")

    def _status(self, caller: Caller) -> dict[str, Any]:
        """Say what concerns the caller: nothing of other people's requests."""
        person, _ = self._person(caller)
        return {
            "event": "status",
            "person": person.id,
            "roles": sorted(person.roles),
            "projects": sorted(person.projects),
            "running": self._running[caller.uid],
            "model": f"{self.house.model.name} {self.house.model.version}",
            "serving": self._pair.serving,
            "draining": self._stop.is_set(),
        }

    def _person(self, caller: Caller) -> tuple[Any, Any]:
        granted = roles.load_roles(self.roles_file, self.house.site)
        return roles.person_of(caller, self.house.site, granted)

    @contextlib.contextmanager
    def _place(self, caller: Caller) -> Iterator[None]:
        most = self.house.site.service.per_person
        with self._lock:
            if self._stop.is_set():
                raise RefusedError(
                    "service.draining",
                    "the daemon is ending and takes no new request",
                    hint="send it again when the administrator has started it again",
                )
            if self._running[caller.uid] >= most:
                raise RefusedError(
                    "request.busy",
                    f"{most} of your requests are under way, as many as one person may have",
                    hint="wait for one of them, or cancel it",
                )
            self._running[caller.uid] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[caller.uid] -= 1

    def _run(self, connection: socket.socket, job: Job, files: list[str], caller: Caller) -> None:
        self.house.require_standing()
        person, site = self._person(caller)
        job = Job(
            job.task, job.inputs, choose_project(site, person, job.project), job.options, job.held
        )
        broker = self.house.broker(
            person,
            log=PersonLog(self.log, Peer(caller.uid, caller.pid)),
            pair=self._pair.current(),
            uid=caller.uid,
            site=site,
            request_set=self._sets[caller.uid],
        )

        def tell(tokens: int, finished: int, n: int) -> None:
            state = {"event": "progress", "tokens": tokens, "finished": finished, "n": n}
            try:
                require_client(connection)
                wire.send(connection, state)
            except OSError as error:
                raise cancelled() from error

        answer = broker.infer(job, tell)
        send_answer(connection, broker, job, answer, files)


def send_answer(
    connection: socket.socket, broker: Broker, job: Job, answer: Any, files: list[str]
) -> None:
    """Send what `airgap run` prints and writes, in pieces."""
    rendered = render(broker, job, answer, files)
    header = asdict(rendered.header)
    header["created"] = rendered.header.created.isoformat()
    text = json.dumps(
        {
            "document": rendered.document,
            "files": rendered.files,
            "header": header,
            "prepared": rendered.prepared.model_dump(mode="json"),
            "assessed": rendered.assessed.model_dump(mode="json"),
        }
    )
    for at in range(0, len(text), wire.PIECE):
        wire.send(connection, {"event": "piece", "text": text[at : at + wire.PIECE]})
    wire.send(connection, {"event": "done"})


def require_client(connection: socket.socket) -> None:
    """Return while the client waits; RefusedError `request.cancelled` when it does no more."""
    if select.select([connection], [], [], 0)[0]:
        message = wire.receive(connection, wire.MESSAGE_LIMIT)
        if message is None or message == {"op": "cancel"}:
            raise cancelled()
        raise wire.malformed("a request came while another one was under way")


def cancelled() -> RefusedError:
    """The person does not want the answer any more."""
    return RefusedError(
        "request.cancelled", "the request was cancelled; it is on record as such", hint="-"
    )


def error_message(error: AirgapError) -> dict[str, Any]:
    """Return an error as the wire has it."""
    return {
        "event": "error",
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "exit": error.exit_status,
    }


# -- the socket ------------------------------------------------------------------------------------


def listening(path: Path | None, group: int = -1) -> socket.socket:
    """Return the socket that systemd handed over (LISTEN_FDS), else one bound at `path`.

    Raises:
        RefusedError: `service.absent`; neither is there, or something else lies at `path`.

    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        if os.environ.get("LISTEN_FDS") != "1":
            raise RefusedError("service.absent", "systemd handed over other than one socket")
        server = socket.socket(fileno=3)
        os.set_inheritable(3, False)
        if server.family != socket.AF_UNIX or server.type != socket.SOCK_STREAM:
            raise RefusedError("service.absent", "what systemd handed over is no Unix socket")
        return server
    if path is None:
        raise RefusedError(
            "service.absent",
            "no socket is named",
            hint="--socket PATH, or [service] socket in site.toml",
        )
    return _bind(path, group)


def _bind(path: Path, group: int) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RefusedError("service.absent", f"{path} is no socket; it is left alone")
        path.unlink()  # the log's lock is ours: whoever bound it is gone
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    if group >= 0:
        os.chown(path, -1, group)
        path.chmod(0o660)
    server.listen(64)
    return server


def tell_systemd(state: str) -> None:
    """Send a line to the service manager, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in {"/", "@"}:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(state.encode(), address.replace("@", "\0", 1))


def on_signals(daemon: Daemon) -> None:
    """Drain on SIGTERM and SIGINT."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: daemon.stop())

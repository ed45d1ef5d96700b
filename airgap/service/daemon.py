"""The broker as a daemon (docs/design/architecture.md, 4): one sealed pair, one log, many people.

The kernel says who a client is; nothing that a client sends names a person. Each request is decided
for its own person by what site.toml, rules, roles and trust say at that moment, written to the log
under her uid, and answered only once its outcome is durable. A client sees its own requests and
holds and no other. Whatever cannot be done has a code, and the daemon stands: a client that is
slow, silent or hostile costs its own places alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import select
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from airgap.audit import Event, new_ulid
from airgap.audit.clock import Peer
from airgap.config import Person, Site
from airgap.holds import Hold, Holds
from airgap.install.record import actor_of
from airgap.release_desk import ReleaseDesk
from airgap.serve.broker import Broker, Job, printable
from airgap.serve.present import render
from airgap.serve.session import House, choose_project
from airgap.serve.tree import Facts
from airgap.service import budget, roles, wire
from airgap.service.budget import Budget, Turned
from airgap.service.keeper import LAST_WORDS_S, LOOK_S, Keeper, Ticket, cut_off
from airgap.service.kept_log import KeptLog, PersonLog, disk_fault
from airgap.service.roles import Caller
from policy.errors import AirgapError, RefusedError

CANCEL_S: Final = 2.0  # from the first byte of a cancel to its last
HOLDS_TOLD: Final = 1_000  # the newest, in one message
ON_RECORD: Final = frozenset({"trust", "seal", "site", "policy", "pack", "start", "hold"})
_CREDENTIALS: Final = struct.Struct("3i")
_OF_THE_SOCKET: Final = (TimeoutError, ConnectionError)

operator = structlog.get_logger("airgap.service")

MakeJob = Callable[[House, Person, Site], Job]


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take; times in seconds."""

    clients: int = 256
    per_person: int = 32
    idle_s: float = 3_600.0  # without a request
    message_s: float = 60.0  # from its first byte to its last
    send_s: float = 60.0  # for one piece of an answer
    answer_s: float = 600.0  # for the whole of it
    large: int = 1 << 20  # bytes from which on a request needs one of few places
    large_at_once: int = 16
    large_per_person: int = 4
    refusals: int = budget.BURST  # of one account on record in a short time
    refusals_per_s: float = budget.PER_S  # from then on


@dataclass(slots=True, eq=False)
class Client:
    """One connection; `idle_since` is None while it waits for an answer."""

    connection: socket.socket
    uid: int
    pid: int
    idle_since: float | None
    thread: threading.Thread | None = None


@dataclass(slots=True)
class Daemon:
    """Serves people on a listening socket until told to stop."""

    keeper: Keeper
    log: KeptLog
    roles_file: Path | None
    limits: Limits = field(default_factory=Limits)
    _asked: int = 0  # times it was told to stop; set in signal handlers, which may take no lock
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _clients: set[Client] = field(default_factory=set)
    _running: Counter[int] = field(default_factory=Counter)
    _places: Counter[int] = field(default_factory=Counter)  # of those, with more than a last word
    _large: Counter[int] = field(default_factory=Counter)
    _sets: dict[int, str] = field(default_factory=dict)  # of people who are connected
    _budget: Budget = field(init=False)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._budget = Budget(self.limits.refusals, self.limits.refusals_per_s)

    def run(
        self, server: socket.socket, house: House, ready: Callable[[House], None] = lambda _: None
    ) -> None:
        """Start the sealed pair of a release, serve, and drain when told to stop.

        Raises:
            RefusedError: As `open_broker`: nothing was served.
            FaultError: As there.

        """
        roles.load_roles(self.roles_file, house.site)
        self.keeper.start(house)
        telling = threading.Thread(target=self._tell_of_turned, name="turned", daemon=True)
        telling.start()
        try:
            server.settimeout(LOOK_S)
            ready(house)
            while not self._asked:
                self._accept(server)
            server.close()
        finally:
            self._end()
            self._ended.set()
            telling.join(LAST_WORDS_S)

    def stop(self) -> None:
        """Take no new request and end those under way; told twice, at once. For signal handlers."""
        self._asked += 1

    def _end(self) -> None:
        self._asked = self._asked or 1
        self.keeper.close(lambda: self._asked > 1, cut_off("the daemon is ending"))
        self._await(lambda: not self._running.total())  # answers on their way out
        with self._lock:
            clients = tuple(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.connection.shutdown(socket.SHUT_RDWR)
        self._await(lambda: not self._clients)

    def _await(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + LAST_WORDS_S
        while not done() and time.monotonic() < until:
            time.sleep(LOOK_S / 5)

    # -- connections ---------------------------------------------------------------------------

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        except OSError as error:
            # No descriptor is left, or a client went before its turn: the others go on.
            if error.errno != errno.ECONNABORTED:
                operator.error("service.accept", error=str(error)[:120])
                self._make_room(0)
                time.sleep(LOOK_S)
            return
        try:
            self._take(connection)
        except (OSError, RuntimeError) as error:  # of the socket; no thread can be started
            operator.error("service.accept", error=str(error)[:120])
            connection.close()

    def _take(self, connection: socket.socket) -> None:
        pid, uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        client = Client(connection, uid, pid, time.monotonic())
        with self._lock:
            mine = sum(1 for each in self._clients if each.uid == uid)
            full = len(self._clients) >= self.limits.clients
        if mine >= self.limits.per_person or (full and not self._make_room(mine + 1)):
            operator.warning("service.clients", uid=uid)
            with contextlib.suppress(OSError):
                connection.settimeout(0.0)
                wire.send(connection, error_message(_no_place()))
            connection.close()
            return
        client.thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
        with self._lock:
            self._clients.add(client)
        try:
            client.thread.start()
        except RuntimeError:
            self._leave(client)
            raise

    def _make_room(self, least: int) -> bool:
        """Close the idlest connection of whoever has most, if that is more than `least`."""
        with self._lock:
            counts = Counter(each.uid for each in self._clients)
            idle = [each for each in self._clients if each.idle_since is not None]
            idle = [each for each in idle if counts[each.uid] > least]
            if not idle:
                return False
            found = max(idle, key=lambda each: (counts[each.uid], -(each.idle_since or 0.0)))
            self._clients.discard(found)
        operator.warning("service.crowded", uid=found.uid)
        with contextlib.suppress(OSError):
            found.connection.shutdown(socket.SHUT_RDWR)  # its thread sees the end of it
        return True

    def _serve(self, client: Client) -> None:
        connection = client.connection
        try:
            while True:
                connection.settimeout(self.limits.idle_s)
                client.idle_since = time.monotonic()
                with contextlib.ExitStack() as places:
                    try:
                        message = self._receive(client, places)
                        if message is None:
                            return
                        client.idle_since = None
                        connection.settimeout(self.limits.send_s)
                        caller = roles.caller_of(client.uid, client.pid)
                        self._answer(connection, message, caller)
                    except AirgapError as error:
                        if error.code == wire.CODE:
                            raise
                        wire.send(connection, error_message(error))
                    except _OF_THE_SOCKET:
                        raise
                    except OSError as error:  # of the disk, or of this process's limits
                        fault = disk_fault(error, "the request could not be served")
                        wire.send(connection, error_message(fault))
        except (OSError, AirgapError) as error:
            operator.info("service.client", uid=client.uid, pid=client.pid, error=str(error)[:120])
        except Exception as error:  # noqa: BLE001 - one client's thread; the others go on
            operator.error(
                "service.defect", uid=client.uid, error=f"{type(error).__name__}: {error}"[:300]
            )
        finally:
            self._leave(client)

    def _receive(self, client: Client, places: contextlib.ExitStack) -> dict[str, Any] | None:
        """Return the next request; a large one takes one of few places, so that memory is kept."""

        def admit(length: int) -> RefusedError | None:
            limits, uid = self.limits, client.uid
            if length < limits.large:
                return None
            with self._lock:
                if (
                    self._large.total() >= limits.large_at_once
                    or self._large[uid] >= limits.large_per_person
                ):
                    return _no_place()
                self._large[uid] += 1
            places.callback(self._count, self._large, uid)
            return None

        return wire.receive(
            client.connection,
            wire.REQUEST_LIMIT,
            within_s=self.limits.message_s,
            outside=wire.OUTSIDE_LIMIT,
            admit=admit,
        )

    def _leave(self, client: Client) -> None:
        with self._lock:
            self._clients.discard(client)
            last = all(each.uid != client.uid for each in self._clients)
            gone = self._sets.pop(client.uid, "") if last else ""
        client.connection.close()
        if gone and not self._asked:
            self.keeper.forget(gone)

    # -- requests ------------------------------------------------------------------------------

    def _answer(self, connection: socket.socket, message: dict[str, Any], caller: Caller) -> None:
        match message:
            case {"op": "cancel"}:
                return  # it came after the end
            case {"op": "status", **rest} if not rest:
                wire.send(connection, self._status(caller))
            case {"op": "holds", **rest} if not rest:
                wire.send(connection, {"event": "holds", "holds": self._holds_of(caller)})
            case {"op": "fetch", "hold": str(name), "files": list(files), **rest} if (
                not rest and are_files(files)
            ):

                def held(house: House, person: Person, _: Site) -> Job:
                    return take_up(house, person, name)

                self._run(connection, held, files, caller, "hold")
            case {
                "op": "run",
                "task": str(task),
                "inputs": dict(inputs),
                "options": dict(options),
                "project": str(project),
                "held": str(held_by),
                "files": list(files),
                **rest,
            } if not rest and are_files(files):

                def asked(_: House, person: Person, site: Site) -> Job:
                    chosen = choose_project(site, person, project)
                    return Job(task, inputs, chosen, options, held_by)

                self._run(connection, asked, files, caller, task)
            case _:
                raise wire.malformed("no such request")

    def _status(self, caller: Caller) -> dict[str, Any]:
        """Say what concerns the caller: nothing of other people's requests."""
        standing = self.keeper.standing
        person, _ = self._identify(caller, self._house().tree.read().site)
        house, why = standing.house, standing.why
        return {
            "event": "status",
            "person": person.id,
            "roles": sorted(person.roles),
            "projects": sorted(person.projects),
            "running": self._running[caller.uid],
            "model": "" if house is None else f"{house.model.name} {house.model.version}",
            "bundle": "" if house is None else str(house.installed.digest),
            "serving": standing.state == "serving",
            "state": standing.state,
            "why": None if why is None else {"code": why.code, "message": why.message},
            "draining": bool(self._asked),
        }

    def _house(self) -> House:
        house = self.keeper.standing.house
        if house is None:
            raise cut_off("the daemon is ending")
        return house

    def _identify(self, caller: Caller, site: Site) -> tuple[Person, Site]:
        return roles.person_of(caller, site, roles.load_roles(self.roles_file, site))

    def _holds_of(self, caller: Caller) -> list[dict[str, Any]]:
        """Return the holds of the caller and of nobody else, with no word on the rules."""
        house = self._house()
        facts = house.tree.read()
        person, site = self._identify(caller, facts.site)
        trust = facts.trust.standing
        holds = Holds(house.root, trust, person.id)
        desk = ReleaseDesk(house.root, site, facts.rules, trust, holds, hazard_role=False)
        return [desk.row(hold) for hold in own_holds(holds, person)[-HOLDS_TOLD:]]

    @contextlib.contextmanager
    def _place(self, caller: Caller, most: int) -> Iterator[Callable[[], None]]:
        """Take a place for a request; yields what gives it back before the last word.

        Who asks again at once then finds it free; the request itself ends with the block.
        """
        with self._lock:
            if self._asked:
                raise RefusedError(
                    "service.draining",
                    "the daemon is ending and takes no new request",
                    hint="send it again when the administrator has started it again",
                )
            if self._places[caller.uid] >= most:
                raise RefusedError(
                    "request.busy",
                    f"{most} of your requests are under way, as many as one person may have",
                    hint="wait for one of them, or cancel it",
                )
            self._running[caller.uid] += 1
            self._places[caller.uid] += 1
        place = contextlib.ExitStack()
        place.callback(self._count, self._places, caller.uid)
        try:
            yield place.close
        finally:
            place.close()
            self._count(self._running, caller.uid)

    def _count(self, counter: Counter[int], uid: int) -> None:
        with self._lock:
            counter[uid] -= 1

    @contextlib.contextmanager
    def _refusals(self, caller: Caller, log: PersonLog, task: str) -> Iterator[None]:
        """Put on record what is refused before a broker has the request: it was an attempt."""
        try:
            yield
        except RefusedError as error:
            if error.code.partition(".")[0] in ON_RECORD or error.code == roles.CODE:
                log.append(
                    Event(
                        "denial",
                        req=new_ulid(),
                        actor=self._actor(caller),
                        err=error.code,
                        data={"count": 1, "stage": "standing", "task": printable(task)},
                    )
                )
            raise

    def _tell_of_turned(self) -> None:
        """Put on record who was turned away and how often, now and then and at the end."""
        ended, wait_s = False, LOOK_S
        while not ended:
            ended, wait_s = self._ended.wait(wait_s), LOOK_S
            for turned in self._budget.due(0.0 if ended else budget.TOLD_S):
                try:
                    self._record_turned(turned)
                except (AirgapError, OSError) as error:  # of the log: later, then
                    self._budget.keep(turned)
                    wait_s = budget.TOLD_S
                    operator.warning("service.turned", uid=turned.uid, error=str(error)[:120])

    def _record_turned(self, turned: Turned) -> None:
        caller = roles.caller_of(turned.uid, turned.pid)
        event = turned.event(self._budget.clock(), time.time_ns(), self._actor(caller))
        self.log.append(event, peer=Peer(turned.uid, turned.pid))

    def _actor(self, caller: Caller) -> Any:
        with contextlib.suppress(AirgapError):
            return actor_of(self._identify(caller, self._house().tree.read().site)[0])
        return None  # the record has her uid

    def _run(
        self,
        connection: socket.socket,
        make: MakeJob,
        files: list[str],
        caller: Caller,
        task: str,
    ) -> None:
        with contextlib.ExitStack() as place:
            spend = place.enter_context(self._budget.request(caller.uid, caller.pid))
            log = PersonLog(self.log, Peer(caller.uid, caller.pid), spend)
            with self._refusals(caller, log, task):
                _, site = self._identify(caller, self._facts().site)
                leave = place.enter_context(self._place(caller, site.service.per_person))
            with contextlib.ExitStack() as at_pair:
                with self._refusals(caller, log, task):
                    ticket = at_pair.enter_context(self.keeper.ticket())
                    broker, job = self._broker(ticket, make, caller, log)
                answer = broker.infer(job, teller(connection, ticket))
                pieces = packed(broker, job, answer, files)
            send_pieces(connection, pieces, self.limits.answer_s)
            leave()
            wire.send(connection, {"event": "done"})

    def _facts(self) -> Facts:
        return self._house().tree.read()

    def _broker(
        self, ticket: Ticket, make: MakeJob, caller: Caller, log: PersonLog
    ) -> tuple[Broker, Job]:
        house = ticket.serving.house
        person, site = self._identify(caller, house.require_standing().site)
        job = make(house, person, site)
        with self._lock:  # who only comes and goes leaves nothing that the worker must forget
            request_set = self._sets.setdefault(caller.uid, secrets.token_hex(16))
        broker = house.broker(
            lambda site: self._identify(caller, site),
            log=log,
            pair=ticket.serving.pair,
            uid=caller.uid,
            request_set=request_set,
            proceed=ticket.proceed,
        )
        return broker, job


def teller(connection: socket.socket, ticket: Ticket) -> Callable[[int, int, int], None]:
    """Return who tells a client of progress, and ends a request that nobody waits for."""

    def tell(tokens: int, finished: int, n: int) -> None:
        ticket.proceed()
        state = {"event": "progress", "tokens": tokens, "finished": finished, "n": n}
        try:
            require_client(connection)
            wire.send(connection, state)
        except OSError as error:
            raise cancelled() from error

    return tell


def are_files(kinds: list[Any]) -> bool:
    """Whether these are kinds of files, each once."""
    return all(isinstance(kind, str) and kind in wire.FILES for kind in kinds) and (
        len(set(kinds)) == len(kinds)
    )


def own_holds(holds: Holds, person: Person) -> list[Hold]:
    """Return what is held of one person, oldest first."""
    return [hold for hold in holds.every() if hold.person == person.id]


def take_up(house: House, person: Person, name: str) -> Job:
    """Return the job of a person's own hold, to be run again as it was held.

    Raises:
        RefusedError: `hold.missing`, she has none of that name; `hold.model`.

    """
    holds = Holds(house.root, house.tree.read().trust.standing, person.id)
    found = [
        hold
        for hold in own_holds(holds, person)
        if name in {hold.reference, hold.request, str(hold.seq), f"#{hold.seq}"}
    ]
    if len(found) != 1:
        raise RefusedError(
            "hold.missing",
            f"{len(found)} of your holds answer to {name!r:.80}",
            hint="airgap hold list shows their references",
        )
    (hold,) = found
    if hold.bundle != str(house.installed.digest):
        raise RefusedError(
            "hold.model",
            f"{hold.reference} is of release {hold.bundle}, and {house.installed.digest} is served",
            hint="ask the administrator to switch to that release, or send the request anew",
        )
    inputs, options = hold.inputs_and_options()
    return Job(hold.task, inputs, hold.project, options, held=hold.request)


def packed(broker: Broker, job: Job, answer: Any, files: list[str]) -> str:
    """Return what `airgap run` prints and writes, as one text."""
    rendered = render(broker, job, answer, files)
    header = asdict(rendered.header)
    header["created"] = rendered.header.created.isoformat()
    return json.dumps(
        {
            "document": rendered.document,
            "files": rendered.files,
            "header": header,
            "prepared": rendered.prepared.model_dump(mode="json"),
            "assessed": rendered.assessed.model_dump(mode="json"),
        }
    )


def send_pieces(connection: socket.socket, text: str, within_s: float) -> None:
    """Send an answer in pieces; a client that takes it too slowly is cut off."""
    until = time.monotonic() + within_s
    for at in range(0, len(text), wire.PIECE):
        if time.monotonic() > until:
            raise TimeoutError("the client takes its answer too slowly")
        wire.send(connection, {"event": "piece", "text": text[at : at + wire.PIECE]})


def require_client(connection: socket.socket) -> None:
    """Return while the client waits; RefusedError `request.cancelled` when it does no more."""
    poll = select.poll()  # `select` takes no descriptor above 1023
    poll.register(connection, select.POLLIN)
    if poll.poll(0):
        # Who sends half a message holds a place of the worker: there is little time for it.
        try:
            message = wire.receive(connection, wire.CANCEL_LIMIT, within_s=CANCEL_S)
        except TimeoutError:
            raise wire.malformed("half a message came while a request was under way") from None
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


def _no_place() -> RefusedError:
    return RefusedError(
        "request.busy",
        "the daemon has as many connections or large requests, of yours or in all, as it takes",
        hint="end some of yours, or try it again in a while",
    )


def on_signals(daemon: Daemon) -> None:
    """Drain on SIGTERM and SIGINT, end at once on the second; load everything anew on SIGHUP."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: daemon.stop())
    signal.signal(signal.SIGHUP, lambda *_: daemon.keeper.ask_reload())

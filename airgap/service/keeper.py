"""Keeps one release served: the sealed pair, its restarts, and the change to another release.

One thread looks after everything here. It ends a release that was revoked or has expired, together
with the requests under way; it takes over the release that the store makes the active one, or what
site.toml now says of worker and seal: requests under way end first, the old pair ends, the new one
is started and proven, and requests in between wait. A sealed process that ends by itself is started
again, later each time; after `Patience.ends` such ends in a row of time nothing is started any more
until somebody asks for it: a model that keeps ending is no model to serve.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from airgap.audit import Event, new_ulid
from airgap.config import Site
from airgap.enclave import Enclave
from airgap.inference.protocol import Forget
from airgap.serve.session import House, find_installed, screen_packs
from airgap.service.kept_log import AGAIN_S, KeptLog, disk_fault
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

LOOK_S: Final = 0.25
STANDING_S: Final = 1.0  # how often the files of the tree are looked at
LAST_WORDS_S: Final = 15.0  # for requests that were told to end
CODE: Final = "service.reloading"
_CERTAIN: Final = frozenset({"trust.revoked", "trust.expired", "seal.revoked", "store.missing"})
_FORGET_S: Final = 60.0

operator = structlog.get_logger("airgap.service")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds, and how often they may fail."""

    drain_s: float = 600.0
    wait_s: float = 20.0  # a request, for a pair that is being started
    restart_s: tuple[float, ...] = (0.0, 1.0, 5.0, 30.0, 60.0)  # by how many have ended
    ends: int = 6  # of sealed pairs within the window, after which none is started
    window_s: float = 600.0


@dataclass(slots=True, eq=False)
class Ticket:
    """One request at a pair: told to end by `stop`, which is the word that its person gets."""

    serving: Serving
    stop: AirgapError | None = None

    def proceed(self) -> None:
        """Return while the request may go on."""
        if self.stop is not None:
            raise anew(self.stop)


@dataclass(slots=True, eq=False)
class Serving:
    """A release that is served: its house, the sealed pair, the requests under way."""

    house: House
    key: Digest
    pair: tuple[Enclave, Enclave]
    stack: contextlib.ExitStack
    tickets: set[Ticket] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        """Whether both processes run."""
        return all(each.alive for each in self.pair)


@dataclass(frozen=True, slots=True)
class Standing:
    """How it stands: `state` is serving, changing, failed or ended; `why` the last refusal."""

    state: str
    house: House | None
    why: AirgapError | None


class Keeper:
    """See above. `load` checks the release that is to be served, every file hashed again."""

    def __init__(
        self,
        load: Callable[[], House],
        model: str,
        log: KeptLog,
        patience: Patience,
        on_change: Callable[[], None] = lambda: None,
        *,
        on_look: Callable[[Site], None] = lambda _: None,
    ) -> None:
        """`on_change` hears that `standing` is another, `on_look` at each look the site facts."""
        self._load, self._model, self._log = load, model, log
        self._patience, self._on_change, self._on_look = patience, on_change, on_look
        self._house: House | None = None  # the release that is or shall be served
        self._now: Serving | None = None
        self._why: AirgapError = _ended()  # while nothing serves
        self._retry = True  # by itself, at `_next_try`
        self._refused: AirgapError | None = None  # why the last release was not taken over
        self._doubt = ""  # what the last look at the tree found
        self._tried: Digest | None = None
        self._ends: list[float] = []
        self._next_try = 0.0
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._asked = False  # set in signal handlers, which may take no lock
        self._thread: threading.Thread | None = None

    # -- for the daemon ------------------------------------------------------------------------

    def start(self, house: House) -> None:
        """Start the pair of a release that was just checked; raises as `House.sealed_pair`."""
        self._open(house, _key_of(house), {"reason": "start"})
        self._thread = threading.Thread(target=self._run, name="service-keeper", daemon=True)
        self._thread.start()

    def ask_reload(self) -> None:
        """Load everything anew; safe in a signal handler."""
        self._asked = True

    @property
    def standing(self) -> Standing:
        """How it stands now."""
        now = self._now
        if now is not None and now.alive:
            return Standing("serving", now.house, self._refused)
        state = "changing" if self._retry and _passes(self._why) else "refusing"
        return Standing(state, self._house, self._why)

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Give one request its place at the pair that serves; wait while one is being started.

        Raises:
            AirgapError: Why nothing serves.

        """
        until = time.monotonic() + self._patience.wait_s
        with self._change:
            while (now := self._now) is None or not now.alive:
                why = _ended() if now is not None else self._why
                left = until - time.monotonic()
                if not (self._retry and _passes(why)) or left <= 0 or self._stop.is_set():
                    raise anew(why)
                self._change.wait(min(left, LOOK_S))
            mine = Ticket(now)
            now.tickets.add(mine)
        try:
            yield mine
        except AirgapError as error:
            if mine.stop is not None and error.code != mine.stop.code:
                raise anew(mine.stop) from error
            raise
        finally:
            with self._change:
                now.tickets.discard(mine)
                self._change.notify_all()

    def forget(self, request_set: str) -> None:
        """Let the worker drop what a person's requests left in its memory."""
        now = self._now
        if now is not None:
            with contextlib.suppress(AirgapError):
                now.pair[0].request(Forget(request_set).encode(), _FORGET_S)

    def close(self, hurry: Callable[[], bool], word: AirgapError) -> None:
        """Let the requests under way end, then the pair; its end is no incident.

        `hurry` ends the patience; `word` is what those get that did not end in time.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        now, self._now = self._now, None
        if now is not None:
            self._retire(now, word, hurry)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        looked = 0.0
        while not self._stop.wait(LOOK_S):
            try:
                self._log.look()
                now = self._now
                if now is not None and not now.alive:
                    self._bury(now)
                if self._asked or time.monotonic() - looked >= STANDING_S:
                    looked = time.monotonic()
                    self._look_at_tree()
                if self._now is None and self._retry and time.monotonic() >= self._next_try:
                    self._start_again()
            except (AirgapError, OSError) as error:
                operator.error("service.keeper", error=str(error)[:300])
            except Exception as error:  # noqa: BLE001 - nobody else looks after the pair
                operator.error("service.defect", error=f"{type(error).__name__}: {error}"[:300])

    def _look_at_tree(self) -> None:
        """End what may serve no more, and take over what shall."""
        asked, self._asked = self._asked, False
        house = self._house
        if house is None:
            return
        refusal = _refusal_of(house)
        # A folder of trust that is being written may look broken once; what is revoked never does.
        sure = refusal is not None and refusal.code in {*_CERTAIN, self._doubt}
        self._doubt = "" if refusal is None else refusal.code
        if refusal is not None and sure and self._now is not None:
            self._end_serving(self._now, refusal)
        try:
            self._on_look(house.tree.read().site)
            key = _wanted(house, self._model)
        except (AirgapError, OSError):
            key = None  # each request says why; nothing else can be taken over
        if self._now is not None and key == self._now.key:
            self._tried, self._refused = key, None
        if asked or (key is not None and key != self._tried):
            self._tried = key
            self._reload("asked for" if asked else "the tree names another release or worker")

    def _reload(self, reason: str) -> None:
        """Check the next release while the old one serves; then change, and never go back."""
        try:
            house = self._load()
        except AirgapError as error:
            self._refused = error
            operator.error("service.reload", code=error.code, message=error.message[:300])
            self._record_refused(reason, error)
            self._on_change()
            return
        old, before = self._now, self._house
        why = {"reason": reason}
        if before is not None:
            why["previous"] = str(before.installed.digest)
        with self._change:
            self._now, self._why, self._refused, self._retry = None, _changing(), None, True
        self._on_change()
        if old is not None:
            word = cut_off("the daemon changed to another release")
            self._retire(old, word, self._stop.is_set)
        if self._stop.is_set():
            return
        self._ends, self._next_try = [], 0.0
        self._house = house
        self._try_open(house, _key_of(house), why)

    def _record_refused(self, reason: str, error: AirgapError) -> None:
        """Put a release that was not taken over on record; the old one goes on."""
        house = self._house
        if house is None:
            return
        request, digest = new_ulid(), house.installed.digest
        data = {"digest": str(digest), "reason": reason}
        result = "refused" if isinstance(error, RefusedError) else "failed"
        with contextlib.suppress(AirgapError):
            self._log.append(Event("model.load", "intent", req=request, data=data))
            more = {**data, "result": result}
            self._log.append(Event("model.load", "outcome", req=request, err=error.code, data=more))

    def _end_serving(self, now: Serving, refusal: AirgapError) -> None:
        """End a release that may not go on, and at once what is under way at it."""
        operator.error("service.ended", code=refusal.code, message=refusal.message[:300])
        with self._change:
            self._now, self._why, self._retry = None, refusal, True
        self._retire(now, refusal, lambda: True)
        self._on_change()

    def _retire(self, old: Serving, word: AirgapError, hurry: Callable[[], bool]) -> None:
        """Wait for the requests of a pair, cut off those that do not end, and close it."""
        until = time.monotonic() + self._patience.drain_s
        operator.info("service.draining", requests=len(old.tickets))
        while old.tickets and time.monotonic() < until and not hurry():
            time.sleep(LOOK_S / 5)
            self._log.look()
            if (refusal := _refusal_of(old.house)) is not None:
                word = refusal
                break
        for ticket in tuple(old.tickets):
            ticket.stop = word
        until = time.monotonic() + LAST_WORDS_S
        while old.tickets and time.monotonic() < until:
            time.sleep(LOOK_S / 5)
        with contextlib.suppress(AirgapError, OSError):
            old.stack.close()  # a request that heeds nothing ends with its worker
        until = time.monotonic() + LAST_WORDS_S
        while old.tickets and time.monotonic() < until:
            time.sleep(LOOK_S / 5)

    def _bury(self, dead: Serving) -> None:
        """Record the end of a pair of which one has ended, and say when the next is due."""
        for each in dead.pair:
            if not each.alive:
                each.close()  # its end is on record from here on, as an incident
        with self._change:
            self._now, self._why = None, _ended()
        with contextlib.suppress(AirgapError, OSError):
            dead.stack.close()
        self._count_end(_ended())

    def _count_end(self, why: AirgapError) -> None:
        """Say when the next pair is due, if any; what the log or the disk refuses is no end."""
        now, patience = time.monotonic(), self._patience
        if why.code.partition(".")[0] in {"audit", "host"}:
            self._why, self._next_try = why, now + AGAIN_S
            self._on_change()
            return
        self._ends = [each for each in self._ends if now - each < patience.window_s] + [now]
        count = len(self._ends)
        self._next_try = now + patience.restart_s[min(count, len(patience.restart_s)) - 1]
        if count >= patience.ends:
            self._retry = False
            self._why = FaultError(
                "service.failed",
                f"{count} sealed workers have ended or not started within "
                f"{patience.window_s:g} s, the last: {why.code}: {why.message:.300}",
                hint="the administrator looks for the reason (airgap doctor; airgap audit show "
                "--kind enclave.incident), then: systemctl reload airgap",
            )
            operator.error("service.failed", ends=count, code=why.code)
            with contextlib.suppress(AirgapError):
                words = f"not started again: {count} ends in a row; the last {why.code}"
                self._log.append(
                    Event("enclave.incident", data={"profile": "worker", "reason": words})
                )
        self._on_change()

    def _start_again(self) -> None:
        """Start a pair in place of one that ended, its release checked as before any start."""
        house = self._house
        if house is None:
            return
        refusal = _refusal_of(house)
        if refusal is not None:
            self._why, self._next_try = refusal, time.monotonic() + STANDING_S
            return
        try:
            house = self._load()
        except AirgapError as error:
            operator.error("service.start", code=error.code, message=error.message[:300])
            self._why = error
            self._count_end(error)
            return
        self._try_open(house, _key_of(house), {"reason": "the one before ended"})

    def _try_open(self, house: House, key: Digest, why: dict[str, str]) -> None:
        try:
            self._open(house, key, why)
            operator.warning("service.started", model=str(house.installed.digest), **why)
        except (AirgapError, OSError) as error:
            known = error if isinstance(error, AirgapError) else disk_fault(error, "the start")
            operator.error("service.start", code=known.code, message=known.message[:300])
            self._why = _ended()
            self._count_end(known)

    def _open(self, house: House, key: Digest, why: dict[str, str]) -> None:
        with contextlib.ExitStack() as stack:
            pair = stack.enter_context(house.sealed_pair(self._log, lasting=True, why=why))
            serving = Serving(house, key, pair, stack.pop_all())
        with self._change:
            self._house, self._now, self._tried = house, serving, key
            self._change.notify_all()
        self._on_change()


def _key_of(house: House) -> Digest:
    """Return what a pair was started for: the release, and what site.toml says of its processes."""
    return _key(house.installed.digest, house)


def _wanted(house: House, model: str) -> Digest:
    """Return the same for what the tree says now; raises as `House.of` where that is cheap."""
    installed = find_installed(house.root, model)
    return _key(installed.digest, house)


def _key(digest: Digest, house: House) -> Digest:
    site = house.tree.read().site
    packs = [Digest.of(path.read_bytes()) for path in screen_packs(house.root)]
    parts: list[Any] = [digest, site.inference, site.enclave, *packs]
    return Digest.of("\n".join(repr(part) for part in parts).encode())


def _refusal_of(house: House) -> AirgapError | None:
    """Return why a release may serve no more; that the tree cannot be read is told by requests."""
    try:
        house.require_standing()
    except AirgapError as error:
        return error if error.code.partition(".")[0] in {"trust", "seal", "start"} else None
    if not house.installed.folder.is_dir():
        return RefusedError(
            "store.missing",
            f"{house.model.name} {house.model.version} was removed from the store",
            hint="airgap install, or airgap switch to another release",
        )
    return None


def anew(error: AirgapError) -> AirgapError:
    """Return the same error for another person: each raises one of her own."""
    return type(error)(error.code, error.message, hint=error.hint)


def _passes(why: AirgapError) -> bool:
    """Whether waiting helps."""
    return why.code in {CODE, "enclave.worker"}


def _ended() -> FaultError:
    return FaultError(
        "enclave.worker",
        "the sealed worker has ended and a new one is being started",
        hint="send the request again in a while",
    )


def _changing() -> FaultError:
    return FaultError(
        CODE,
        "the daemon changes to another release or worker, and takes requests again after that",
        hint="send the request again in a while",
    )


def cut_off(why: str) -> FaultError:
    """Return the last word to a request that did not end in time."""
    return FaultError(
        "service.draining",
        f"{why}, and this request had not ended in the time that it had for that",
        hint="send the request again",
    )

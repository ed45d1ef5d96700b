"""How often one account may be refused on record: a bucket of tokens for each.

Each denial is a record, and a record costs the log's disk, which all share. Whoever is refused
again and again soon has no token left: she is told when to ask again, her request is not looked
at, and how many were turned away so is told in one record a while later. What is admitted costs
nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from airgap.audit import Actor, Event
from airgap.audit.record import timestamp
from policy.errors import RefusedError

# A script with a typing error over a table of molecules, or a newcomer who tries things out, stays
# below the burst. One a second from then on is at most 64 MB of records of one account a day, of
# about 730 bytes each, where 25 a second were 1.5 GB.
BURST: Final = 60
PER_S: Final = 1.0
# One record for all that were turned away in so long: a tenth of what the denials cost.
TOLD_S: Final = 10.0
# Before a client is told that it was turned away: at once it would ask again, and all the processor
# of the daemon would go to the answers.
PAUSE_S: Final = 0.25
# Accounts that are kept: those of a large directory group. An entry has some 200 bytes.
ACCOUNTS: Final = 4_096


@dataclass(frozen=True, slots=True)
class Turned:
    """Requests of one account that were turned away and that no record tells of yet."""

    uid: int
    pid: int  # of the last
    count: int
    since: float  # the first, on the clock of the budget

    def event(self, now: float, wall_ns: int, actor: Actor | None) -> Event:
        """Return the record of them: `now` and `wall_ns` are the moment on both clocks."""
        since = timestamp(wall_ns - int((now - self.since) * 1e9))
        return Event(
            "denial",
            actor=actor,
            err="request.busy",
            data={"count": self.count, "stage": f"budget since {since}"},
        )


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    pid: int = 0
    turned: int = 0
    since: float = 0.0


@dataclass(slots=True)
class Budget:
    """The buckets of all accounts; threads may share it."""

    burst: int = BURST
    per_s: float = PER_S
    accounts: int = ACCOUNTS
    clock: Callable[[], float] = time.monotonic
    pause_s: float = PAUSE_S
    _buckets: OrderedDict[int, _Bucket] = field(default_factory=OrderedDict)  # last used last
    _left: list[Turned] = field(default_factory=list)  # of accounts that had to give way
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def request(self, uid: int, pid: int) -> Iterator[Callable[[], None]]:
        """Lend a token to a request; it is spent if the request calls what it is given.

        So requests at once have no more tokens than there are.

        Raises:
            RefusedError: `request.busy`, none is left; the request is counted as turned away.

        """
        spent = False

        def spend() -> None:
            nonlocal spent
            spent = True

        try:
            self._take(uid, pid)
        except RefusedError:
            time.sleep(self.pause_s)
            raise
        try:
            yield spend
        finally:
            if not spent:
                self._give_back(uid)

    def due(self, after_s: float = TOLD_S) -> list[Turned]:
        """Return what was turned away since `after_s` or longer, to be put on record by the caller.

        It counts as told from now on; see `keep`.
        """
        with self._lock:
            now, found = self.clock(), self._left
            self._left = []
            for uid, bucket in self._buckets.items():
                if bucket.turned and now - bucket.since >= after_s:
                    found.append(_turned(uid, bucket))
                    bucket.turned = 0
            return found

    def keep(self, turned: Turned) -> None:
        """Take back what could not be put on record."""
        with self._lock:
            bucket = self._buckets.get(turned.uid)
            if bucket is None:
                self._left.append(turned)
                return
            bucket.pid = bucket.pid or turned.pid
            bucket.turned += turned.count
            bucket.since = turned.since

    def _take(self, uid: int, pid: int) -> None:
        with self._lock:
            now = self.clock()
            bucket = self._buckets.get(uid)
            if bucket is None:
                self._make_room(now)
                bucket = self._buckets[uid] = _Bucket(float(self.burst), now)
            self._buckets.move_to_end(uid)
            self._fill(bucket, now)
            if bucket.tokens >= 1.0:
                bucket.tokens -= 1.0
                return
            if not bucket.turned:
                bucket.since = now
            bucket.turned += 1
            bucket.pid = pid
            wait_s = max(1, math.ceil((1.0 - bucket.tokens) / self.per_s))
        raise RefusedError(
            "request.busy",
            f"more than {self.burst} requests of yours were refused in a short time; this one was "
            "not looked at",
            hint=f"ask again in {wait_s} s",
        )

    def _give_back(self, uid: int) -> None:
        with self._lock:
            bucket = self._buckets.get(uid)
            if bucket is not None:  # else it was full, and gave way
                bucket.tokens = min(float(self.burst), bucket.tokens + 1.0)

    def _fill(self, bucket: _Bucket, now: float) -> None:
        gained = max(0.0, now - bucket.at) * self.per_s
        bucket.tokens = min(float(self.burst), bucket.tokens + gained)
        bucket.at = now

    def _make_room(self, now: float) -> None:
        """Forget an account where the table is full: the oldest that lost nothing by it, if any."""
        if len(self._buckets) < self.accounts:
            return
        for uid, each in self._buckets.items():  # noqa: B007 - the one that it breaks off at
            self._fill(each, now)
            if each.tokens >= self.burst and not each.turned:
                break
        else:
            uid = next(iter(self._buckets))
        bucket = self._buckets.pop(uid)
        if bucket.turned:
            self._left.append(_turned(uid, bucket))


def _turned(uid: int, bucket: _Bucket) -> Turned:
    return Turned(uid, bucket.pid, bucket.turned, bucket.since)

"""How many calls the filters of a sealed process have denied, from the kernel's own records.

Obeys docs/design/enclave.md, 7. Every filter is installed with the flag that asks the kernel for a
record (type 1326) of each denied call, by its host pid. Two sources exist: the audit multicast
group (CAP_AUDIT_READ; every record, unless the buffer runs over) and the kernel log (rate-limited,
so a lower bound). A source counts only after it has shown the denials that the worker provoked on
purpose, with its self-test; otherwise the count is unknown, never zero.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import time
from collections import Counter
from typing import Any

from airgap.enclave import tables

_NETLINK_AUDIT, _READLOG_GROUP = 9, 1
_SO_RCVBUFFORCE, _BUFFER = 33, 8 << 20
_HEAD = 16  # bytes of a netlink head
_RECORD = re.compile(rb" pid=(\d+) comm=.* syscall=(\d+) ")
_LOG_TYPE = b"type=1326 "
_SECCOMP_TYPE = 1326
_SETTLE_S = 0.05  # the kernel hands its records out by a thread of its own
_QUIET_S = 0.002
_SILENCE_LIMIT_S = 1.0
# The last calls that a seal provokes on purpose. Records come in order, so that these are the last.
LAST_OF_STAGE1 = tables.CEILING + 1
LAST_DOOR = tables.NUMBERS["tgkill"][0]
_ENOUGH = 3  # records of the self-test without which a source proves nothing
_DRAIN_LIMIT = 200_000


class Denials:
    """Listens from before a process starts until after it has ended."""

    def __init__(self) -> None:
        self.source: str | None = None
        self.exact = False
        self._descriptor = -1
        self._seen: dict[int, Counter[int]] = {}
        self._pid = 0
        self._before: Counter[int] = Counter()
        if not self._open_audit():
            self._open_log()

    def _open_audit(self) -> bool:
        try:
            made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_AUDIT)
        except OSError:
            return False
        try:
            made.bind((0, _READLOG_GROUP))
        except OSError:
            made.close()
            return False
        with contextlib.suppress(OSError):
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        made.setblocking(False)
        self._descriptor, self.source, self.exact = made.detach(), "audit", True
        return True

    def _open_log(self) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(descriptor, 0, os.SEEK_END)
            self._descriptor, self.source = descriptor, "kernel log"

    def settle(self, pid: int, last: int | None = None) -> None:
        """Wait for the denials that the self-test of `pid` provoked; later ones are its own.

        Args:
            pid: The process on the host.
            last: The call that was denied last; None waits for an instant of silence.

        """
        until = time.monotonic() + _SETTLE_S
        while self._descriptor >= 0:
            self._drain()
            seen = self._seen.get(pid, Counter())
            shown = seen.total() >= _ENOUGH
            if shown and last in seen:
                break
            left = until - time.monotonic()
            if left <= 0:
                break
            readable, _, _ = select.select([self._descriptor], [], [], _QUIET_S if shown else left)
            if shown and not readable:
                break
        self._pid = pid
        self._before = Counter(self._seen.get(pid, Counter()))
        if self._before.total() < _ENOUGH:
            self.close()
            self.source = None

    def poll(self) -> None:
        """Read what has come, so that no buffer runs over, and forget other processes."""
        self._drain()
        self._seen = {self._pid: self._seen.get(self._pid, Counter())}

    def result(self) -> dict[str, Any]:
        """Return the denied calls since `settle`; `count` is None where no source is readable."""
        if self.source is None or not self._pid:
            return {"count": None, "source": None, "exact": None, "calls": None}
        self._await_silence()
        since = self._seen.get(self._pid, Counter()) - self._before
        calls = {name_of(number): times for number, times in sorted(since.items())}
        return {
            "count": since.total(),
            "source": self.source,
            "exact": self.exact,
            "calls": calls,
        }

    def _await_silence(self) -> None:
        """Read until the kernel has been silent for a while: on a busy host its thread is late."""
        until = time.monotonic() + _SILENCE_LIMIT_S
        while self._descriptor >= 0:
            self.poll()
            if self._descriptor < 0 or not select.select([self._descriptor], [], [], _SETTLE_S)[0]:
                return
            if time.monotonic() > until:
                self.exact = False  # more may come, of others or of this one
                return

    def close(self) -> None:
        """Stop listening."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _drain(self) -> None:
        for _ in range(_DRAIN_LIMIT):
            if self._descriptor < 0:
                return
            try:
                content = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                # The buffer ran over: what follows is still true, but not all of it.
                self.exact = False
                if error.errno not in {errno.ENOBUFS, errno.EPIPE}:
                    self.close()
                    return
                continue
            self._note(content)

    def _note(self, content: bytes) -> None:
        found = parse_log(content) if self.source == "kernel log" else parse_audit(content)
        if found is not None:
            self._seen.setdefault(found[0], Counter())[found[1]] += 1


def parse_audit(message: bytes) -> tuple[int, int] | None:
    """Return (host pid, number of the call) of a netlink message, None for another record."""
    if len(message) < _HEAD or int.from_bytes(message[4:6], "little") != _SECCOMP_TYPE:
        return None
    return _fields(message[_HEAD:])


def parse_log(line: bytes) -> tuple[int, int] | None:
    """Return (host pid, number of the call) of a record of /dev/kmsg, None for another record.

    Only the kernel writes with facility 0; a line of a user bears another one.
    """
    head, _, text = line.partition(b";")
    priority = head.partition(b",")[0]
    if not priority.isdigit() or int(priority) >> 3 or not text.startswith(b"audit: " + _LOG_TYPE):
        return None
    return _fields(text)


def _fields(text: bytes) -> tuple[int, int] | None:
    found = _RECORD.search(text)
    return None if found is None else (int(found[1]), int(found[2]))


def name_of(number: int) -> str:
    """Return the name of an x86-64 call, or its number."""
    return next((name for name, pair in tables.NUMBERS.items() if pair[0] == number), str(number))

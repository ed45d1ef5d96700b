"""The audit log: durable records a second, latency of a barrier, verification, opening.

Peers write the same records to the same disk in the same run: SQLite (WAL, synchronous=FULL, one
transaction a batch of what waits) and a bare file with one fdatasync a batch. Neither chains,
hashes, reads back or signs; both show what the disk gives.
"""

from __future__ import annotations

import os
import queue
import shutil
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import Context, Paired, Result, alone, paired

from airgap.audit import (
    Actor,
    AuditLog,
    Commit,
    DecisionRef,
    Event,
    create_log_key,
    load_vkey,
    new_ulid,
    verify_log,
)
from airgap.audit.disk import Disk
from airgap.audit.record import encode
from airgap.audit.tiles import SEGMENT
from airgap.audit.writer import MAX_BATCH

MODEL = "sha256:" + "cd" * 32
VERIFIED = 60_000
OPENED = 1_048_000  # the last segment almost full: the worst case at a million


def run(context: Context) -> list[Result]:
    """Measure everything with a target in docs/design/audit.md, 12."""
    results: list[Result] = []
    with context.folder() as folder:
        key = folder / "keys" / "audit.pem"
        create_log_key(key, site="bench.example")
        for producers, each in ((1, 300), (64, 60)):
            results += _durable(context, folder, key, producers, each)
        context.step("barriers of one inference")
        results.append(_barriers(context, folder, key))
        results += _verify_and_open(context, folder, key)
    return results


def _durable(context: Context, folder: Path, key: Path, producers: int, each: int) -> list[Result]:
    """Return the rate against a floor, against SQLite and against a bare file."""
    name = f"{producers} producer{'s' if producers > 1 else ''}"
    content = {"producers": producers, "records_a_run": producers * each, "record_bytes": 700}
    results = []
    with _ours(folder, key) as log:
        context.step(f"durable records, {name}")
        floor = {1: 300.0, 64: 5_000.0}[producers]
        measured = alone(lambda: _rate(log, producers, each), floor, context.runs)
        results.append(
            measured.higher_is_better(
                f"durable, {name}: required rate", unit="records/s",
                target=1.0, peer_is=f"the design's floor of {floor:g}/s", **content,
            )
        )  # fmt: skip
        for peer_name, peer, target in (
            ("SQLite WAL FULL", _Sqlite(folder), 0.5),
            ("bare fdatasync", _Bare(folder), 0.25),
        ):
            context.step(f"durable records, {name}, beside {peer_name}")
            pair = paired(
                lambda: _rate(log, producers, each),
                lambda peer=peer: _rate(peer, producers, each),  # type: ignore[misc]
                context.runs,
            )
            peer.close()
            results.append(
                pair.higher_is_better(
                    f"durable, {name}: {peer_name}", unit="records/s",
                    target=target, **content,
                )
            )  # fmt: skip
    return results


def _barriers(context: Context, folder: Path, key: Path) -> Result:
    """Return the median cost of an intent and an outcome, each durable, beside two fdatasyncs."""
    waits: list[float] = []
    with _ours(folder, key) as log, (folder / "two.bin").open("wb") as file:
        decision = log.put_object(b'{"outcome":"permit"}')

        def ours() -> float:
            start = time.perf_counter()
            req = new_ulid()
            log.append(_intent(str(decision), req))
            log.append(_outcome(req))
            waits.append(time.perf_counter() - start)
            return waits[-1] * 1000

        def peer() -> float:
            start = time.perf_counter()
            for _ in range(2):
                os.write(file.fileno(), b"x" * 700 + b"\n")
                os.fdatasync(file.fileno())
            return (time.perf_counter() - start) * 1000

        pair = paired(ours, peer, 40 * context.runs)
    waits.sort()
    absolute = Paired(pair.ours, 10.0, pair.all_ours, (10.0,))
    return absolute.lower_is_better(
        "two barriers of an inference: limit", unit="ms", target=1.0,
        peer_is="the design's limit of 10 ms", p99_ms=round(waits[len(waits) * 99 // 100] * 1e3, 2),
        two_bare_fdatasyncs_ms=round(statistics.median(pair.all_peer), 3),
    )  # fmt: skip


def _verify_and_open(context: Context, folder: Path, key: Path) -> list[Result]:
    context.step(f"writing {VERIFIED} records to verify")
    with _ours(folder, key, "verified") as log:
        _bulk(log, VERIFIED)
        size = log.size
    vkey = load_vkey(key.with_suffix(".vkey"))

    def verify() -> float:
        start = time.process_time()  # of this process alone: a core's worth, whoever else runs
        verify_log(folder / "verified", vkey=vkey)
        return size / (time.process_time() - start)

    context.step("verifying")
    verified = alone(verify, 80_000.0, context.runs).higher_is_better(
        "verify, one core: required rate", unit="records/s", target=1.0, records=size,
        peer_is="the design's floor of 80,000/s", seconds="of CPU time",
    )  # fmt: skip
    context.step(f"generating {OPENED} records to open")
    log = AuditLog.open(folder / "opened", key=key, reserve_bytes=0, disk=_Unflushed())
    _generate(log, OPENED)
    shutil.copytree(folder / "opened", folder / "crashed")  # as a crash would leave it
    log.close()
    used: list[float] = []

    def reopen() -> float:
        copy = folder / "again"
        shutil.copytree(folder / "crashed", copy, copy_function=os.link)
        for name in (".lock", "log/checkpoints.jsonl", "log/checkpoint"):
            content = (copy / name).read_bytes()
            (copy / name).unlink()
            (copy / name).write_bytes(content)
        newest = max((copy / "log/seg").iterdir())
        shutil.copy(newest, newest.with_suffix(".new"))
        newest.with_suffix(".new").rename(newest)
        start, cpu = time.perf_counter(), time.process_time()
        opened = AuditLog.open(copy, key=key, reserve_bytes=0)
        took = time.perf_counter() - start
        used.append(time.process_time() - cpu)
        opened.close()
        shutil.rmtree(copy)
        return took

    context.step("opening after a crash")
    opened = alone(reopen, 1.0, context.runs).lower_is_better(
        f"open {OPENED:,} records after a crash: limit", unit="s", target=1.0, records=OPENED,
        peer_is="the design's limit of 1 s", cpu_s=round(statistics.median(used), 3),
        lines_to_read=OPENED % SEGMENT,
    )  # fmt: skip
    return [verified, opened]


# -- ours --------------------------------------------------------------------------------------


@contextmanager
def _ours(folder: Path, key: Path, name: str = "log") -> Iterator[AuditLog]:
    with AuditLog.open(folder / name, key=key, reserve_bytes=0) as log:
        yield log


class _Unflushed(Disk):
    """Real files without flushes, to generate a long log: nothing here is measured."""

    def fsync(self, fd: int) -> None:
        """Leave it to the kernel."""

    def fdatasync(self, fd: int) -> None:
        """Leave it to the kernel."""


def _generate(log: AuditLog, count: int) -> None:
    """Append `count` records, of which one in 512 waits for the writer."""
    decision = str(log.put_object(b'{"outcome":"permit"}'))
    while log.size < count:
        for _ in range(MAX_BATCH // 2):
            req = new_ulid()
            log._submit(_intent(decision, req), None, None)  # noqa: SLF001 - without waiting
            log._submit(_outcome(req), None, None)  # noqa: SLF001
        req = new_ulid()
        log.append(_intent(decision, req))
        log.append(_outcome(req))


def _bulk(log: AuditLog, count: int) -> None:
    """Append `count` records by threads that share commits."""
    producers = 64
    _rate(log, producers, count // producers)


def _intent(decision: str, req: str) -> Event:
    return Event(
        kind="inference", phase="intent", req=req, actor=Actor("jdoe", "scientist"),
        project="P-0042", decision=DecisionRef(decision, "permit", "BASE-USE"), model=MODEL,
        in_=Commit("ef" * 32, 512), data={"task": "retrosynthesis", "n": 10, "seed": 7},
    )  # fmt: skip


def _outcome(req: str) -> Event:
    return Event(
        kind="inference", phase="outcome", req=req, actor=Actor("jdoe", "scientist"),
        project="P-0042", out=Commit("01" * 32, 2048), tok=(512, 1024), lat_ms=1834,
        data={"result": "complete", "samples": 10},
    )  # fmt: skip


# -- peers -------------------------------------------------------------------------------------


class _GroupCommit:
    """Producers that wait, and one thread that makes what waits durable in one go."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[bytes, threading.Lock] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def append(self, event: Event) -> None:
        line = encode(event.fields(uid=0, auth="self"))
        done = threading.Lock()
        done.acquire()
        self._queue.put((line, done))
        done.acquire()

    def put_object(self, _content: bytes) -> str:
        return "sha256:" + "ab" * 32

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        self.begin()
        while (item := self._queue.get()) is not None:
            batch = [item]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    self._queue.put(None)
                    break
                batch.append(more)
            self.commit([line for line, _ in batch])
            for _, done in batch:
                done.release()

    def begin(self) -> None:
        """Open the file; runs in the writer's thread."""
        raise NotImplementedError

    def commit(self, lines: list[bytes]) -> None:
        """Make the lines durable."""
        raise NotImplementedError


class _Sqlite(_GroupCommit):
    def __init__(self, folder: Path) -> None:
        self._path = folder / f"peer-{time.time_ns()}.sqlite"
        super().__init__()

    def begin(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("CREATE TABLE log (seq INTEGER PRIMARY KEY, line BLOB)")

    def commit(self, lines: list[bytes]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO log (line) VALUES (?)", [(line,) for line in lines])
        self._db.execute("COMMIT")


class _Bare(_GroupCommit):
    def __init__(self, folder: Path) -> None:
        self._path = folder / f"peer-{time.time_ns()}.jsonl"
        super().__init__()

    def begin(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def commit(self, lines: list[bytes]) -> None:
        os.write(self._fd, b"\n".join(lines) + b"\n")
        os.fdatasync(self._fd)


def _rate(log: AuditLog | _GroupCommit, producers: int, each: int) -> float:
    """Return acknowledged records a second with so many threads, each appending in turn."""
    decision = str(log.put_object(b'{"outcome":"permit"}'))

    def work() -> None:
        for _ in range(each // 2):
            req = new_ulid()
            log.append(_intent(decision, req))
            log.append(_outcome(req))

    threads = [threading.Thread(target=work) for _ in range(producers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return producers * each / (time.perf_counter() - start)


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)

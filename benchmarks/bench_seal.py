"""What the seal costs: the start of a worker and one round trip, against the same worker unsealed.

Obeys docs/design/enclave.md, 11: at most 60 ms more at the start (difference of medians, 15 pairs
or more, the kept probe apart) and nothing measurable a request. The unsealed worker is made here
and nowhere in the product: it runs the worker's own code but for the launcher's layers and the last
filter. The real worker is started too where `airgap demo` has left a lab.
"""

from __future__ import annotations

import compileall
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness import Context, Paired, Result

    from airgap.enclave import SealSpec

ROOT = Path(__file__).resolve().parents[1]
LAB = Path(os.environ.get("AIRGAP_BENCH_LAB", ROOT / "demo-out" / "lab"))
ALLOWED_MS = 60.0
LEAST_PAIRS = 15
REQUESTS = 2000
PAYLOAD = b"x" * 1024

# Entry, worker and program as in the seal; it loads, says so, and serves.
BARE = """
import json, os, sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("entry", sys.argv[1])
entry = module_from_spec(spec)
spec.loader.exec_module(entry)
where = json.loads(sys.argv[2])
sys.meta_path.append(entry.Folders(where["packages"]))
sys.path.extend(where["site"])
os.dup2(int(sys.argv[3]), 203), os.dup2(int(sys.argv[4]), 204)
os.dup2(203, 3), os.dup2(204, 4), os.close(203), os.close(204)
from airgap.enclave import channel, worker
try:
    program, wanted = worker.load()
    channel.receive(3, 1 << 20)
    channel.send(4, channel.READY, b"{}")
    worker.serve(program, wanted["request_cap"])
except EOFError:
    os._exit(0)
"""


class Echo:
    """The smallest program: what is left is the seal."""

    def warm_up(self) -> dict[str, Any]:
        """Need nothing."""
        return {}

    def handle(self, payload: bytes, emit: Callable[[bytes], None]) -> bytes:
        """Answer with the question."""
        del emit
        return payload


def create(config: dict[str, Any]) -> Echo:
    """Make the program; this file is loaded inside the seal."""
    del config
    return Echo()


def run(context: Context) -> list[Result]:
    """Measure start and round trip."""
    from airgap.enclave import SealSpec, host
    from airgap.enclave.host import default_min_rung

    for room in ("airgap", "bundle", "policy"):  # as an installation has them
        compileall.compile_dir(ROOT / room, quiet=1)
    facts = host.survey()
    rung = "A" if facts.uid == 0 else default_min_rung(facts)
    here = Path(__file__).resolve()
    echo = SealSpec(profile="worker", program=f"{here}:create", read_only=(here,), reverify_s=0)
    pairs = max(context.runs, LEAST_PAIRS)
    context.step(f"start on rung {rung}, {pairs} pairs")
    out = [started("start", echo, rung, pairs)]
    model = real_worker(context)
    if model is not None:
        context.step("start of the real worker")
        out.append(started("worker_start", model, rung, pairs))
    context.step(f"{REQUESTS} round trips of {len(PAYLOAD)} bytes")
    return [*out, round_trips(echo, rung, context.runs * 4)]


def real_worker(context: Context) -> SealSpec | None:
    """Return the worker of the lab that the demo leaves, None without one that opens."""
    if not (LAB / "store" / "current").exists():
        return None
    from dataclasses import replace

    from airgap.config import load_site
    from airgap.serve import open_broker
    from airgap.serve.session import find_installed, specs
    from policy.errors import AirgapError

    try:
        with open_broker(LAB, project="route-design") as (broker, _):
            spec = specs(find_installed(LAB, ""), broker.model, load_site(LAB), LAB)[0]
    except AirgapError as error:
        context.step(f"no figure of the real worker: {error.code}; run `airgap demo` again")
        return None
    return replace(spec, reverify_s=0)


def started(name: str, spec: SealSpec, rung: str, pairs: int) -> Result:
    """Return what the seal adds to a start, in ms, against what is allowed."""
    from harness import Result, paired

    from airgap.enclave import host, seal

    facts = host.survey()

    def sealed() -> float:
        begun = time.perf_counter()
        enclave = seal.start(rung, spec, facts)
        taken = time.perf_counter() - begun
        enclave.close()
        return taken * 1e3

    def bare() -> float:
        begun = time.perf_counter()
        peer = Bare(spec)
        taken = time.perf_counter() - begun
        peer.close()
        return taken * 1e3

    both: Paired = paired(sealed, bare, pairs, warm_ups=2)
    added = max(both.ours - both.peer, 0.01)
    conditions = {
        "peer_is": "60 ms allowed",
        "rung": rung,
        "runs": pairs,
        "paired_ms": round(statistics.median(map(float.__sub__, both.all_ours, both.all_peer)), 2),
        "sealed_ms": round(both.ours, 2),
        "bare_ms": round(both.peer, 2),
        "sealed_range": [round(min(both.all_ours), 2), round(max(both.all_ours), 2)],
        "bare_range": [round(min(both.all_peer), 2), round(max(both.all_peer), 2)],
    }
    return Result(name, ALLOWED_MS / added, 1.0, added, ALLOWED_MS, "ms", conditions)


def round_trips(spec: SealSpec, rung: str, runs: int) -> Result:
    """Return the time of one round trip through the same frames, sealed and bare, in us."""
    from harness import paired

    from airgap.enclave import host, seal

    peer = Bare(spec)
    with seal.start(rung, spec, host.survey()) as enclave:
        # The pipe ends themselves on both sides: what differs is the seal of the other process.
        process = enclave._process  # noqa: SLF001
        both = paired(
            lambda: exchange(process.reader, process.writer),
            lambda: exchange(peer.reader, peer.writer),
            runs,
        )
    peer.close()
    return both.lower_is_better(
        "round_trip", unit="us", target=0.8, rung=rung, bytes=len(PAYLOAD), peer_is="unsealed"
    )


def exchange(reader: Any, writer: Any) -> float:
    """Return the mean time of a round trip in us."""
    from airgap.enclave import channel

    begun = time.perf_counter()
    deadline = time.monotonic() + 60
    for number in range(1, REQUESTS + 1):
        writer.write(channel.encode(channel.REQUEST, PAYLOAD, number), deadline=deadline)
        reader.read((channel.REPLY,), cap=1 << 20, deadline=deadline, request=number)
    return (time.perf_counter() - begun) / REQUESTS * 1e6


class Bare:
    """The worker of `spec` without a seal, as far as READY."""

    def __init__(self, spec: SealSpec) -> None:
        from airgap.enclave import channel, plan
        from airgap.enclave.channel import Reader, Writer

        packages = plan.package_folders()
        where = json.dumps({"packages": packages, "site": plan.site_folders()})
        incoming, self._to = os.pipe()
        self._from, outgoing = os.pipe()
        entry = f"{packages['airgap']}/enclave/entry.py"
        self._popen = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-B",
                "-c",
                BARE,
                entry,
                where,
                f"{incoming}",
                f"{outgoing}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(incoming, outgoing),
            cwd="/",
            env=plan.built_environment(threads=spec.caps.threads),
        )
        os.close(incoming)
        os.close(outgoing)
        self.reader, self.writer = Reader(self._from), Writer(self._to)
        wanted = {
            "program": spec.program,
            "config": spec.config,
            "request_cap": spec.caps.request_bytes,
            "cuda": None,
        }
        deadline = time.monotonic() + 60
        for kind, payload, answer in (
            (channel.PROGRAM, json.dumps(wanted).encode(), channel.LOADED),
            (channel.SEAL, b"", channel.READY),
        ):
            self.writer.write(channel.encode(kind, payload), deadline=deadline)
            self.reader.read((answer,), cap=1 << 20, deadline=deadline)

    def close(self) -> None:
        """End it."""
        os.close(self._to)
        os.close(self._from)
        self._popen.wait(10)


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)

"""Verification against `sha256sum` on the same cached bytes; memory, disk and time to refuse.

Obeys docs/design/bundle.md, 9. Our side does all of steps 0 to 8: seal, trust, manifest, every
chunk, every header, the documents inside and the strict parsers. The peer hashes and does nothing
else. Both read a file that lies in the page cache.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import FOLDER, Context, Paired, Result, alone, paired, seconds

sys.path.insert(0, str(FOLDER.parent / "tests"))
import bundles

from airgap.install import install
from bundle.trust import Trust, append_root, save_trust
from bundle.verify import open_bundle, verify_bundle
from policy.errors import RefusedError
from policy.terms import Digest

SIZE = 1024 * 1024 * 1024
MEMORY_LIMIT = 200.0  # MiB
SPARE = 64.0  # MiB of disk beside the installed size
REFUSAL = 1.0  # seconds
MIB = 1024 * 1024
PEER = ("sha256sum",)
# Uses the processor's SHA instructions everywhere, which the sha256sum of some systems does not.
FAST_PEER = ("openssl", "dgst", "-sha256")


def run(context: Context) -> list[Result]:
    """Build one bundle and measure everything on it."""
    trust = bundles.make_trust()
    with context.folder() as scratch:
        context.step(f"building a bundle of {SIZE // MIB} MiB")
        path = build(scratch)
        found = []
        cores = sorted(os.sched_getaffinity(0))
        context.step("one core: airgap verify against sha256sum")
        facts = {"mib": SIZE // MIB, "peer_is": "sha256sum, one core", "cached": True}
        with pinned(cores[:1]):
            pair = rates(path, trust, context.runs)
            fast = rates(path, trust, context.runs, FAST_PEER)
        found.append(
            pair.higher_is_better("one_core", unit="MiB/s", target=0.9, threads=1, **facts)
        )
        faster = facts | {"peer_is": "openssl dgst -sha256, one core"}
        found.append(
            fast.higher_is_better("one_core.openssl", unit="MiB/s", target=0.9, threads=1, **faster)
        )
        if len(cores) > 1:
            context.step("two cores: airgap verify against sha256sum")
            with pinned(cores[:2]):
                pair = rates(path, trust, context.runs)
            found.append(
                pair.higher_is_better("two_cores", unit="MiB/s", target=1.7, threads=2, **facts)
            )
        context.step("memory, refusal, disk")
        found += [memory(path, trust, scratch), refusal(path, trust), disk(path, trust, scratch)]
    return found


def build(scratch: Path) -> Path:
    """Write a bundle whose weights fill it; unrelated bytes, so that nothing is cached twice."""
    weights, path = scratch / "weights", scratch / "bench.agb"
    with weights.open("wb") as stream:
        for part in range(SIZE // (16 * MIB)):
            stream.write(bundles.make_weights(16 * MIB, seed=part))
    bundles.make_bundle(path, members=bundles.make_members(weights))
    weights.unlink()
    return path


def rates(path: Path, trust: Trust, runs: int, argv: tuple[str, ...] = PEER) -> Paired:
    """Measure MiB a second of both sides."""
    size = path.stat().st_size / MIB
    ours = seconds(lambda: verify_bundle(path, trust, now=bundles.NOW))
    peer = seconds(lambda: subprocess.run([*argv, path], check=True, capture_output=True))
    return paired(lambda: size / ours(), lambda: size / peer(), runs)


def memory(path: Path, trust: Trust, scratch: Path) -> Result:
    """Measure the peak memory of a process that verifies the bundle."""
    save_trust(trust, scratch / "trust")
    script = (
        "import re, sys\n"
        "from datetime import datetime\n"
        "from pathlib import Path\n"
        "from bundle.trust import load_trust\n"
        "from bundle.verify import verify_bundle\n"
        "verify_bundle(Path(sys.argv[1]), load_trust(Path(sys.argv[2])),\n"
        "              now=datetime.fromisoformat(sys.argv[3]))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(re.search('VmHWM:\\\\s*([0-9]+)', status)[1])\n"
    )
    argv = [sys.executable, "-c", script, path, scratch / "trust", bundles.NOW.isoformat()]

    def peak() -> float:
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        return int(done.stdout) / 1024

    return alone(peak, MEMORY_LIMIT, 1, warm_ups=0).lower_is_better(
        "peak_memory", unit="MiB", target=1.0, mib=SIZE // MIB, peer_is="the required figure"
    )


def refusal(path: Path, trust: Trust) -> Result:
    """Measure the time to refuse a bundle that too few people signed."""
    demanding = trust_of_three(trust)

    def refuse() -> None:
        with contextlib.suppress(RefusedError):
            open_bundle(path, demanding, now=bundles.NOW).close()
            raise AssertionError("it was accepted")

    return alone(seconds(refuse), REFUSAL, 3).lower_is_better(
        "refusal", unit="s", target=1.0, mib=SIZE // MIB, peer_is="the required figure"
    )


def trust_of_three(trust: Trust) -> Trust:
    """Return the host's trust with one more version, in which three approvers are needed."""
    root = trust.document
    three = root.thresholds.seal.model_copy(update={"people": 3})
    thresholds = root.thresholds.model_copy(update={"seal": three})
    newer = root.model_copy(update={"version": root.version + 1, "thresholds": thresholds})
    return append_root(trust, newer, [bundles.signer("root")])


class _Yes:
    """A policy that admits: what is measured here is the disk."""

    permitted = True
    canonical = b"{}"
    digest = Digest.of(canonical)

    def refusal(self) -> RefusedError:
        """Never asked for."""
        raise NotImplementedError


def disk(path: Path, trust: Trust, scratch: Path) -> Result:
    """Measure the most disk space that an install takes, sampled while it runs."""
    root = scratch / "root"
    save_trust(trust, root / "trust")
    size = path.stat().st_size / MIB

    def peak() -> float:
        with watched(root) as most:
            install(
                path,
                root=root,
                now=bundles.NOW,
                gate=lambda _manifest, _digest: _Yes(),
                audit=lambda event: event,
            )
        return most[0]

    found = alone(peak, size + SPARE, 1, warm_ups=0)
    for place, _, _ in os.walk(root):
        Path(place).chmod(0o700)
    return found.lower_is_better(
        "install_space", unit="MiB", target=1.0, peer_is="installed size + 64 MiB"
    )


@contextmanager
def watched(folder: Path) -> Iterator[list[float]]:
    """Sample the space below a folder; yields a list of one figure, in MiB."""
    most, done = [0.0], threading.Event()

    def sample() -> None:
        while True:
            used = 0
            for place, _, names in os.walk(folder):
                for name in names:
                    try:
                        used += (Path(place) / name).lstat().st_blocks * 512
                    except OSError:
                        continue
            most[0] = max(most[0], used / MIB)
            if done.is_set():
                return
            time.sleep(0.01)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


@contextmanager
def pinned(cores: list[int]) -> Iterator[None]:
    """Restrict this process, and what it starts, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

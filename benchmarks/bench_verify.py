"""Verification against `sha256sum`, `tar` and `model_signing`; memory, disk and time to refuse.

Obeys docs/design/bundle.md, 9. Our side does all of steps 0 to 8: seal, trust, manifest, every
chunk, every header, the documents inside and the strict parsers. The peers hash, or copy, and do
nothing else. All read files that lie in the page cache. AIRGAP_BENCH_BUNDLE_MIB sets the size: 4096
where the disk has room for it three times over, else 1024.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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
from cnsa2 import make_cnsa2_bundle, make_cnsa2_trust

from airgap.install import install
from bundle import transit
from bundle.media import Help, open_medium
from bundle.source import PlainFile
from bundle.split import split
from bundle.trust import Trust, append_root, save_trust
from bundle.verify import open_bundle, verify_bundle
from policy.errors import RefusedError
from policy.terms import Digest

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
        mib = size_for(scratch)
        context.step(f"building a bundle of {mib} MiB")
        path, building = build(scratch, mib)
        found = [building]
        cores = sorted(os.sched_getaffinity(0))
        context.step("one core: airgap verify against sha256sum")
        facts = {"mib": mib, "peer_is": "sha256sum, one core", "cached": True}
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
        context.step("against tar, which only copies, and model_signing")
        found.append(against_tar(path, trust, context.runs, mib))
        found += against_model_signing(path, trust, scratch, context.runs, mib)
        context.step("volumes and encryption against the plain file")
        found += other_forms(path, trust, scratch, context.runs, mib)
        context.step("profile cnsa2 against sha384sum, one core")
        with pinned(cores[:1]):
            found.append(against_sha384sum(scratch, context.runs, mib // 4))
        context.step("memory, refusal, disk")
        found += [
            memory(path, trust, scratch, mib),
            refusal(path, trust, mib),
            disk(path, trust, scratch),
        ]
    return found


def size_for(scratch: Path) -> int:
    """Return the size of the bundle in MiB: as asked for, else as the disk allows."""
    asked = os.environ.get("AIRGAP_BENCH_BUNDLE_MIB", "")
    if asked:
        return int(asked)
    free = shutil.disk_usage(scratch).free // MIB
    return 4096 if free > 4 * 4096 else 1024


def build(scratch: Path, mib: int) -> tuple[Path, Result]:
    """Write a bundle whose weights fill it, of bytes that never repeat; and measure the writing."""
    weights, path = scratch / "weights", scratch / "bench.agb"
    with weights.open("wb") as stream:
        for _ in range(mib // 16):
            stream.write(os.urandom(16 * MIB))
    members = bundles.make_members(weights)
    pair = paired(
        seconds(lambda: bundles.make_bundle(path, members=members)),
        seconds(lambda: copy_and_hash(weights, scratch / "copy")),
        1,
        warm_ups=0,
    )
    weights.unlink()
    return path, pair.lower_is_better(
        "build", unit="s", target=1.0, mib=mib, peer_is="cp, sync and sha256sum of the weights"
    )


def copy_and_hash(weights: Path, copy: Path) -> None:
    """Do what a release made by hand takes at least."""
    subprocess.run(["cp", weights, copy], check=True)
    subprocess.run(["sync", copy], check=True)
    subprocess.run(["sha256sum", copy], check=True, capture_output=True)
    copy.unlink()


def against_tar(path: Path, trust: Trust, runs: int, mib: int) -> Result:
    """Compare with tar taking the same bytes out to nowhere, without any check."""
    size = path.stat().st_size / MIB
    ours = seconds(lambda: verify_bundle(path, trust, now=bundles.NOW))
    command = f"tar -xOf '{path}' | cat > /dev/null"  # GNU tar skips the work for /dev/null itself
    peer = seconds(lambda: subprocess.run(["sh", "-c", command], check=True))
    pair = paired(lambda: size / ours(), lambda: size / peer(), runs)
    return pair.higher_is_better(
        "tar", unit="MiB/s", target=0.5, mib=mib, peer_is="tar -xO, which checks nothing"
    )


def against_model_signing(
    path: Path, trust: Trust, scratch: Path, runs: int, mib: int
) -> list[Result]:
    """Compare with `model_signing verify` of the same files, taken out of the bundle."""
    program = Path(sys.executable).with_name("model_signing")
    if not program.exists():
        return []
    folder, key = scratch / "model", scratch / "key.pem"
    folder.mkdir()
    subprocess.run(["tar", "xf", path, "-C", folder, "payload"], check=True)
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key]
    subprocess.run(curve, check=True, capture_output=True)
    public, signature = scratch / "pub.pem", scratch / "model.sig"
    opened = ["openssl", "ec", "-in", key, "-pubout", "-out", public]
    subprocess.run(opened, check=True, capture_output=True)
    where = ["--signature", signature, folder]
    subprocess.run(
        [program, "sign", "key", "--private_key", key, *where], check=True, capture_output=True
    )
    argv = [program, "verify", "key", "--public_key", public, *where]
    ours = seconds(lambda: verify_bundle(path, trust, now=bundles.NOW))
    peer = seconds(lambda: subprocess.run(argv, check=True, capture_output=True))
    pair = paired(ours, peer, runs)
    shutil.rmtree(folder)
    return [
        pair.lower_is_better(
            "model_signing",
            unit="s",
            target=1.0,
            mib=mib,
            peer_is="model_signing verify key, of the payload alone",
        )
    ]


def against_sha384sum(scratch: Path, runs: int, mib: int) -> Result:
    """Compare a bundle of the profile `cnsa2` with `sha384sum` of the same file."""
    weights, path = scratch / "weights", scratch / "cnsa2.agb"
    with weights.open("wb") as stream:
        for _ in range(mib // 16):
            stream.write(os.urandom(16 * MIB))
    make_cnsa2_bundle(path, members=bundles.make_members(weights))
    weights.unlink()
    trust, size = make_cnsa2_trust(), path.stat().st_size / MIB
    ours = seconds(lambda: verify_bundle(path, trust, now=bundles.NOW))
    peer = seconds(lambda: subprocess.run(["sha384sum", path], check=True, capture_output=True))
    pair = paired(lambda: size / ours(), lambda: size / peer(), runs)
    path.unlink()
    return pair.higher_is_better(
        "cnsa2", unit="MiB/s", target=0.9, mib=mib, threads=1, peer_is="sha384sum, one core"
    )


def other_forms(path: Path, trust: Trust, scratch: Path, runs: int, mib: int) -> list[Result]:
    """Compare a set of 12 volumes and an encrypted file with the plain bundle."""
    plain = seconds(lambda: verify_bundle(path, trust, now=bundles.NOW))
    folder = scratch / "set"
    folder.mkdir()
    medium = open_medium(path)
    size = path.stat().st_size // 11
    split(medium, folder, volume_size=size, parity_count=1)
    medium.close()
    of_set = seconds(lambda: verify_bundle(folder, trust, now=bundles.NOW))
    found = [
        paired(of_set, plain, runs).lower_is_better(
            "volumes", unit="s", target=0.6, mib=mib, peer_is="the same bundle in one file"
        )
    ]
    lost = sorted(folder.iterdir())[4]
    lost.unlink()
    found.append(
        paired(of_set, plain, 1, warm_ups=0).lower_is_better(
            "volumes.one_lost",
            unit="s",
            target=0.1,
            mib=mib,
            volumes=len(list(folder.iterdir())),
            peer_is="the same bundle in one file",
        )
    )
    shutil.rmtree(folder)
    key, out = transit.new_transit_key(scratch, "bench"), scratch / "bench.agb.enc"
    transit.encrypt_file(PlainFile(path), out, [key])
    more = Help(identities=(transit.load_identity(scratch / "bench.transit.pem"),))
    opened = seconds(lambda: verify_bundle(out, trust, now=bundles.NOW, more=more))
    found.append(
        paired(opened, plain, runs).lower_is_better(
            "encrypted", unit="s", target=0.3, mib=mib, peer_is="the same bundle in plain"
        )
    )
    out.unlink()
    return found


def rates(path: Path, trust: Trust, runs: int, argv: tuple[str, ...] = PEER) -> Paired:
    """Measure MiB a second of both sides."""
    size = path.stat().st_size / MIB
    ours = seconds(lambda: verify_bundle(path, trust, now=bundles.NOW))
    peer = seconds(lambda: subprocess.run([*argv, path], check=True, capture_output=True))
    return paired(lambda: size / ours(), lambda: size / peer(), runs)


def memory(path: Path, trust: Trust, scratch: Path, mib: int) -> Result:
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
        "peak_memory", unit="MiB", target=1.0, mib=mib, peer_is="the required figure"
    )


def refusal(path: Path, trust: Trust, mib: int) -> Result:
    """Measure the time to refuse a bundle that too few people signed."""
    demanding = trust_of_three(trust)

    def refuse() -> None:
        with contextlib.suppress(RefusedError):
            open_bundle(path, demanding, now=bundles.NOW).close()
            raise AssertionError("it was accepted")

    return alone(seconds(refuse), REFUSAL, 3).lower_is_better(
        "refusal", unit="s", target=1.0, mib=mib, peer_is="the required figure"
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


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)

"""From a split bundle on a read-only mount to an answered request, on a root that has nothing.

`python tests/clean_root.py --demo demo-out --work build/clean-root` takes the keys and the model
that `airgap demo` left, builds a bundle of wheels, signs and splits it, and installs both on a
Debian root with python3 and openssl alone (debootstrap; kept as an archive in --cache), inside a
network namespace without a route and a process namespace of its own. At the end it answers one
request, verifies the exported log with the public key, runs the installer again and finds nothing
changed; the counters of the namespace show that nothing even tried to connect. Without root,
debootstrap or unshare it says so and ends with 77. `make wheel-test` runs it; pytest a short form.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bare_roots import CACHE, REPOSITORY, SKIPPED, make_medium, make_root, reason_to_skip

# Runs as the first process of the new namespaces; ends as the lab's first shell.
ENTER = """
set -eu
root=$1
mount --make-rprivate /
mount --bind "$root" "$root"
mkdir -p "$root/media/disc"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/dev"
for node in null zero full random urandom; do
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm"
mount --bind "$2" "$root/media/disc"
mount -o remount,bind,ro "$root/media/disc"
cd "$root"
pivot_root . mnt
exec chroot . /bin/sh -c 'umount -l /mnt && exec sh /lab.sh' </dev/null
"""
LAB = """
set -eu
cd /media/disc
test ! -w /media/disc || { echo 'the medium can be written' >&2; exit 1; }
for signature in SHA256SUMS.*.sig; do
    key=${signature#SHA256SUMS.}
    openssl pkeyutl -verify -pubin -inkey "keys/${key%.sig}.pem" -rawin -in SHA256SUMS \\
        -sigfile "$signature"
done
sha256sum -c --strict SHA256SUMS
install() {
    printf '%s\\n' "$(cat fingerprint)" |
        sh install.sh --bundle /media/disc --system --site site.toml --model media/model.agb
}
install
airgap=/opt/airgap/bin/airgap
$airgap run retrosynthesis --smiles 'CC(=O)Nc1ccc(O)cc1' -n 4 --seed 1 --project route-design \\
    --root /var/lib/airgap --receipt /tmp/answer.tlog-proof --html /tmp/answer.html --json \\
    > /tmp/answer.json
grep -q '<svg' /tmp/answer.html
$airgap audit export -o /tmp/export --root /var/lib/airgap
$airgap audit verify /tmp/export --vkey /var/lib/airgap/keys/audit.vkey \\
    --anchors /tmp/answer.tlog-proof
state() { find /opt/airgap /var/lib/airgap /etc -printf '%p %s %T@\\n' | sort | sha256sum; }
state > /tmp/before
install | tail -1 > /tmp/said
state > /tmp/after
cmp /tmp/before /tmp/after
echo "second run: $(cat /tmp/said)"
grep -q 'nothing to do' /tmp/said
for name in huggingface_hub requests urllib3 torch; do
    ! ls -d /opt/airgap/runtimes/*/lib/python3*/site-packages/$name 2>/dev/null
done
echo 'counters:'
grep -E '^(Ip|Tcp|Udp):' /proc/net/snmp
tail -n +2 /proc/net/route
echo 'control:'
python3 -I -c '
import socket
for kind, port in ((socket.SOCK_STREAM, 443), (socket.SOCK_DGRAM, 53)):
    try:
        socket.socket(socket.AF_INET, kind).connect(("192.0.2.1", port))
    except OSError as error:
        print(error)
'
grep -E '^(Ip|Tcp|Udp):' /proc/net/snmp
"""
# Columns of /proc/net/snmp that a single attempt to reach somebody would raise.
SILENT = {
    "Ip": ("OutRequests", "OutNoRoutes", "InReceives"),
    "Tcp": ("ActiveOpens", "AttemptFails", "OutSegs"),
    "Udp": ("OutDatagrams", "NoPorts"),
}


def main() -> int:
    """Build, sign, split, enter, install, ask, verify; exits with the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="what `airgap demo` left")
    parser.add_argument("--work", type=Path, required=True, help="a folder to work in; cleared")
    parser.add_argument("--medium", type=Path, help="where the medium is, or is made and stays")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--airgap", type=Path, default=REPOSITORY, help="source that is installed")
    options = parser.parse_args()
    reason = reason_to_skip()
    if reason:
        print(f"clean-root: SKIPPED, {reason}")
        return SKIPPED
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    disc = (options.medium or work / "disc").absolute()
    make_medium(options.demo.absolute(), disc, options.airgap.absolute())
    if not make_root(work / "root", options.cache):
        print("clean-root: SKIPPED, debootstrap reached no mirror and none is kept")
        return SKIPPED
    (work / "root" / "lab.sh").write_text(LAB)
    started = time.monotonic()
    said = enter(work / "root", disc)
    require_silence(said)
    print(f"clean-root: answered, verified and silent after {time.monotonic() - started:.0f} s")
    shutil.rmtree(work)
    return 0


def enter(root: Path, disc: Path) -> str:
    """Run the lab's script inside; its output comes back and is shown."""
    argv = ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    done = subprocess.run(
        [*argv, "sh", "-c", ENTER, "sh", root, disc],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    if done.returncode:
        raise SystemExit(f"clean-root: the lab ended with {done.returncode}")
    return done.stdout


def require_silence(said: str) -> None:
    """Fail when a counter of the namespace is not zero, or there is a route."""
    counted, _, control = said.partition("counters:\n")[2].partition("control:\n")
    assert loud(counted) == [], f"something was sent: {loud(counted)}"
    assert loud(control), "the counters do not notice an attempt"
    rows = [line for line in counted.splitlines() if line and line.split(":")[0] not in SILENT]
    assert rows == [], f"there is a route: {rows}"


def loud(lines: str) -> list[str]:
    """Return the counters that are not zero."""
    rows: dict[str, list[list[str]]] = {}
    for line in lines.splitlines():
        name, _, rest = line.partition(": ")
        if name in SILENT:
            rows.setdefault(name, []).append(rest.split())
    found = {name: dict(zip(*rows[name], strict=True)) for name in SILENT}
    return [
        f"{name}.{column}"
        for name, columns in SILENT.items()
        for column in columns
        if found[name][column] != "0"
    ]


if __name__ == "__main__":
    sys.exit(main())

"""Debian roots that hold next to nothing, and the medium that brings the product to them.

Shared by `clean_root.py` (from the medium to an answer) and `live_systemd.py` (the units under a
systemd of its own). Roots come from debootstrap and are kept as archives; nothing here enters one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CACHE = Path.home() / ".cache" / "airgap-clean-root"
SKIPPED = 77
PACKAGES = ("python3", "openssl")
PEOPLE = ("isso", "compliance")


def reason_to_skip(*tools: str) -> str:
    """Say why no root can be made or entered here, or nothing."""
    wanted = ("debootstrap", "unshare", "mount", "pivot_root", "chroot", "tar", *tools)
    missing = [tool for tool in wanted if shutil.which(tool) is None]
    if os.geteuid() != 0:
        return "only root can make a root"
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    done = subprocess.run(probe, capture_output=True, check=False)
    return "this host gives out no namespaces" if done.returncode else ""


def airgap(*words: object) -> dict:
    """Run one command of this checkout and return its document."""
    script = Path(sys.executable).with_name("airgap")
    done = subprocess.run(
        [script, *map(str, words), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"airgap {words[0]}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)


def make_medium(demo: Path, disc: Path, source: Path) -> Path:
    """Build, approve and split the wheels; put model, facts and fingerprint beside them.

    A medium that is whole is taken as it is: two tests in a row need one only.
    """
    if (disc / "fingerprint").is_file():
        return disc
    shutil.rmtree(disc, ignore_errors=True)
    disc.mkdir(parents=True)
    staging = demo / "staging"
    keys = {name: staging / "keys" / f"{name}.pem" for name in (*PEOPLE, "builder")}
    bundle, there = disc.with_name(f"{disc.name}.agb"), ("--root", staging)
    bundle.unlink(missing_ok=True)
    target = f"linux-{os.uname().machine}-cp311"
    words = ("--name", "airgap-wheels", "--version", "1.0.0", "--airgap", source)
    built = airgap(
        *("build", "-o", bundle, *words, "--target", target, "--key", keys["builder"], *there)
    )
    print(f"medium: {len(built['wheels'])} wheels, {built['size'] >> 20} MiB")
    for name in PEOPLE:
        airgap("sign", bundle, "--key", keys[name], "--confirm", "airgap-wheels", *there)
    airgap("split", bundle, "--volume-size", "40MB", "-o", disc)
    airgap("installer", bundle, "-o", disc, *there)
    bundle.unlink()
    for name in PEOPLE:
        airgap("trust", "sign-file", disc / "SHA256SUMS", "--key", keys[name], *there)
    chain = disc.with_name(f"{disc.name}.chain.json")
    airgap("trust", "export", chain, "--keys", disc / "keys", *there)
    chain.unlink()
    (disc / "media").mkdir()  # a folder holds one bundle
    shutil.copy(next((demo / "media").glob("*.agb")), disc / "media" / "model.agb")
    shutil.copy(demo / "lab" / "site.toml", disc)
    shown = airgap("trust", "show", *there)
    (disc / "fingerprint").write_text(shown["fingerprint"] + "\n")
    return disc


def make_root(root: Path, cache: Path, packages: tuple[str, ...] = PACKAGES) -> bool:
    """Unpack the kept root, or make it with debootstrap and keep it; False without a mirror."""
    kept = cache / f"bookworm-{'-'.join(p for p in packages if p != 'openssl')}.tar"
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        include = f"--include={','.join(packages)}"
        argv = ["debootstrap", "--variant=minbase", include, "bookworm", root]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-300:], done.stderr[-300:])
            return False
        partial = kept.with_suffix(".partial")
        subprocess.run(["tar", "-C", root, "-cf", partial, "."], check=True)
        partial.rename(kept)
        return True
    root.mkdir(parents=True)
    subprocess.run(["tar", "-C", root, "-xpf", kept], check=True)
    return True

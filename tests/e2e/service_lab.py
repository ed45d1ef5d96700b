"""A daemon on a lab of its own, and people with accounts of their own who ask it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from conftest_road import call

from airgap.audit import load_ring, verify_log
from airgap.audit.query import read_records
from airgap.serve import Job
from airgap.service import client
from airgap.service.presence import find_daemon
from bundle.envelope import Envelope, add_signature
from bundle.keys import load_signer
from bundle.manifest import Release, parse_manifest
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.write import Member, write_archive
from policy.errors import AirgapError

ADA, BEN, NOBODY = 40404, 40405, 40406
GROUP = 100  # `users`, on every Debian
AIRGAP = Path(sys.executable).with_name("airgap")
SEED = 1  # what is drawn by chance is held by chance
JOB = {
    "task": "retrosynthesis",
    "inputs": {"smiles": "CC(=O)Nc1ccccc1"},
    "options": {"n": 2, "seed": SEED},
}
BEN_TOML = """
[[person]]
id = "ben"
name = "Ben Example"
uid = 40405
roles = ["researcher"]
projects = ["sensor-coatings"]
training_until = 2027-06-30
us_person = true
record = "export office, file 2026-015"
affiliations = []
"""
# `airgap serve` with a clock that tests set forward, and with other patience and limits.
DAEMON = """
import json, resource, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from airgap.service.daemon import Limits
from airgap.service.keeper import Patience
from airgap.service.start import Plan, serve
import structlog

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
told = json.loads(sys.argv[1])
if told["files"]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (told["files"], hard))
days = Path(told["days"])

def clock():
    return datetime.now(UTC) + timedelta(days=float(days.read_text()) if days.exists() else 0)

told["patience"] = Patience(**told["patience"])
limits = Limits(**told["limits"])
plan = Plan(Path(told["root"]), Path(told["socket"]), 100, None, told["model"], clock,
            told["patience"], limits)
serve(plan, lambda house: print("serving", house.model.version, file=sys.stderr, flush=True))
"""


class Running:
    """A daemon on a lab of its own, and people who ask it."""

    def __init__(self, lab, folder):
        self.lab, self.socket = lab, folder / "broker.sock"
        self.days = folder / "days"
        self.process = None
        self.lines = []

    def start(self, *, model="", patience=None, limits=None, files=0):
        told = {"root": str(self.lab), "socket": str(self.socket), "days": str(self.days)}
        told |= {"model": model, "patience": patience or {}, "limits": limits or {}}
        told["files"] = files
        plain = not (model or patience or limits or files)
        words = [AIRGAP, "serve", "--root", self.lab, "--socket", self.socket, "--group", "users"]
        self.process = subprocess.Popen(
            words if plain else [sys.executable, "-I", "-c", DAEMON, json.dumps(told)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "AIRGAP_LOG": "info"},
        )
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("serving "):
                threading.Thread(target=self._read, daemon=True).start()
                return self
        raise AssertionError("".join(self.lines)[-3000:])

    def _read(self):
        self.lines.extend(self.process.stderr)

    def stop(self, within=60):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def records(self, kind=None):
        found = read_records(self.lab / "audit")
        return [record for record in found if kind in (None, record["kind"])]

    def outcomes(self):
        return [
            (record["actor"]["uid"], record["data"]["result"], record.get("err", {}).get("code"))
            for record in self.records("inference")
            if record["phase"] == "outcome"
        ]

    def told(self):
        return find_daemon(self.lab) or {}

    def worker(self):
        paths = (self.lab / "enclave" / "running").glob("*.json")
        documents = [json.loads(path.read_text()) for path in paths]
        pids = [d["proc"]["pid"] for d in documents if d["profile"] == "worker"]
        return next((pid for pid in pids if Path(f"/proc/{pid}").exists()), None)

    def under_way(self):
        """Return how many intents have no outcome."""
        found = self.records("inference")
        ends = {record["req"] for record in found if record["phase"] == "outcome"}
        return sum(r["phase"] == "intent" and r["req"] not in ends for r in found)

    def verify(self):
        found = verify_log(self.lab / "audit", vkey=load_ring(self.lab / "keys" / "audit.vkey"))
        assert (found.exit, found.size) == (3, found.records), found  # 3: no anchor kept elsewhere
        return found


def wait_for(ready, what="", within=60):
    until = time.monotonic() + within
    while time.monotonic() < until:
        found = ready()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what or ready} did not come within {within} s")


@contextlib.contextmanager
def lab_of(road):
    """Yield a copy of the lab in which Ada and Ben have accounts."""
    folder = Path(tempfile.mkdtemp(prefix="airgap-service-", dir="/var/tmp"))
    copy = shutil.copytree(road.lab, folder / "lab", symlinks=True)
    shutil.rmtree(copy / "holds", ignore_errors=True)  # of other tests that went this road
    site = (copy / "site.toml").read_text()
    assert "uid = 0 " in site
    site = site.replace("uid = 0 ", f"uid = {ADA} ") + BEN_TOML
    (copy / "site.toml").write_text(site + "\n[service]\nper_person = 2\n")
    try:
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def place_of(lab):
    """Yield a daemon that is not yet started, with a folder for its socket."""
    with tempfile.TemporaryDirectory(prefix="airgap-run-") as folder:
        Path(folder).chmod(0o755)
        running = Running(lab, Path(folder))
        try:
            yield running
        finally:
            if running.process is not None and running.process.poll() is None:
                running.process.send_signal(signal.SIGTERM)
                running.process.send_signal(signal.SIGTERM)
                try:
                    running.process.wait(60)
                except subprocess.TimeoutExpired:
                    running.kill()
            print("".join(running.lines)[-6000:])


class Person:
    """A forked child that gave up root and does one thing; its result comes as JSON."""

    def __init__(self, uid, act):
        self._from, to = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(to)
            return
        try:
            os.setgroups([GROUP])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            try:
                found = act()
            except AirgapError as error:
                found = {"code": error.code, "message": error.message}
            os.write(to, json.dumps(found).encode())
        except BaseException:  # noqa: BLE001 - a child that must not return into the tests
            os.write(to, json.dumps({"trace": traceback.format_exc()}).encode())
        os._exit(0)

    def result(self):
        with os.fdopen(self._from, "rb") as pipe:
            found = json.loads(pipe.read() or b"null")
        os.waitpid(self.pid, 0)
        assert not isinstance(found, dict) or "trace" not in found, found["trace"]
        return found


def run(running, uid, outputs=None, project="", **change):
    wanted = {**JOB, **change}
    job = Job(wanted["task"], wanted["inputs"], project, wanted["options"])

    def act():
        return client.run(running.socket, job, outputs or {}, lambda *_: None).json

    return Person(uid, act)


def ada(running, **options):
    """Let Ada ask, and return what she gets."""
    return run(
        running, ADA, project="route-design", options={"n": 2, "seed": SEED, **options}
    ).result()


def long_run(running, n=2000):
    """Let Ada ask for much; returns once its intent is on record."""
    before = running.under_way()
    asked = run(running, ADA, project="route-design", options={"n": n, "seed": 1})
    wait_for(lambda: running.under_way() > before, "the intent")
    return asked


def status(running, uid=ADA):
    return Person(uid, lambda: client.status(running.socket)).result()


def repack(road, out, **changes):
    """Seal the files of the road's release again as another release of its line."""
    (folder,) = (road.lab / "store" / "installed").iterdir()
    manifest = parse_manifest((folder / "META" / "manifest.json").read_bytes())
    release = Release(**{name: getattr(manifest, name) for name in Release.model_fields} | changes)
    members = [
        Member(e.path, folder / e.path, e.role, e.media_type, e.origin, e.derived_from)
        for e in manifest.files
        if e.path != "META/SHA256SUMS"
    ]
    signers = [load_signer(road.staging / "keys" / f"{name}.pem") for name in SIGNERS]

    def seal(made):
        envelope = Envelope(seal_statement(made, builder="ben").to_bytes(), PAYLOAD_TYPE, ())
        for signer in signers:
            envelope = add_signature(envelope, signer)
        return envelope

    chain = (folder / "META" / "trust.json").read_bytes()
    return write_archive(out, release, members, trust_chain=chain, seal=seal)


SIGNERS = ("builder", "isso", "compliance")


def must(capsys, *argv):
    done = call(capsys, *argv)
    assert done.status == 0, done.text
    return done

"""`airgap sign` at a terminal of its own: what was shown is what is signed, whatever happens."""

import hashlib
import os
import pty
import select
import shutil
import sys
import time
from datetime import UTC, datetime, timedelta

import bundles
import pytest
from lab_trees import make_staging, run

from bundle import envelope, keys, trust
from bundle.archive import read_head
from bundle.canonical import canonical_json
from bundle.source import PlainFile
from bundle.staging.release import DECISION
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.write import Member, write_archive

PROGRAM = "import sys; from airgap.cli import invoke; sys.exit(invoke(sys.argv[1:]))"
ASKED = b"to sign"
PATIENCE = 120  # seconds; a loaded machine needs many


@pytest.fixture(scope="module")
def staging(tmp_path_factory):
    return make_staging(tmp_path_factory.mktemp("staging"))


REPORT = {
    "model": "tiny",
    "provenance": {"level": "L1", "sentence": "hash-pinned"},
    "weights": {"parameters": 9, "tensors": 1, "bytes": 36, "types": ["F32"], "files": 1},
    "findings": [{"path": "README.md", "text": "something to read"}],
}


def draft(staging, path, *, seed=0, report=None):
    """Write a draft that the builder alone has signed."""

    def seal(manifest):
        payload = seal_statement(manifest, builder="ben", attested=True).to_bytes()
        signer = keys.load_signer(staging / "keys" / "builder.pem")
        return envelope.add_signature(envelope.Envelope(payload, PAYLOAD_TYPE, ()), signer)

    now = datetime.now(UTC).replace(microsecond=0)
    release = bundles.make_release(created=now, not_before=now, expires=now + timedelta(days=9))
    extra = (Member(DECISION, b"{}", "policy", "application/json"),)
    told = canonical_json(REPORT if report is None else report)
    members = [
        Member(each.path, told, each.role, each.media_type) if each.role == "report" else each
        for each in bundles.make_members(bundles.make_weights(seed=seed), extra=extra)
    ]
    chain = trust.chain_document(trust.load_trust(staging / "trust"))
    write_archive(path, release, members, trust_chain=chain, seal=seal)
    return path


def at_terminal(words, act):
    """Run `airgap WORDS` with a terminal, call `act` when it asks, and type what that returns."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(  # noqa: S606 - this very interpreter
            sys.executable, [sys.executable, "-c", PROGRAM, *(str(word) for word in words)]
        )
    seen, acted, until = b"", False, time.monotonic() + PATIENCE
    try:
        while time.monotonic() < until:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                part = os.read(terminal, 65536)
            except OSError:  # its other end is closed
                break
            if not part:
                break
            seen += part
            if not acted and ASKED in seen:
                acted = True
                os.write(terminal, act())
    finally:
        os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert acted, seen.decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(status), seen.decode("utf-8", "replace")


def signatures(path):
    source = PlainFile(path)
    try:
        return len(envelope.parse_seal(read_head(source).envelope).signatures)
    finally:
        source.close()


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def ask(staging, tmp_path):
    path = draft(staging, tmp_path / "tiny.agb")
    words = ("sign", path, "--key", staging / "keys" / "alice.pem", "--root", staging)
    return path, lambda act: at_terminal(words, act)


def test_the_name_that_is_typed_signs(ask):
    path, sign = ask
    status, said = sign(lambda: b"tiny\n")
    assert (status, signatures(path)) == (0, 2), said
    assert "you sign as alice: approver" in said
    for shown in ("L1: hash-pinned", "something to read", "local:tiny at r1"):
        assert shown in said


@pytest.mark.parametrize("typed", [b"tinny\n", b"\n", b"\x04", b"y\n"])
def test_anything_else_that_is_typed_stops(ask, typed):
    path, sign = ask
    before = sha(path)
    status, said = sign(lambda: typed)
    assert (status, sha(path)) == (1, before), said
    assert "sign.confirm" in said


def replaced(path, staging):
    other = draft(staging, path.with_name("other.agb"), seed=5)
    shutil.move(other, path)


def written_over(path, staging):
    other = draft(staging, path.with_name("other.agb"), seed=5)
    path.write_bytes(other.read_bytes())


def linked(path, staging):
    other = draft(staging, path.with_name("other.agb"), seed=5)
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("how", [replaced, written_over, linked])
def test_a_draft_that_is_replaced_between_reading_and_typing_is_not_signed(ask, staging, how):
    path, sign = ask

    def act():
        how(path, staging)
        act.after = sha(path)
        return b"tiny\n"

    status, said = sign(act)
    assert status == 1, said
    assert "seal.subject" in said
    assert "changed between reading and signing" in " ".join(said.split())
    assert sha(path) == act.after
    assert signatures(path) == 1


def test_a_draft_that_is_gone_or_cut_is_not_signed(ask):
    path, sign = ask

    def act():
        os.truncate(path, path.stat().st_size - 4096)
        act.after = sha(path)
        return b"tiny\n"

    status, said = sign(act)
    assert status in {1, 3}, said
    assert "Traceback" not in said
    assert sha(path) == act.after


@pytest.mark.parametrize(
    "report",
    [
        {},
        {**REPORT, "findings": [1]},
        {**REPORT, "weights": "many"},
        {**REPORT, "provenance": {"level": "L4", "sentence": "better than the manifest says"}},
    ],
)
def test_a_report_that_cannot_be_shown_or_says_more_than_the_manifest_is_not_signed(
    staging, tmp_path, capsys, report
):
    path = draft(staging, tmp_path / "tiny.agb", report=report)
    words = ("--key", staging / "keys" / "alice.pem", "--root", staging, "--confirm", "tiny")
    assert run("sign", draft(staging, tmp_path / "good.agb"), *words) == 0
    before = sha(path)
    assert run("sign", path, *words) == 1
    assert "manifest.schema" in capsys.readouterr().err
    assert sha(path) == before

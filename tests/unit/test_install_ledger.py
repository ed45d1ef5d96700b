"""`verify --resume`: what was seen is not read again, unless anything about the files changed."""

import os
import signal

import attacks
import bundles
import pytest

from airgap.install.ledger import kept_ledger
from bundle.verify import verify_bundle
from policy.errors import AirgapError, RefusedError

TRUST = bundles.make_trust()
CHUNKS = 5


@pytest.fixture
def path(tmp_path):
    out = tmp_path / "x.agb"
    bundles.make_bundle(out, members=bundles.make_members(bundles.make_weights(18 << 20)))
    return out


def verify(path, folder, progress=None):
    seen = []

    def tell(done, total):
        seen.append(done)
        if progress is not None:
            progress(done, total)

    verify_bundle(
        path,
        TRUST,
        now=bundles.NOW,
        progress=tell,
        remember=lambda sealed: kept_ledger(folder, sealed),
    )
    return len(seen)


def stop(path, folder):
    """Verify in a process of its own that is killed half-way."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return

    def kill(done, total):
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        verify(path, folder, kill)
    finally:
        os._exit(0)


def test_a_killed_verification_goes_on(path, tmp_path):
    folder = tmp_path / "verify"
    assert verify(path, folder) == CHUNKS
    assert list(folder.iterdir()) == []  # what is finished leaves nothing
    stop(path, folder)
    assert len(list(folder.iterdir())) == 1
    assert 1 <= verify(path, folder) <= CHUNKS - 2
    assert verify(path, folder) == CHUNKS


def test_a_file_that_was_touched_is_read_from_its_start(path, tmp_path):
    folder = tmp_path / "verify"
    stop(path, folder)
    raw = path.read_bytes()
    found = path.stat()
    path.write_bytes(attacks.flip(raw, attacks.head_of(raw)["body"][0] + 300_000))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # the other time cannot be set
    with pytest.raises(RefusedError) as caught:
        verify(path, folder)
    assert caught.value.code == "chunk.leaf"
    path.write_bytes(raw)
    assert verify(path, folder) == CHUNKS


def test_a_ledger_of_another_file_is_not_believed(path, tmp_path):
    folder = tmp_path / "verify"
    stop(path, folder)
    (ledger,) = folder.iterdir()
    ledger.write_bytes(bytes(32) + b"\x01" * CHUNKS)
    assert verify(path, folder) == CHUNKS


def test_a_ledger_that_cannot_be_kept_is_a_fault(path, tmp_path):
    (tmp_path / "verify").write_bytes(b"")
    with pytest.raises(AirgapError) as caught:
        verify(path, tmp_path / "verify")
    assert caught.value.code == "host.io"

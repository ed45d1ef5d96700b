"""A bundle of 800 GB with 5,000 files is opened, and read from, in bounded memory and time."""

import hashlib
import subprocess
import sys
from pathlib import Path

import bundles
import pytest

from bundle import archive, merkle, trust
from bundle.manifest import CHUNK_SIZE, Body, FileEntry, Manifest, body_key, canonical
from bundle.tar import Layout

TESTS = Path(__file__).parents[1]
GB = 10**9
EMPTY = hashlib.sha256(b"").hexdigest()

READ = """
import re, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import bundles
from bundle.verify import open_bundle

class Enough(Exception):
    pass

def stop(done, total):
    if done > 400 << 20:
        raise Enough

with open_bundle(Path(sys.argv[2]), bundles.make_trust(), now=bundles.NOW) as sealed:
    assert len(sealed.manifest.files) > 5000
    try:
        sealed.verify_body(progress=stop)
    except Enough:
        pass
print(re.search("VmHWM:\\\\s*([0-9]+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture
def large(tmp_path):
    """Return a sealed bundle whose weights are a hole of 800 GB; of a hole each leaf is known."""
    weights = "payload/tiny/model.onnx_data"
    entries = [("META/SHA256SUMS", 100, "sums"), ("META/report.json", 100, "report")]
    entries += [(weights, 800 * GB, "external-data"), ("payload/tiny/graphs.json", 10, "graphs")]
    entries += [(f"payload/wheels/w{number:04}.txt", 0, "document") for number in range(5000)]
    entries.sort(key=lambda entry: body_key(entry[0]))
    layout = Layout([(path, size) for path, size, _ in entries])
    body = Body(
        size=layout.size,
        chunk_size=CHUNK_SIZE,
        hash="sha256",
        root="0" * 64,
        leaves=-(-layout.size // CHUNK_SIZE),
    )
    path = tmp_path / "large.agb"
    files = tuple(
        FileEntry(
            path=name,
            role=role,
            media_type="text/plain",
            size=size,
            offset=offset,
            sha256=EMPTY,
        )
        for (name, size, role), offset in zip(entries, layout.offsets, strict=True)
    )
    release = bundles.make_release()
    facts = {name: getattr(release, name) for name in type(release).model_fields}
    draft = Manifest(**facts, files=files, body=body)
    chain = trust.chain_document(bundles.make_trust())
    start = len(archive.head_bytes(b"", chain, canonical(draft), bytes(32 * body.leaves)))
    touched = set()
    with path.open("w+b") as stream:
        stream.truncate(start + layout.size)
        position = 0
        for index, (_, size) in enumerate([*layout.files, ("", 0)]):
            gap = layout.gap(index)
            stream.seek(start + position)
            stream.write(gap)
            touched |= {position // CHUNK_SIZE, (position + len(gap)) // CHUNK_SIZE}
            position += len(gap) + size
        stream.flush()
        zero = merkle.leaf_hash(bytes(CHUNK_SIZE))
        leaves = [zero] * body.leaves
        for index in sorted(touched | {body.leaves - 1}):
            stream.seek(start + index * CHUNK_SIZE)
            chunk = stream.read(min(CHUNK_SIZE, layout.size - index * CHUNK_SIZE))
            if chunk:
                leaves[index] = merkle.leaf_hash(chunk)
        manifest = draft.model_copy(
            update={"body": body.model_copy(update={"root": merkle.root(leaves).hex()})}
        )
        seal = bundles.seal_with("builder", "alice", "bob")(manifest)
        stream.seek(0)
        stream.write(
            archive.head_bytes(seal.to_padded(), chain, canonical(manifest), b"".join(leaves))
        )
    return path


def test_memory_does_not_grow_with_the_bundle(large):
    assert large.stat().st_size > 800 * GB
    assert large.stat().st_blocks * 512 < 100 * 1024 * 1024
    done = subprocess.run(
        [sys.executable, "-c", READ, TESTS, large], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) / 1024 < 200  # MiB

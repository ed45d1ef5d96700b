"""Witnesses: requests and cosignatures on media, trust policies, anchors, heads on paper."""

import base64
import shutil
import subprocess

import audit_logs as logs
import pytest

from airgap.audit import load_ring, verify_log
from airgap.audit.anchors import parse_anchor
from airgap.audit.checkpoint import parse_checkpoint, parse_vkey, sign_checkpoint
from airgap.audit.cosigning import import_cosigned
from airgap.audit.layout import Layout, last_checkpoint
from airgap.audit.paper import Paper
from airgap.audit.qr import encode
from airgap.audit.query import read_records
from airgap.audit.quorum import find_cosignature, parse_policy
from airgap.audit.status import read_status
from airgap.audit.tiles import consistency_path
from airgap.audit.tree import StoredTree
from airgap.audit.witness import Request, Witness, parse_request
from bundle import merkle
from policy.errors import FaultError, RefusedError

NOW = 1_764_000_000


@pytest.fixture
def tree(tmp_path):
    logs.write_log(tmp_path / "tree", 4)
    return tmp_path / "tree"


@pytest.fixture
def witness(tmp_path, tree):
    made = Witness.create(tmp_path / "w1", "isso.example/w1")
    made.trust(load_ring(tree / "keys/audit.vkey"))
    return Witness.load(tmp_path / "w1")


def head_of(tree):
    return last_checkpoint(tree / "audit/log/checkpoints.jsonl")[0]


def request(tree, old=0):
    head = head_of(tree)
    proof = StoredTree(Layout(tree / "audit")).consistency(old, head)
    return parse_request(Request(old, proof, head).as_text().encode())


def policy_of(*witnesses, quorum="any"):
    lines = [f"witness w{n} {witness.vkey}\n" for n, witness in enumerate(witnesses)]
    names = " ".join(f"w{n}" for n in range(len(witnesses)))
    return "".join(lines) + f"group all-of-them {quorum} {names}\nquorum all-of-them\n"


# -- requests and cosignatures ------------------------------------------------------------


def test_a_witness_cosigns_a_log_that_only_grows(tree, witness):
    first = witness.cosign(request(tree), NOW)
    cosignature = find_cosignature(parse_checkpoint(first.encode()), witness.vkey)
    assert cosignature.time == NOW
    old = head_of(tree).size
    logs.write_log(tree, 3)
    second = witness.cosign(request(tree, old), NOW + 60)
    assert parse_checkpoint(second.encode()).size > old
    again = witness.cosign(request(tree, head_of(tree).size), NOW + 90)  # nothing new: same head
    assert parse_checkpoint(again.encode()).size == head_of(tree).size


def test_an_independent_library_checks_request_and_cosignature(tree, witness):
    pytest.importorskip("tlog_scales", reason="tlog-scales is not installed")
    from tlog_scales import signing, tlog

    old = 3
    found = request(tree, old)
    root = StoredTree(Layout(tree / "audit")).root(old)
    head = tlog.Checkpoint.from_text(found.checkpoint.note)
    proof = tlog.ConsistencyProof(old, head.size, list(found.proof))
    proof.check(root, head.root_hash)
    note = tlog.Checkpoint.from_text(witness.cosign(request(tree), NOW))
    known = signing.Vkey.from_string(str(witness.vkey))
    verifier = signing.Ed25519CosignatureVerifier(known)
    mine = [s for s in note.signatures if known.match(s)]
    verifier.verify_note(mine[0], note)


def test_a_witness_that_saw_more_tells_how_much(tree, witness):
    witness.cosign(request(tree), NOW)
    size = head_of(tree).size
    logs.write_log(tree, 1)
    with pytest.raises(RefusedError) as refused:
        witness.cosign(request(tree, 3), NOW)
    assert refused.value.code == "audit.witness"
    assert f"--old {size}" in refused.value.hint
    witness.cosign(request(tree, size), NOW)


def test_t18_t19_a_witness_refuses_a_rollback_and_a_fork(tmp_path, tree, witness):
    old = logs.copy(tree, tmp_path / "old")
    logs.write_log(tree, 2)
    witness.cosign(request(tree), NOW)
    size = head_of(tree).size
    with pytest.raises(RefusedError):  # rolled back
        witness.cosign(Request(size, (), head_of(old)), NOW)
    logs.write_log(old, 5)
    forged = Request(size, request(old, size).proof, head_of(old))
    with pytest.raises(RefusedError) as refused:  # another history from some record on
        witness.cosign(forged, NOW)
    assert refused.value.code == "merkle.proof"
    assert witness._last(logs.ORIGIN)[0] == size  # nothing was stored


def test_an_unknown_log_a_bad_signature_and_a_replaced_key_are_refused(tmp_path, tree, witness):
    stranger = tmp_path / "stranger"
    logs.write_log(stranger, 1, origin="other.example/audit/1")
    with pytest.raises(RefusedError, match="does not know"):
        witness.cosign(request(stranger), NOW)
    head = head_of(tree)
    forged = sign_checkpoint(logs.log_key(seed=9), head.size, head.root).note
    with pytest.raises(RefusedError) as refused:
        witness.cosign(Request(0, (), parse_checkpoint(forged.encode())), NOW)
    assert refused.value.code == "audit.note"
    witness.cosign(request(tree), NOW)
    size = head_of(tree).size
    with logs.open_log(tree) as log:
        log.rotate_key(logs.Actor("isso"))
        logs.infer(log)
    with pytest.raises(RefusedError):  # the new key is not known yet
        witness.cosign(request(tree, size), NOW)
    witness.trust(load_ring(tree / "keys/audit.vkey"))
    witness.cosign(request(tree, size), NOW)
    size, root = head_of(tree).size, head_of(tree).root
    stolen = sign_checkpoint(logs.log_key(), size, root).note
    with pytest.raises(RefusedError, match="replaced"):
        witness.cosign(Request(size, (), parse_checkpoint(stolen.encode())), NOW)


def test_a_witness_knows_each_log_by_its_keys_and_keeps_its_state(tmp_path, tree, witness):
    with pytest.raises(RefusedError, match="other keys"):
        witness.trust(type(load_ring(tree / "keys/audit.vkey"))((logs.vkey(9),)))
    with pytest.raises(RefusedError):
        Witness.create(tmp_path / "w1", "isso.example/w1")
    with pytest.raises(RefusedError):
        Witness.create(tmp_path / "w2", "a name with spaces")
    witness.cosign(request(tree), NOW)
    state = next((tmp_path / "w1/logs").glob("*.json"))
    state.write_text("{}")
    with pytest.raises(FaultError) as fault:  # never begin again at zero by itself
        witness.cosign(request(tree), NOW)
    assert fault.value.code == "audit.witness"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "old 1\n",
        "old 01\n\n",
        "new 1\n\n",
        "old 1\nAAAA\n\n",
        "old 1\n" + "A" * 43 + "=\n" * 64,
    ],
)
def test_a_malformed_request_is_refused(tree, text):
    parse_request(request(tree).as_text().encode())
    with pytest.raises(RefusedError):
        parse_request(text.encode() + head_of(tree).note.encode())


@pytest.mark.parametrize("new", [1, 2, 3, 7, 8, 100, 255, 256, 600])
def test_proofs_from_disk_are_those_of_a_tree_in_memory(new):
    leaves = [bytes([n % 251, n // 251]) * 16 for n in range(600)]
    tree = merkle.Tree(leaves)

    def node(where):
        level, index = where
        return merkle.root(leaves[index << level : (index + 1) << level])

    for old in {0, 1, new // 2, max(0, new - 1), new}:
        assert list(consistency_path(old, new, node)) == tree.consistency_proof(old, new)


# -- policies ------------------------------------------------------------


def test_a_quorum_is_counted_as_the_policy_says(tmp_path, tree, witness):
    second = Witness.create(tmp_path / "w2", "second.example/w2")
    second.trust(load_ring(tree / "keys/audit.vkey"))
    one = witness.cosign(request(tree), NOW)
    both = one + second.cosign(request(tree), NOW).splitlines(keepends=True)[-1]
    any_of, all_of = (
        parse_policy(policy_of(witness, second, quorum=quorum).encode())
        for quorum in ("any", "all")
    )
    assert set(any_of.require(parse_checkpoint(one.encode()))) == {"w0"}
    assert set(all_of.require(parse_checkpoint(both.encode()))) == {"w0", "w1"}
    with pytest.raises(RefusedError) as refused:
        all_of.require(parse_checkpoint(one.encode()))
    assert refused.value.code == "audit.quorum"
    none = parse_policy(b"quorum none\n")
    assert none.require(head_of(tree)) == {}


def test_a_cosignature_that_does_not_hold_rejects_the_note(tree, witness):
    note = witness.cosign(request(tree), NOW)
    *lines, last = note.splitlines(keepends=True)
    blob = bytearray(base64.b64decode(last.split(" ")[2]))
    for at in (8, 20):  # in the time, in the signature
        changed = bytearray(blob)
        changed[at] ^= 1
        bad = f"\u2014 {witness.vkey.name} {base64.b64encode(changed).decode()}\n"
        with pytest.raises(RefusedError) as refused:
            find_cosignature(parse_checkpoint("".join([*lines, bad]).encode()), witness.vkey)
        assert refused.value.code == "audit.note"


@pytest.mark.parametrize(
    "text",
    [
        "", "quorum w1\n", "quorum none\nquorum none\n", "quorum none", "log x\nquorum none\n",
        "witness none {w}\nquorum none\n", "witness w1 {w}\nwitness w2 {w}\nquorum w1\n",
        "witness w1 {w}\nwitness w1 {v}\nquorum w1\n", "witness w1 {log}\nquorum w1\n",
        "log {log}\nlog {log}\nquorum none\n", "witness w1 {w}\ngroup g 2 w1\nquorum g\n",
        "witness w1 {w}\ngroup g 0 w1\nquorum g\n", "witness w1 {w}\ngroup g any w1 w1\nquorum g\n",
        "witness w1 {w}\ngroup g any w1\ngroup h any w1\nquorum g\n", "group g any w1\nquorum g\n",
        "quorum g\nwitness w1 {w}\ngroup g any w1\n", "sponsor x\nquorum none\n",
        "quorum none\r\n", "quorum none\x7f\n",
    ],
)  # fmt: skip
def test_a_malformed_policy_is_refused(text):
    parse_policy(logs.POLICY.encode())
    filled = text.format(w=logs.witness_vkey(), v=logs.witness_vkey(22, "v"), log=logs.vkey())
    with pytest.raises(RefusedError) as refused:
        parse_policy(filled.encode())
    assert refused.value.code == "audit.policy"


def test_a_policy_may_have_comments_tabs_groups_of_groups_and_addresses():
    text = (
        f"\n# us\n \tlog\t{logs.vkey()} https://log.example/ \nwitness a {logs.witness_vkey()}\n"
        f"witness b {logs.witness_vkey(22, 'b')}\ngroup x all a b\ngroup y any x\nquorum y\n"
    )
    found = parse_policy(text.encode())
    assert (found.quorum, found.groups["x"].needed, len(found.logs)) == ("y", 2, 1)


def test_the_keys_of_witness_and_log_are_not_taken_for_each_other():
    assert parse_vkey(str(logs.witness_vkey()).encode(), 4).kind == 4
    with pytest.raises(RefusedError):
        parse_vkey(str(logs.witness_vkey()).encode())
    with pytest.raises(RefusedError):
        parse_vkey(str(logs.vkey()).encode(), 4)


# -- anchors ------------------------------------------------------------


def test_a_cosigned_head_comes_back_as_an_anchor_and_on_record(tmp_path, tree, witness):
    second = Witness.create(tmp_path / "w2", "second.example/w2")
    second.trust(load_ring(tree / "keys/audit.vkey"))
    policy = tmp_path / "policy.tlog"
    policy.write_text(policy_of(witness, second, quorum="all"))
    note, other = witness.cosign(request(tree), NOW), second.cosign(request(tree), NOW + 5)
    size = head_of(tree).size
    with logs.open_log(tree) as log:
        half = import_cosigned(log, note.encode(), policy.read_bytes())
        assert (half.quorum, log.anchored) == (False, 0)
        whole = import_cosigned(log, other.encode(), None)  # the policy was kept
        assert (whole.quorum, whole.witnesses, log.anchored) == (True, ("w0", "w1"), size)
    found = [r["data"] for r in read_records(tree / "audit") if r["kind"] == "import.cosign"]
    assert [(d["witness"], d["size"]) for d in found] == [
        ("isso.example/w1", size), ("second.example/w2", size),
    ]  # fmt: skip
    ring = load_ring(tree / "keys/audit.vkey")
    status = read_status(tree / "audit", ring)
    assert (status.anchored, status.size > size) == (size, True)
    assert f"anchored to {size}, age 0 h 0 min" in status.text()
    assert f"records {size} to {status.size - 1} at root's mercy" in status.text()
    with logs.open_log(tree) as log:
        assert log.anchored == size
    kept = shutil.copy(next((tree / "audit/log/anchors").iterdir()), tmp_path / "kept.note")
    verdict = verify_log(
        tree / "audit", vkey=ring, anchors=[tmp_path / "kept.note"],
        policy=parse_policy(policy.read_bytes()),
    )  # fmt: skip
    assert (verdict.exit, verdict.anchored_size) == (0, size), kept


def test_an_anchor_without_its_quorum_is_not_good_enough(tmp_path, tree, witness):
    note = tmp_path / "note"
    note.write_text(witness.cosign(request(tree), NOW))
    lone = parse_policy(policy_of(witness).encode())
    other = parse_policy(logs.POLICY.encode())
    assert verify_log(tree / "audit", vkey=logs.vkey(), anchors=[note], policy=lone).exit == 0
    verdict = verify_log(tree / "audit", vkey=logs.vkey(), anchors=[note], policy=other)
    assert verdict.exit == 3
    assert "nobody cosigned" in "\n".join(map(str, verdict.findings))
    assert verify_log(tree / "audit", vkey=None, anchors=[note], policy=other).exit == 3


def test_a_head_that_nobody_cosigned_or_of_another_history_is_not_imported(tmp_path, tree, witness):
    policy = tmp_path / "policy.tlog"
    policy.write_text(policy_of(witness))
    other = tmp_path / "other"
    logs.write_log(other, 9)
    foreign = Witness.create(tmp_path / "w3", "isso.example/w1")
    foreign.trust(load_ring(tree / "keys/audit.vkey"))
    with logs.open_log(tree) as log:
        for content, code in (
            (log.head, "audit.witness"),
            (foreign.cosign(request(tree), NOW), "audit.witness"),
            (witness.cosign(request(other), NOW), "audit.history"),
        ):
            with pytest.raises(RefusedError) as refused:
                import_cosigned(log, content.encode(), policy.read_bytes())
            assert refused.value.code == code
        assert log.anchored == 0
    assert not any((tree / "audit/log/anchors").iterdir())


# -- paper ------------------------------------------------------------


def test_a_line_that_was_typed_from_paper_is_an_anchor(tmp_path, tree):
    paper = Paper(head_of(tree))
    typed = tmp_path / "typed.txt"
    typed.write_text(paper.short + "\n")
    assert parse_anchor(typed.read_bytes(), "typed").written
    assert verify_log(tree / "audit", vkey=logs.vkey(), anchors=[typed]).exit == 0
    typed.write_text(paper.short.replace(" 10 ", " 9 "))
    assert verify_log(tree / "audit", vkey=logs.vkey(), anchors=[typed]).exit == 1
    typed.write_text(paper.short.replace("lab.example", "lab.other"))
    assert verify_log(tree / "audit", vkey=logs.vkey(), anchors=[typed]).exit == 3


def test_the_words_change_with_every_character(tree):
    paper = Paper(head_of(tree))
    assert len(paper.words.split()) == 4
    head = head_of(tree)
    for changed in (
        parse_checkpoint(head.note.replace("\n10\n", "\n11\n", 1).encode()),
        parse_checkpoint(head.note.replace("lab.example/audit", "lab.example/audid", 1).encode()),
    ):
        assert Paper(changed).words != paper.words
    assert paper.head.root.hex()[:4] in paper.text()


@pytest.mark.parametrize("length", [1, 40, 187, 290, 700])
def test_a_decoder_that_is_not_ours_reads_the_qr_code(tmp_path, length):
    if shutil.which("zbarimg") is None:
        pytest.skip("needs zbarimg (zbar-tools)")
    content = ("\u2014 example.edu/audit/0123456789abcdef " * 30).encode()[:length]
    code = encode(content)
    scale, quiet = 4, 4
    size = len(code.rows) + 2 * quiet
    blank = b"\xff" * (size * scale) * scale
    rows = [blank] * quiet
    for row in code.rows:
        line = b"".join((b"\0" if module else b"\xff") * scale for module in row)
        rows.append((b"\xff" * quiet * scale + line + b"\xff" * quiet * scale) * scale)
    image = tmp_path / "code.pgm"
    head = b"P5 %d %d 255\n" % (size * scale, size * scale)
    image.write_bytes(head + b"".join([*rows, *[blank] * quiet]))
    argv = ["zbarimg", "-q", "--raw", "-Sbinary", str(image)]
    done = subprocess.run(argv, check=False, capture_output=True)
    assert done.stdout == content


def test_the_qr_code_of_a_head_fits_a_page_and_a_terminal(tree):
    paper = Paper(head_of(tree))
    assert paper.svg().startswith("<svg ")
    assert 'fill="#000"' in paper.svg()
    lines = paper.terminal().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) < 80
    with pytest.raises(RefusedError):
        encode(b"x" * 2_000)

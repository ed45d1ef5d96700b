"""T1 to T50 of docs/design/audit.md, 13: which test shows each, and what no other file shows.

Each row names tests as `file::function`, with `[key` where one table of attacks holds several. The
first test of this file checks that every number has a row, and every row a test.
"""

import ast
import base64
import hashlib
import shutil
from pathlib import Path

import audit_logs as logs
import orjson
import pytest
from test_audit_attacks import FILES, VKEY, base, tree, verify

from airgap.audit import new_ulid
from airgap.audit.checkpoint import parse_checkpoint, verify_checkpoint
from airgap.audit.query import read_records
from policy.errors import RefusedError

__all__ = ["base", "tree"]  # fixtures

TESTS = Path(__file__).resolve().parent.parent
A, C = "attack/test_audit_attacks.py", "attack/test_audit_catalogue.py"
CUTS = "attack/test_audit_reorderings.py"
LOG, CLI = "unit/test_audit_log.py", "unit/test_audit_cli.py"
EPOCHS, WITNESS = "unit/test_audit_epochs.py", "unit/test_audit_witness.py"
PAYLOADS, RETENTION = "unit/test_audit_payloads.py", "unit/test_audit_retention.py"
SERVICE = "unit/test_audit_service.py"
SIEM, VERIFIERS = "unit/test_audit_siem.py", "attack/test_audit_verifiers.py"
SUMDB = "conformance/test_audit_sumdb.py"
FILE_ATTACKS = f"{A}::test_an_attack_on_the_files_gets_its_verdict"
MEDIA = f"{A}::test_an_export_that_was_changed_on_media_is_tampered"

CATALOGUE = {
    **{f"T{n}": [f"{FILE_ATTACKS}[T{n} "] for n in range(1, 13)},
    "T13": [
        f"{FILE_ATTACKS}[T13 ",
        f"{A}::test_t13_the_half_record_is_quarantined_and_the_recovery_says_so",
        f"{A}::test_t13_t15_in_an_export_nothing_is_forgiven",
    ],
    "T14": [f"{LOG}::test_t14_a_torn_middle_segment_is_refused"],
    "T15": [
        f"{FILE_ATTACKS}[T15 ", f"{A}::test_t15_a_gap_between_heartbeats_is_reported",
    ],
    "T16": [
        f"{FILE_ATTACKS}[T16 ", f"{LOG}::test_t16_a_missing_segment_is_tampered_and_refused",
        f"{RETENTION}::test_t16_a_beginning_that_nobody_pruned_on_record_is_tampering",
    ],
    "T17": [f"{FILE_ATTACKS}[T17 "],
    "T18": [
        f"{FILE_ATTACKS}[T18 ", f"{A}::test_t18_each_kind_of_anchor_shows_a_rollback",
        f"{C}::test_t18_a_head_on_paper_and_a_cosigned_one_show_a_rollback",
        f"{WITNESS}::test_t18_t19_a_witness_refuses_a_rollback_and_a_fork",
    ],
    "T19": [
        f"{FILE_ATTACKS}[T19 ",
        f"{A}::test_t19_a_receipt_shows_that_its_own_record_was_changed",
    ],
    "T20": [f"{FILE_ATTACKS}[T20 "],
    "T21": [f"{FILE_ATTACKS}[T21 "],
    "T22": [f"{FILE_ATTACKS}[T22 "],
    "T23": [
        f"{EPOCHS}::test_t23_a_head_of_an_old_size_signed_by_the_newer_key_is_tampered",
        f"{EPOCHS}::test_t23_a_stolen_old_key_signs_nothing_later",
        f"{EPOCHS}::test_t23_an_anchor_signed_outside_its_epoch_shows_a_stolen_key",
    ],
    "T24": [
        f"{FILE_ATTACKS}[T24 ", f"{A}::test_t24_without_a_key_the_verdict_is_never_good",
    ],
    "T25": [f"{A}::test_t25_a_second_writer_is_refused_with_the_pid_of_the_first"],
    "T26": [f"{A}::test_t26_t27_a_live_file_that_is_no_longer_there_halts_the_log"],
    "T27": [f"{A}::test_t26_t27_a_live_file_that_is_no_longer_there_halts_the_log"],
    "T28": [
        f"{A}::test_t28_a_file_system_that_remounts_itself_read_only_halts_the_log",
        f"{A}::test_t28_a_file_system_that_turned_read_only_halts_the_log",
    ],
    "T29": [
        f"{A}::test_t29_a_full_disk_halts_and_the_reserve_holds_the_recovery_record",
        f"{SERVICE}::test_t29_with_the_services_disk_full_no_inference_answers",
    ],
    "T30": [
        f"{A}::test_t30_a_fault_at_any_call_loses_nothing_that_was_acknowledged",
        f"{A}::test_t30_a_flush_that_failed_is_never_tried_again",
        f"{A}::test_t30_the_suspect_tail_is_kept_and_written_again_after_an_io_error",
    ],
    "T31": [f"{A}::test_t31_a_clock_that_jumps_is_recorded_and_orders_nothing"],
    "T32": [f"{A}::test_t32_another_boot_is_a_boot_record"],
    "T33": [
        f"{A}::test_t33_a_stalled_disk_denies_in_time",
        f"{SERVICE}::test_t33_t34_with_the_service_stopped_paused_or_gone_no_inference_answers",
    ],
    "T34": [
        f"{SERVICE}::test_t33_t34_with_the_service_stopped_paused_or_gone_no_inference_answers",
        f"{SERVICE}::test_t34_an_answer_whose_outcome_finds_no_log_is_not_released",
    ],
    "T35": [
        f"{A}::test_t35_kill_9_loses_nothing_that_was_acknowledged",
        f"{A}::test_t35_kill_9_two_hundred_times",
    ],
    "T36": [
        f"{A}::test_t36_a_power_cut_loses_nothing_that_was_acknowledged_and_the_control_does",
        f"{CUTS}::test_every_legal_disk_of_a_short_life_opens_with_what_was_acknowledged",
    ],
    "T37": [
        f"{A}::test_t37_the_uid_is_the_kernels_and_a_name_in_the_message_changes_nothing",
        f"{SERVICE}::test_t37_a_message_cannot_name_a_uid",
    ],
    "T38": [f"{A}::test_t38_no_log_level_silences_a_record"],
    "T39": [
        f"{C}::test_t39_what_a_user_types_is_in_no_record",
        f"{CLI}::test_t39_a_csv_reader_gets_every_cell_back_and_no_formula",
        f"{SIEM}::test_t39_rsyslog_gives_every_field_of_every_row_back",
        f"{SIEM}::test_a_cef_row_gives_every_field_back",
    ],
    "T40": [f"{A}::test_t40_a_short_prompt_cannot_be_guessed_from_its_commitment"],
    "T41": [
        f"{PAYLOADS}::test_t41_a_spilled_payload_is_destroyed_and_the_log_verifies",
        f"{PAYLOADS}::test_t41_one_person_or_another_act_destroys_nothing",
    ],
    "T42": [f"{PAYLOADS}::test_t42_the_wrong_key_opens_nothing_and_changes_no_verdict"],
    "T43": [f"{MEDIA}[T43 "],
    "T44": [f"{RETENTION}::test_t44_an_export_is_what_its_host_signed[T44 "],
    "T45": [
        f"{MEDIA}[T45 ",
        f"{SIEM}::test_t45_an_export_in_every_format_verifies_and_a_row_that_differs_does_not",
    ],
    "T46": [f"{A}::test_t46_a_proof_for_one_record_says_nothing_for_another"],
    "T47": [
        f"{RETENTION}::test_t47_what_is_not_exported_cosigned_old_and_signed_by_two_stays",
        f"{RETENTION}::test_t47_each_condition_alone_holds_a_pruning",
    ],
    "T48": [
        f"{MEDIA}[T48 ", f"{RETENTION}::test_t44_an_export_is_what_its_host_signed[T48 ",
        f"{VERIFIERS}::test_t50_without_an_anchor_all_three_cannot_tell_and_remember_the_first",
        f"{VERIFIERS}::test_t48_the_memory_of_each_is_that_of_the_others",
    ],
    "T49": [f"{MEDIA}[T49 "],
    "T50": [
        f"{C}::test_t50_other_implementations_say_the_same_of_what_they_cover",
        f"{VERIFIERS}::test_t50_three_verifiers_say_tampered_of_every_attack",
        f"{VERIFIERS}::test_t50_three_verifiers_say_good_of_a_good_export",
        f"{SUMDB}::test_go_proves_every_record_from_our_tiles_and_takes_our_proofs",
    ],
}  # fmt: skip


def _functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}


def test_every_attack_of_the_design_has_its_test():
    assert list(CATALOGUE) == [f"T{n}" for n in range(1, 51)]
    known = {path: _functions(TESTS / path) for path in {t.split("::")[0] for t in _all_tests()}}
    for number, tests in CATALOGUE.items():
        assert tests, number
        for test in tests:
            path, _, function = test.partition("::")
            function, _, key = function.partition("[")
            assert function in known[path], (number, test)
            if key:
                assert f'"{key}' in (TESTS / path).read_text(), (number, test)


def _all_tests():
    return [test for tests in CATALOGUE.values() for test in tests]


# -- T18: paper and cosignature -------------------------------------------------------


def test_t18_a_head_on_paper_and_a_cosigned_one_show_a_rollback(tree, tmp_path):
    from airgap.audit import verify_log
    from airgap.audit.paper import Paper
    from airgap.audit.quorum import parse_policy
    from airgap.audit.witness import Request, Witness

    head = parse_checkpoint((tree / "audit/log/checkpoint").read_bytes())
    (tmp_path / "typed.txt").write_text(Paper(head).short)
    witness = Witness.create(tmp_path / "w", "isso.example/w1")
    witness.trust(logs.log_key().ring)
    (tmp_path / "cosigned.note").write_text(witness.cosign(Request(0, (), head), 1_764_000_000))
    policy = parse_policy(f"witness w {witness.vkey}\nquorum w\n".encode())
    anchors = [tmp_path / "typed.txt", tmp_path / "cosigned.note"]

    def verdict(anchor):
        return verify_log(tree / "audit", vkey=VKEY, anchors=[anchor], policy=policy).exit

    assert [verdict(anchor) for anchor in anchors] == [0, 0]
    shutil.rmtree(tree / "audit")
    shutil.copytree(tree / "old/audit", tree / "audit")
    assert [verdict(anchor) for anchor in anchors] == [1, 1]
    assert verify(tree, anchored=False).exit == 3


# -- T39: hostile text -------------------------------------------------------

HOSTILE = (
    "line\nbreak", "\x1b[31mred\x1b[0m", "\u202ereversed", "para\u2028graph", "|=\\", ']"\\',
    "=1+1", "@SUM(A1)", "\r\nCEF:0|a|b|", "\x00",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_t39_what_a_user_types_is_in_no_record(tmp_path, text):
    """It is committed to; where a field of a record takes text, foreign characters are refused."""
    from airgap.audit import commitment

    with logs.open_log(tmp_path) as log:
        decision, req = log.put_object(logs.DECISION), new_ulid()
        content = f"<MoleculeS>{text}<MoleculeE>".encode()
        log.append(logs.intent(decision, req, in_=commitment(content, logs.NONCE)))
        log.append(logs.outcome(req))
        if not text.isascii() or not text.isprintable():
            for field in ({"label": text}, {"data": {"stage": text}}):
                with pytest.raises(RefusedError):
                    logs.denial(**field)
    held = b"".join(p.read_bytes() for p in (tmp_path / "audit").rglob("*") if p.is_file())
    assert content not in held
    assert text.encode() not in logs.segment(tmp_path).read_bytes() or len(text) < 4
    for record in read_records(tmp_path / "audit"):
        assert all(" " <= c <= "~" for c in orjson.dumps(record).decode())


# -- T50: other implementations -------------------------------------------------------


def _scales(folder):
    """Ask tlog-scales about head and tiles; it never reads a line."""
    from tlog_scales import backend, reader, signing, tlog

    head = tlog.Checkpoint.from_text((folder / "checkpoint").read_text())
    head.verify(signing.Vkey.from_string(str(VKEY)))
    tiles = reader.TilesReader(backend.LocalBackend(folder))
    tiles.set_size(head.size)
    assert tiles.calculate_root_hash() == head.root_hash


def _by_hand(folder):
    """Ask hashlib and openssl about lines and head: what `sha256sum` and a calculator could do."""
    head = verify_checkpoint(parse_checkpoint((folder / "checkpoint").read_bytes()), VKEY)
    lines = (folder / "seg/00000000.jsonl").read_bytes().split(b"\n")[:-1]
    level = [hashlib.sha256(b"\0" + line).digest() for line in lines[: head.size]]
    assert len(level) == head.size
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(p)).digest() if p[1:] else p[0] for p in pairs]
    note = (folder / "checkpoint").read_text().split("\n")
    assert base64.b64encode(level[0]).decode() == note[2]


# What an implementation that looks at one part must find, and what it cannot see.
# (tlog-scales 0.0.3 takes a note with a good signature though a second one of the key is bad: T22.)
TILES_SEE = {"T21", "T24", "a tile edited"}
LINES_SEE = {f"T{n}" for n in (*range(1, 12), 16, 21, 22, 24)}


@pytest.mark.parametrize("name", FILES)
def test_t50_other_implementations_say_the_same_of_what_they_cover(tree, name):
    pytest.importorskip("tlog_scales", reason="tlog-scales is not installed")
    asked = {"tiles": (_scales, TILES_SEE), "lines": (_by_hand, LINES_SEE)}
    folder = tree / "audit/log"
    for ask, _ in asked.values():
        ask(folder)
    FILES[name].act(tree)
    ours = verify(tree, anchored=False).exit
    number = name.split(" ", 1)[0] if name.startswith("T") else name
    if number == "T5" and "last" in name:
        number = "past the head"  # a line more, which no head covers
    for ask, sees in asked.values():
        try:
            ask(folder)
        except Exception:  # noqa: BLE001 - whatever another library raises means: no
            said_no = True
        else:
            said_no = False
        if said_no and (folder / "checkpoint").exists() and number not in {"T15", "T12"}:
            assert ours == 1, (name, ask.__name__)
        if number in sees:
            assert said_no, (name, ask.__name__)

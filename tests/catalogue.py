"""The catalogue of attacks, row by row, and the tests in which each row is carried out.

A reference is `attack: NAME`, a row of `tests/attacks.py`, or `FILE::TEST` below `tests/`.
`tests/attack/test_catalogue.py` checks that every reference is there. A row without a reference is
open and says so in `OPEN`.
"""

from __future__ import annotations

ATTACKS = "attack/test_bundle_attacks.py"
TARGET = "attack/test_parity_attacks.py"
VOLUMES = "unit/test_bundle_volumes.py"
TRANSIT = "unit/test_bundle_transit.py"
DELTA = "unit/test_bundle_delta.py"
EVIDENCE = "unit/test_evidence.py"
STORE = "unit/test_install_store.py"
PARSERS = "property/test_bundle_parsers.py"
REVOKED = "unit/test_revocations.py"
ROOT = "unit/test_trust_root.py"

CATALOGUE: dict[str, tuple[str, ...]] = {
    "symlink, hardlink member": ("attack: symbolic link", "attack: hard link"),
    "hardlink to symlink (CVE-2026-11940)": (
        "attack: hard link through a symbolic link (CVE-2026-11940)",
    ),
    "device, fifo, folder entry": (
        "attack: character device",
        "attack: block device",
        "attack: fifo",
        "attack: folder entry",
    ),
    "GNU long name, sparse file, pax global header": (
        "attack: GNU long name",
        "attack: GNU long link",
        "attack: GNU sparse file",
        "attack: pax global header",
    ),
    "unlisted pax key, comment smuggling": (
        "attack: unlisted pax key",
        "attack: owner name",
        "attack: comment smuggles bytes",
    ),
    "pax size differs, pax length lies": (
        "attack: pax size record",
        "attack: pax length lies",
        "attack: pax record without newline",
        "attack: size differs from the manifest",
    ),
    "parent path, absolute path": (
        "attack: parent path, in the tar only",
        "attack: absolute path, in the tar only",
    ),
    "duplicate member": ("attack: duplicate member",),
    "case twin, Unicode twin": (
        "attack: hostile name: case twin",
        "attack: hostile name: folder case twin",
        "attack: hostile name: NFD",
    ),
    "hostile names": (
        "attack: hostile name: newline",
        "attack: hostile name: right-to-left override",
        "attack: hostile name: device",
        "attack: hostile name: trailing dot",
        "attack: hostile name: file beside a folder of its name",
    ),
    "bad header checksum, base-256 or negative size": (
        "attack: bad header checksum",
        "attack: base-256 size",
        "attack: negative size",
    ),
    "head too large": ("attack: manifest of 5 MiB",),
    "head reordered": (
        "attack: chunks before the manifest",
        "attack: head reordered: trust after manifest",
    ),
    "data or a second archive appended": (
        "attack: a byte appended",
        "attack: a second archive appended",
    ),
    "non-zero padding": (
        "attack: non-zero padding in the head",
        "attack: non-zero padding in the body, sealed",
        "attack: non-zero padding in the body, not sealed",
        "attack: non-zero end, sealed",
    ),
    "truncated; empty; noise": (
        "attack: empty file",
        "attack: noise",
        f"{ATTACKS}::test_truncation_at_every_block_of_the_head_is_told_as_such",
        f"{ATTACKS}::test_truncation_anywhere_in_the_body_is_told_before_it_is_read",
    ),
    "EOF loop (CVE-2026-11972)": ("attack: cut inside an extended header (CVE-2026-11972)",),
    "unlisted file, missing file": ("attack: unlisted member", "attack: listed file missing"),
    "offsets overlap, data unaligned, sums disagree": (
        "attack: offsets overlap",
        "attack: data unaligned",
        "attack: SHA256SUMS disagree",
    ),
    "signature stripped": ("attack: signatures stripped", "attack: no signature"),
    "payload edited": ("attack: payload edited",),
    "payload or predicate type swapped": (
        "attack: payload type swapped",
        "attack: a signed approval used as the seal",
    ),
    "one key twice": ("attack: one signature twice",),
    "one key, two ids": (
        f"{ROOT}::test_a_root_that_breaks_a_rule",
        "attack: one signature under two key ids",
    ),
    "one person, two keys; builder approves": (
        "attack: one person, two keys",
        "attack: the builder approves",
    ),
    "role missing": (f"{ATTACKS}::test_required_role_missing",),
    "unknown key only": ("attack: an unknown key alone",),
    "key inside bundle": ("attack: the bundle brings its own anchor",),
    "revoked signer": (f"{REVOKED}::test_a_revoked_signer_counts_for_nothing",),
    "key out of validity": (f"{ATTACKS}::test_enrolment_ended_before_the_release",),
    "algorithm confusion": (f"{ATTACKS}::test_a_key_of_another_scheme_never_counts",),
    "profile downgrade": (
        "attack: profile of another kind",
        "unit/test_bundle_cnsa2.py::test_a_profile_is_that_of_the_host",
    ),
    "hybrid half": (
        "unit/test_bundle_cnsa2.py::test_half_of_a_hybrid_counts_for_nobody",
        "unit/test_bundle_cnsa2.py::test_half_a_builder_builds_nothing",
    ),
    "base64, JSON abuse": (
        "attack: payload is a number",
        "attack: a field is missing",
        "attack: JSON nested 10,000 deep",
        "attack: a tail that is no space",
        "attack: base64 with unused bits",
    ),
    "manifest of another bundle": ("attack: manifest swapped for that of another sealed bundle",),
    "manifest not canonical": (
        "attack: manifest with reordered keys",
        "attack: manifest with whitespace",
        "attack: manifest with a duplicate key",
        "attack: manifest with epoch 9223372036854775808",
        "attack: manifest with epoch 1e400",
        "attack: manifest with epoch NaN",
    ),
    "unknown field; future format": ("attack: unknown field", "attack: future format"),
    "any JSON value anywhere": (
        f"{PARSERS}::test_any_json_value_in_any_field",
        f"{PARSERS}::test_any_value_in_a_sealed_manifest_is_refused_or_changes_nothing",
    ),
    "chunk flipped": (
        "attack: one bit of chunk 0 flipped",
        "attack: one bit of chunk 1 flipped",
        f"{ATTACKS}::test_a_chunk_error_names_chunk_offset_and_file",
        f"{VOLUMES}::test_a_bad_volume_is_named_with_the_offset",
    ),
    "leaf list edited": (
        "attack: one leaf changed",
        "attack: a leaf dropped",
        "attack: a leaf added",
        "attack: an inner node offered as the only leaf",
    ),
    "piece missing; stale piece of another set (zarf#3266)": (
        f"{VOLUMES}::test_a_lost_volume_is_named",
        f"{VOLUMES}::test_a_damaged_volume_is_refused_by_name",
    ),
    "pieces swapped, sidecar lies": (
        f"{VOLUMES}::test_a_damaged_volume_is_refused_by_name",
        f"{VOLUMES}::test_all_volumes_agree_on_a_lie",
        f"{VOLUMES}::test_one_volume_twice",
    ),
    "parity poisoned": (
        f"{VOLUMES}::test_poisoned_parity_repairs_nothing",
        f"{VOLUMES}::test_parity_that_lies_consistently_is_held_against_the_seal",
    ),
    "medium changes during read": (f"{ATTACKS}::test_medium_changes_between_passes",),
    "older epoch; same epoch, other bytes": (
        f"{ATTACKS}::test_older_epoch_and_twin",
        f"{STORE}::test_an_older_epoch_never_comes_back",
    ),
    "expired, not yet valid": ("attack: expired", "attack: not yet valid"),
    "clock set back": (
        f"{ATTACKS}::test_clock_set_back",
        f"{STORE}::test_the_clock_may_not_lie_before_the_last_record",
    ),
    "revoked model; rollback to revoked": (
        f"{REVOKED}::test_revoked_things_are_refused",
        f"{REVOKED}::test_a_model_is_revoked_by_what_it_was_made_of",
        f"{REVOKED}::test_an_installed_bundle_is_asked_again_before_each_start",
        f"{DELTA}::test_a_revoked_base_is_none",
    ),
    "old revocation list": (
        f"{REVOKED}::test_a_list_only_grows",
        f"{REVOKED}::test_a_forged_list_in_a_bundle_is_refused",
    ),
    "root gap, root signed by new keys only": (
        "attack: a gap in the chain of roots",
        f"{ROOT}::test_new_keys_alone_do_not_make_a_new_root",
    ),
    "delta on wrong base": (
        "attack: a delta without its base",
        f"{DELTA}::test_no_base_no_install",
        f"{DELTA}::test_an_altered_base_is_named",
        f"{DELTA}::test_a_delta_that_lies",
    ),
    "ciphertext block moved, cut, foreign key": (
        f"{TRANSIT}::test_an_altered_file_is_refused",
        f"{TRANSIT}::test_nobody_else_opens_it",
    ),
    "subject mismatch": (
        f"{EVIDENCE}::test_a_bundle_over_one_artifact_covers_that_file",
        f"{EVIDENCE}::test_an_attestation_must_speak_of_files_that_are_here",
    ),
    "wrong identity, wrong issuer": (f"{EVIDENCE}::test_another_identity_or_issuer_is_refused",),
    "OMS ignore_paths, symlink, expired certificate": (
        f"{EVIDENCE}::test_a_model_signature_over_anything_else_is_refused",
        f"{EVIDENCE}::test_certificates_count_only_while_they_are_valid_and_lead_to_a_given_authority",
        "unit/test_model_signing_cli.py::test_what_the_tool_would_pass_over_is_refused_here",
    ),
    "level inflated": (
        "attack: a level without a summary",
        "attack: level inflated: the summary says less",
        "attack: level inflated: no evidence of its kind",
    ),
    "BOM differs": ("attack: BOM differs from the files", "attack: BOM missing"),
    "the 20 samples of section 5": (
        "unit/test_scan_samples.py::test_sample_gets_its_verdict",
        "unit/test_scan_samples.py::test_sample_in_a_payload_is_refused",
    ),
    "ONNX sub-graph hides external data": (
        "unit/test_scan_onnx.py::test_external_data_is_found_wherever_it_hides",
    ),
    "ONNX hard link (CVE-2026-34446); cases of CVE-2022-25882, CVE-2024-27318, CVE-2024-5187, "
    "CVE-2026-27489": (
        "attack: hard link",
        "unit/test_scan_onnx.py::test_location_is_a_plain_name",
        "unit/test_scan_onnx.py::test_bounds_and_keys_of_external_data",
    ),
    "template bomb": (
        "unit/test_scan_parsers.py::test_templates_that_do_not_render_within_limits_are_refused",
        "unit/test_scan_parsers.py::test_a_template_that_never_ends_is_stopped",
    ),
    "wheel tampered, extra dependency": (
        "unit/test_scan_parsers.py::test_bad_wheels_are_refused",
        "attack/test_wheel_attacks.py::test_a_wheel_that_is_not_plain_is_refused",
        "attack/test_wheel_attacks.py::test_wheels_that_come_into_each_other_s_way_are_refused",
        "unit/test_installer_attacks.py::test_wheels_that_may_not_enter_are_refused_before_pip_starts",
        "unit/test_wheelhouse.py::test_a_name_that_is_on_no_list_is_refused",
    ),
    "policy denies, pack in bundle permits": (
        "attack/test_catalogue.py::test_a_pack_in_the_bundle_permits_nothing",
    ),
    "disk full, kill -9 at each step": (
        f"{STORE}::test_a_disk_that_fills_during_the_copy_is_a_fault_and_resumes",
        f"{STORE}::test_a_killed_install_resumes",
        f"{STORE}::test_an_install_killed_after_its_files_were_made_read_only_resumes",
        "attack/test_catalogue.py::test_an_install_killed_at_any_step_leaves_the_old_bundle",
    ),
    "file changed after install": (
        f"{STORE}::test_a_file_changed_after_install_is_found_at_start",
    ),
    "parity differs on target": (
        f"{TARGET}::test_a_bundle_whose_graph_answers_otherwise_here_is_not_made_active",
    ),
    "hostile `policy.py` in the working folder": (
        "attack/test_catalogue.py::test_a_module_of_the_working_folder_is_not_loaded",
    ),
    "staging evidence: payload, time, log id, entry missing": (
        f"{EVIDENCE}::test_an_altered_sigstore_bundle_is_refused",
        f"{EVIDENCE}::test_another_instance_is_refused",
    ),
}

# Rows that nothing carries out yet, and why.
OPEN: dict[str, str] = {
    name: "the check itself is being built" for name, tests in CATALOGUE.items() if not tests
}

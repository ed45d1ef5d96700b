"""The case this was made for: three licences and four parties of one model, none hidden."""

from __future__ import annotations

import tiny_llama

from bundle.staging.inspect import inspect_source
from bundle.staging.licences import Conflict, LicenceFound, licence_conflicts


def logos(folder):
    """A snapshot that says of itself what the published LOGOS 3B says, with tiny weights."""
    made = tiny_llama.write_snapshot(folder, _name_or_path="meta-llama/Llama-3.2-3B")
    (made / "LICENSE").write_text("Creative Commons Attribution 4.0 International\n")
    return inspect_source(made, origin="hf:LOGOS-Hub/LOGOS-pretrain-3B")


def test_the_three_licences_of_logos_conflict_in_pairs(tmp_path):
    report = logos(tmp_path / "m")
    base = (
        "LicenseRef-Llama-3.2 (base model meta-llama/Llama-3.2-3B (config.json#_name_or_path), "
        "base model llama-3.2 (registry version 1, logos-pretrain-3b))"
    )
    llama = (
        "LicenseRef-Llama-3.2 sets conditions on use, on naming and on very large users, and "
        "binds derivatives"
    )
    creative = "CC-BY-4.0 demands attribution and a note of changes"
    apache = "Apache-2.0 asks for its text and notices to be kept"
    assert report.conflicts == (
        Conflict("CC-BY-4.0 (LICENSE)", "Apache-2.0 (README.md#license)", f"{creative}; {apache}"),
        Conflict("CC-BY-4.0 (LICENSE)", base, f"{creative}; {llama}"),
        Conflict("Apache-2.0 (README.md#license)", base, f"{apache}; {llama}"),
    )
    document = report.as_document()
    assert document["licence_conflicts"] == [each.text for each in report.conflicts]
    assert all(len(item["sha256"]) == 64 and item["place"] for item in document["licences"])


def test_every_party_stands_with_its_basis_and_is_declared(tmp_path):
    report = logos(tmp_path / "m")
    found = {(item["relation"], item["party"]) for item in report.as_document()["lineage"]}
    assert found == {
        ("derived_from", "meta-llama/Llama-3.2-3B"),
        ("derived_from", "llama-3.2"),
        ("distributed_by", "hf:LOGOS-Hub"),
        ("developed_by", "logos-hub"),
        ("codeveloped_by", "gaoling-school"),
    }
    lines = report.as_document()["lineage"]
    assert {item["status"] for item in lines} == {"declared"}
    assert all(item["basis"] for item in lines)


def test_one_licence_is_no_conflict(tmp_path):
    report = inspect_source(tiny_llama.write_snapshot(tmp_path / "m"))
    assert report.conflicts == ()
    same = [LicenceFound("MIT", place, "", "declared") for place in ("a", "b")]
    assert licence_conflicts(same) == ()
    use = [
        LicenceFound(name, "LICENSE", "", "declared")
        for name in ("LicenseRef-Llama-3.2", "LicenseRef-Llama-3.2-AUP")
    ]
    assert licence_conflicts(use) == ()


def test_the_card_names_who_made_it(tmp_path):
    folder = tiny_llama.write_snapshot(tmp_path / "m")
    card = (folder / "README.md").read_text()
    extra = "developers: [A]\nco_developers: [B]\nfine_tuned_by: C\ndistributor: D\n"
    (folder / "README.md").write_text(card.replace("license:", extra + "license:", 1))
    hints = {(hint.relation, hint.party) for hint in inspect_source(folder).lineage}
    assert hints >= {
        ("developed_by", "A"),
        ("codeveloped_by", "B"),
        ("fine_tuned_by", "C"),
        ("distributed_by", "D"),
    }

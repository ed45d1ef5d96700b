"""The main road end to end, and every way in which a person or a medium can get it wrong."""

import json
import shutil
import subprocess
import sys
from datetime import date, timedelta

import pytest
from conftest_road import SNAPSHOT, call

PARACETAMOL = "CC(=O)Nc1ccc(O)cc1"
LYSOZYME = "KVFERCELARTLKRLGMDGYRGISLANWMCLAKWESGYNTRATNYNAG"
PROJECT = ("--project", "route-design")
SEED = ("--seed", "1")  # what is drawn by chance is held by chance

RUNS = {
    "retrosynthesis": ("--smiles", PARACETAMOL),
    "molecule": (),
    "binding-site": ("--sequence", LYSOZYME),
    "pocket-ligand": ("--sequence", LYSOZYME, "--residues", "17,34,44-48"),
    "material": (),
}


# -- the answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", RUNS)
def test_each_task_answers_with_a_receipt(road, capsys, task, tmp_path):
    done = call(
        capsys,
        *("run", task, *RUNS[task], "-n", "4", "--seed", "7", *PROJECT, "--root", road.lab),
        *("--html", tmp_path / "r.html", "--csv", tmp_path / "r.csv"),
        *("--receipt", tmp_path / "r.tlog-proof"),
    )
    assert done.status == 0, done.text
    assert done.document["stamp"] == "scientific_use: false – reference model"
    assert done.document["summary"]["n"] == 4
    page = (tmp_path / "r.html").read_text()
    assert "scientific_use: false" in page
    assert "<script" not in page
    assert "<MoleculeS>" not in page
    receipt = call(capsys, "audit", "check-receipt", tmp_path / "r.tlog-proof", "--root", road.lab)
    assert receipt.status == 0, receipt.text


def test_one_seed_gives_one_answer(road, capsys):
    def rows(n):
        done = call(
            capsys,
            *("run", "molecule", "-n", n, "--seed", "11", *PROJECT, "--root", road.lab),
        )
        assert done.status == 0, done.text
        found = [*done.document["rows"], *done.document["invalid"]]
        return {row["index"]: row["logprob"] for row in found if "indices" not in row} | {
            index: row["rank"] and row["smiles"]
            for row in done.document["rows"]
            for index in row["indices"]
        }

    few, many = rows(3), rows(6)
    assert {index: many[index] for index in few} == few


def test_binding_site_is_an_exact_copy(road, capsys):
    done = call(
        capsys,
        *("run", "binding-site", "--sequence", LYSOZYME, "-n", "6", *PROJECT, "--root", road.lab),
    )
    assert done.status == 0, done.text
    assert done.document["summary"]["valid"] == 6
    assert done.document["track"]["sequence"] == LYSOZYME


def test_a_table_is_printed_for_people(road, capsys):
    done = call(
        capsys,
        *("run", "retrosynthesis", "--smiles", PARACETAMOL, "-n", "4", *SEED, *PROJECT),
        *("--root", road.lab),
        as_json=False,
    )
    assert done.status == 0
    assert "not checked:" in done.text
    assert "on record:" in done.text


def test_sdf_is_read_back_by_rdkit(road, capsys, tmp_path):
    rdkit = pytest.importorskip("rdkit.Chem")
    path = tmp_path / "m.sdf"
    done = call(
        capsys, "run", "molecule", "-n", "6", *SEED, *PROJECT, "--sdf", path, "--root", road.lab
    )
    assert done.status == 0, done.text
    molecules = [m for m in rdkit.SDMolSupplier(str(path)) if m is not None]
    assert len(molecules) == len(done.document["rows"])


# -- wrong input ----------------------------------------------------------------------------------

WRONG_RUNS = {
    "unknown task": (("run", "retrosynthesys", "--smiles", "CCO"), 1, "prompt.task"),
    "unpublished task": (("run", "antibody-cdr"), 1, "prompt.unpublished"),
    "malformed SMILES": (("run", "retrosynthesis", "--smiles", "CC(=O"), 1, "prompt.g07"),
    "five-bonded carbon": (
        ("run", "retrosynthesis", "--smiles", "C(C)(C)(C)(C)C"),
        1,
        "prompt.g07",
    ),
    "a tag in a value": (
        ("run", "retrosynthesis", "--smiles", "CCO<MoleculeE>"),
        1,
        "prompt.g03",
    ),
    "a prompt without its closing tag": (
        ("run", "retrosynthesis", "--prompt", "<MoleculeS>CCOC(C)=O<ReverseReact>"),
        1,
        "prompt.g01",
    ),
    "a salt": (("run", "retrosynthesis", "--smiles", "CCO.Cl"), 1, "prompt.g08"),
    "no input": (("run", "retrosynthesis"), 1, "prompt.input"),
    "two inputs": (
        ("run", "binding-site", "--sequence", "MKV", "--smiles", "CC"),
        1,
        "prompt.input",
    ),
    "lower-case protein": (("run", "binding-site", "--sequence", "mkvl"), 1, "prompt.g06"),
    "too long": (("run", "binding-site", "--sequence", "MKVL" * 60), 1, "prompt.g10"),
    "1 MB prompt": (("run", "retrosynthesis", "--smiles", "C" * 1_000_000), 1, "request.limit"),
    "n = 0": (("run", "molecule", "-n", "0"), 1, "prompt.option"),
    "n = 10^6": (("run", "molecule", "-n", "1000000"), 1, "prompt.option"),
    "negative seed": (("run", "molecule", "--seed", "-1"), 1, "prompt.option"),
    "unknown project": (("run", "molecule", "--project", "none-such"), 1, "site.project"),
    "unknown model": (("run", "molecule", "--model", "none-such"), 1, "store.missing"),
    "missing file": (("run", "binding-site", "--fasta", "/nonexistent.fasta"), 2, "usage.argument"),
    "binary file": (("run", "binding-site", "--fasta", sys.executable), 2, "usage.argument"),
    "sdf of no molecule": (("run", "material", "--sdf", "x.sdf"), 2, "usage.argument"),
    "output in no folder": (
        ("run", "molecule", "--html", "/nonexistent/r.html"),
        2,
        "usage.argument",
    ),
}


@pytest.mark.parametrize(("argv", "status", "code"), WRONG_RUNS.values(), ids=WRONG_RUNS.keys())
def test_wrong_input_has_a_code(road, capsys, argv, status, code):
    project = () if "--project" in argv else PROJECT
    done = call(capsys, *argv, *project, "--root", road.lab)
    assert (done.status, done.document["code"]) == (status, code), done.text
    assert done.document["error"]


# -- policy ---------------------------------------------------------------------------------------


def test_a_denied_use_cites_its_rule_and_is_on_record(road, capsys):
    permitted = call(capsys, "run", "molecule", "-n", "1", *SEED, *PROJECT, "--root", road.lab)
    assert permitted.status == 0
    denied = call(
        capsys, "run", "molecule", "-n", "1", "--project", "sensor-coatings", "--root", road.lab
    )
    assert (denied.status, denied.document["code"]) == (1, "policy.denied")
    assert "CUI-BOUNDARY" in denied.document["error"]
    shown = call(capsys, "audit", "show", "--kind", "denial", "--root", road.lab)
    assert any(r["project"] == "sensor-coatings" for r in shown.document["records"])


def test_a_hazard_hold_tells_a_reference_and_nothing_else(road, capsys):
    # The phosphonofluoridate core alone: an entry of the Annex as a family, not a listed chemical.
    done = call(
        capsys,
        *("run", "retrosynthesis", "--smiles", "COP(C)(=O)F", "-n", "1", *PROJECT),
        *("--root", road.lab),
    )
    assert (done.status, done.document["code"]) == (1, "policy.held")
    text = done.document["error"] + done.document["hint"]
    assert "Reference" in text
    for word in ("CWC", "HAZ", "Schedule", "phosph", "H3", "H4"):
        assert word not in text


# -- the log --------------------------------------------------------------------------------------


def test_a_held_request_is_released_by_two_and_answered_with_the_same_seed(road, capsys, tmp_path):
    lab = tmp_path / "lab"
    shutil.copytree(road.lab, lab, symlinks=True)
    site = lab / "site.toml"
    site.write_text(site.read_text().replace("as_of = ", "# as_of = "))  # the clock decides
    for name, role in (("eve", "ehs"), ("xia", "export_control")):
        call(capsys, "keys", "new", name, "--person", name, "--role", role, "--root", lab)
        public = lab / "keys" / f"{name}.pub.json"
        key = road.staging / "keys" / "root.pem"
        assert call(capsys, "trust", "add", public, "--key", key, "--root", lab).status == 0
    memo = tmp_path / "memo.txt"
    memo.write_text("seen by the board")
    words = ("--reason", "seen", "--expires", f"{date.today() + timedelta(days=9)}")  # noqa: DTZ011

    asked = ("run", "retrosynthesis", "--smiles", "OCCSCCO", "-n", "2", "--seed", "3", *PROJECT)
    assert call(capsys, *asked, "--root", lab).document["code"] == "policy.held"
    done = None
    for _ in range(2):  # the input is held, and then the answer
        hold = call(capsys, "hold", "list", "--root", lab).document["holds"][-1]["reference"]
        refused = call(capsys, "hold", "fetch", hold, "--root", lab)
        assert refused.document["code"] == "hold.waiting"
        hold = hold if done is None else done.document["error"].split("Reference ")[1].rstrip(".")
        sign = ("hold", "release", hold, *("--confirm", "route-design"), "--root", lab)
        first = call(capsys, *sign, "--key", "eve", *words, "--document", memo)
        assert first.status == 0, first.text
        assert call(capsys, *sign, "--key", "xia").document["people"] == ["eve", "xia"]
        done = call(capsys, "hold", "fetch", hold, "--root", lab)
        if done.status == 0:
            break
    assert done.document["hold"] == hold
    assert done.document["summary"]["n"] == 2
    states = [
        each["state"] for each in call(capsys, "hold", "list", "--root", lab).document["holds"]
    ]
    assert any(state.startswith("answered as") for state in states)

    report = call(capsys, "report", "award", "route-design", "--root", lab).document
    assert report["results"]["held"] >= 1
    page = tmp_path / "dossier.html"
    request = done.document["request"]
    dossier = call(capsys, "dossier", request, "--html", page, "--root", lab).document
    assert len(dossier["proofs"]) == len(dossier["records"]) == 2
    assert "HAZ-" not in page.read_text()


def test_the_decisions_of_the_log_come_out_the_same(road, capsys):
    done = call(capsys, "policy", "replay", "--root", road.lab)
    assert done.status == 0, done.text
    found = done.document
    assert (found["differs"], found["not_possible"]) == (0, 0)
    assert found["same"] > 0
    install = next(
        each for each in found["decisions"] if each["decision"] == road.installed["decision"]
    )
    assert install["replay"] == "same"


def test_no_prompt_and_no_output_is_in_the_log(road, capsys):
    canary = "CC(=O)Oc1ccccc1C(=O)O"
    done = call(
        capsys,
        *("run", "retrosynthesis", "--smiles", canary, "-n", "2", *SEED, *PROJECT),
        *("--root", road.lab),
    )
    assert done.status == 0, done.text
    wanted = [canary.encode()]
    for row in done.document["rows"]:
        wanted += [part["smiles"].encode() for part in row["reactants"] if len(part["smiles"]) > 6]
    for path in (road.lab / "audit").rglob("*"):
        if path.is_file() and path.name != "reserve":
            content = path.read_bytes()
            assert not any(text in content for text in wanted), path


def test_the_log_verifies_and_an_edit_does_not(road, capsys, tmp_path):
    run = call(
        capsys,
        *("run", "molecule", "-n", "1", *SEED, *PROJECT, "--root", road.lab),
        *("--receipt", tmp_path / "a.tlog-proof"),
    )
    assert run.status == 0
    vkey = road.lab / "keys" / "audit.vkey"
    out = tmp_path / "export"
    export = call(capsys, "audit", "export", "--format", "jsonl", "-o", out, "--root", road.lab)
    assert export.status == 0, export.text
    anchors = ("--vkey", vkey, "--anchors", tmp_path / "a.tlog-proof")
    good = call(capsys, "audit", "verify", out, *anchors)
    assert (good.status, good.document["verdict"]) == (0, "good"), good.text
    unanchored = call(capsys, "audit", "verify", out, "--vkey", vkey)
    assert unanchored.status == 3
    segment = out / "log" / "seg" / "00000000.jsonl"
    raw = bytearray(segment.read_bytes())
    raw[len(raw) // 2] ^= 1
    segment.write_bytes(raw)
    assert call(capsys, "audit", "verify", out, *anchors).status == 1


# -- the bundle -----------------------------------------------------------------------------------


def test_too_few_signatures_are_refused(road, capsys):
    assert call(capsys, "verify", road.bundle, "--root", road.lab).status == 0
    for path in (road.draft, road.half):
        done = call(capsys, "verify", path, "--root", road.lab)
        assert (done.status, done.document["code"]) == (1, "seal.threshold"), done.text


def test_signing_twice_with_one_key_does_not_count_twice(road, capsys, tmp_path):
    copy = tmp_path / "half.agb"
    shutil.copyfile(road.half, copy)
    key = road.staging / "keys" / "isso.pem"
    again = call(
        capsys, "sign", copy, "--key", key, "--confirm", "logos-ref-tiny", "--root", road.staging
    )
    assert again.status in {0, 1}
    done = call(capsys, "verify", copy, "--root", road.lab)
    assert done.status == 1


def test_the_builder_cannot_approve(road, capsys, tmp_path):
    copy = tmp_path / "half.agb"
    shutil.copyfile(road.half, copy)
    key = road.staging / "keys" / "builder.pem"
    done = call(
        capsys, "sign", copy, "--key", key, "--confirm", "logos-ref-tiny", "--root", road.staging
    )
    assert done.status == 1
    assert call(capsys, "verify", copy, "--root", road.lab).status == 1


def members(bundle):
    """Return (name, offset of data, size) of each member, as GNU tar sees the file."""
    import tarfile

    with tarfile.open(bundle) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive.getmembers()]


def test_a_byte_flipped_in_each_section_is_refused(road, capsys, tmp_path):
    good = road.bundle.read_bytes()
    copy = tmp_path / "flipped.agb"
    found = members(road.bundle)
    assert len(found) > 12
    for name, offset, size in found:
        for place in {offset, offset + size // 2, offset + size - 1}:
            raw = bytearray(good)
            raw[place] ^= 1
            copy.write_bytes(raw)
            done = call(capsys, "verify", copy, "--root", road.lab)
            assert done.status == 1, (name, place)
            assert done.document["code"].split(".")[0] in {
                "seal", "trust", "manifest", "chunk", "archive",
            }, (name, done.text)  # fmt: skip


def test_a_refused_bundle_leaves_nothing_outside_quarantine(road, capsys, tmp_path):
    lab = tmp_path / "lab"
    lab.mkdir(mode=0o700)
    shutil.copy(road.lab / "site.toml", lab)
    shutil.copytree(road.lab / "trust", lab / "trust")
    raw = bytearray(road.bundle.read_bytes())
    raw[-20_000] ^= 1
    bad = tmp_path / "bad.agb"
    bad.write_bytes(raw)
    done = call(capsys, "install", bad, "--root", lab)
    assert done.status == 1
    assert call(capsys, "list", "--root", lab).document["bundles"] == []
    left = {p.relative_to(lab).parts[:2] for p in (lab / "store").rglob("*") if p.is_file()}
    assert left <= {
        ("store", "quarantine"),
        ("store", "lock"),
        ("store", ".lock"),
        ("store", "state.json"),
    }
    good = call(capsys, "install", road.bundle, "--root", lab)
    assert good.status == 0, good.text


@pytest.mark.parametrize("name", ["absent", "empty", "folder", "noise", "huge"])
def test_what_is_no_bundle_has_a_code(road, capsys, tmp_path, name):
    path = tmp_path / "x.agb"
    if name == "empty":
        path.touch()
    elif name == "folder":
        path.mkdir()
    elif name == "noise":
        path.write_bytes(bytes(range(256)) * 4096)
    elif name == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    for command in ("verify", "install"):
        done = call(capsys, command, path, "--root", road.lab)
        assert done.status in {1, 2, 3}
        assert done.document["code"]


def test_an_expired_release_does_not_run(road):
    from datetime import timedelta

    from airgap.serve import open_broker
    from airgap.serve.session import utc_now
    from policy.errors import RefusedError

    late = utc_now() + timedelta(days=4000)
    with (
        pytest.raises(RefusedError) as refused,
        open_broker(road.lab, project="route-design", clock=lambda: late),
    ):
        pass
    assert refused.value.code == "trust.expired"


def test_standard_tools_read_the_bundle(road, tmp_path):
    listed = subprocess.run(["tar", "-tf", road.bundle], capture_output=True, text=True, check=True)
    assert listed.stdout.split("\n")[0] == "META/envelope.dsse.json"
    subprocess.run(["tar", "-xf", road.bundle, "-C", tmp_path], check=True)
    checked = subprocess.run(
        ["sha256sum", "-c", "--quiet", "META/SHA256SUMS"], cwd=tmp_path, check=False
    )
    assert checked.returncode == 0


def test_a_changed_installed_file_stops_the_start(road, capsys, tmp_path):
    lab = tmp_path / "lab"
    shutil.copytree(road.lab, lab, symlinks=True)
    assert call(capsys, "run", "molecule", "-n", "1", *SEED, *PROJECT, "--root", lab).status == 0
    victim = next(lab.rglob("tokenizer.json"))
    victim.chmod(0o644)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    done = call(capsys, "run", "molecule", "-n", "1", *SEED, *PROJECT, "--root", lab)
    assert (done.status, done.document["code"]) == (1, "start.digest")


# -- the snapshot ---------------------------------------------------------------------------------


def test_pickle_weights_and_code_hooks_are_refused(capsys, tmp_path):
    snapshot = SNAPSHOT
    good = call(capsys, "inspect", snapshot)
    assert good.status == 0, good.text

    pickled = tmp_path / "pickled"
    shutil.copytree(snapshot, pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert call(capsys, "inspect", pickled).document["code"] == "scan.pickle"

    hooked = tmp_path / "hooked"
    shutil.copytree(snapshot, hooked)
    config = json.loads((hooked / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Model"}
    (hooked / "config.json").write_text(json.dumps(config))
    assert call(capsys, "inspect", hooked).document["code"] == "scan.config"


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "binary"])
def test_a_source_that_is_no_snapshot_has_a_code(road, capsys, tmp_path, kind):
    source = tmp_path / "source"
    if kind in {"empty", "binary"}:
        source.mkdir()
    if kind == "file":
        source.write_text("x")
    if kind == "binary":
        (source / "config.json").write_bytes(bytes(range(256)))
    for argv in (
        ("inspect", source),
        (
            *("build", source, "-o", tmp_path / "x.agb", "--name", "m", "--version", "1"),
            *("--key", road.staging / "keys" / "builder.pem", "--root", road.staging),
        ),
    ):
        done = call(capsys, *argv)
        assert done.status in {1, 2, 3}
        assert done.document["code"]
    assert not (tmp_path / "x.agb").exists()
    assert not list(tmp_path.glob(".x.agb*"))

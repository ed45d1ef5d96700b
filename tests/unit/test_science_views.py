import csv as csvlib
import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from science_runs import HEADER, RUNS, run

from airgap.science import results, svg, views
from policy.errors import FaultError

GOOD_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" class="molecule" width="10" height="10" '
    'viewBox="0 0 10 10"><g transform="translate(1.0 2.0)">{}</g></svg>'
)


def page(task: str, header: views.Header = HEADER, drawings: dict | None = None) -> str:
    texts, inputs = RUNS[task]
    prepared, assessed, drawn = run(task, texts, **inputs)
    return views.html(prepared, assessed, header, drawn if drawings is None else drawings)


def printed(task: str, header: views.Header = HEADER) -> str:
    texts, inputs = RUNS[task]
    prepared, assessed, _ = run(task, texts, **inputs)
    console = Console(width=160, file=io.StringIO(), color_system=None)
    console.print(views.table(prepared, assessed, header))
    return console.file.getvalue()


@pytest.mark.parametrize("task", RUNS)
def test_every_view_says_what_was_not_checked_and_carries_the_stamp(task):
    texts, inputs = RUNS[task]
    prepared, assessed, _ = run(task, texts, **inputs)
    html, text = page(task), " ".join(printed(task).split())
    document = views.document(prepared, assessed, HEADER)
    for shown in (html, text, json.dumps(document, ensure_ascii=False)):
        assert "scientific_use: false – reference model" in shown
        assert assessed.unchecked.split(";")[0] in shown
    for fact in (HEADER.model_digest, HEADER.prompt_commitment, HEADER.receipt, HEADER.seal, "7"):
        assert fact in html
    assert document["run"]["model_digest"] == HEADER.model_digest
    assert "classes" not in json.dumps(document)


def test_stamp_is_absent_for_a_model_of_science_and_plain_for_another():
    science = replace(HEADER, scientific_use=True, reference_model=False)
    assert "scientific_use" not in page("molecule", science)
    assert "scientific_use" not in printed("molecule", science)
    other = replace(HEADER, reference_model=False)
    assert "scientific_use: false" in page("molecule", other)
    assert "reference model" not in page("molecule", other)


@pytest.mark.parametrize("task", RUNS)
def test_report_loads_nothing_and_runs_nothing(task):
    html = page(task)
    assert "<script" not in html
    assert not re.search(r"""[\s"'](?:src|href|action|srcset|style|on\w+)\s*=""", html)
    assert "url(" not in html
    assert "@import" not in html
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src &#39;none&#39;; style-src &#39;sha256-")


def test_policy_of_the_page_names_the_hash_of_its_style():
    import base64
    import hashlib

    html = page("molecule")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"sha256-{digest}" in html.replace("&#43;", "+")


def test_text_of_model_and_site_is_escaped_in_the_report():
    evil = '<img src=x onerror="alert(1)">'
    header = replace(HEADER, decision=evil, reasons=(evil,), receipt=evil, model=evil)
    texts = ["CC(C<script>alert(1)</script>", '"><svg onload=alert(1)>']
    prepared, assessed, _ = run("molecule", texts)
    html = views.html(prepared, assessed, header, {})
    assert "<img" not in html
    assert "<script" not in html
    assert "&lt;img" in html


def test_withheld_text_is_named_as_withheld():
    texts, inputs = RUNS["binding-site"]
    prepared, assessed, _ = run("binding-site", texts, **inputs)
    assert "withheld" in views.html(prepared, assessed, HEADER, {})


def test_result_without_an_answer_is_a_page_too():
    prepared, assessed, drawings = run("molecule", ["", "CC("])
    html = views.html(prepared, assessed, HEADER, drawings)
    assert "No sample gave a valid answer" in html
    assert "0 of 2 valid" in " ".join(
        str(r) for r in views.table(prepared, assessed, HEADER).renderables
    )


def test_long_results_say_how_much_is_left_out():
    prepared, assessed, _ = run("molecule", RUNS["molecule"][0])
    many = assessed.model_copy(update={"rows": [assessed.rows[0]] * 300})
    html = views.html(prepared, many, HEADER, {})
    assert "first 200 of 300" in html
    console = Console(width=100, file=io.StringIO())
    console.print(views.table(prepared, many, HEADER))
    assert "280 more rows" in console.file.getvalue()


# -- CSV ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", RUNS)
def test_csv_has_one_line_a_row_with_rank_likelihood_and_run(task):
    texts, inputs = RUNS[task]
    _, assessed, _ = run(task, texts, **inputs)
    lines = list(csvlib.DictReader(io.StringIO(views.csv(assessed, HEADER))))
    assert len(lines) == len(assessed.rows)
    for line, row in zip(lines, assessed.rows, strict=True):
        assert int(line["rank"]) == row.rank
        assert float(line["logprob"]) == row.logprob
        assert float(line["per_token"]) == row.per_token
        assert float(line["removed_mass"]) == row.removed_mass
        assert line["model_digest"] == HEADER.model_digest
        assert (line["seed"], line["scientific_use"]) == ("7", "false")
        assert line["prompt_commitment"] == HEADER.prompt_commitment


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_csv_cell_that_looks_like_a_formula_is_quoted(text):
    _, assessed, _ = run("molecule", RUNS["molecule"][0])
    header = replace(HEADER, model=text)
    row = assessed.rows[0].model_copy(update={"formula": text})
    made = views.csv(assessed.model_copy(update={"rows": [row]}), header)
    (line,) = csvlib.DictReader(io.StringIO(made, newline=""))
    assert line["model"] == line["formula"] == f"'{text}"
    assert line["logprob"].startswith("-")  # a number stays a number


def test_csv_keeps_smiles_as_they_are():
    _, assessed, _ = run("molecule", ["[NH4+]<MoleculeE>", "C=C<MoleculeE>"])
    lines = list(csvlib.DictReader(io.StringIO(views.csv(assessed, HEADER))))
    assert {line["smiles"] for line in lines} == {"[NH4+]", "C=C"}


# -- screen and small texts -----------------------------------------------------------------------


def test_screen_line_never_names_a_class():
    _, assessed, _ = run("molecule", ["OCCSCCO<MoleculeE>"])
    line = views.screen_line(assessed)
    assert assessed.output_screen.classes
    assert "2b13" not in line
    assert "H2" not in line
    held = assessed.model_copy(update={"output_screen": results.incomplete("crash: ValueError")})
    assert views.screen_line(held) == "held for review"
    _, clean, _ = run("molecule", ["CCO<MoleculeE>"])
    assert views.screen_line(clean).startswith("not held; ag/1+cwc/1")
    noted = clean.model_copy(
        update={"output_screen": clean.output_screen.model_copy(update={"tier": "H1"})}
    )
    assert views.screen_line(noted) == views.screen_line(clean)


def test_small_texts():
    assert views.short("sha256:" + "ab" * 32) == "sha256:abababababab"
    assert views.short("abcdefghijklmnop") == "abcdefghijkl"
    assert views.composition("[O].[Zn].[Zn].[Zn].[Zn]") == "Zn4 O"
    assert views.formula("C8H4O4-2") == "C₈H₄O₄²⁻"
    assert views.formula("C6H6") == "C₆H₆"
    assert views.formula("H4N+") == "H₄N⁺"


# -- drawings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", RUNS)
def test_every_drawing_of_the_helper_passes_the_list(task):
    texts, inputs = RUNS[task]
    _, _, drawings = run(task, texts, **inputs)
    for texts in drawings.values():
        for text in texts:
            cleaned = svg.clean_svg(text, title="a <b> & c")
            assert "<title>a &lt;b&gt; &amp; c</title>" in cleaned
            assert svg.clean_svg(cleaned.replace(' role="img"', ""))


ATTACKS = {
    "script": "<script>alert(1)</script>",
    "handler": '<path d="M0 0" onclick="alert(1)"/>',
    "foreign object": "<foreignObject><b>x</b></foreignObject>",
    "link": '<a href="https://example.org"><path d="M0 0"/></a>',
    "image": '<image href="https://example.org/x.png"/>',
    "use": '<use href="#x"/>',
    "style element": "<style>*{display:none}</style>",
    "style attribute": '<path d="M0 0" style="fill:url(https://example.org)"/>',
    "paint server": '<path d="M0 0" fill="url(#x)"/>',
    "animation": '<animate attributeName="href" to="x"/>',
    "text between shapes": "<g>buy now</g>",
    "class of the page": '<path class="stamp; x" d="M0 0"/>',
    "path with letters": '<path d="M0 0 javascript"/>',
    "huge number": '<rect x="1e99" y="0" width="1" height="1"/>',
    "other namespace": '<x:path xmlns:x="http://example.org" d="M0 0"/>',
    "namespaced attribute": (
        '<path xmlns:xlink="http://www.w3.org/1999/xlink" xlink:href="x" d="M0 0"/>'
    ),
    "nested svg": '<svg viewBox="0 0 1 1"/>',
    "deep": "<g>" * 20 + "</g>" * 20,
    "many": "<g/>" * 61_000,
    "comment": "<!-- x -->",
    "instruction": "<?xml-stylesheet href='x'?>",
    "not closed": "<g>",
    "entity": "&xxe;",
}


@pytest.mark.parametrize("inner", ATTACKS.values(), ids=ATTACKS.keys())
def test_drawing_with_anything_else_is_refused(inner):
    assert svg.clean_svg(GOOD_SVG.format('<path d="M0 0L1 1" fill="none"/>'))
    with pytest.raises(FaultError) as refused:
        svg.clean_svg(GOOD_SVG.format(inner))
    assert refused.value.code == "science.svg"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html/>",
        '<!DOCTYPE svg [<!ENTITY a "b">]>' + GOOD_SVG.format(""),
        GOOD_SVG.format("") + "x",
        "x" * 500_000,
    ],
)
def test_text_that_is_no_drawing_is_refused(text):
    with pytest.raises(FaultError):
        svg.clean_svg(text)


def test_evil_drawing_makes_no_page():
    with pytest.raises(FaultError):
        page("molecule", drawings={"1": [GOOD_SVG.format(ATTACKS["script"])]})


def test_report_is_made_without_drawings_too():
    assert "scheme-box" not in page("retrosynthesis", drawings={}).split("</style>")[1]


# -- replies --------------------------------------------------------------------------------------


def test_reply_with_rows_of_another_task_is_refused():
    _, assessed, _ = run("molecule", RUNS["molecule"][0])
    good = assessed.model_dump_json().encode()
    assert results.parse_assessed(good) == assessed
    for task in ("material", "poetry"):
        wrong = assessed.model_copy(update={"task": task})
        with pytest.raises(FaultError):
            results.parse_assessed(wrong.model_dump_json().encode())


LIES = {
    "a vote more": lambda d: d["rows"][0].update(votes=5),
    "a row more": lambda d: d["rows"].append(d["rows"][0]),
    "an invalid sample less": lambda d: d["invalid"].clear(),
    "a number that is text": lambda d: d["rows"][0].update(mw="46"),
    "an unknown field": lambda d: d.update(note="x"),
    "an unknown field in a row": lambda d: d["rows"][0].update(path="/etc/passwd"),
    "an unknown tier": lambda d: d["output_screen"].update(tier="H9"),
    "mass above one": lambda d: d["rows"][0].update(removed_mass=1.5),
    "parts that never came": lambda d: d.update(parts=3),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_reply_that_does_not_add_up_is_refused(lie):
    _, assessed, _ = run("molecule", RUNS["molecule"][0])
    document = json.loads(assessed.model_dump_json())
    assert results.parse_assessed(json.dumps(document).encode())
    lie(document)
    with pytest.raises(FaultError) as refused:
        results.parse_assessed(json.dumps(document).encode())
    assert refused.value.code == "science.reply"


def test_prompt_that_the_helper_made_up_is_refused():
    prepared, _, _ = run("molecule", RUNS["molecule"][0])
    assert results.parse_prepared(prepared.model_dump_json().encode()) == prepared
    for change in ({"prompt": "<MoleculeS>C"}, {"task": "poetry"}, {"modality": "weapons"}):
        wrong = prepared.model_copy(update=change)
        with pytest.raises(FaultError):
            results.parse_prepared(json.dumps(json.loads(wrong.model_dump_json())).encode())


def test_oversize_reply_is_refused():
    with pytest.raises(FaultError, match="bytes, more than"):
        results.parse_assessed(b" " * (5 * 1024 * 1024))


def test_helper_that_makes_no_progress_is_refused():
    _, assessed, _ = run("molecule", RUNS["molecule"][0])
    with pytest.raises(FaultError, match="no progress"):
        results.draw_all(lambda _: b'{"drawings": {}, "next": 0}', inputs={}, assessed=assessed)


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x9b2J", "\u202e", "a\nb", "\x00"])
def test_nothing_of_the_helper_moves_a_terminal(evil):
    prepared, _, _ = run("molecule", RUNS["molecule"][0])
    for change in ({"display": evil}, {"notes": [evil]}, {"unchecked": evil}):
        wrong = {**json.loads(prepared.model_dump_json()), **change}
        with pytest.raises(FaultError):
            results.parse_prepared(json.dumps(wrong).encode())


@pytest.mark.parametrize("width", [20, 40, 59, 60, 80, 200])
@pytest.mark.parametrize("task", list(RUNS))
def test_numbers_and_headings_stay_whole_on_every_terminal(task, width):
    texts, inputs = RUNS[task]
    prepared, assessed, _ = run(task, texts, **inputs)
    console = Console(width=width, file=io.StringIO(), soft_wrap=True)
    console.print(views.table(prepared, assessed, HEADER))
    said = console.file.getvalue().split()
    assert "log-lik." in said
    assert all(f"{row.logprob:.2f}" in said for row in assessed.rows)
    assert all(f"{row.votes}/{assessed.summary.n}" in said for row in assessed.rows)

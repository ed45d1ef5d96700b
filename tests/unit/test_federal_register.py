"""Lists from notices of the Federal Register: names, counts, order, and hostile XML."""

from __future__ import annotations

from datetime import date

import pytest
from policy_cases import RULES

from airgap import federal_register as fr
from policy import parse_lists
from policy.errors import RefusedError
from policy.snapshots import normal_name

NOTICE = """<?xml version="1.0" encoding="UTF-8"?>
<?xml-stylesheet type="text/xsl" href="notice.xsl"?>
<NOTICE>
<PREAMB><PRTPAGE P="35189"/><AGENCY TYPE="S">DEPARTMENT</AGENCY>
<DEPDOC>[Docket ID: DOD-2026-OS-1288]</DEPDOC><SUBJECT>Made-up Companies</SUBJECT>
<ACT><HD SOURCE="HED">ACTION:</HD><P>Notice of availability.</P></ACT></PREAMB>
<SUPLINF><HD SOURCE="HED">SUPPLEMENTARY INFORMATION:</HD>
<P>The following entities qualify:</P>
%s
<P>This is done<FTREF/><SU>1</SU> under section 1260H.</P>
<SIG><DATED>Dated: June 8, 2026.</DATED><NAME>Somebody,</NAME></SIG></SUPLINF>
<FRDOC>[FR Doc. 2026-11571 Filed 6-9-26; 8:45 am]</FRDOC><BILCOD>BILLING CODE 6001-FR-P</BILCOD>
</NOTICE>
"""
BULLETS = (
    "Alibaba Group Holding Limited",
    (
        "Blue Harbour Corporation (BHC) "
        "(Blue Harbour Yards Co., Ltd.; Blue Harbour (Dalian) Co., Ltd.)"
    ),
    "Copper Kite Technology Co., Ltd. (formerly Copper Toys Inc.; also known as CKT)",
    (
        "Delta Lotus Group (including Delta Lotus Optics Co., Ltd., Delta Lotus Chips Inc., "
        "and Lotus Cloud Company Limited (LCC))"
    ),
    "Elm Road Industries (Limited)",
)


def notice(*bullets: str, pattern: str = "<P>\u2022 {}</P>") -> bytes:
    body = "\n".join(pattern.format(each) for each in bullets or BULLETS)
    return (NOTICE % body).encode()


def names(*bullets: str) -> dict[str, tuple[str, ...]]:
    return {each.name: each.others for each in fr.parse_notice(notice(*bullets)).companies}


def test_companies_other_names_and_subsidiaries():
    found = fr.parse_notice(notice())
    assert (found.document, found.subject) == ("2026-11571", "Made-up Companies")
    assert found.parents == 5
    assert [(each.name, each.parent) for each in found.companies] == [
        ("Alibaba Group Holding Limited", None),
        ("Blue Harbour Corporation", None),
        ("Blue Harbour Yards Co., Ltd.", "Blue Harbour Corporation"),
        ("Blue Harbour (Dalian) Co., Ltd.", "Blue Harbour Corporation"),
        ("Copper Kite Technology Co., Ltd.", None),
        ("Delta Lotus Group", None),
        ("Delta Lotus Optics Co., Ltd.", "Delta Lotus Group"),
        ("Delta Lotus Chips Inc.", "Delta Lotus Group"),
        ("Lotus Cloud Company Limited", "Delta Lotus Group"),
        ("Elm Road Industries (Limited)", None),
    ]
    others = {each.name: each.others for each in found.companies if each.others}
    assert others == {
        "Blue Harbour Corporation": ("BHC",),
        "Copper Kite Technology Co., Ltd.": ("Copper Toys Inc.", "CKT"),
        "Lotus Cloud Company Limited": ("LCC",),
    }


TRAPS = {
    "the comma of Co., Ltd.": ("Ash Co., Ltd. (Ash One Co., Ltd., Ash Two Co., Ltd.)", 3),
    "a trailing Limited in parentheses": ("Ash Industries (Limited)", 1),
    "formerly known as": ("Ash Group (formerly known as Birch Group)", 1),
    "also known as, twice": ("Ash Group (also known as Ash; also known as Asche AG)", 1),
    "a page break inside a name": ('Ash <PRTPAGE P="35190"/>Tree Group', 1),
    "markup inside a name": ('Ash <E T="03">Tree</E> Group (ATG)', 1),
    "its subsidiaries": ("Ash Group (its subsidiaries: Oak Co., Ltd. and Elm Co., Ltd.)", None),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_of_the_printed_list(trap):
    text, count = TRAPS[trap]
    found = names(text)
    if count is not None:
        assert len(found) == count, found
    assert all(not each.endswith(",") for each in found)


def test_a_page_break_is_no_part_of_a_name():
    assert list(names('Ash <PRTPAGE P="35190"/>Tree Group')) == ["Ash Tree Group"]
    assert list(names("Ash Industries (Limited)")) == ["Ash Industries (Limited)"]


REFUSED = {
    "no bullet": notice("Alpha", pattern="<P>{}</P>"),
    "out of order": notice("Beta Co.", "Alpha Co."),
    "one name twice": notice("Alpha Co., Ltd.", "Alpha Co."),
    "two bullets in one paragraph": notice("Alpha \u2022 Beta"),
    "a parenthesis left open": notice("Alpha (formerly Beta"),
    "a parenthesis too many": notice("Alpha) Beta"),
    "no name": notice("(ABC)"),
    "another document": notice().replace(b"NOTICE>", b"PAGE>"),
    "not well-formed": notice()[:-20],
    "a document type": notice().replace(b"<NOTICE>", b"<!DOCTYPE NOTICE><NOTICE>"),
    "an entity bomb": notice().replace(
        b"<NOTICE>",
        b'<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><NOTICE>',
    ),
    "an entity of a file": notice().replace(
        b"<NOTICE>", b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><NOTICE>'
    ),
    "an undefined entity": notice("Alpha &bull; Co."),
    "an instruction": notice().replace(b"<NOTICE>", b"<?php echo 1 ?><NOTICE>"),
    "not UTF-8": notice().replace(b"Made-up", b"Made\xff\xfeup"),
    "too deep": b"<NOTICE>" + b"<P>" * 100 + b"</P>" * 100 + b"</NOTICE>",
    "too many elements": b"<NOTICE>" + b"<P/>" * 200_001 + b"</NOTICE>",
    "too large": b"<NOTICE>" + b" " * fr.MAX_BYTES + b"</NOTICE>",
    "empty": b"",
    "parentheses without end": notice("Alpha " + "(Beta " * 9 + ")" * 9),
    "thousands of parentheses": notice("Alpha " + "(" * 5000 + ")" * 5000),
    "a paragraph without end": notice("Alpha (" + "; ".join(["Beta Co"] * 3000) + ")"),
    "too many names": notice(*(f"Alpha {at:06d} Works" for at in range(fr.MAX_COMPANIES + 1))),
    "a bullet in what is not read": notice("Alpha Co. <FTNT>\u2022 Beta Co.</FTNT>"),
    "a bullet in no paragraph": notice("Alpha", pattern="<P>\u2022 {}</P>\u2022 Beta"),
    "a number inside a name": notice("Alpha <FRDOC>x</FRDOC> Co."),
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_what_is_no_notice_is_refused(content):
    assert fr.parse_notice(notice()).parents == 5
    with pytest.raises(RefusedError) as caught:
        fr.parse_notice(content)
    assert caught.value.code == "policy.list"


def test_counts_of_the_edition_are_kept():
    found = fr.parse_notice(notice())
    fr.require_counts(found, parents=5, names=10)
    fr.require_counts(found, parents=None, names=None)
    for parents, names_ in ((6, None), (None, 188)):
        with pytest.raises(RefusedError, match="were read"):
            fr.require_counts(found, parents=parents, names=names_)


def test_the_snapshot_loads_and_takes_days_from_the_shipped_entry_of_the_same_name():
    shipped = next(
        each
        for each in RULES.lists.snapshots
        if each.list_id == "dod-1260h" and each.text.edition == "2026-06-08"
    )
    edition = fr.Edition(
        list_id="dod-1260h",
        edition="2026-06-08",
        released=date(2026, 6, 8),
        published=date(2026, 6, 10),
        retrieved_on=date(2026, 11, 24),
        citation="91 FR 35189",
        next_review_by=None,
        complete=True,
    )
    document = fr.snapshot_document(fr.parse_notice(notice()), edition, shipped)
    (snapshot,) = parse_lists(fr.to_yaml(document).encode())
    assert snapshot.text.names_in_edition == 10
    (alibaba,) = snapshot.matches([normal_name("Alibaba Group Holding Ltd")])
    assert alibaba.released.start == date(2026, 6, 8)
    assert alibaba.published.start == date(2026, 6, 10)
    (lotus,) = snapshot.matches([normal_name("LCC")])
    assert (lotus.listed_as, lotus.released.start) == ("named_subsidiary", None)

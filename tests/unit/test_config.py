"""site.toml: the demonstration's example, refusals with the line, the template, the legal day."""

import os
from datetime import UTC, date, datetime

import pytest
from policy_cases import DEMO, demo_site

from airgap.config import (
    MAX_BYTES,
    create_site,
    default_site_toml,
    load_site,
    parse_site,
    read_plain,
    unnamed_site,
)
from policy.errors import RefusedError

GOOD = """\
[institution]
name = "U"

[[project]]
id = "p1"
sponsors = ["NIH"]

[[project]]
id = "p2"

[project.data]
markings = []

[[person]]
id = "ada"
uid = 1000
projects = ["p1", "p2"]
"""


def test_the_site_of_the_demonstration_reads():
    site = demo_site()
    assert [each.id for each in site.project] == ["route-design", "sensor-coatings"]
    assert site.project[1].data.markings == {"CUI", "ITAR"}
    assert site.require_account(0, "root").id == "ada"


def test_what_is_not_given_is_none_and_limits_are_safe():
    site = parse_site(GOOD.encode())
    assert site.project[0].federal_funds is None
    assert site.project[0].data.markings is None
    assert site.project[1].data.markings == frozenset()
    assert (site.limits.samples, site.limits.prompt_bytes) == (10_000, 65_536)
    assert site.enclave.min_rung is None


FAULTS = {
    "an unknown table": (GOOD + "[instituton]\n", "site.schema", "line 18"),
    "an unknown key": (GOOD.replace('id = "ada"', 'id = "ada"\nrole = "pi"'), "site.schema", "16"),
    "a sponsor that is not there": (GOOD.replace('"NIH"', '"NHI"'), "site.schema", "line 6"),
    "a sponsor twice": (GOOD.replace('"NIH"', '"NIH", "NIH"'), "site.schema", "line 6"),
    "a text for a number": (GOOD.replace("1000", '"1000"'), "site.schema", "line 16"),
    "a number for true": (GOOD.replace('id = "p2"', 'id = "p2"\nactive = 1'), "site.schema", "10"),
    "a date as text": (
        GOOD.replace('id = "p2"', 'id = "p2"\naward_date = "2026-01-01"'),
        "site.schema",
        "line 10",
    ),
    "a time as date": (
        GOOD.replace('id = "p2"', 'id = "p2"\naward_date = 2026-01-01T10:00:00Z'),
        "site.schema",
        "line 10",
    ),
    "a project twice": (
        GOOD.replace('"p2"\n\n[project', '"p1"\n\n[project'),
        "site.schema",
        "twice",
    ),
    "a uid twice": (GOOD + '[[person]]\nid = "bob"\nuid = 1000\n', "site.schema", "twice"),
    "a project of nobody": (GOOD.replace('"p1", "p2"]', '"p3"]'), "site.schema", "'p3'"),
    "an investigator of nowhere": (
        GOOD.replace('id = "p2"', 'id = "p2"\nprincipal_investigators = ["eve"]'),
        "site.schema",
        "'eve'",
    ),
    "an action that is not there": (
        GOOD.replace('id = "p2"', 'id = "p2"\nactions = ["infre"]'),
        "site.schema",
        "'infer'",
    ),
    "a zone that is not there": (
        GOOD.replace('name = "U"', 'name = "U"\nlegal_zone = "Mars/Olympus"'),
        "site.schema",
        "line 3",
    ),
    "a zone that is a path": (
        GOOD.replace('name = "U"', 'name = "U"\nlegal_zone = "../../etc/passwd"'),
        "site.schema",
        "line 3",
    ),
    "a limit too high": (GOOD + "[limits]\nsamples = 10001\n", "site.schema", "line 19"),
    "no institution": ('[[project]]\nid = "p"\n', "site.schema", "institution"),
    "a rung that is not there": (GOOD + '[enclave]\nmin_rung = "Z"\n', "site.schema", "line 19"),
    "an id with a slash": (GOOD.replace('id = "ada"', 'id = "../ada"'), "site.schema", "line 15"),
    "no TOML": ("institution = [", "site.toml", ""),
    "a key twice": (GOOD.replace('name = "U"', 'name = "U"\nname = "V"'), "site.toml", "line 3"),
    "deep nesting": ("a = " + "[" * 5000, "site.toml", ""),
    "a huge integer": ("a = " + "9" * 5000, "site.toml", ""),
    "nothing": ("", "site.schema", "institution"),
}


@pytest.mark.parametrize(("text", "code", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_file_is_refused_with_its_place(text, code, words):
    assert parse_site(GOOD.encode())
    with pytest.raises(RefusedError) as caught:
        parse_site(text.encode())
    assert caught.value.code == code
    assert words in caught.value.message


def test_bytes_that_are_no_text_and_a_huge_file_are_refused():
    with pytest.raises(RefusedError, match="line 2: byte 0xff"):
        parse_site(b'[institution]\nname = "\xff"\n')
    with pytest.raises(RefusedError) as caught:
        parse_site(b"#" * (MAX_BYTES + 1))
    assert caught.value.code == "site.toml"


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(RefusedError) as caught:
        load_site(tmp_path)
    assert (caught.value.code, "airgap site init" in caught.value.hint) == ("site.missing", True)
    assert "--root" in caught.value.hint
    (tmp_path / "site.toml").mkdir()
    with pytest.raises(RefusedError) as caught:
        load_site(tmp_path)
    assert caught.value.code == "site.missing"


def test_the_template_loads_with_every_answer_open_and_never_replaces(tmp_path):
    path = create_site(tmp_path / "new")
    site = load_site(tmp_path / "new")
    assert path.read_text() == default_site_toml()
    assert site.project == ()
    assert site.system.owner is None
    path.write_text("mine")
    with pytest.raises(RefusedError) as caught:
        create_site(tmp_path / "new")
    assert caught.value.code == "site.exists"
    assert path.read_text() == "mine"
    assert [each.name for each in path.parent.iterdir()] == ["site.toml"]


def test_every_line_of_the_template_can_be_taken_into_use(tmp_path):
    """What stands behind `# ` is itself a sound file."""
    lines = default_site_toml().splitlines()
    used = [
        line.removeprefix("# ") if " = " in line or line.startswith("# [") else line
        for line in lines
    ]
    (tmp_path / "site.toml").write_text("\n".join(used))
    site = load_site(tmp_path)
    assert site.system.crypto is not None
    assert site.project[0].data.export_class == "fundamental_research"
    assert site.person[0].uid == 1000


def test_an_account_is_one_person():
    site = parse_site(GOOD.encode())
    assert site.require_account(1000, "whoever").id == "ada"
    for uid, account in ((1001, "ada"), (0, "root")):
        with pytest.raises(RefusedError) as caught:
            site.require_account(uid, account)
        assert caught.value.code == "site.person"
    named = parse_site(GOOD.replace("uid = 1000", 'account = "adal"').encode())
    assert named.require_account(os.getuid(), "adal").id == "ada"


def test_a_project_that_is_not_there_is_named():
    with pytest.raises(RefusedError) as caught:
        parse_site(GOOD.encode()).require_project("p9")
    assert (caught.value.code, "p1, p2" in caught.value.message) == ("site.project", True)


def test_the_legal_day_is_that_of_the_declared_zone():
    text = GOOD.replace('name = "U"', 'name = "U"\nlegal_zone = "America/New_York"')
    site = parse_site(text.encode())
    now = datetime(2026, 6, 30, 3, 59, tzinfo=UTC)
    assert site.legal_day(now).as_of == date(2026, 6, 29)
    assert site.legal_day(datetime(2026, 6, 30, 4, 0, tzinfo=UTC)).as_of == date(2026, 6, 30)
    assert "America/New_York" in site.legal_day(now).source


def test_a_fixed_day_goes_before_the_clock_and_an_asked_one_before_that():
    now = datetime(2030, 1, 1, tzinfo=UTC)
    site = demo_site()
    fixed = site.legal_day(now)
    assert (fixed.as_of, fixed.source) == (date(2026, 11, 23), "site.toml [policy] as_of")
    assert fixed.known_at == datetime(2026, 11, 23, 23, 59, 59, tzinfo=UTC)
    asked = site.legal_day(now, date(2025, 1, 6))
    assert (asked.as_of, asked.source) == (date(2025, 1, 6), "--as-of")


def test_a_site_about_which_nothing_is_known():
    assert unnamed_site().project == ()
    assert DEMO.is_file()


def test_a_pipe_in_the_place_of_the_site_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "site.toml")
    with pytest.raises(RefusedError) as refused:
        load_site(tmp_path)
    assert refused.value.code == "site.missing"


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        read_plain(tmp_path, 10)
    assert error.value.filename == str(tmp_path)

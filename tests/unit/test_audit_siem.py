"""Derived rows: OCSF against its schema, syslog against rsyslog, CEF, Splunk and CSV by hand."""

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta

import audit_logs as logs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airgap.audit.export.fields import epoch_us, flatten
from airgap.audit.export.ocsf import CLASSES, VERSION, ocsf_event
from airgap.audit.export.rows import FORMATS, find_format
from airgap.audit.record import RULES, encode, parse_line, timestamp

LEAF = bytes(range(32))
HEX = "5" * 64
HOSTILE = 'a\\b"c]d|e=f,g\'h;i  j\\]"" {"k":[1]} <13>1 %00 $(x) =1+1'
SAMPLE = {
    "ts": "2026-11-25T14:30:15.123456Z", "v": 1, "prev": "0" * 64, "mono_ns": "12345",
    "boot": logs.BOOT, "host": "lab1", "inst": "01HZZZZZZZZZZZZZZZZZZZZZZZ",
    "actor": {"uid": 1000, "auth": "peercred", "name": "jdoe", "role": "scientist"},
    "req": "01HZZZZZZZZZZZZZZZZZZZZZZ1", "project": "P-0042", "policy": f"sha256:{HEX}",
    "model": f"sha256:{HEX}", "src": "unix:pid=812", "label": "CUI", "lat_ms": 1200,
    "decision": {"id": f"sha256:{HEX}", "outcome": "permit", "rule": "BASE-USE"},
    "in": {"commit": HEX, "bytes": 25}, "out": {"commit": HEX, "bytes": 4},
    "tok": {"in": 12, "out": 200}, "part": 3,
}  # fmt: skip
_VALUES = {str: HOSTILE, int: -7, list: ["a", 'b"]\\'], bool: True}


def record_of(kind, phase, *, full=True, **more):
    """Return a record of this kind with every field, or with as few as the schema allows."""
    record = {**SAMPLE, "kind": kind, "phase": phase, "seq": 41}
    data = {key: _VALUES[of] for key, of in RULES[kind].data.items()}
    digests = {key: f"sha256:{HEX}" for key in ("settings", "evidence", "screen") if key in data}
    data |= digests
    if not full:
        kept = {"ts", "v", "prev", "mono_ns", "boot", "host", "inst", "kind", "phase", "seq"}
        wanted = kept | {"req", "actor", "project", "decision", "model", "in", "out", "tok", "part"}
        record = {key: value for key, value in record.items() if key in wanted}
        record["actor"] = {"uid": 0, "auth": "local"}
        data = {}
    if phase == "outcome":
        data["result"] = "complete"
    record = {**record, "data": data, **more}
    if not record["data"]:
        del record["data"]
    return parse_line(encode(record))


KINDS = [(kind, phase) for kind, rule in RULES.items() for phase in rule.phases]
RECORDS = [record_of(*each, full=full) for each in KINDS for full in (True, False)]
RECORDS += [
    record_of("egress.probe", "outcome", data={"probe": "dns", "result": result})
    for result in ("refused", "failed")
]
RECORDS += [record_of("verify.result", "event", data={"verdict": "tampered", "size": 1})]
RECORDS += [
    record_of(
        "denial",
        "event",
        err={"code": "prompt.g01"},
        decision={**SAMPLE["decision"], "outcome": word},
    )
    for word in ("deny", "needs_approval", "permit_with_obligations")
]
RECORDS += [
    record_of("inference", "outcome", data={"result": word}, err={"code": "host.io"})
    for word in ("failed", "refused", "cancelled", "unknown")
]


def name_of(record):
    return f"{record['kind']}-{record['phase']}"


def row_of(name, record):
    line = encode(record)
    row = find_format(name).row(logs.ORIGIN, record, line, LEAF)
    assert row.count(b"\n") == 1
    assert row.endswith(b"\n")
    assert row.isascii()
    return row.decode()


# -- fields ----------------------------------------------------------------------------------


def test_no_name_of_the_schema_is_too_long_for_syslog_or_meets_another():
    for record in RECORDS:
        flat = flatten(record)
        leaves = sum(len(v) if isinstance(v, dict) else 1 for v in record.values())
        assert len(flat) == leaves
        for name in [*flat, "leaf", "origin"]:
            assert re.fullmatch("[a-z0-9_]{1,32}", name), name
        assert not {"leaf", "origin"} & flat.keys()


@given(st.integers(0, 3_652_058 * 86_400 * 10**6))
def test_the_time_of_a_record_is_counted_as_the_calendar_does(elapsed):
    moment = datetime(1, 1, 1, tzinfo=UTC) + timedelta(microseconds=elapsed)
    text = f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}.{moment.microsecond:06d}Z"
    assert epoch_us(text) == (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
        microseconds=1
    )
    assert epoch_us(timestamp(1_764_000_000 * 10**9)) == 1_764_000_000 * 10**6
    assert isinstance(epoch_us("2026-19-39T29:59:69.000000Z"), int)  # which the schema lets pass


def test_an_unknown_format_is_none():
    assert find_format("leef") is None
    assert find_format("rfc5424-0") is None
    assert find_format("rfc5424-48567").name == "rfc5424-48567"


# -- OCSF ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocsf():
    """Return a function that lists what the published schema holds against an event."""
    from jsonschema import Draft202012Validator
    from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

    published = OcsfJsonSchemaEmbedded(get_ocsf_schema(VERSION))
    validators = {}

    def errors(event):
        uid = event["class_uid"]
        if uid not in validators:
            name = published.lookup_class_name_from_uid(uid)
            profiles = ["host", "security_control"] + ["ai_operation"] * (uid == 6003)
            validators[uid] = Draft202012Validator(published.get_class_schema(name, profiles))
        return [
            f"{'.'.join(map(str, e.path))}: {e.message[:200]}"
            for e in validators[uid].iter_errors(event)
        ]

    return errors


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_an_ocsf_event_of_every_kind_fits_the_published_schema(ocsf, record):
    event = json.loads(row_of("ocsf", record))
    assert ocsf(event) == []
    assert event["metadata"]["sequence"] == record["seq"]
    assert event["metadata"]["uid"] == LEAF.hex()
    assert event["metadata"]["log_name"] == logs.ORIGIN
    assert event["unmapped"] == flatten(record)


def test_the_schema_catches_what_is_wrong_with_an_event(ocsf):
    event = ocsf_event(logs.ORIGIN, record_of("inference", "intent"), LEAF)
    assert ocsf(event) == []
    for wrong in (
        {k: v for k, v in event.items() if k != "api"}, event | {"severity_id": 77},
        event | {"prompt_text": "CCO"}, event | {"activity_id": 12},
        event | {"ai_model": {"name": "x"}},
    ):  # fmt: skip
        assert ocsf(wrong)


def test_ocsf_classes_and_verdicts_are_those_of_the_design():
    assert set(CLASSES) == set(RULES)

    def said(record, *names):
        event = ocsf_event(logs.ORIGIN, record, LEAF)
        return tuple(event.get(name) for name in names)

    def probe(result):
        return record_of("egress.probe", "outcome", data={"result": result})

    assert said(probe("refused"), "class_uid", "activity_id") == (4001, 5)
    assert said(probe("failed"), "class_uid", "activity_id") == (4001, 4)
    assert said(probe("complete"), "class_uid", "severity_id") == (2004, 5)
    denial = record_of("denial", "event")
    for word, action, disposition in (
        ("permit", 1, 1), ("deny", 2, 2), ("needs_approval", 2, 26),
    ):  # fmt: skip
        decision = {**SAMPLE["decision"], "outcome": word}
        assert said({**denial, "decision": decision}, "action_id", "disposition_id") == (
            action, disposition,
        )  # fmt: skip
    assert said(record_of("export", "outcome"), "class_uid", "activity_id", "status_id") == (
        1008,
        3,
        1,
    )
    tokens = said(record_of("inference", "outcome"), "message_context")[0]
    assert (tokens["prompt_tokens"], tokens["completion_tokens"]) == (12, 200)


# -- RFC 5424 --------------------------------------------------------------------------------

_SYSLOG = re.compile(
    r"<(\d{1,3})>1 (\S+) (\S{1,255}) (\S{1,48}) (\S{1,128}) (\S{1,32}) "
    r'\[([!#-<>-\\^-~]{1,32})((?: [!#-<>-\\^-~]{1,32}="(?:[^"\\\]]|\\["\\\]])*")*)\] (.*)\n'
)
_PARAM = re.compile(r' ([^= ]+)="((?:[^"\\\]]|\\["\\\]])*)"')


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_syslog_row_has_the_grammar_of_rfc_5424(record):
    found = _SYSLOG.fullmatch(row_of("rfc5424-48567", record))
    assert found[2] == record["ts"]
    assert (found[6], found[7]) == (record["kind"], "airgap@48567")
    fields = {n: re.sub(r'\\(["\\\]])', r"\1", v) for n, v in _PARAM.findall(found[8])}
    assert fields == flatten(record) | {"leaf": LEAF.hex(), "origin": logs.ORIGIN}
    assert int(found[1]) // 8 == 13


RSYSLOG = """
global(workDirectory="{work}" maxMessageSize="64k")
module(load="imuxsock" SysSock.Use="off")
module(load="imtcp")
module(load="mmpstrucdata")
input(type="imtcp" port="{port}" address="127.0.0.1" ruleset="in")
template(name="json" type="list") {{
  property(name="$!")
  constant(value="\\n")
}}
ruleset(name="in") {{
  action(type="mmpstrucdata" sd_name.lowercase="off")
  action(type="omfile" file="{out}" template="json")
}}
"""


def _free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_t39_rsyslog_gives_every_field_of_every_row_back(tmp_path):
    import socket

    rsyslogd = shutil.which("rsyslogd") or shutil.which("rsyslogd", path="/usr/sbin")
    if rsyslogd is None:
        pytest.skip("rsyslog is not installed (apt package rsyslog)")
    out, port = tmp_path / "out.json", _free_port()
    conf = tmp_path / "rsyslog.conf"
    conf.write_text(RSYSLOG.format(work=tmp_path, port=port, out=out))
    daemon = subprocess.Popen(
        [rsyslogd, "-n", "-f", str(conf), "-i", str(tmp_path / "pid")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=1)
                break
            except OSError:
                assert daemon.poll() is None, daemon.stdout.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with connection:
            for record in RECORDS:
                connection.sendall(row_of("rfc5424", record).encode())
        while not out.exists() or out.read_bytes().count(b"\n") < len(RECORDS):
            assert time.monotonic() < deadline, out.exists() and out.read_text()[-500:]
            time.sleep(0.05)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    got = [json.loads(line) for line in out.read_text().splitlines()]
    for record, found in zip(RECORDS, got, strict=True):
        fields = found["rfc5424-sd"]["airgap@32473"]
        assert fields == flatten(record) | {"leaf": LEAF.hex(), "origin": logs.ORIGIN}


# -- CEF, Splunk, CSV ------------------------------------------------------------------------


def parse_cef(row):
    """Read CEF as its specification says: seven header fields, then `key=value`."""
    found = re.fullmatch(r"CEF:0((?:\|(?:[^|\\]|\\[|\\])*){6})\|(.*)\n", row)
    header = [
        re.sub(r"\\([|\\])", r"\1", p) for p in re.findall(r"\|((?:[^|\\]|\\[|\\])*)", found[1])
    ]
    keys = list(re.finditer(r"(?:^| )([A-Za-z0-9_.]+)(?<!\\)=", found[2]))
    ends = [k.start() for k in keys[1:]] + [len(found[2])]
    values = {
        k[1]: re.sub(r"\\([=\\])", r"\1", found[2][k.end() : end])
        for k, end in zip(keys, ends, strict=True)
    }
    return header, values


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_cef_row_gives_every_field_back(record):
    header, values = parse_cef(row_of("cef", record))
    assert header[:4] == ["airgap", "audit", "1", record["kind"]]
    assert 0 <= int(header[5]) <= 10
    assert values["externalId"] == "41"
    assert (values["cs1Label"], values["cs1"], values["cs2"]) == ("leaf", LEAF.hex(), logs.ORIGIN)
    assert values["rt"] == "1795617015123"
    own = {name[3:]: value for name, value in values.items() if name.startswith("ad.")}
    assert own == flatten(record)


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_splunk_event_holds_the_record_as_it_stands(record):
    row = row_of("hec", record)
    event = json.loads(row)
    assert set(event) == {"event", "host", "source", "sourcetype", "time"}
    assert '"time":1795617015.123456}' in row
    assert event["event"] == {
        "leaf": LEAF.hex(),
        "origin": logs.ORIGIN,
        "record": record,
        "seq": 41,
    }
    assert encode(record).decode() in row


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_no_cell_of_a_csv_row_is_a_formula(start):
    record = record_of(
        "inference", "intent", label=start, actor={"uid": 1, "auth": "self", "name": start}
    )
    chosen = FORMATS["csv"]
    row = chosen.row(logs.ORIGIN, record, encode(record), LEAF)
    head, cells = csv.reader(io.StringIO((chosen.header + row).decode(), newline=""))
    assert dict(zip(head, cells, strict=True))["person"] == f"'{start}"
    assert not [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell]


# -- an export in every format ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*FORMATS, "rfc5424-48567"])
def test_t45_an_export_in_every_format_verifies_and_a_row_that_differs_does_not(tmp_path, name):
    from airgap.audit.export.write import Plan, export_log
    from airgap.audit.layout import Layout, last_checkpoint
    from airgap.audit.verify import verify_log

    receipt = logs.write_log(tmp_path, 3)[-1]
    anchor = logs.keep(receipt, tmp_path / "anchors/a.tlog-proof")
    layout = Layout(tmp_path / "audit")
    head = last_checkpoint(layout.journal)[0]
    manifest = export_log(layout, tmp_path / "out", Plan(head, name))

    def verdict():
        return verify_log(tmp_path / "out", vkey=logs.vkey(), anchors=[anchor])

    assert verdict().exit == 0
    path = tmp_path / "out" / manifest.rows_file
    logs.replace(path, path.read_bytes().replace(b"jdoe", b"eve.", 1))
    assert verdict().exit == 1

"""What a daemon and the log's service read once: a later change is told, with its step."""

import os

import pytest
import structlog

from airgap.audit.restart import READ_ONCE, SettingsWatch, restart_for
from airgap.cli.install import status_view
from airgap.config import AuditSettings, parse_site
from airgap.demo import site_toml
from airgap.service.started import Started
from policy.terms import Digest

PLAIN = site_toml(os.getuid())
CHANGES = {
    "socket": '"/run/airgap/audit.sock"',
    "payloads": '"sealed"',
    "quota_mb": "64",
    "refuse_overdue_export": "true",
}
A, B = Digest.of(b"a"), Digest.of(b"b")


@pytest.fixture(autouse=True)
def every_level():
    """The operator's log says all: a command in this process may have silenced it."""
    before = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**before)


def site(more=""):
    return parse_site(f"{PLAIN}\n{more}".encode())


def started(text="", model="", default=A):
    begun = site(text)
    return Started(begun, begun.audit, model, default)


def test_every_setting_of_the_log_is_read_once_or_when_it_is_used():
    """A new setting is put on one side: told when it changes, or read by each act anew."""
    when_used = {"origin", "retention", "retention_months"}
    assert set(AuditSettings.model_fields) == set(READ_ONCE) | when_used
    assert set(CHANGES) == set(READ_ONCE)


@pytest.mark.parametrize("name", READ_ONCE)
def test_a_change_of_a_setting_of_the_log_is_told_once_and_taken_back(name):
    daemon, changed = started(), site(f"[audit]\n{name} = {CHANGES[name]}")
    with structlog.testing.capture_logs() as said:
        assert not daemon.look(site(), A)
        assert daemon.look(changed, A)
        assert not daemon.look(changed, A)
    assert daemon.waits == (f"[audit] {name}",)
    (warning,) = said
    assert (warning["event"], warning["log_level"]) == ("service.restart", "warning")
    assert warning["settings"] == [f"[audit] {name}"]
    assert warning["next"].startswith("systemctl restart airgap,")
    with structlog.testing.capture_logs() as said:
        assert daemon.look(site(), A)  # whoever takes it back is told as well
    assert (daemon.waits, said[0]["settings"]) == ((), [])


def test_what_counts_from_the_next_act_on_waits_for_nothing():
    daemon = started()
    more = '[audit]\nretention = "site"\nretention_months = 9\n[limits]\nsamples = 7\n'
    assert not daemon.look(site(f"{more}[service]\nper_person = 9\n"), A)
    assert daemon.waits == ()


def test_the_step_names_the_units_that_hold_what_changed():
    served = '[audit]\nsocket = "/run/airgap/audit.sock"\n'
    daemon = started(served)
    assert daemon.look(site(f"{served}quota_mb = 64\n"), A)
    assert daemon.step.startswith("systemctl restart airgap-audit airgap,")
    assert daemon.look(site(f'{served}[service]\nsocket = "/run/other.sock"\n'), A)
    assert daemon.waits == ("[service] socket",)
    assert daemon.step.startswith("systemctl restart airgap.socket airgap,")


def test_a_log_that_was_opened_anew_has_the_settings_of_that_moment():
    daemon, changed = started(), site("[audit]\nquota_mb = 64")
    assert daemon.look(changed, A)
    daemon.audit = changed.audit  # as after a fault of the disk
    assert daemon.look(changed, A)
    assert daemon.waits == ()


def test_another_default_release_is_told_by_a_daemon_that_was_given_one_alone():
    follows, pinned = started(), started(model="tiny-line")
    assert not follows.look(site(), B)
    assert not pinned.look(site(), A)
    assert pinned.look(site(), B)
    assert pinned.waits == ("--model tiny-line: the tree has another default now",)


def test_status_shows_the_restart_and_its_step():
    document = {
        "root": "/tree", "site": True, "trust": {"error": "none"}, "current": None, "alarms": [],
        "unfinished": [], "audit": True, "program": None, "held": 0, "reviews_owed": [],
        "service": {"pid": 7, "serves": "tiny 1", "state": "serving", "waits": [], "next": ""},
    }  # fmt: skip
    assert "RESTART" not in str(status_view(document))
    document["service"] |= {"waits": ["[audit] quota_mb"], "next": "systemctl restart airgap"}
    shown = " ".join(str(status_view(document)).split())
    assert "RESTART" in shown
    assert "[audit] quota_mb" in shown
    assert "systemctl restart airgap" in shown


# -- the log's own service ---------------------------------------------------------------------


def test_the_logs_service_says_it_to_the_journal_and_to_systemd(tmp_path):
    path, lines = tmp_path / "site.toml", []
    path.write_text(PLAIN)
    watch = SettingsWatch(tmp_path, parse_site(PLAIN.encode()).audit, lines.append)
    with structlog.testing.capture_logs() as said:
        assert watch.look() == ()
        path.write_text(PLAIN + "\n[audit]\nquota_mb = 64\n")
        assert watch.look() == watch.look() == ("[audit] quota_mb",)
        path.write_text("broken")
        assert watch.look() == ("[audit] quota_mb",)
        path.write_text(PLAIN)
        assert watch.look() == ()
    assert [each["log_level"] for each in said] == ["warning", "info"]
    assert "airgap-audit" in said[0]["next"]
    assert lines == ["serving; restart it for [audit] quota_mb", "serving"]


def test_the_settings_are_compared_one_by_one():
    begun = parse_site(PLAIN.encode()).audit
    assert restart_for(begun, begun) == ()
    other = begun.model_copy(update={"quota_mb": 1, "refuse_overdue_export": True})
    assert restart_for(begun, other) == ("[audit] quota_mb", "[audit] refuse_overdue_export")

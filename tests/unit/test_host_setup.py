"""What a system installation puts on a host, `remove` takes away; owners and modes are told."""

import os
import stat

import pytest
from enclave_harness import needs_root

from airgap.config import LOG_ACCOUNT, parse_site
from airgap.host_setup import (
    Places,
    differences,
    has_account,
    log_account,
    log_served,
    set_up,
    settle_restored,
    stop_daemon,
    take_down,
    to_start,
)
from policy.errors import FaultError

NAME = b'[institution]\nname = "Lab"\n'
SERVED = NAME + b'[service]\nsocket = "/run/b.sock"\n[audit]\nsocket = "/run/a/a.sock"\n'
PLAIN, DAEMON = (parse_site(raw, "site.toml") for raw in (NAME, SERVED))


class Told:
    """Stands for the programs that are run; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def foreign(self, *argv):
        self.asked.append(argv)


@pytest.fixture
def places(tmp_path):
    found = Places(tmp_path / "program", tmp_path / "tree", True, tmp_path / "host")
    for name in ("etc/apparmor.d", "run/systemd/system"):
        (found.host / name).mkdir(parents=True)
    found.root.mkdir()
    (found.root / "site.toml").write_bytes(SERVED)
    return found


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@needs_root
def test_a_restored_tree_gets_owners_and_modes_and_no_account_is_guessed(places):
    list(set_up(places, DAEMON, Told()))
    (places.root / "audit").chmod(0o755)
    assert settle_restored(places, PLAIN) == ""
    assert differences(places, DAEMON) != []
    assert settle_restored(places, DAEMON) == ""
    assert differences(places, DAEMON) == []
    if not has_account(LOG_ACCOUNT):
        told = settle_restored(Places(places.root, places.root, system=True), DAEMON)
        assert "install.sh --system" in told


def test_what_is_set_up_is_as_it_must_be_and_a_second_time_nothing_changes(places):
    assert differences(places, DAEMON) != []
    first = list(set_up(places, DAEMON, Told()))
    assert any(changed for changed, _ in first)
    assert differences(places, DAEMON) == []
    assert not any(changed for changed, _ in set_up(places, DAEMON, Told()))
    assert mode(places.root) == 0o750
    assert mode(places.root / "keys") == 0o750
    assert {mode(places.root / name) for name in ("audit", "holds", "enclave/running")} == {0o700}
    assert {mode(places.root / name) for name in ("trust", "policy", "store")} == {0o755}


@pytest.mark.parametrize(
    ("name", "wrong"), [("audit", 0o755), ("trust", 0o700), (".", 0o755), ("site.toml", 0o600)]
)
def test_another_mode_is_told_and_mended(places, name, wrong):
    list(set_up(places, DAEMON, Told()))
    (places.root / name).chmod(wrong)
    (found,) = differences(places, DAEMON)
    assert f"has mode {wrong:04o}" in found
    list(set_up(places, DAEMON, Told()))
    assert differences(places, DAEMON) == []


def test_what_root_wrote_under_a_strict_umask_is_opened_for_the_daemon(places):
    list(set_up(places, DAEMON, Told()))
    for name in ("trust/1.root.json", "policy/a/b.toml", "store/state.json", "keys/hold.pub"):
        path = places.root / name
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.write_text("x")
        path.chmod(0o600)
    secret = places.root / "keys" / "audit.pem"
    secret.touch(0o400)
    assert len([text for text in differences(places, DAEMON) if "cannot be read" in text]) == 5
    list(set_up(places, DAEMON, Told()))
    assert differences(places, DAEMON) == []
    assert mode(places.root / "policy/a/b.toml") == 0o644
    assert mode(secret) == 0o400


def test_a_link_in_the_place_of_a_folder_is_refused(places, tmp_path):
    (places.root / "audit").symlink_to(tmp_path)
    with pytest.raises(FaultError, match="is a link"):
        list(set_up(places, DAEMON, Told()))


@needs_root
def test_all_in_a_folder_goes_to_its_account_and_nothing_that_has_two_names(tmp_path):
    from airgap import host_setup

    folder, secret = tmp_path / "audit", tmp_path / "secret"
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "a").write_text("x")
    (folder / "link").symlink_to(secret)
    secret.write_text("root's")
    assert host_setup._settle(folder, 4242, 4242, 0o700)
    assert {os.lstat(path).st_uid for path in (folder, *folder.rglob("*"))} == {4242}
    assert secret.stat().st_uid == 0  # the link was given away, and not what it names
    os.link(secret, folder / "second")
    with pytest.raises(FaultError, match="has 2 names"):
        host_setup._settle(folder, 4243, 4243, 0o700)
    assert secret.stat().st_uid == 0


def test_remove_takes_every_file_of_the_system_and_no_other(places):
    own = places.host / "etc/systemd/system/other.service"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("[Unit]\n")
    list(set_up(places, DAEMON, Told()))
    there = files(places.host)
    program = Told()
    gone = list(take_down(places, program))
    assert files(places.host) == ["etc/systemd/system/other.service"]
    assert len(gone) == len(there) - 1
    (stop, *_), end = program.asked, program.asked[-1]
    assert stop[:3] == ("systemctl", "disable", "--now")
    assert "airgap.socket" in stop
    assert not any("@" in word for word in stop)
    assert end == ("systemctl", "daemon-reload")
    assert list(take_down(places, Told())) == []


def test_without_systemd_nobody_is_asked(places):
    (places.host / "run/systemd/system").rmdir()
    program = Told()
    list(set_up(places, DAEMON, program))
    stop_daemon(places, program)
    list(take_down(places, program))
    assert program.asked == []


def test_the_daemon_is_stopped_before_what_it_uses_goes(places):
    program = Told()
    stop_daemon(places, program)
    assert program.asked == []  # not installed
    list(set_up(places, DAEMON, Told()))
    stop_daemon(places, program)
    assert program.asked == [("systemctl", "stop", "airgap.socket", "airgap.service")]


def test_the_command_that_starts_what_the_site_asks_for(places):
    assert to_start(places, PLAIN) == ""
    wanted = "airgap-audit.service airgap.socket airgap.service"
    assert to_start(places, DAEMON) == f"systemctl enable --now {wanted}"
    link = places.host / "etc/systemd/system/multi-user.target.wants/airgap.service"
    link.parent.mkdir(parents=True)
    link.touch()
    assert to_start(places, DAEMON) == f"systemctl restart {wanted}"


def test_the_log_belongs_to_root_or_to_its_own_account():
    assert (log_account(PLAIN), log_account(DAEMON)) == ("root", "airgap-audit")


def test_no_service_of_the_log_is_started_where_none_is_asked_for(places):
    with log_served(places, PLAIN, Told()), log_served(places, DAEMON, Told()):
        pass  # the second is another host than this one

"""Roles of accounts and groups: who may write the file, what it may say, whom it makes a person."""

import grp
import os
import pwd
import socket
import struct
from pathlib import Path

import pytest
from enclave_harness import needs_root

from airgap.cli.app import dispatch
from airgap.config import parse_site
from airgap.service.roles import Caller, Roles, caller_of, find_roles, load_roles, person_of
from policy.errors import RefusedError

SITE = parse_site(
    b"""
[institution]
name = "Test"
[[project]]
id = "chem"
[[project]]
id = "bio"
[[person]]
id = "ada"
uid = 1001
roles = ["principal_investigator"]
projects = ["bio"]
us_person = true
[[person]]
id = "eve"
account = "eve"
"""
)
GOOD = """
[[grant]]
group = "airgap-chem"
roles = ["researcher"]
projects = ["chem"]
[[grant]]
account = "ben"
projects = ["bio"]
[[grant]]
uid = 1001
roles = ["reviewer"]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "roles.toml"
    path.write_text(GOOD)
    path.chmod(0o644)
    return path


def caller(uid=2000, account="ben", *groups):
    return Caller(uid, 1, account, frozenset(groups))


def test_grants_add_to_what_the_site_says_and_make_a_person_of_an_account(file):
    roles = load_roles(file, SITE)
    ada, site = person_of(caller(1001, "anything", "airgap-chem"), SITE, roles)
    assert (ada.id, ada.us_person) == ("ada", True)
    assert ada.roles == {"principal_investigator", "reviewer", "researcher"}
    assert ada.projects == {"bio", "chem"}
    assert site.find_person("ada") == ada
    ben, site = person_of(caller(2000, "ben"), SITE, roles)
    assert (ben.id, ben.uid, ben.projects, ben.us_person) == ("ben", 2000, {"bio"}, None)
    assert site.find_person("ben") == ben
    assert SITE.find_person("ben") is None


def test_who_is_in_neither_file_is_nobody(file):
    with pytest.raises(RefusedError) as caught:
        person_of(caller(2000, "zoe", "other"), SITE, load_roles(file, SITE))
    assert caught.value.code == "site.person"
    assert person_of(caller(9, "eve"), SITE, Roles())[0].id == "eve"


def test_an_account_does_not_become_the_person_whose_id_it_bears(file):
    file.write_text('[[grant]]\naccount = "ada"\nroles = ["researcher"]\n')
    with pytest.raises(RefusedError) as caught:
        person_of(caller(2000, "ada"), SITE, load_roles(file, SITE))
    assert caught.value.code == "site.person"


WRONG = {
    "no TOML": "[[grant",
    "an unknown key": '[[grant]]\nuid = 1\nroles = ["a"]\nadmin = true\n',
    "nobody named": '[[grant]]\nroles = ["a"]\n',
    "two named": '[[grant]]\nuid = 1\naccount = "x"\nroles = ["a"]\n',
    "one named twice": '[[grant]]\nuid = 1\nroles = ["a"]\n' * 2,
    "an unknown project": '[[grant]]\nuid = 1\nprojects = ["war"]\n',
    "nothing given": "[[grant]]\nuid = 1\n",
    "too long": "#" * (1 << 20) + "\n",
    "a strange name": '[[grant]]\ngroup = "a/b"\nroles = ["a"]\n',
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_a_file_that_says_something_wrong_is_refused(file, text):
    assert load_roles(file, SITE).grant
    file.write_text(text)
    with pytest.raises(RefusedError) as caught:
        load_roles(file, SITE)
    assert caught.value.code == "service.roles"
    assert str(file) in caught.value.message


def open_to_others(path):
    path.chmod(0o646)


def open_to_group(path):
    path.chmod(0o664)


def open_folder(path):
    path.parent.chmod(0o777)


def link(path):
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def pipe(path):
    path.unlink()
    os.mkfifo(path, 0o644)


@pytest.mark.parametrize(
    "spoil", [open_to_others, open_to_group, open_folder, link, pipe, Path.unlink]
)
def test_a_file_that_others_may_have_written_is_refused(file, spoil):
    assert load_roles(file, SITE).grant
    spoil(file)
    with pytest.raises(RefusedError) as caught:
        load_roles(file, SITE)
    assert caught.value.code == "service.roles"


@needs_root
def test_a_file_of_another_account_is_refused(file):
    os.chown(file, 40404, 40404)
    with pytest.raises(RefusedError):
        load_roles(file, SITE)


def test_the_tree_goes_before_the_system(file):
    assert find_roles(file.parent) == file
    assert load_roles(None, SITE) == Roles()


def test_accounts_and_groups_come_from_the_name_service():
    found = caller_of(0, 7)
    assert (found.account, found.pid) == ("root", 7)
    assert "root" in found.groups
    assert caller_of(2**31 - 5, 7) == Caller(2**31 - 5, 7, str(2**31 - 5), frozenset())


@needs_root
def test_a_program_that_still_bears_a_group_is_no_member_of_it():
    """Who was taken out of a group may have left a program there that is set to it."""
    server = socket.socketpair()
    nobody, group = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("users").gr_gid
    with server[0], server[1]:
        child = os.fork()
        if not child:
            os.setresgid(group, group, group)
            os.setresuid(nobody, nobody, nobody)
            hers = socket.socketpair()  # with her uid and that group, as the kernel tells it
            told = hers[0].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            server[1].send(told)
            os._exit(0)
        pid, uid, gid = struct.unpack("3i", server[0].recv(12))
        os.waitpid(child, 0)
    assert (uid, gid) == (nobody, group)
    assert "users" not in caller_of(uid, pid).groups


@needs_root
def test_a_folder_of_another_account_holds_no_roles_even_if_sticky(file):
    file.parent.chmod(0o1777)
    assert load_roles(file, SITE).grant
    os.chown(file.parent, 40404, 40404)  # its owner moves anything there, sticky or not
    file.parent.chmod(0o1755)
    with pytest.raises(RefusedError) as caught:
        load_roles(file, SITE)
    assert "belongs to uid 40404" in caught.value.message


@needs_root
def test_a_link_above_leads_through_no_folder_of_another_account(tmp_path):
    real = tmp_path / "theirs" / "etc"
    real.mkdir(parents=True)
    (real / "roles.toml").write_text(GOOD)
    link = tmp_path / "etc"
    link.symlink_to(real)
    assert load_roles(link / "roles.toml", SITE).grant
    os.chown(real.parent, 40404, 40404)
    with pytest.raises(RefusedError) as caught:
        load_roles(link / "roles.toml", SITE)
    assert "theirs" in caught.value.message


def test_lint_names_grants_that_nobody_has(file, capsys):
    (file.parent / "site.toml").write_text('[institution]\nname = "Test"\n')
    file.write_text(
        '[[grant]]\naccount = "root"\nroles = ["a"]\n[[grant]]\ngroup = "no-such"\nroles = ["a"]\n'
    )
    assert dispatch(["roles", "lint", "--root", str(file.parent)]) == 0
    assert "no-such" in capsys.readouterr().out
    file.chmod(0o666)
    assert dispatch(["roles", "lint", "--root", str(file.parent), "--json"]) == 1
    assert "service.roles" in capsys.readouterr().out

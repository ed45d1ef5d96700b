"""Steps of the launcher that can be tried without becoming sealed, and what each refuses."""

from __future__ import annotations

import errno
import json
import marshal
import os
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
from enclave_plans import make

from airgap.enclave import (
    channel,
    entry,
    filters,
    landlock,
    launcher,
    linux,
    plan,
    root,
    tables,
)
from airgap.enclave.landlock import LandlockError
from airgap.enclave.launcher import Refusal

MOUNTINFO = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /tmp/old rw,nosuid - tmpfs tmpfs rw
50 22 0:50 / /tmp rw,nosuid,nodev - tmpfs tmpfs rw
51 50 254:0 /usr /tmp/usr ro,nosuid,nodev,relatime - ext4 /dev/vda rw
52 51 0:51 / /tmp/usr/a\\040b\\134c rw,noexec,noatime - tmpfs tmpfs rw
60 22 0:60 / /tmpfoo rw - tmpfs tmpfs rw
"""


def test_only_mounts_below_the_new_root_are_protected():
    """A mount that the new root covers has a name like one below it."""
    assert root.parse_mounts(MOUNTINFO, "/tmp") == [  # noqa: S108
        ("/tmp/usr", ["ro", "nosuid", "nodev", "relatime"]),  # noqa: S108
        ("/tmp/usr/a b\\c", ["rw", "noexec", "noatime"]),  # noqa: S108
    ]
    assert root.parse_mounts(MOUNTINFO, "/srv") == []


def test_flags_that_a_mount_has_are_repeated():
    assert root.keep_flags(["rw"]) == 0
    assert root.keep_flags(["ro", "noexec"]) == linux.MS_RDONLY | linux.MS_NOEXEC
    assert root.keep_flags(["relatime", "unknown"]) == linux.MS_RELATIME


def test_a_failing_step_names_its_layer():
    with pytest.raises(Refusal) as caught, launcher.layer("root"):
        raise OSError(errno.EPERM, "Operation not permitted", "/mnt")
    assert caught.value.layer == "root"
    assert str(caught.value) == "EPERM Operation not permitted (/mnt)"
    with pytest.raises(Refusal) as caught, launcher.layer("landlock"):
        raise LandlockError("it opens")
    assert (caught.value.layer, str(caught.value)) == ("landlock", "it opens")
    with pytest.raises(Refusal) as caught, launcher.layer("outer"), launcher.layer("inner"):
        raise ValueError("x")
    assert caught.value.layer == "inner"


def test_a_refusal_is_one_frame():
    read, write = os.pipe()
    launcher.report(write, "root", "x" * 5000)
    frame = channel.receive(read, 1 << 16)
    assert frame.kind == channel.REFUSED
    assert json.loads(frame.payload) == {"layer": "root", "message": "x" * 2000}
    os.close(write)
    os.close(read)
    launcher.report(write, "root", "nobody listens")


@pytest.mark.parametrize(
    "text", ['a "quote" and a \\', "m\u00fcller \U0001f512", "\udcff", "", "plain"]
)
def test_a_refusal_is_json_whatever_it_says(text):
    sent = launcher.quoted(text).encode(errors="backslashreplace")
    assert json.loads(sent) == text
    assert json.loads(launcher.quoted("two\nlines\x00")) == "two lines "


def test_a_second_thread_or_another_machine_is_refused(monkeypatch):
    assert in_child(launcher.check_start) is None
    monkeypatch.setattr(os, "listdir", lambda _: ["1"])
    with monkeypatch.context() as patch:
        patch.setattr(linux, "MACHINE", "aarch64")
        with pytest.raises(Refusal) as caught:
            launcher.check_start()
        assert caught.value.layer == "arch"
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda _: ["1", "2"])
        with pytest.raises(Refusal) as caught:
            launcher.check_start()
        assert caught.value.layer == "start"


def in_child(action):
    """Run `action` in a child; returns None, or the refusal as (layer, message)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with launcher.layer("?"):
                action()
            os.write(write, b"null")
        except Refusal as refusal:
            os.write(write, json.dumps([refusal.layer, str(refusal)]).encode())
        except BaseException as error:  # noqa: BLE001
            os.write(write, json.dumps(["!", repr(error)]).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    answer = json.loads(os.read(read, 65536) or '["!", "died"]')
    os.close(read)
    return answer


def test_a_parent_that_has_changed_is_noticed():
    mine = os.getpid()
    assert in_child(lambda: launcher.die_with(mine)) is None
    assert "the broker is gone" in in_child(lambda: launcher.die_with(1))[1]


def arrange(extra=None):
    """Give a child exactly the descriptors of a launcher, and one more if asked."""
    null, (read, write) = os.open("/dev/null", os.O_RDWR), os.pipe()
    keep = [os.dup(end) for end in (null, write, read, write)]
    for number, end in zip((0, 2, 100, 101), keep, strict=True):
        os.dup2(end, number)
    os.dup2(0, 1)
    launcher.take_channel(100, 101)
    launcher.close_others()
    if extra:
        extra()
    launcher.check_descriptors()


def answered(action):
    """Run `action` in a child that keeps only its exit status to answer with."""
    child = os.fork()
    if not child:
        status = 9
        try:
            action()
            status = 0
        except Refusal as refusal:
            status = 1 if refusal.layer == "descriptors" else 2
        except BaseException:  # noqa: BLE001
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def surprise_socket():
    import socket

    socket.socket().detach()


def surprise_std():
    os.close(1)
    os.open("/proc/self/status", os.O_RDONLY)


SURPRISES = {
    "a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "a pipe": os.pipe,
    "a socket": surprise_socket,
    "a missing channel": lambda: os.close(3),
    "a file for standard output": surprise_std,
    "another device": lambda: os.dup2(os.open("/dev/zero", os.O_RDONLY), 0),
}


def test_a_launcher_holds_null_the_error_pipe_and_the_channel():
    assert answered(arrange) == 0


@pytest.mark.parametrize("surprise", SURPRISES.values(), ids=SURPRISES.keys())
def test_a_surprise_descriptor_is_refused(surprise):
    assert answered(lambda: arrange(surprise)) == 1


def test_descriptors_are_closed_where_the_kernel_has_no_close_range(monkeypatch):
    def call(name, *_):
        assert name == "close_range"
        raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(linux, "call", call)
    assert answered(arrange) == 0


def test_a_descriptor_is_found_without_proc():
    def quiet():
        os.closerange(5, launcher.OPEN_DESCRIPTORS)
        launcher.check_descriptors_by_number()

    def loud():
        os.closerange(5, launcher.OPEN_DESCRIPTORS)
        os.dup2(0, 77)
        launcher.check_descriptors_by_number()

    assert answered(quiet) == 0
    assert answered(loud) == 1


def test_a_filter_that_the_broker_does_not_expect_is_refused(monkeypatch):
    def read(plan):
        sent = channel.Frame(channel.PLAN, 0, marshal.dumps(plan))
        monkeypatch.setattr(channel, "receive", lambda *_: sent)
        return launcher.read_plan()

    plan = make()
    assert read(plan) == plan
    with pytest.raises(Refusal) as caught:
        read({**plan, "stage1": "0" * 64})
    assert caught.value.layer == "stage1"


def test_limits_are_set_hard_and_read_back():
    def check():
        launcher.set_limits({"limits": {"CORE": 0, "NOFILE": 99}})
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (99, 99)
        launcher.set_limits({"limits": {"NOFILE": 500}})  # a hard limit below the wish stays
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (99, 99)

    assert in_child(check) is None


def test_a_limit_that_does_not_take_is_refused(monkeypatch):
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    answer = in_child(lambda: launcher.set_limits({"limits": {"NOFILE": 12}}))
    assert answer[0] == "limits"


# -- Landlock ----------------------------------------------------------------------------------

ABI = landlock.reported_abi()
needs_landlock = pytest.mark.skipif(ABI < 1, reason="this kernel has no Landlock")


@pytest.mark.parametrize(
    ("abi", "size", "net", "scopes"),
    [
        (1, 8, 0, 0),
        (2, 8, 0, 0),
        (3, 8, 0, 0),
        (4, 16, 3, 0),
        (5, 16, 3, 0),
        (6, 24, 3, 3),
        (7, 24, 3, 3),
        (9, 24, 3, 3),
    ],
)
def test_a_rule_set_asks_for_what_its_abi_knows(abi, size, net, scopes):
    assert len(landlock.attribute(abi)) == size
    files, found_net, found_scopes = landlock.handled(abi)
    assert (found_net, found_scopes) == (net, scopes)
    assert files & (1 << 14) == (0 if abi < 3 else 1 << 14)
    assert landlock.rights(landlock.WRITE, abi, folder=False) & ~landlock._ON_FILES == 0


@needs_landlock
def test_what_no_rule_allows_is_denied(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("x")
    (tmp_path / "out").mkdir()

    def check():
        rules = [(str(tmp_path / "in"), landlock.READ), (str(tmp_path / "out"), landlock.WRITE)]
        landlock.restrict(rules, ABI)
        parent = os.getppid() if ABI >= 6 else None
        landlock.verify_behaviour(ABI, readable=str(tmp_path / "in/file"), outside=parent)
        assert (tmp_path / "in/file").read_text() == "x"
        (tmp_path / "out/new").write_text("y")
        for path in ("/etc/passwd", str(tmp_path)):
            assert not landlock.can_open(path)
        with pytest.raises(PermissionError):
            (tmp_path / "out/link").symlink_to("x")
        with pytest.raises(PermissionError):
            os.mkfifo(tmp_path / "out/fifo")

    linux_nnp = lambda: linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)  # noqa: E731
    assert in_child(lambda: (linux_nnp(), check())) is None


@needs_landlock
def test_a_program_that_runs_says_nothing_of_the_rules(tmp_path):
    """Its owner gets ETXTBSY first: `install.sh --user` makes a copy of the interpreter."""
    program, script = tmp_path / "sleep", tmp_path / "script.py"
    shutil.copy("/bin/sleep", program)
    script.write_text("x")
    own = {**make(), "argv": [str(program), "-I", "-S", "-B", str(script)], "namespaces": ["pid"]}
    own["landlock"] = {"abi": ABI, "rules": [[str(program), "exec"], [str(tmp_path), "read"]]}

    def check(witness):
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        launcher.apply_landlock(own)
        landlock.verify_behaviour(ABI, readable=str(witness), outside=None)

    with subprocess.Popen([program, "60"]) as running:
        try:
            assert in_child(lambda: check(script)) is None
            assert "opens for writing" in in_child(lambda: check(program))[1]
        finally:
            running.kill()


@pytest.mark.parametrize(
    ("number", "opens"),
    [(errno.EACCES, False), (errno.EROFS, False), (errno.ETXTBSY, True), (errno.ENOENT, True)],
)
def test_only_a_denial_counts_as_one(number, opens, monkeypatch):
    def answer(*_):
        raise OSError(number, "")

    monkeypatch.setattr(os, "open", answer)
    assert landlock.can_open("/x", os.O_WRONLY) is opens


def test_a_missing_path_breaks_the_whole_rule_set():
    if ABI < 1:
        pytest.skip("this kernel has no Landlock")
    with pytest.raises(LandlockError):
        landlock.restrict([("/nowhere/at/all", landlock.READ)], ABI)


def test_without_rules_the_behaviour_gives_it_away(tmp_path):
    readable = tmp_path / "file"
    readable.write_text("x")
    with pytest.raises(LandlockError, match="root folder"):
        landlock.verify_behaviour(1, readable=str(readable), outside=None)


CASES = {
    "a writable input": (1, {"/": False, "w": True}, "writing"),
    "a connect": (4, {"/": False, "w": False}, "TCP"),
}


@pytest.mark.parametrize(("abi", "opens", "words"), CASES.values(), ids=CASES.keys())
def test_each_behaviour_is_tried(abi, opens, words, monkeypatch):
    monkeypatch.setattr(
        landlock, "can_open", lambda path, _flags=0: opens["/" if path == "/" else "w"]
    )
    with pytest.raises(LandlockError, match=words):
        landlock.verify_behaviour(abi, readable="/x", outside=None)


def test_a_signal_that_passes_is_found(monkeypatch):
    monkeypatch.setattr(landlock, "can_open", lambda *_: False)
    monkeypatch.setattr(landlock, "_verify_tcp", lambda: None)
    landlock.verify_behaviour(6, readable="/x", outside=None)
    with pytest.raises(LandlockError, match="signalled"):
        landlock.verify_behaviour(6, readable="/x", outside=os.getpid())
    landlock.verify_behaviour(5, readable="/x", outside=os.getpid())


def test_a_kernel_without_landlock_reports_0(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(linux, "call", missing)
    assert landlock.reported_abi() == 0


def test_a_plan_without_landlock_applies_none(monkeypatch):
    monkeypatch.setattr(linux, "call", lambda *_: pytest.fail("the kernel was asked"))
    launcher.apply_landlock({**make(), "landlock": None})


def test_rules_need_a_folder_that_opened_before(monkeypatch):
    monkeypatch.setattr(landlock, "can_open", lambda *_: False)
    with pytest.raises(Refusal) as caught:
        launcher.apply_landlock(make())
    assert caught.value.layer == "landlock"


# -- stage 1 -----------------------------------------------------------------------------------


def nnp():
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def test_stage_1_is_tried_after_it_was_installed():
    assert in_child(lambda: (nnp(), launcher.apply_stage1())) is None


@pytest.mark.parametrize("weak", [filters.no_exec(), None])
def test_a_filter_that_denies_too_little_is_refused(weak, monkeypatch):
    if weak is None:
        monkeypatch.setattr(filters, "install", lambda _: None)
    else:
        monkeypatch.setattr(filters, "stage1", lambda _: weak)
    assert in_child(lambda: (nnp(), launcher.apply_stage1()))[0] == "stage1"


def test_a_filter_without_a_ceiling_is_refused(monkeypatch):
    monkeypatch.setattr(filters, "install", lambda _: None)
    expected = {"socket": 13, "io_uring_setup": 38}
    by_number = {linux.NUMBER[name]: code for name, code in expected.items()}
    monkeypatch.setattr(
        launcher,
        "answer_of",
        lambda nr: 0 if nr > tables.CEILING else by_number.get(nr, errno.EPERM),
    )
    with pytest.raises(Refusal, match="ceiling"):
        launcher.apply_stage1()


def test_a_call_that_succeeds_answers_0():
    assert launcher.answer_of(linux.NUMBER["getpid"]) == 0


# -- identity ----------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")


@needs_root
def test_root_is_given_up_for_good():
    def check():
        launcher.drop_identity({**make(), "identity": [61200, 61200]})
        assert os.getresuid() == (61200,) * 3
        assert os.getgroups() == []
        with pytest.raises(PermissionError):
            os.seteuid(0)

    assert in_child(check) is None


@needs_root
def test_a_process_that_stays_root_is_refused():
    assert in_child(lambda: launcher.drop_identity(make()))[0] == "identity"


@needs_root
def test_a_way_back_to_root_is_refused(monkeypatch):
    monkeypatch.setattr(linux, "drop_capabilities", lambda: None)
    monkeypatch.setattr(linux, "drop_bounding_set", lambda: None)
    monkeypatch.setattr(os, "setresuid", lambda *_: None)
    monkeypatch.setattr(os, "getresuid", lambda: (61200,) * 3)
    rooted = {**make(), "identity": [61200, 61200]}
    assert "root again" in in_child(lambda: launcher.drop_identity(rooted))[1]


def test_an_id_of_0_inside_is_refused(monkeypatch):
    monkeypatch.setattr(linux, "call", lambda *_: 0)
    with pytest.raises(Refusal) as caught:
        launcher.enter_namespaces({**make(), "mapping": [0, 100]})
    assert caught.value.layer == "identity"


def test_unreadable_inputs_are_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("x")
    launcher.check_readable({**make(), "check": [str(tmp_path)]})
    assert str(tmp_path / "model") in list(launcher.entries(str(tmp_path)))
    with pytest.raises(Refusal) as caught:
        launcher.check_readable({**make(), "check": [str(tmp_path / "nothing")]})
    assert caught.value.layer == "files"


@pytest.mark.parametrize(
    ("names", "flags", "words"),
    [(["lo", "eth0"], 0, "eth0"), (["lo"], 1, "is up")],
)
def test_a_network_is_refused(names, flags, words, monkeypatch):
    import _socket
    import fcntl
    import struct

    monkeypatch.setattr(_socket, "if_nameindex", lambda: list(enumerate(names)))
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: struct.pack("<16sH14x", b"lo", flags))
    with pytest.raises(Refusal) as caught:
        launcher.check_network()
    assert caught.value.layer == "network"
    assert words in str(caught.value)


# -- entry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["launcher", "worker", "convert", "fixture"])
def test_each_part_is_reached_by_its_name(part, monkeypatch):
    import sys

    from airgap.enclave import fixture, stub, worker

    called = []
    modules = {"launcher": launcher, "worker": worker, "convert": stub, "fixture": fixture}
    for name, module in modules.items():
        monkeypatch.setattr(module, "main", lambda *_, name=name: called.append(name))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    where = json.dumps({"packages": {}, "site": ["/nowhere"]})
    entry.main(["entry.py", part, "/ours" if part == "launcher" else where, "1"])
    assert called == [part]
    assert (sys.path[-1] == "/nowhere") == (part != "launcher")


def test_our_packages_are_found_by_folder_and_others_left_alone(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    finder = entry.Folders({"mine": str(tmp_path)})
    spec = finder.find_spec("mine")
    assert spec.submodule_search_locations == [str(tmp_path)]
    assert finder.find_spec("json") is None


def test_a_folder_of_our_name_among_the_packages_of_others_is_passed_over(tmp_path):
    """An editable install leaves `airgap/packaging` there: a package without code."""
    (tmp_path / "airgap" / "packaging").mkdir(parents=True)
    where = json.dumps({"packages": plan.package_folders(), "site": [str(tmp_path)]})
    argv = [plan.interpreter(), "-I", "-S", "-B", entry.__file__, "fixture", where]
    done = subprocess.run(argv, input=b"", capture_output=True, cwd="/", check=False)
    assert b"ModuleNotFoundError" not in done.stderr
    assert b"JSONDecodeError" in done.stderr  # it was reached, and had nothing to read


# -- raw calls ---------------------------------------------------------------------------------


def test_errors_of_the_kernel_are_errors_here():
    with pytest.raises(OSError, match="Bad file") as caught:
        linux.call("close", 987654)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(KeyError):
        linux.call("no_such_call")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM])
def test_the_bounding_set_ends_or_stays(code, monkeypatch):
    seen = []

    def prctl(_option, value):
        seen.append(value)
        if value == 5:
            raise OSError(code, "")

    monkeypatch.setattr(linux, "prctl", prctl)
    linux.drop_bounding_set()
    assert seen == list(range(6))


def test_another_error_of_the_bounding_set_is_raised(monkeypatch):
    def prctl(*_):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(linux, "prctl", prctl)
    with pytest.raises(OSError, match="5"):
        linux.drop_bounding_set()


def test_filters_of_a_process_of_somebody_else_cannot_be_dumped():
    with pytest.raises(OSError, match=r"No such process|not permitted"):
        linux.dump_filters(1 if os.geteuid() else 2**30)


@needs_root
def test_filters_of_a_live_process_are_read_back():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        nnp()
        filters.install(filters.no_exec())
        filters.install(filters.stage1())
        os.write(write, b"!")
        signal.pause()
    os.read(read, 1)
    try:
        assert linux.dump_filters(child)[-2:] == [filters.no_exec(), filters.stage1()]
    except PermissionError:
        pytest.skip("no CAP_SYS_ADMIN in the first user namespace")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_live_filters_are_compared_only_where_the_broker_may(monkeypatch):
    from airgap.enclave import evidence

    one, two = filters.stage1(), filters.stage2(1)
    host = SimpleNamespace(sys_admin=True)
    monkeypatch.setattr(linux, "dump_filters", lambda _: [b"outer", one, two])
    assert evidence.live_filters(1, [one, two], host) is True
    assert evidence.live_filters(1, [two, one], host) is False
    assert evidence.live_filters(1, [one] * 4, host) is False
    assert evidence.live_filters(1, [one, two], SimpleNamespace(sys_admin=False)) is None

    def refuse(_):
        raise OSError(errno.EACCES, "")

    monkeypatch.setattr(linux, "dump_filters", refuse)
    assert evidence.live_filters(1, [one, two], host) is None

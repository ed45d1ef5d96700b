"""The listening socket: handed over by systemd, bound, in place of a dead one, never of a file."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from enclave_harness import needs_root

from airgap.audit.service import RemoteLog
from airgap.service import client, wire
from airgap.service.daemon import are_files, require_client
from airgap.service.sockets import listening
from airgap.systemd import tell_systemd
from policy.errors import FaultError, RefusedError

CHILD = """
import os, socket, sys
kept = [os.open("/dev/null", 0) for _ in range(2)]
one = socket.socket(socket.AF_UNIX if sys.argv[1] == "unix" else socket.AF_INET)
if sys.argv[1] == "unix": one.bind(sys.argv[2])
one.listen(1) if sys.argv[1] == "unix" else None
os.dup2(one.fileno(), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": sys.argv[3]}
from airgap.service.sockets import listening
from policy.errors import RefusedError
try:
    server = listening(None)
    print(server.getsockname(), os.get_inheritable(3))
except RefusedError as error:
    print(error.code)
"""


@pytest.mark.parametrize(
    ("family", "count", "expected"),
    [
        ("unix", "1", "{path} False"),
        ("unix", "2", "service.absent"),
        ("inet", "1", "service.absent"),
    ],
)
def test_one_unix_socket_is_taken_from_systemd(family, count, expected, tmp_path):
    path = tmp_path / "s"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, family, path, count],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected.format(path=path)


def test_a_socket_is_bound_for_its_owner_or_a_group_and_a_file_is_left_alone(tmp_path):
    path = tmp_path / "run" / "s"
    with listening(path):
        assert path.stat().st_mode & 0o777 == 0o600
    with listening(path, os.getgid()):  # the dead one is replaced
        assert path.stat().st_mode & 0o777 == 0o660
    with listening(path):  # one that is alive is not: it may be of another tree
        with pytest.raises(RefusedError) as refused:
            listening(path)
        assert refused.value.code == "service.locked"
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(path))
    path.unlink()
    path.write_text("mine")
    for wrong in (path, None):
        with pytest.raises(RefusedError) as caught:
            listening(wrong)
        assert caught.value.code == "service.absent"
    assert path.read_text() == "mine"


def test_the_service_manager_is_told(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        tell_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"
    tell_systemd("READY=1")  # nobody listens any more: no error
    monkeypatch.delenv("NOTIFY_SOCKET")
    tell_systemd("READY=1")


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda end: wire.send(end, {"op": "cancel"}), "request.cancelled"),
        (lambda end: end.close(), "request.cancelled"),
        (lambda end: wire.send(end, {"op": "status"}), "service.client"),
        (lambda end: end.sendall(b"\xff\xff\xff\xff"), "service.client"),
        (lambda end: end.sendall(b"\0\0\0\1{"), "service.client"),
    ],
)
def test_a_client_that_leaves_or_speaks_out_of_turn_gets_no_answer(act, code):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        require_client(ours)
        act(theirs)
        with pytest.raises(RefusedError) as caught:
            require_client(ours)
        assert caught.value.code == code


@pytest.mark.parametrize(
    "body",
    [
        b'{"op":"run","a":[' + b"[]," * 30_000 + b"[]]}",
        b'{"op":"run","a":[' + b'"",' * 40_000 + b"0]}",
        b'{"op":"run","a":' + b" " * 70_000 + b"0}",
        b'{"op":"run","a":"' + b'\\"' * 40_000 + b'",' + b'"' * 70_000,
        '{"op":"status"}'.encode("utf-16"),
        b'{"op":"status","x":"\xff"}',
        b"[" * 200_000,
        b'{"op":"status","x":' + b"1" * 5_000 + b"}",
    ],
)
def test_what_would_cost_much_memory_or_is_no_utf_8_is_no_message(body):
    with pytest.raises(RefusedError) as refused:
        receive(body)
    assert refused.value.code == wire.CODE


def test_a_large_text_is_taken_whatever_stands_in_it():
    text = '[[],{"a":1}],\\\n' * 20_000
    assert receive(json.dumps({"pdb": text}).encode()) == {"pdb": text}


def receive(body):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(
            target=theirs.sendall, args=(struct.pack(">I", len(body)) + body,)
        )
        sender.start()
        try:
            return wire.receive(ours, wire.REQUEST_LIMIT, outside=wire.OUTSIDE_LIMIT)
        finally:
            sender.join()


def test_half_a_message_during_a_run_is_waited_for_no_longer_than_a_cancel_takes():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(3_600)
        theirs.sendall(b"\0")  # and no more
        with pytest.raises(RefusedError) as refused:
            require_client(ours)
        assert refused.value.code == wire.CODE  # ends the connection


@needs_root
def test_a_socket_that_somebody_else_put_there_is_told_nothing():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        path = Path(folder) / "s"
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.setresuid(40404, 40404, 40404)
                with socket.socket(socket.AF_UNIX) as theirs:
                    theirs.bind(str(path))
                    path.chmod(0o777)
                    theirs.listen(5)
                    os.write(tell, b"1")
                    signal.pause()
            finally:
                os._exit(1)
        os.close(tell)
        try:
            assert os.read(ready, 1) == b"1"
            with pytest.raises(FaultError) as refused:
                client.status(path)
            assert refused.value.code == "service.absent"
            assert "uid 40404" in refused.value.message
            with pytest.raises(FaultError) as refused:
                RemoteLog(path)
            assert refused.value.code == "audit.service"
            assert "uid 40404" in refused.value.message
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(ready)


@pytest.mark.parametrize("files", [["csv", "csv"], [["csv"]], [{}], ["x"], [1], [None]])
def test_files_are_kinds_each_once(files):
    assert are_files(["csv", "html"])
    assert are_files([])
    assert not are_files(files)

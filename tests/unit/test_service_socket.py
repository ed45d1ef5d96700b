"""The listening socket: handed over by systemd, bound, in place of a dead one, never of a file."""

import os
import socket
import subprocess
import sys

import pytest

from airgap.service import wire
from airgap.service.daemon import require_client
from airgap.service.sockets import listening
from airgap.systemd import tell_systemd
from policy.errors import RefusedError

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

"""A fake internet with receivers, a control and a sealed twin (docs/design/enclave.md, 7).

Runs as a process of its own, because it changes its network namespace. There every address is
local, so nothing that leaks can leave this machine. Where no namespace can be made, only loopback
addresses and Unix paths are used. Prints one JSON report; `judge` reads it elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from airgap.enclave import convert, evidence, host, linux, probe, reading
from airgap.enclave.gpu import Driver
from airgap.enclave.host import HostSurvey
from airgap.enclave.process import DESCRIPTORS, last_words
from airgap.enclave.refused import SealRefused
from airgap.enclave.seal import start
from airgap.enclave.spec import Caps, SealSpec
from policy.errors import AirgapError

if TYPE_CHECKING:
    from airgap.enclave.channels import Targets  # a name for type checkers alone

_PROGRAMS = ("/usr/bin/true", "/bin/true", "/usr/bin/env", "/bin/sh")  # any will do
ABSTRACT, QUEUE, SHM_KEY = "airgap-probe", "airgap-probe", 0x41475052
_IP, _IP6, _PREFIX6 = "192.0.2.1", "2001:db8::1", 64
_OUTSIDE_PIPE, _OUTSIDE_SOCKET = 601, 600
FOLDER = "airgap-probe-"  # followed by the pid of the probe
_CONTROL_S, _SETTLE_S = 15.0, 0.05
_LINE = re.compile(rb"[0-9a-f]{16}:[a-z0-9_]+")


def main() -> None:
    """Read {"rung", "uid", …} from standard input, run control and twin, print the report."""
    wanted = json.loads(sys.stdin.read())
    driver = Driver(**wanted.get("driver", {}))
    report = run(wanted["rung"], wanted["uid"], wanted.get("profile", "worker"), driver)
    sys.stdout.write(json.dumps(report) + "\n")


def run(
    rung: str, uid: int | None, profile: str = "worker", driver: Driver | None = None
) -> dict[str, Any]:
    """Run the probe on `rung`; `uid` is the worker's when root starts it."""
    # After this process has made its own namespaces the host looks different; the twin must be
    # planned by what the worker was planned by.
    facts = host.survey()
    own_network = enter_network()
    os.umask(0o022)  # whatever the starter has: this process is the probe's own
    raise_descriptors()
    remove_stale(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
    try:
        with Outside(folder, uid, own_network=own_network) as outside:
            twin = SealSpec(
                profile=profile,
                program="airgap.enclave.probe:create",
                min_rung=rung,
                rung=rung,
                uid=uid,
                deadline_s=30.0,
                caps=Caps(memory_mb=512),
                driver=driver or Driver(),
            )
            return _compare(rung, twin, facts, outside)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def raise_descriptors() -> None:
    """Take what the hard limit allows: two descriptors outside have numbers of their own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, DESCRIPTORS), hard))


def remove_stale(parent: Path) -> None:
    """Remove folders that probes of this user left behind when they were killed.

    Only a real folder of our own uid, whose name tells a process that is gone or younger than it.
    """
    for path in parent.glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError, ValueError):
            status = path.lstat()
            owner = int(path.name.removeprefix(FOLDER).partition("-")[0])
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            if not _lives(owner, status.st_mtime):
                shutil.rmtree(path, ignore_errors=True)  # follows no link


def _lives(pid: int, made: float) -> bool:
    """Say whether the process that made a folder at `made` may still be there."""
    try:
        started = reading.started_at(pid)
    except OSError:
        return False
    return started <= made + 1


def _compare(rung: str, spec: SealSpec, facts: HostSurvey, outside: Outside) -> dict[str, Any]:
    control = outside.control()
    report: dict[str, Any] = {
        "version": probe.VERSION,
        "ts": evidence.utc(),
        "own_network": outside.own_network,
        "rung": rung,
        "profile": spec.profile,
        "landlock": facts.landlock_abi,
        "control": control,
        "received": {},
    }
    targets = outside.targets("stage1")
    spec = replace(spec, config={"targets": targets})
    leaked = (targets["inherited"], targets["passed"])
    try:
        twin = start(rung, spec, facts, leaked=leaked)
        report["stage1"] = twin.evidence["artifacts"]["program"]["stage1"]
        wanted = json.dumps({"op": "all", "token": outside.token("stage2")}).encode()
        report["stage2"] = json.loads(twin.request(wanted, 10.0))
        with contextlib.suppress(AirgapError):
            twin.request(json.dumps({"op": "foreign"}).encode(), 10.0)
        report["foreign_abi"] = twin.close()["signal"]
        if rung != "C":
            report["convert"] = _converted(rung, spec.uid, facts, outside)
    except SealRefused as refused:
        report["refused"] = {"layer": refused.layer, "message": refused.message}
    except AirgapError as error:
        report["refused"] = {"layer": "probe", "message": f"{error.code}: {error.message}"}
    time.sleep(_SETTLE_S)
    report["received"] = outside.received()
    return report


def _converted(
    rung: str, uid: int | None, facts: HostSurvey, outside: Outside
) -> dict[str, list[str]]:
    """Try every channel once more, as a conversion."""
    targets = outside.targets("convert")
    job = ProbeJob(outside.folder / "out", json.dumps(targets))
    job.out.mkdir()
    work = convert.Work(
        job=job,
        facts=facts,
        program=convert.parse_argv(job.argv),
        out=job.out,
        inputs=(),
        limit=1 << 20,
        uid=uid,
    )
    leaked = (targets["inherited"], targets["passed"])
    result = convert.run_on(rung, work, leaked=leaked)
    if not result.files:
        raise SealRefused("probe", f"the conversion twin failed{last_words(result.stderr)}")
    return dict(json.loads(result.files[0].read_bytes()))


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """The probe as a conversion."""

    out: Path
    targets: str
    read_only: tuple[Path, ...] = ()
    memory_mb: int = 512
    timeout_s: float = 15.0
    stderr_limit: int = 4096

    @property
    def argv(self) -> list[str]:
        """Return the command line."""
        result = str(self.out / "channels.json")
        return ["python", "-m", "airgap.enclave.probe", self.targets, result]


# -- the fake internet ----------------------------------------------------------------------------


def enter_network() -> bool:
    """Make a network namespace where every address is local; False where none can be made."""
    # A host may let a namespace be made and then deny all inside it: a child tries first.
    child = os.fork()
    if not child:
        status = 1
        try:
            _unshare_network()
            status = 0
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        return False
    _unshare_network()
    with contextlib.suppress(OSError):  # echo sockets are a channel only where groups may have them
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
    return True


def _unshare_network() -> None:
    uid, gid = os.geteuid(), os.getegid()
    status = host.parse_status(Path("/proc/self/status").read_text())
    privileged = int(status["CapEff"], 16) >> 21 & 1
    if privileged:
        linux.call("unshare", linux.CLONE_NEWNET)
    else:
        linux.call("unshare", linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _configure_loopback()


def _configure_loopback() -> None:
    """Bring lo up, give it addresses, and route everything to it, by rtnetlink."""
    four, six = socket.inet_aton(_IP), socket.inet_pton(socket.AF_INET6, _IP6)
    with contextlib.closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)) as link:
        # RTM_NEWLINK: index 1, flag UP
        _ask(link, 16, 0, struct.pack("<BxHiII", 0, 0, 1, 1, 1))
        for family, bits, address in ((2, 24, four), (10, _PREFIX6, six)):
            # RTM_NEWADDR: local and peer address; IFA_F_NODAD for IPv6
            body = struct.pack("<BBBBI", family, bits, 2, 0, 1)
            body += _attribute(2, address) + _attribute(1, address)
            _ask(link, 20, 0x600, body, optional=family != 2)  # noqa: PLR2004 - AF_INET
            # RTM_NEWROUTE: type LOCAL, table LOCAL, to everywhere, out of index 1
            route = struct.pack("<BBBBBBBBI", family, 0, 0, 0, 255, 3, 254, 2, 0)
            route += _attribute(4, struct.pack("<I", 1))
            _ask(link, 24, 0x600, route, optional=family != 2)  # noqa: PLR2004


def _attribute(kind: int, content: bytes) -> bytes:
    padding = -len(content) % 4
    return struct.pack("<HH", 4 + len(content), kind) + content + bytes(padding)


def _ask(
    link: socket.socket, kind: int, flags: int, body: bytes, *, optional: bool = False
) -> None:
    """Send one request with an acknowledgement; OSError when the kernel refuses it."""
    link.send(struct.pack("<IHHII", 16 + len(body), kind, 0x5 | flags, 1, 0) + body)
    (code,) = struct.unpack_from("<i", link.recv(4096), 16)
    if code and not optional:
        raise OSError(-code, os.strerror(-code))


# -- what stands outside --------------------------------------------------------------------------


class Outside:
    """Receivers, a process of the worker's uid with an open socket, and the control."""

    def __init__(self, folder: Path, uid: int | None, *, own_network: bool) -> None:
        self.own_network = own_network
        self.folder = folder
        self._uid = uid
        self._probe = os.getpid()
        self._tokens: dict[str, str] = {}
        self._got: list[str] = []
        self._lock = threading.Lock()
        self._children: list[int] = []
        self._ip, self._ip6 = (_IP, _IP6) if own_network else ("127.0.0.1", "::1")

    def __enter__(self) -> Self:
        self._files()
        self._listen()
        self._start_outside_process()
        self._fork_control()
        for receiver in self._receivers:
            threading.Thread(target=receiver, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            try:
                os.kill(child, signal.SIGKILL)
            except OSError:
                continue  # root without CAP_KILL: it dies with this process, and is not waited for
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        with contextlib.suppress(OSError):
            linux.call("shmctl", self._shm, 0, 0)
        with contextlib.suppress(OSError):
            linux.call("mq_unlink", ctypes.c_char_p(QUEUE.encode()))

    # -- tokens -----------------------------------------------------------------------------------

    def token(self, phase: str) -> str:
        """Return the secret of a phase: control, stage1 or stage2."""
        return self._tokens.setdefault(phase, secrets.token_hex(8))

    def received(self) -> dict[str, list[str]]:
        """Return, for each phase, the channels whose token a receiver got."""
        with self._lock:
            lines = list(self._got)
        return {
            phase: sorted({line.split(":", 1)[1] for line in lines if line.startswith(token + ":")})
            + (["write_shared_dir"] if (self.folder / "shared" / token).exists() else [])
            for phase, token in self._tokens.items()
        }

    def targets(self, phase: str) -> Targets:
        """Return where to send in `phase`, with fresh descriptors to leak."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        inherited, given = self._connection(), self._connection()
        socket.send_fds(one, [b"x"], [given.fileno()])
        self._kept += [one, other, inherited, given]
        return {
            "token": self.token(phase),
            "ip": self._ip,
            "ip6": self._ip6,
            "port": self._port,
            "dns_port": self._dns_port,
            "resolver": self.own_network,
            "stream": str(self.folder / "stream"),
            "datagram": str(self.folder / "datagram"),
            "abstract": ABSTRACT + self.folder.name,
            "inherited": inherited.fileno(),
            "passed": other.fileno(),
            "pid": self._pid,
            "address": self._address,
            "outside_pipe": _OUTSIDE_PIPE,
            "outside_socket": _OUTSIDE_SOCKET,
            "shared": str(self.folder / "shared"),
            "secret": str(self.folder / "secret"),
            "shm_key": SHM_KEY,
            "queue": QUEUE,
            "program": next((p for p in _PROGRAMS if Path(p).exists()), _PROGRAMS[0]),
        }

    # -- receivers --------------------------------------------------------------------------------

    def _files(self) -> None:
        self.folder.chmod(0o755)
        shared = self.folder / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        (self.folder / "secret").write_text("a file of the user")
        (self.folder / "secret").chmod(0o644)

    def _listen(self) -> None:
        """Bind every receiver; the threads that read them start after the forks."""
        self._kept: list[socket.socket] = []
        self._receivers: list[Callable[[], None]] = []
        tcp = self._receiver(socket.SOCK_STREAM, 0)
        with contextlib.suppress(OSError):
            tcp.setsockopt(socket.IPPROTO_TCP, 23, 16)  # TCP_FASTOPEN
        self._port = tcp.getsockname()[1]
        udp = self._receiver(socket.SOCK_DGRAM, self._port)
        names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        names.bind(("0.0.0.0", 53) if self.own_network else ("127.0.0.1", 0))  # noqa: S104 - an own namespace
        self._dns_port = names.getsockname()[1]
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.bind(str(self.folder / "stream"))
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        datagram.bind(str(self.folder / "datagram"))
        for name in ("stream", "datagram"):
            (self.folder / name).chmod(0o777)
        abstract = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        abstract.bind("\0" + ABSTRACT + self.folder.name)
        for listening in (tcp, stream, abstract, *self._own_address6(socket.SOCK_STREAM)):
            listening.listen(64)
            self._serve_stream(listening)
        for receiver in (udp, datagram, *self._own_address6(socket.SOCK_DGRAM)):
            self._serve_datagrams(receiver)
        self._serve_names(names)
        for family, kind, protocol in ((2, 2, 136), (2, 3, 1)):  # UDP-Lite; ICMP
            with contextlib.suppress(OSError):
                extra = socket.socket(family, kind, protocol)
                extra.bind((self._ip, self._port if protocol == 136 else 0))  # noqa: PLR2004
                self._serve_datagrams(extra)
        self._shm = -1
        with contextlib.suppress(OSError):
            self._shm = linux.call("shmget", SHM_KEY, 4096, 0o1666)
        with contextlib.suppress(OSError):
            made = linux.call(
                "mq_open", ctypes.c_char_p(QUEUE.encode()), os.O_CREAT | os.O_RDWR, 0o666, 0
            )
            os.fchmod(made, 0o666)

    def _receiver(self, kind: int, port: int) -> socket.socket:
        """Return a bound socket for both families, for IPv4 alone where the host has no IPv6."""
        try:
            made = socket.socket(socket.AF_INET6, kind)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            made.bind(("::" if self.own_network else "::ffff:127.0.0.1", port))
        except OSError:
            made = socket.socket(socket.AF_INET, kind)
            made.bind(("0.0.0.0" if self.own_network else "127.0.0.1", port))  # noqa: S104 - as above
        return made

    def _own_address6(self, kind: int) -> list[socket.socket]:
        """Return a receiver on ::1, where the first one listens on 127.0.0.1 alone."""
        if self.own_network:
            return []
        try:
            made = socket.socket(socket.AF_INET6, kind)
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(("::1", self._port))
        except OSError:
            return []
        return [made]

    def _serve_stream(self, listening: socket.socket) -> None:
        def read(made: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while part := made.recv(4096):
                    self._note(part)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    made, _ = listening.accept()
                    threading.Thread(target=read, args=(made,), daemon=True).start()

        self._kept.append(listening)
        self._receivers.append(accept)

    def _serve_datagrams(self, receiver: socket.socket) -> None:
        def receive() -> None:
            with contextlib.suppress(OSError):
                while True:
                    self._note(receiver.recv(4096))

        self._kept.append(receiver)
        self._receivers.append(receive)

    def _serve_names(self, receiver: socket.socket) -> None:
        def receive() -> None:
            with contextlib.suppress(OSError):
                while True:
                    query, sender = receiver.recvfrom(4096)
                    label = query[13 : 13 + query[12]].decode("latin1")
                    token, _, kind = label.partition("-")
                    name = "dns_getaddrinfo" if kind == "dns" else "dns_udp"
                    self._note(f"{token}:{name}\n".encode())
                    receiver.sendto(query[:2] + b"\x81\x83" + query[4:], sender)  # no such name

        self._kept.append(receiver)
        self._receivers.append(receive)

    def _note(self, content: bytes) -> None:
        """Keep everything that looks like a token and a channel."""
        with self._lock:
            self._got += [found.decode() for found in _LINE.findall(content)]

    # -- children ---------------------------------------------------------------------------------

    def _connection(self) -> socket.socket:
        return socket.create_connection((self._ip, self._port))

    def _start_outside_process(self) -> None:
        """Fork a process of the worker's uid that holds a connected socket and a pipe."""
        told, tell = os.pipe()
        read, write = os.pipe()
        held = self._connection()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.dup2(held.fileno(), _OUTSIDE_SOCKET)
                os.dup2(write, _OUTSIDE_PIPE)
                self._become_worker()
                content = ctypes.create_string_buffer(64)
                os.write(tell, struct.pack("<Q", ctypes.addressof(content)))
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        self._children.append(self._pid)
        os.close(tell)  # else a child that failed would never be seen to have ended
        (self._address,) = struct.unpack("<Q", os.read(told, 8))
        os.close(told)
        os.close(write)
        held.close()

        def receive() -> None:
            while part := os.read(read, 4096):
                self._note(part)

        self._receivers.append(receive)

    def _become_worker(self) -> None:
        """Take the worker's uid and no other layer; end with the probe."""
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if self._uid is not None and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(self._uid, self._uid, self._uid)
            os.setresuid(self._uid, self._uid, self._uid)
            linux.prctl(linux.PR_SET_DUMPABLE, 1)
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        # A probe that was killed before that sends no signal: its pipes would stay open for ever,
        # and with them whoever reads the probe's report.
        if os.getppid() != self._probe:
            os._exit(1)

    def _fork_control(self) -> None:
        """Fork the control; it waits for a sign, so that the receivers run before it sends."""
        targets = self.targets("control")
        go, self._go = os.pipe()
        self._answer, answer = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                os.close(self._go)
                self._become_worker()
                os.read(go, 1)
                found = probe.attempt_all(targets)
                found["foreign_abi"] = _foreign_control()
                os.write(answer, json.dumps(found).encode())
                status = 0
            finally:
                os._exit(status)
        self._children.append(child)
        os.close(go)
        os.close(answer)

    def control(self) -> dict[str, list[str]]:
        """Let the control run and return what it saw; empty when it did not answer."""
        os.write(self._go, b"!")
        parts: list[bytes] = []
        timer = threading.Timer(_CONTROL_S, os.kill, (self._children[-1], signal.SIGKILL))
        timer.start()
        while part := os.read(self._answer, 65536):
            parts.append(part)
        timer.cancel()
        try:
            return dict(json.loads(b"".join(parts)))
        except ValueError:
            return {}


def _foreign_control() -> list[str]:
    """Make a socket by the i386 gate in a child; a kernel without the gate kills it."""
    child = os.fork()
    if not child:
        os._exit(0 if probe.prepare_foreign_socket()() >= 0 else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [probe.OPEN, ""] if status == 0 else [probe.BLOCKED, "ENOSYS"]

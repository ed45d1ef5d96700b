"""Every way out that we know, one function each (docs/design/enclave.md, 6).

A channel decides nothing: it reports that a call worked, or raises what the kernel said. Each names
the layers that close it. Standard library only: the sealed twin runs this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct

from airgap.enclave import linux

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypedDict

    class Targets(TypedDict):
        """Where the receivers of a fixture listen, and what stands outside."""

        token: str
        ip: str
        ip6: str
        port: int
        dns_port: int
        resolver: bool  # the system's resolver may be asked: the name service is the fixture's own
        stream: str
        datagram: str
        abstract: str
        inherited: int
        passed: int
        pid: int
        address: int
        outside_pipe: int
        outside_socket: int
        shared: str
        secret: str
        shm_key: int
        queue: str
        program: str

    Channel = Callable[[Targets], object]

CHANNELS: dict[str, Channel] = {}
CLOSED_BY: dict[str, str] = {}
_WAIT_S = 1.0
_FAMILIES = {
    "af_vsock": (40, 1, 0),
    "af_packet": (17, 3, 0x0300),
    "af_alg": (38, 5, 0),
    "af_bluetooth": (31, 3, 1),
    "af_xdp": (44, 3, 0),
    "af_smc": (43, 1, 0),
    "af_can": (29, 3, 1),
    "af_tipc": (30, 1, 0),
    "af_rds": (21, 5, 0),
    "af_qipcrtr": (42, 2, 0),
    "af_kcm": (41, 2, 0),
    "af_rxrpc": (33, 2, 2),
    "af_key": (15, 3, 2),
    "af_nfc": (39, 5, 0),
    "af_x25": (9, 5, 0),
    "af_appletalk": (5, 2, 0),
    "af_llc": (26, 1, 0),
    "af_ieee802154": (36, 2, 0),
    "af_phonet": (35, 2, 0),
}


class SkippedError(Exception):
    """The channel cannot be tried here without reaching something that is not ours."""


def channel(closed_by: str) -> Callable[[Channel], Channel]:
    """Register a channel under the name of its function, with the layers that close it."""

    def register(function: Channel) -> Channel:
        name = function.__name__
        CHANNELS[name] = function
        CLOSED_BY[name] = closed_by
        return function

    return register


def mark(targets: Targets, name: str) -> bytes:
    """Return the line that a receiver recognises."""
    return f"{targets['token']}:{name}\n".encode()


def _socket(family: int, kind: int, protocol: int = 0) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    made.settimeout(_WAIT_S)
    return made


# -- internet -------------------------------------------------------------------------------------

_NETWORK = "stage 1, own network"


@channel(_NETWORK)
def tcp4(t: Targets) -> object:
    """TCP over IPv4."""
    s = _socket(socket.AF_INET, socket.SOCK_STREAM)
    s.connect((t["ip"], t["port"]))
    return s.send(mark(t, "tcp4"))


@channel(_NETWORK)
def tcp6(t: Targets) -> object:
    """TCP over IPv6."""
    s = _socket(socket.AF_INET6, socket.SOCK_STREAM)
    s.connect((t["ip6"], t["port"]))
    return s.send(mark(t, "tcp6"))


@channel(_NETWORK)
def mptcp(t: Targets) -> object:
    """Multipath TCP to a plain TCP server; Landlock does not see it."""
    s = _socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    s.connect((t["ip"], t["port"]))
    return s.send(mark(t, "mptcp"))


@channel(_NETWORK)
def tcp_fastopen_sendto(t: Targets) -> object:
    """TCP Fast Open, data without connect(); Landlock does not see it."""
    s = _socket(socket.AF_INET, socket.SOCK_STREAM)
    s.settimeout(None)
    return s.sendto(mark(t, "tcp_fastopen_sendto"), 0x20000000, (t["ip"], t["port"]))


@channel(_NETWORK)
def udp4_sendto(t: Targets) -> object:
    """UDP over IPv4."""
    return _socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
        mark(t, "udp4_sendto"), (t["ip"], t["port"])
    )


@channel(_NETWORK)
def udp6_sendto(t: Targets) -> object:
    """UDP over IPv6."""
    return _socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(
        mark(t, "udp6_sendto"), (t["ip6"], t["port"])
    )


@channel(_NETWORK)
def udp4_sendmsg(t: Targets) -> object:
    """UDP by sendmsg, which some filters forget."""
    return _socket(socket.AF_INET, socket.SOCK_DGRAM).sendmsg(
        [mark(t, "udp4_sendmsg")], [], 0, (t["ip"], t["port"])
    )


@channel(_NETWORK)
def udplite(t: Targets) -> object:
    """UDP-Lite."""
    return _socket(socket.AF_INET, socket.SOCK_DGRAM, 136).sendto(
        mark(t, "udplite"), (t["ip"], t["port"])
    )


@channel(_NETWORK)
def sctp(t: Targets) -> object:
    """SCTP."""
    s = _socket(socket.AF_INET, socket.SOCK_STREAM, 132)
    s.connect((t["ip"], t["port"]))
    return s.send(mark(t, "sctp"))


@channel(_NETWORK)
def icmp_raw(t: Targets) -> object:
    """ICMP on a raw socket."""
    packet = b"\x08\x00" + bytes(6) + mark(t, "icmp_raw")
    return _socket(socket.AF_INET, socket.SOCK_RAW, 1).sendto(packet, (t["ip"], 0))


@channel(_NETWORK)
def icmp_dgram(t: Targets) -> object:
    """ICMP echo on a datagram socket."""
    packet = b"\x08\x00\xf7\xff" + bytes(4) + mark(t, "icmp_dgram")
    return _socket(socket.AF_INET, socket.SOCK_DGRAM, 1).sendto(packet, (t["ip"], 0))


@channel(_NETWORK)
def dns_udp(t: Targets) -> object:
    """Send a DNS query by hand."""
    name = f"{t['token']}-udp".encode()
    query = bytes([0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, len(name)]) + name + b"\0\0\1\0\1"
    return _socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(query, (t["ip"], t["dns_port"]))


@channel(_NETWORK)
def dns_getaddrinfo(t: Targets) -> object:
    """Ask the system's resolver for a name that carries the token."""
    if not t["resolver"]:
        raise SkippedError
    try:
        return socket.getaddrinfo(f"{t['token']}-dns.probe.invalid", 80)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            return "asked"  # a name server answered that there is no such name
        raise


# -- local sockets --------------------------------------------------------------------------------

_LOCAL = "stage 1, own root"


@channel(_LOCAL)
def unix_path_stream(t: Targets) -> object:
    """Connect to a Unix socket by path: container daemons, D-Bus, nscd."""
    s = _socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.connect(t["stream"])
    return s.send(mark(t, "unix_path_stream"))


@channel(_LOCAL)
def unix_path_dgram_sendto(t: Targets) -> object:
    """Send a datagram to a Unix socket by path."""
    return _socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(
        mark(t, "unix_path_dgram_sendto"), t["datagram"]
    )


@channel(_LOCAL)
def unix_path_dgram_sendmsg(t: Targets) -> object:
    """Do the same by sendmsg."""
    return _socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg(
        [mark(t, "unix_path_dgram_sendmsg")], [], 0, t["datagram"]
    )


@channel("stage 1, own network, Landlock")
def unix_abstract_stream(t: Targets) -> object:
    """Connect to an abstract Unix socket."""
    s = _socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.connect("\0" + t["abstract"])
    return s.send(mark(t, "unix_abstract_stream"))


@channel(_LOCAL)
def socketpair_dgram_readdress(t: Targets) -> object:
    """Re-address one end of a datagram socket pair."""
    one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return one.sendto(mark(t, "socketpair_dgram_readdress"), t["datagram"])


def _family(name: str, family: int, kind: int, protocol: int) -> Channel:
    def make(t: Targets) -> object:
        del t
        _socket(family, kind, protocol).close()
        return "socket made"

    make.__name__ = name
    return make


for _name, _arguments in _FAMILIES.items():
    channel("stage 1")(_family(_name, *_arguments))


@channel("stage 1")
def af_netlink_route(t: Targets) -> object:
    """Ask the kernel for its interfaces."""
    del t
    s = _socket(socket.AF_NETLINK, socket.SOCK_RAW)
    s.send(struct.pack("<IHHIIBxHiII", 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0))
    return f"{len(s.recv(65536))} bytes"


@channel("stage 1")
def af_netlink_audit(t: Targets) -> object:
    """Write to the kernel's audit socket."""
    del t
    s = _socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)
    return s.send(struct.pack("<IHHII", 16, 1000, 1, 1, 0))


# -- io_uring -------------------------------------------------------------------------------------


@channel("stage 1")
def io_uring_tcp(t: Targets) -> object:
    """TCP through a ring: no socket call is made."""
    address = struct.pack("<H", socket.AF_INET) + struct.pack(">H", t["port"])
    address += socket.inet_aton(t["ip"]) + bytes(8)
    return _ring_send(socket.AF_INET, address, mark(t, "io_uring_tcp"))


@channel("stage 1")
def io_uring_unix_path(t: Targets) -> object:
    """Reach a Unix socket through a ring."""
    address = struct.pack("<H", socket.AF_UNIX) + t["stream"].encode() + b"\0"
    return _ring_send(socket.AF_UNIX, address, mark(t, "io_uring_unix_path"))


def _ring_send(family: int, address: bytes, message: bytes) -> int:
    """Make a socket, connect it and send, by raw ring entries."""
    parameters = ctypes.create_string_buffer(120)
    ring = linux.call("io_uring_setup", 8, parameters)
    entries = struct.unpack_from("<II", parameters.raw, 0)
    sq = struct.unpack_from("<7I", parameters.raw, 40)
    cq = struct.unpack_from("<7I", parameters.raw, 80)
    size = max(sq[6] + entries[0] * 4, cq[5] + entries[1] * 16)
    shared = mmap.mmap(ring, size)
    queue = mmap.mmap(ring, entries[0] * 64, offset=0x10000000)
    where = ctypes.create_string_buffer(address, len(address))
    what = ctypes.create_string_buffer(message, len(message))

    def submit(entry: bytes) -> int:
        (tail,) = struct.unpack_from("<I", shared, sq[1])
        queue[0:64] = entry.ljust(64, b"\0")
        struct.pack_into("<I", shared, sq[6], 0)
        struct.pack_into("<I", shared, sq[1], tail + 1)
        linux.call("io_uring_enter", ring, 1, 1, 1, 0, 0)
        (head,) = struct.unpack_from("<I", shared, cq[0])
        (mask,) = struct.unpack_from("<I", shared, cq[2])
        (result,) = struct.unpack_from("<i", shared, cq[5] + (head & mask) * 16 + 8)
        struct.pack_into("<I", shared, cq[0], head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)

    made = submit(_entry(45, family, socket.SOCK_STREAM, 0, 0))
    submit(_entry(16, made, len(address), ctypes.addressof(where), 0))
    return submit(_entry(26, made, 0, ctypes.addressof(what), len(message)))


def _entry(operation: int, descriptor: int, offset: int, address: int, length: int) -> bytes:
    return struct.pack("<BBHiQQI", operation, 0, 0, descriptor, offset, address, length)


# -- descriptors and other processes --------------------------------------------------------------


@channel("descriptors closed")
def inherited_tcp_fd(t: Targets) -> object:
    """Write to a connected socket that the parent forgot to close."""
    return os.write(t["inherited"], mark(t, "inherited_tcp_fd"))


@channel("stage 1, descriptors closed")
def scm_rights_recv(t: Targets) -> object:
    """Receive a connected socket over a Unix socket; no namespace stops that."""
    s = socket.socket(fileno=os.dup(t["passed"]))
    s.settimeout(_WAIT_S)
    _, ancillary, *_ = s.recvmsg(16, 256)
    (received,) = struct.unpack("<i", ancillary[0][2][:4])
    with _closing(received):
        return os.write(received, mark(t, "scm_rights_recv"))


@channel("stage 1, own processes")
def ptrace_outside(t: Targets) -> object:
    """Attach to a process of the same uid."""
    linux.call("ptrace", 0x4206, t["pid"], 0, 0)
    linux.call("ptrace", 0x4207, t["pid"], 0, 0)
    os.waitpid(t["pid"], 0x40000000)
    return linux.call("ptrace", 17, t["pid"], 0, 0)


@channel("stage 1, own processes")
def process_vm_readv_outside(t: Targets) -> object:
    """Read the memory of a process of the same uid."""
    buffer = ctypes.create_string_buffer(8)
    here = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(buffer), 8))
    there = ctypes.create_string_buffer(struct.pack("<QQ", t["address"], 8))
    return linux.call("process_vm_readv", t["pid"], here, 1, there, 1, 0)


@channel("own processes, Landlock, stage 2")
def proc_mem_outside(t: Targets) -> object:
    """Open the memory of a process of the same uid for writing."""
    os.close(os.open(f"/proc/{t['pid']}/mem", os.O_RDWR))
    return "opened"


@channel("own processes, Landlock, stage 2")
def proc_root_outside(t: Targets) -> object:
    """Walk the file system of a process of the same uid."""
    return os.listdir(f"/proc/{t['pid']}/root/")[:2]  # noqa: PTH208 - a raw call is meant


@channel("own processes, Landlock, stage 2")
def proc_fd_outside(t: Targets) -> object:
    """Write to a pipe of a process of the same uid."""
    with _closing(os.open(f"/proc/{t['pid']}/fd/{t['outside_pipe']}", os.O_WRONLY)) as end:
        return os.write(end, mark(t, "proc_fd_outside"))


@channel("stage 1, own processes")
def pidfd_getfd_outside(t: Targets) -> object:
    """Take a connected socket from a process of the same uid."""
    with (
        _closing(linux.call("pidfd_open", t["pid"], 0)) as handle,
        _closing(linux.call("pidfd_getfd", handle, t["outside_socket"], 0)) as taken,
    ):
        return os.write(taken, mark(t, "pidfd_getfd_outside"))


@channel("stage 1, own processes")
def setns_outside(t: Targets) -> object:
    """Enter the network namespace of a process outside."""
    with _closing(os.open(f"/proc/{t['pid']}/ns/net", os.O_RDONLY)) as end:
        return linux.call("setns", end, linux.CLONE_NEWNET)


@channel("own processes, Landlock, stage 2")
def signal_outside(t: Targets) -> object:
    """Signal a process of the same uid: a bit a signal."""
    os.kill(t["pid"], signal.SIGCONT)
    return "sent"


@channel("stage 1")
def new_user_namespace(t: Targets) -> object:
    """Make a user namespace, whose capabilities open rare kernel code."""
    del t
    return _in_child(lambda: linux.call("unshare", linux.CLONE_NEWUSER | linux.CLONE_NEWNET))


# -- files ----------------------------------------------------------------------------------------


@channel("own root, Landlock, stage 2")
def write_shared_dir(t: Targets) -> object:
    """Leave a file in a folder that others read."""
    path = f"{t['shared']}/{t['token']}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    return "written"


@channel("own root, Landlock, stage 2")
def read_file(t: Targets) -> object:
    """Read a file of the user that is not an input."""
    with _closing(os.open(t["secret"], os.O_RDONLY)) as end:
        return len(os.read(end, 100))


@channel("own root, Landlock, stage 2")
def sysctl_core_pattern(t: Targets) -> object:
    """Open the program that the kernel starts for core dumps."""
    del t
    os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    return "opened"


@channel("own root, Landlock, stage 2")
def devices(t: Targets) -> object:
    """Open tunnels, the hypervisor's socket, memory, disks and consoles."""
    del t
    opened, last = [], OSError(errno.ENOENT, "")
    for path in ("/dev/net/tun", "/dev/vsock", "/dev/mem", "/dev/vda", "/dev/kmsg", "/dev/ptmx"):
        try:
            os.close(os.open(path, os.O_RDWR))
            opened.append(path)
        except OSError as error:
            last = error
    if not opened:
        raise last
    return opened


@channel("own root, stage 2")
def tiocsti(t: Targets) -> object:
    """Type into the controlling terminal."""
    del t
    with _closing(os.open("/dev/tty", os.O_RDWR)) as end:
        return fcntl.ioctl(end, 0x5412, b" ")


# -- new programs ---------------------------------------------------------------------------------


@channel("stage 1")
def fork(t: Targets) -> object:
    """Make a process."""
    del t
    return _in_child(lambda: 0)


@channel("Landlock, stage 2; else inherits")
def exec(t: Targets) -> object:  # noqa: A001 - the channel's name
    """Start another program.

    One argument is longer than the kernel takes: E2BIG says that all checks before it passed, and
    this process goes on.
    """
    return _too_big(lambda: os.execve(t["program"], ["x" * (1 << 18)], {}))  # noqa: S606


@channel("stage 2; else inherits the seal")
def memfd_exec(t: Targets) -> object:
    """Start a program that lies in memory alone; see `exec`."""
    empty, nothing = ctypes.c_char_p(b""), ctypes.c_void_p(0)
    argv = (ctypes.c_char_p * 2)(b"x" * (1 << 18), None)
    with _closing(linux.call("memfd_create", ctypes.c_char_p(b"x"), 0)) as image:
        os.write(image, f"#!{t['program']}\n".encode())
        return _too_big(lambda: linux.call("execveat", image, empty, argv, nothing, 0x1000))


# -- the kernel as a helper -----------------------------------------------------------------------


@channel("stage 1")
def keyctl_add_key(t: Targets) -> object:
    """Leave a key in the user's keyring."""
    del t
    return linux.call(
        "add_key", ctypes.c_char_p(b"user"), ctypes.c_char_p(b"egressprobe"), b"token", 5, -3
    )


@channel("stage 1, own queues")
def sysv_shm_outside(t: Targets) -> object:
    """Attach shared memory that a process outside made."""
    return linux.call("shmget", t["shm_key"], 4096, 0)


@channel("stage 1, own queues")
def posix_mq_outside(t: Targets) -> object:
    """Open a message queue that a process outside made."""
    with _closing(linux.call("mq_open", ctypes.c_char_p(t["queue"].encode()), 1, 0, 0)):
        return "opened"


@channel("stage 1")
def bpf(t: Targets) -> object:
    """Make a BPF map."""
    del t
    attribute = ctypes.create_string_buffer(struct.pack("<IIII", 2, 4, 4, 1), 120)
    with _closing(linux.call("bpf", 0, attribute, 120)):
        return "made"


@channel("stage 1")
def perf_event_open(t: Targets) -> object:
    """Open a performance counter."""
    del t
    attribute = ctypes.create_string_buffer(struct.pack("<IIQ", 1, 112, 0), 112)
    with _closing(linux.call("perf_event_open", attribute, 0, -1, -1, 0)):
        return "opened"


@channel("stage 1")
def unknown_call(t: Targets) -> object:
    """Make a system call above the highest reviewed number."""
    del t
    return linux.call_number(500)


def prepare_foreign_socket() -> Callable[[], int]:
    """Return a function that makes a socket by the i386 system call gate: a descriptor or -errno.

    The gate has its own numbers, which no filter of ours reads: under a seal the process is killed.
    The executable page is made here, because stage 2 allows none.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    page = libc.mmap(0x10000000, 8192, 7, 0x32, -1, 0)  # low: the gate takes 32-bit addresses
    arguments = struct.pack("<III", socket.AF_INET, socket.SOCK_STREAM, 0)
    code = b"\x53\xb8" + struct.pack("<I", 102)  # push rbx; mov eax, socketcall
    code += b"\xbb" + struct.pack("<I", 1) + b"\xb9" + struct.pack("<I", 0x10001000)
    code += b"\xcd\x80\x5b\xc3"  # int 0x80; pop rbx; ret
    ctypes.memmove(page, code, len(code))
    ctypes.memmove(page + 4096, arguments, len(arguments))
    return ctypes.CFUNCTYPE(ctypes.c_int)(page)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    """Close a raw descriptor again: a twin with open descriptors is refused before stage 2."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _in_child(action: Callable[[], int]) -> str:
    """Run `action` in a child where one can be made, else here: a denial changes nothing."""
    child = os.fork()
    if not child:
        try:
            action()
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(abs(status), os.strerror(abs(status)))
    return "child ran"


def _too_big(start: Callable[[], object]) -> str:
    try:
        start()
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
    return "would start"

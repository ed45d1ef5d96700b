"""Landlock: file rules, network and scopes where the kernel has them (docs/design/enclave.md, 3).

Never the network layer: MPTCP, TCP Fast Open, UDP and Unix paths pass it. It is the second layer
for files (the first on rung B), and it counts only after a forbidden open, a forbidden connect and
a forbidden signal have failed in this very process; return codes prove nothing. Stdlib only.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import os
import stat
import struct

from airgap.enclave import linux

TYPE_CHECKING = (
    False  # the launcher has no use for the `typing` module; type checkers know this name
)
if TYPE_CHECKING:
    from collections.abc import Sequence

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

# All file rights that an ABI knows: each is handled, so each is denied by default.
_HANDLED = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    4: (1 << 15) - 1,
    5: (1 << 16) - 1,
}
_HIGHEST = 5  # later ABIs add no file right that this build has reviewed
_TCP_ABI, _SCOPE_ABI = 4, 6
_TCP, _SCOPES = 0b11, 0b11  # bind and connect; abstract Unix sockets and signals

READ = _READ_FILE | _READ_DIR
EXECUTE = _READ_FILE | _EXECUTE
DEVICE = _READ_FILE | _WRITE_FILE
GPU = DEVICE | _IOCTL_DEV  # from ABI 5 on; before, Landlock does not see ioctl
PROC = READ | _WRITE_FILE  # a /proc of its own, or its own threads in it
# A program may make and remove plain files and folders; no sockets, FIFOs, devices or links.
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE

_CREATE_VERSION = 1
_RULE_PATH_BENEATH = 1


class LandlockError(Exception):
    """A rule set could not be built, or it is in force and does not deny."""


def reported_abi() -> int:
    """Return the ABI that the kernel reports, 0 for none. Some report more than they do."""
    try:
        return linux.call("landlock_create_ruleset", 0, 0, _CREATE_VERSION)
    except OSError:
        return 0


def handled(abi: int) -> tuple[int, int, int]:
    """Return the masks (files, network, scopes) that a rule set of this ABI handles."""
    files = _HANDLED[min(abi, _HIGHEST)]
    return files, _TCP if abi >= _TCP_ABI else 0, _SCOPES if abi >= _SCOPE_ABI else 0


def attribute(abi: int) -> bytes:
    """Return `struct landlock_ruleset_attr` in the length that this ABI knows."""
    whole = struct.pack("<QQQ", *handled(abi))
    return whole[: 8 if abi < _TCP_ABI else 16 if abi < _SCOPE_ABI else 24]


def rights(wanted: int, abi: int, *, folder: bool) -> int:
    """Cut `wanted` to what the ABI handles and what makes sense on a file."""
    return wanted & handled(abi)[0] & (-1 if folder else _ON_FILES)


def restrict(rules: Sequence[tuple[str, int]], abi: int) -> None:
    """Deny every file right except `rules` (path, rights) to this process, which has one thread.

    Raises:
        LandlockError: The kernel refused any part; nothing is taken as good enough.

    """
    content = attribute(abi)
    try:
        buffer = ctypes.create_string_buffer(content, len(content))
        ruleset = linux.call("landlock_create_ruleset", buffer, len(content), 0)
        try:
            for path, wanted in rules:
                _allow(ruleset, path, wanted, abi)
            linux.call("landlock_restrict_self", ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError as error:
        raise LandlockError(f"{error.strerror} ({error.filename or 'rule set'})") from error


def _allow(ruleset: int, path: str, wanted: int, abi: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack("<Qi", rights(wanted, abi, folder=folder), descriptor)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        linux.call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, buffer, 0)
    finally:
        os.close(descriptor)


# -- behaviour ------------------------------------------------------------------------------------


def can_open(path: str, flags: int = os.O_RDONLY) -> bool:
    """Say whether `path` opens; True also for any failure that is not a denial.

    A read-only mount answers a write before Landlock does. A program that runs does not tell:
    its owner gets ETXTBSY before either is asked.
    """
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in {errno.EACCES, errno.EROFS}
    return True


def verify_behaviour(abi: int, *, readable: str, outside: int | None) -> None:
    """Try what the rules forbid, in the process they bind.

    Args:
        abi: The ABI that was asked for.
        readable: A file that the rules let this process read, and that must not open for writing;
            no program that runs (`can_open`).
        outside: A process outside the seal that a signal could reach, None where there is none.

    Raises:
        LandlockError: Something forbidden worked.

    """
    if can_open("/", os.O_RDONLY | os.O_DIRECTORY):
        raise LandlockError("the root folder opens although no rule allows it")
    if can_open(readable, os.O_WRONLY):
        raise LandlockError(f"{readable} opens for writing although it is read-only")
    if abi >= _TCP_ABI:
        _verify_tcp()
    if abi >= _SCOPE_ABI and outside is not None:
        try:
            os.kill(outside, 0)
        except OSError as error:
            if error.errno == errno.EPERM:
                return
        raise LandlockError("a process outside the seal can be signalled")


def _verify_tcp() -> None:
    """Connect to the discard port of this host; Landlock answers before any packet exists."""
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    answer = probe.connect_ex(("127.0.0.1", 9))
    probe.close()
    if answer != errno.EACCES:
        found = errno.errorcode.get(answer, "success")
        raise LandlockError(f"a TCP connect answered {found}, expected EACCES")

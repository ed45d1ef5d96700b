"""Signed heads: C2SP signed-note, tlog-checkpoint and vkeys (docs/design/audit.md, 2 and 5).

A checkpoint is three lines (origin, size, base64 root) and at least one signature line. Parsing
believes nothing; `verify_checkpoint` returns a `Head`, the type of what a known key has signed.
Signatures of unknown keys are ignored, a bad one of a known key rejects the whole note. A log that
has changed its key has a ring of verifier keys; which of them may sign which size is the affair of
`epochs`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from airgap.audit.disk import Disk, open_plain
from policy.errors import FaultError, RefusedError

if TYPE_CHECKING:
    from airgap.audit.token_key import TokenKey

MAX_NOTE: Final = 131_072  # 16 signatures of 5 kB must pass, says signed-note
MAX_SIGNATURES: Final = 24
MAX_KEY_FILE: Final = 16_384
HASH_BYTES: Final = 32
_MAX_SIZE: Final = 2**53 - 1
ED25519: Final = 1  # types of signature in C2SP signed-note
COSIGNATURE: Final = 4
MAX_RING: Final = 64
TOKEN: Final = b"pkcs11:"  # a key file that names a key in a token begins so
_EM_DASH: Final = "\u2014"
_SIZE: Final = re.compile("0|[1-9][0-9]{0,15}")
_NAME: Final = re.compile(r"[^\s+\x00-\x20\x7f]{1,200}")
_SITE: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Vkey:
    """A verifier key: `name` is the origin of the log, `key_id` four bytes."""

    name: str
    key_id: bytes
    public: Ed25519PublicKey
    kind: int = ED25519  # or COSIGNATURE, for a witness

    @classmethod
    def of(cls, name: str, public: Ed25519PublicKey, kind: int = ED25519) -> Self:
        """Bind a public key to a name."""
        return cls(name, _key_id(name, public.public_bytes_raw(), kind), public, kind)

    def __str__(self) -> str:
        body = bytes([self.kind]) + self.public.public_bytes_raw()
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(body).decode()}"


@dataclass(frozen=True, slots=True)
class Ring:
    """The verifier keys of one log, oldest first: one for each key that it has had."""

    keys: tuple[Vkey, ...]  # at least one, all of one name

    @property
    def name(self) -> str:
        """The origin of the log."""
        return self.keys[0].name

    @property
    def newest(self) -> Vkey:
        """The key that signs now, as far as this ring knows."""
        return self.keys[-1]

    def __str__(self) -> str:
        return "".join(f"{key}\n" for key in self.keys)


Keys = Vkey | Ring


def ring_of(keys: Keys) -> Ring:
    """Return a ring of one key as it is, or a ring of a single key."""
    return keys if isinstance(keys, Ring) else Ring((keys,))


class Signer(Protocol):
    """An Ed25519 key in a file or in a token."""

    def sign(self, data: bytes, /) -> bytes:
        """Return the signature."""
        ...

    def public_key(self) -> Ed25519PublicKey:
        """Return the public half."""
        ...


@dataclass(frozen=True, slots=True)
class LogKey:
    """The private key of a log together with the verifier key that everyone may know."""

    vkey: Vkey
    private: Signer
    ring: Ring

    @classmethod
    def of(cls, origin: str, private: Signer, older: tuple[Vkey, ...] = ()) -> Self:
        """Bind a private key to an origin; `older` are the keys that the log had before."""
        vkey = Vkey.of(origin, private.public_key())
        return cls(vkey, private, Ring((*older, vkey)))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A parsed checkpoint that nobody has verified. `note` is the text it was parsed from."""

    origin: str
    size: int
    root: bytes
    text: bytes
    signatures: tuple[tuple[str, bytes], ...]  # (key name, key id and signature)
    note: str


@dataclass(frozen=True, slots=True)
class Head:
    """A head that the log key has signed: the first `size` leaves have this `root`."""

    origin: str
    size: int
    root: bytes
    note: str
    signers: tuple[bytes, ...] = ()  # key ids of known keys whose signature holds


def create_log_key(path: Path, *, site: str, token: TokenKey | None = None) -> str:
    """Make an Ed25519 log key at `path` (0400) and its vkey beside it (`.vkey`); return the vkey.

    With `token` the key is that one, and the file names it.

    The origin is `<site>/audit/<log id>`; the id is taken from the public key, so that another key
    is another log.

    Raises:
        RefusedError: `audit.key`; the site's name is unusable, or `path` exists.

    """
    if not _SITE.fullmatch(site):
        raise RefusedError(
            "audit.key",
            f"a site name has 1 to 64 of a-z 0-9 . -, found {site!r:.80}",
            hint="use `site_name` to turn an institution's name into one",
        )
    made = Ed25519PrivateKey.generate()
    private: Signer = made if token is None else token
    public = private.public_key().public_bytes_raw()
    origin = f"{site}/audit/{hashlib.sha256(public).hexdigest()[:16]}"
    key = LogKey.of(origin, private)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_new(vkey_path(path), str(key.ring).encode(), 0o444, shared=True)
    content = private_pem(made) if token is None else f"{token.uri}\n".encode()
    try:
        write_new(path, content, 0o400, shared=True)
    except BaseException:
        vkey_path(path).unlink()
        raise
    return str(key.vkey)


def private_pem(private: Ed25519PrivateKey) -> bytes:
    """Return a private key as PKCS#8, not encrypted."""
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def vkey_path(key: Path) -> Path:
    """Return where the public half of a log key lies."""
    return key.with_suffix(".vkey")


def site_name(text: str) -> str:
    """Return `text` as a site name: lower case, everything else turned into single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:64].strip("-.") or "site"


def load_log_key(path: Path) -> LogKey:
    """Read a log key and the verifier keys beside it, of which it is the newest.

    Raises:
        RefusedError: `audit.key`; not an Ed25519 key, open to others, or not the vkey's key.
        FaultError: `audit.key`; a file is missing or unreadable.

    """
    private = load_private(path)
    known = load_ring(vkey_path(path))
    key = LogKey.of(known.name, private, known.keys[:-1])
    if key.vkey.key_id != known.newest.key_id:
        raise RefusedError("audit.key", f"{path} is not the key of {vkey_path(path)}")
    return key


def load_private(path: Path) -> Signer:
    """Read an Ed25519 key that nobody but its owner can read, or open the one that a file names.

    Raises as `load_log_key`, and `trust.token`.
    """
    pem = _read_small(path)
    if path.stat().st_mode & 0o077:
        raise RefusedError(
            "audit.key",
            f"{path} can be read by others than its owner",
            hint=f"chmod 0400 {path}, and ask whether the key must be replaced",
        )
    if pem.startswith(TOKEN):
        from airgap.audit.token_key import open_reference  # noqa: PLC0415 - for those who have one

        return open_reference(path, pem)
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise RefusedError("audit.key", f"{path} is not a PEM private key") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise RefusedError("audit.key", f"{path} is not an Ed25519 key")
    return private


def load_vkey(path: Path) -> Vkey:
    """Read the newest vkey of a file; FaultError when unreadable, RefusedError when not one."""
    return load_ring(path).newest


def load_ring(path: Path) -> Ring:
    """Read a file of verifier keys, one a line; raises as `load_vkey`."""
    return parse_ring(_read_small(path))


def parse_ring(content: bytes) -> Ring:
    """Return the verifier keys of a log, one a line, oldest first; RefusedError `audit.key`."""
    lines = content.removesuffix(b"\n").split(b"\n")
    if len(lines) > MAX_RING:
        raise RefusedError("audit.key", f"more than {MAX_RING} verifier keys")
    keys = tuple(parse_vkey(line) for line in lines)
    if len({key.name for key in keys}) > 1 or len({key.key_id for key in keys}) < len(keys):
        raise RefusedError("audit.key", "verifier keys of several logs, or one key twice")
    return Ring(keys)


def parse_vkey(content: bytes, kind: int = ED25519) -> Vkey:
    """Return the verifier key of `<name>+<8 hex>+<base64 of type and key>`.

    Raises:
        RefusedError: `audit.key`.

    """
    if len(content) > MAX_KEY_FILE:
        raise RefusedError("audit.key", f"a verifier key of {len(content)} bytes")
    try:
        name, key_id, body = content.decode().removesuffix("\n").split("+", 2)
        raw = _strict_base64(body)
        public = Ed25519PublicKey.from_public_bytes(raw[1:])
        found = bytes.fromhex(key_id)
    except (ValueError, UnsupportedAlgorithm):
        raise RefusedError(
            "audit.key", "expected <name>+<key id>+<base64> with an Ed25519 key"
        ) from None
    good = _NAME.fullmatch(name) and raw[0] == kind
    if not good or key_id != found.hex() or found != _key_id(name, raw[1:], kind):
        raise RefusedError("audit.key", f"key name or key id of {name!r:.80} do not fit the key")
    return Vkey(name, found, public, kind)


def sign_checkpoint(key: LogKey, size: int, root: bytes, *, also: LogKey | None = None) -> Head:
    """Sign the head of `size` leaves; the next key signs the last head of an epoch `also`."""
    origin = key.vkey.name
    text = f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"
    note = f"{text}\n"
    signers = []
    for signer in (key,) if also is None else (key, also):
        note += signature_line(signer.vkey, signer.private.sign(text.encode()))
        signers.append(signer.vkey.key_id)
    return Head(origin, size, root, note, tuple(signers))


def signature_line(vkey: Vkey, signature: bytes) -> str:
    """Return the line of a signature (for a cosignature: with its time) below a note."""
    return f"{_EM_DASH} {vkey.name} {base64.b64encode(vkey.key_id + signature).decode()}\n"


def parse_checkpoint(content: bytes) -> Checkpoint:
    """Read a signed note that holds a checkpoint without extension lines.

    Raises:
        RefusedError: `audit.note`.

    """
    if len(content) > MAX_NOTE:
        raise _bad(f"{len(content)} bytes")
    try:
        note = content.decode()
    except UnicodeDecodeError:
        raise _bad("not UTF-8") from None
    if any(ch < " " and ch != "\n" for ch in note):
        raise _bad("a control character")
    text, blank, tail = note.rpartition("\n\n")
    lines = tail.split("\n")
    if not blank or len(lines) < 2 or lines.pop() or len(lines) > MAX_SIGNATURES:  # noqa: PLR2004
        raise _bad("expected a text, an empty line and signature lines, each ended by a newline")
    body = text.split("\n")
    if len(body) != 3:  # noqa: PLR2004 - origin, size, root
        raise _bad(f"expected the lines origin, size and root, found {len(body)} lines")
    origin, size, root = body
    if not _NAME.fullmatch(origin):
        raise _bad(f"origin {origin!r:.80}")
    if not _SIZE.fullmatch(size) or int(size) > _MAX_SIZE:
        raise _bad(f"size {size!r:.40}")
    try:
        raw = _strict_base64(root)
        signatures = tuple(_parse_signature(line) for line in lines)
    except ValueError as error:
        raise _bad(f"{error!s:.80}") from None
    if len(raw) != HASH_BYTES:
        raise _bad(f"a root of {len(raw)} bytes")
    return Checkpoint(origin, int(size), raw, f"{text}\n".encode(), signatures, note)


def is_torn(content: bytes) -> bool:
    """Whether a file that held a note may have been cut short or emptied by a crash."""
    return not content.strip(b"\0") or not content.endswith(b"\n")


def verify_checkpoint(checkpoint: Checkpoint, keys: Keys) -> Head:
    """Return the head if a known key signed it and the origin is the keys' name.

    Whether that key may sign a head of this size is not asked here: see `epochs`.

    Raises:
        RefusedError: `audit.note`; another origin, no signature by a key, or one that is bad.

    """
    known = {key.key_id: key for key in ring_of(keys).keys}
    origin = ring_of(keys).name
    if checkpoint.origin != origin:
        raise _bad(f"origin {checkpoint.origin!r:.80}, expected {origin!r:.80}")
    signers = []
    for name, blob in checkpoint.signatures:
        key = known.get(blob[:4])
        if key is None or name != key.name:
            continue  # Of a key that we do not know: says nothing, for or against.
        try:
            key.public.verify(blob[4:], checkpoint.text)
        except InvalidSignature:
            raise _bad(f"the signature of key {key.key_id.hex()} does not hold") from None
        signers.append(key.key_id)
    if not signers:
        ids = sorted({blob[:4].hex() for _, blob in checkpoint.signatures})
        expected = ", ".join(sorted(key.hex() for key in known))
        raise _bad(f"no signature by key {expected:.60}; signed by {', '.join(ids):.80}")
    return Head(
        checkpoint.origin, checkpoint.size, checkpoint.root, checkpoint.note, tuple(signers)
    )


def unsigned_checkpoint(origin: str, size: str, root: str) -> Checkpoint:
    """Return a head that somebody wrote down, without any signature; RefusedError `audit.note`."""
    try:
        raw = strict_hash(root)
    except ValueError as error:
        raise _bad(f"{error!s:.80}") from None
    text = f"{origin}\n{size}\n{root}\n"
    return Checkpoint(origin, int(size), raw, text.encode(), (), f"{text}\n")


def strict_hash(text: str) -> bytes:
    """Return the 32 bytes of a base64 hash; ValueError for anything but its one spelling."""
    raw = _strict_base64(text)
    if len(raw) != HASH_BYTES:
        raise ValueError("not a hash of 32 bytes")
    return raw


def _parse_signature(line: str) -> tuple[str, bytes]:
    dash, name, blob = [*line.split(" "), "", ""][:3]
    if dash != _EM_DASH or line.count(" ") != 2 or not _NAME.fullmatch(name):  # noqa: PLR2004
        raise ValueError("a signature line is malformed")
    raw = _strict_base64(blob)
    if len(raw) <= 4:  # noqa: PLR2004 - the key id alone
        raise ValueError("a signature is too short")
    return name, raw


def _strict_base64(text: str) -> bytes:
    """Decode the one canonical spelling, so that a note has no second form."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
    if base64.b64encode(raw).decode() != text:
        raise ValueError("not canonical base64")
    return raw


def _key_id(name: str, public: bytes, kind: int) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:4]


def write_new(path: Path, content: bytes, mode: int, *, shared: bool = False) -> None:
    """Write a key file durably; RefusedError `audit.key` when it exists.

    A key of the log's owner is `shared`: root writes it for the account that the folder belongs to.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = Disk().open(path, flags, mode) if shared else os.open(path, flags, mode)
    except FileExistsError:
        raise RefusedError(
            "audit.key", f"{path} exists", hint="a log keeps its key; choose another path"
        ) from None
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(content)
            file.flush()
            os.fsync(fd)
    except BaseException:
        path.unlink()  # half a file would be in the way of the next attempt
        raise


def _read_small(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            content = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise FaultError(
            "audit.key", f"cannot read {path}: {error.strerror}", hint="check path and owner"
        ) from error
    if len(content) > MAX_KEY_FILE:
        raise RefusedError("audit.key", f"{path} is larger than {MAX_KEY_FILE} bytes")
    return content


def _bad(message: str) -> RefusedError:
    return RefusedError("audit.note", f"checkpoint: {message}")

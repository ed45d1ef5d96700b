"""Transit encryption: a file in any form, opened only by those it is for; FORMAT.md section 16.

The seal covers the plain bytes, so this layer needs no signature: it keeps the content from who
finds the medium, and lets nobody cut, move or exchange a block unseen. The key of the content is
random, wrapped for each recipient by HPKE (RFC 9180) with a hybrid of ML-KEM and a classical curve,
and committed to, since AES-GCM alone lets one cipher text open under two keys.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, ValidationError

from bundle.archive import Progress
from bundle.canonical import canonical_json, parse_canonical
from bundle.durable import write_new
from bundle.fields import Count, Document, KeyId, Name, Sha256Hex
from bundle.keys import decode_base64, encode_base64, read_private
from bundle.manifest import first_problem
from bundle.source import Source, read_exactly
from bundle.tar import Layout, read_document, require_layout
from bundle.write import fresh_file
from policy.errors import RefusedError

TRANSIT = "META/transit.json"
CONTENT = "TRANSIT/content.bin"
FORMAT: Literal["airgap-transit/1"] = "airgap-transit/1"
KEY_FORMAT: Literal["airgap-transit-key/1"] = "airgap-transit-key/1"
HEADER_LIMIT = 1024 * 1024
KEY_LIMIT = 64 * 1024
MAX_RECIPIENTS = 64
CHUNK = 4 * 1024 * 1024
TAG = 16
_KEPT = 8  # blocks in plain that are kept for the next reader
_PEM = re.compile(rb"-----BEGIN [A-Z ]+-----\n[^-]+-----END [A-Z ]+-----\n")
_SECRET_INFO = b"airgap-transit/1 "

Scheme = Literal["mlkem768-x25519", "mlkem1024-p384"]
SCHEMES: dict[str, Scheme] = {"default": "mlkem768-x25519", "cnsa2": "mlkem1024-p384"}


class TransitKey(Document):
    """`NAME.transit.pub.json`: what a receiver hands to whoever encrypts for her."""

    format: Literal["airgap-transit-key/1"] = KEY_FORMAT
    keyid: KeyId
    name: Name
    public: Annotated[str, Field(max_length=8192)]
    scheme: Scheme

    def to_bytes(self) -> bytes:
        """Return the canonical form and a newline."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"


class Recipient(Document):
    """The content key, wrapped for one transit key."""

    keyid: KeyId
    scheme: Scheme
    wrapped: Annotated[str, Field(max_length=4096)]


class TransitHeader(Document):
    """`META/transit.json`: `size` is that of the plain file, `id` makes keys and blocks unique."""

    format: Literal["airgap-transit/1"] = FORMAT
    id: Sha256Hex
    size: Count
    chunk: Literal[4194304] = 4194304
    commitment: Sha256Hex
    recipients: Annotated[tuple[Recipient, ...], Field(min_length=1, max_length=MAX_RECIPIENTS)]

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return -(-self.size // CHUNK)

    def layout(self) -> Layout:
        """Return the whole file."""
        size = self.size + TAG * self.count
        return Layout([(TRANSIT, len(self.to_bytes())), (CONTENT, size)])


@dataclass(frozen=True, slots=True)
class Identity:
    """A private transit key."""

    scheme: Scheme
    keyid: str
    _private: Any  # of `cryptography.hazmat.primitives.hpke`, whose key types share no base

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes | None:
        """Return the content key, None when it was not wrapped for this key."""
        try:
            return _suite(self.scheme).decrypt(wrapped, self._private, info=info)
        except (InvalidTag, ValueError):
            return None


class TransitFile:
    """The plain bytes of an encrypted file; each block is authentic, and still to be verified.

    Raises:
        RefusedError: `archive.*`, `transit.malformed`; `transit.key`, no identity opens it.

    """

    def __init__(self, source: Source, identities: Sequence[Identity]) -> None:
        self._source = source
        self.header = parse_header(read_document(source, 0, TRANSIT, HEADER_LIMIT))
        layout = self.header.layout()
        require_layout(source, 0, layout)
        self.path = source.path
        self.size = self.header.size
        self._start = layout.offsets[1]
        self._binding = hashlib.sha256(self.header.to_bytes()).digest()
        self._cipher = AESGCM(_block_key(self._open(identities), self.header))
        self._lock = threading.Lock()
        self._plain: OrderedDict[int, bytes] = OrderedDict()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Decrypt what lies there: RefusedError `transit.tag` when a block is not authentic."""
        if offset + len(buffer) > self.size:
            raise RefusedError("archive.truncated", f"{self.path} ends at byte {self.size:,}")
        filled = 0
        while filled < len(buffer):
            index, within = divmod(offset + filled, CHUNK)
            block = self._block(index)
            part = block[within : within + len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            filled += len(part)

    def block(self, index: int) -> bytes:
        """Return one block in plain."""
        length = min(CHUNK, self.size - index * CHUNK) + TAG
        raw = read_exactly(self._source, self._start + index * (CHUNK + TAG), length)
        try:
            return self._cipher.decrypt(
                _nonce(index), raw, _bound(self._binding, index, self.header.count)
            )
        except InvalidTag as error:
            raise RefusedError(
                "transit.tag",
                f"block {index} of {self.header.count} of {self.path.name!r:.100} is not the one "
                "that was encrypted there",
                hint="copy it again from the medium; if it stays, the medium was altered",
            ) from error

    def map(self) -> memoryview | None:
        """Return nothing: the plain bytes lie nowhere."""
        return None

    def close(self) -> None:
        """Close the file and forget what was opened."""
        self._source.close()
        self._plain.clear()

    def _block(self, index: int) -> memoryview:
        """Return a block; neighbours are asked for by more than one reader."""
        with self._lock:
            known = self._plain.get(index)
        if known is None:
            known = self.block(index)
            with self._lock:
                self._plain[index] = known
                while len(self._plain) > _KEPT:
                    self._plain.popitem(last=False)
        return memoryview(known)

    def _open(self, identities: Sequence[Identity]) -> bytes:
        """Return the content key if one of the identities is a recipient's."""
        by_id = {recipient.keyid: recipient for recipient in self.header.recipients}
        info = _wrap_info(self.header.id, self.header.size)
        for identity in identities:
            recipient = by_id.get(identity.keyid)
            if recipient is None or recipient.scheme != identity.scheme:
                continue
            key = identity.unwrap(_base64(recipient.wrapped), info)
            if key is not None and hmac.compare_digest(
                _derive(key, self.header.id, b"commitment").hex(), self.header.commitment
            ):
                return key
        known = ", ".join(keyid[:16] for keyid in by_id)
        raise RefusedError(
            "transit.key",
            f"{self.path.name!r:.100} is encrypted for {known}; "
            f"{len(identities)} keys were given and none opens it",
            hint="add --transit-key KEYFILE of a recipient",
        )


def encrypt_file(
    source: Source,
    out: Path,
    recipients: Sequence[TransitKey],
    *,
    progress: Progress | None = None,
    random: Callable[[int], bytes] = os.urandom,
) -> TransitHeader:
    """Encrypt a file for `recipients`.

    Args:
        source: The plain file, in any form.
        out: Replaced if it exists.
        recipients: One or more, of one or several schemes.
        progress: Told plain bytes.
        random: Gives the id and the content key.

    Raises:
        RefusedError: `transit.key`, no recipient or one twice; FaultError `host.*`.

    """
    keyids = sorted(recipient.keyid for recipient in recipients)
    if not recipients or len(set(keyids)) != len(keyids) or len(keyids) > MAX_RECIPIENTS:
        raise RefusedError(
            "transit.key",
            f"{len(keyids)} recipients; 1 to {MAX_RECIPIENTS} are needed, each once",
            hint="add --to NAME.transit.pub.json",
        )
    identity, key = random(32).hex(), random(32)
    info = _wrap_info(identity, source.size)
    wrapped = [
        Recipient(keyid=r.keyid, scheme=r.scheme, wrapped=encode_base64(_wrap(r, key, info)))
        for r in sorted(recipients, key=lambda r: r.keyid)
    ]
    header = TransitHeader(
        id=identity,
        size=source.size,
        commitment=_derive(key, identity, b"commitment").hex(),
        recipients=tuple(wrapped),
    )
    raw, layout = header.to_bytes(), header.layout()
    cipher, binding = AESGCM(_block_key(key, header)), hashlib.sha256(raw).digest()

    def seal(index: int) -> bytes:
        plain = read_exactly(source, index * CHUNK, min(CHUNK, source.size - index * CHUNK))
        return cipher.encrypt(_nonce(index), plain, _bound(binding, index, header.count))

    with fresh_file(out, layout.size) as stream:
        stream.write(layout.gap(0) + raw + layout.gap(1))
        for index, block in enumerate(_ordered(seal, header.count)):
            stream.write(block)
            if progress is not None:
                progress(min(source.size, (index + 1) * CHUNK), source.size)
        stream.write(layout.gap(2))
    return header


def decrypt_file(file: TransitFile, out: Path, progress: Progress | None = None) -> None:
    """Write the plain file; nothing is left under its name or beside it if a block is refused.

    Raises:
        RefusedError: `transit.tag`; FaultError `host.*`.

    """
    with fresh_file(out, file.size) as stream:
        for index, block in enumerate(_ordered(file.block, file.header.count)):
            stream.write(block)
            if progress is not None:
                progress(min(file.size, (index + 1) * CHUNK), file.size)


# -- keys -------------------------------------------------------------------------------------


def new_transit_key(
    folder: Path, name: str, *, profile: str = "default", passphrase: bytes = b""
) -> TransitKey:
    """Make `NAME.transit.pem` (mode 0600) and `NAME.transit.pub.json`.

    Raises:
        RefusedError: `trust.keyfile`; one of them exists, or the name is not allowed.

    """
    parts = _generate(SCHEMES[profile])
    public = _public_bytes(SCHEMES[profile], parts)
    try:
        document = TransitKey(
            keyid=_keyid(SCHEMES[profile], public),
            name=name,
            public=encode_base64(public),
            scheme=SCHEMES[profile],
        )
    except ValidationError as error:
        raise RefusedError(
            "trust.keyfile", f"a key cannot be made: {first_problem(error)}"
        ) from error
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = b"".join(
        part.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        for part in parts
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, shown = folder / f"{name}.transit.pem", folder / f"{name}.transit.pub.json"
    if secret.exists() or shown.exists():
        raise RefusedError(
            "trust.keyfile",
            f"{secret} or {shown.name} exists; a key is never overwritten",
            hint="choose another name, or move the old key away",
        )
    write_new(secret, pem, 0o600)
    try:
        write_new(shown, document.to_bytes(), 0o644)
    except BaseException:
        secret.unlink()  # half a pair would be in the way of the next attempt
        raise
    return document


def load_identity(path: Path, passphrase: bytes = b"") -> Identity:
    """Read a private transit key.

    Raises:
        RefusedError: `trust.keyfile`; others can read it, it is no such key, or the passphrase is
            missing or wrong.
        FaultError: `host.io`; it cannot be read.

    """
    raw = read_private(path, KEY_LIMIT, what="the transit key")
    try:
        parts = [
            serialization.load_pem_private_key(block, passphrase or None)
            for block in _PEM.findall(raw)
        ]
        scheme = _scheme_of(parts)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError(
            "trust.keyfile",
            f"{path} is not a transit key that this passphrase opens",
            hint="give the NAME.transit.pem that `airgap keys transit NAME` made",
        ) from error
    return Identity(scheme, _keyid(scheme, _public_bytes(scheme, parts)), _joined(scheme, parts))


def parse_transit_key(raw: bytes) -> TransitKey:
    """Turn the bytes of a `NAME.transit.pub.json` into a key: RefusedError `transit.key`."""
    body = raw.removesuffix(b"\n")
    parse_canonical(body, code="transit.key", what="the transit key", limit=KEY_LIMIT)
    try:
        key = TransitKey.model_validate_json(body)
        public = decode_base64(key.public)
        _public_key(key.scheme, public)
    except ValidationError as error:
        raise RefusedError("transit.key", f"the transit key: {first_problem(error)}") from error
    except ValueError as error:
        raise RefusedError("transit.key", f"the transit key: {error!s:.120}") from error
    if _keyid(key.scheme, public) != key.keyid:
        raise RefusedError("transit.key", "the transit key bears the id of another key")
    return key


def parse_header(raw: bytes) -> TransitHeader:
    """Turn untrusted bytes into a header: RefusedError `transit.malformed`."""
    parse_canonical(raw, code="transit.malformed", what=TRANSIT, limit=HEADER_LIMIT)
    try:
        header = TransitHeader.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("transit.malformed", f"{TRANSIT}: {first_problem(error)}") from error
    keyids = [recipient.keyid for recipient in header.recipients]
    if header.to_bytes() != raw or keyids != sorted(set(keyids)):
        raise RefusedError("transit.malformed", f"{TRANSIT} writes a field in another form")
    return header


# -- helpers ----------------------------------------------------------------------------------


def _ordered(work: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    """Yield `work(0)` to `work(count - 1)` in order, computed on all cores, few at a time."""
    workers = min(8, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="transit")
    try:
        pending: deque[Future[bytes]] = deque()
        for index in range(count):
            pending.append(pool.submit(work, index))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _derive(key: bytes, identity: str, purpose: bytes) -> bytes:
    return HKDF(
        hashes.SHA384(), 32, salt=bytes.fromhex(identity), info=_SECRET_INFO + purpose
    ).derive(key)


def _block_key(key: bytes, header: TransitHeader) -> bytes:
    return _derive(key, header.id, b"block")


def _wrap_info(identity: str, size: int) -> bytes:
    return _SECRET_INFO + b"wrap" + bytes.fromhex(identity) + struct.pack(">Q", size)


def _nonce(index: int) -> bytes:
    return struct.pack(">IQ", 0, index)


def _bound(binding: bytes, index: int, count: int) -> bytes:
    """Return what is authenticated with a block: the header, its place, the number, the last."""
    return _SECRET_INFO + binding + struct.pack(">QQB", index, count, index == count - 1)


def _suite(scheme: Scheme) -> hpke.Suite:
    kem = {
        "mlkem768-x25519": hpke.KEM.MLKEM768_X25519,
        "mlkem1024-p384": hpke.KEM.MLKEM1024_P384,
    }[scheme]
    return hpke.Suite(kem, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)


def _wrap(recipient: TransitKey, key: bytes, info: bytes) -> bytes:
    public = _public_key(recipient.scheme, decode_base64(recipient.public))
    return _suite(recipient.scheme).encrypt(key, public, info=info)


def _generate(scheme: Scheme) -> list[Any]:
    if scheme == "mlkem768-x25519":
        return [mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()]
    return [mlkem.MLKEM1024PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())]


def _scheme_of(parts: Sequence[Any]) -> Scheme:
    first, second = parts
    if isinstance(first, mlkem.MLKEM768PrivateKey) and isinstance(second, x25519.X25519PrivateKey):
        return "mlkem768-x25519"
    if (
        isinstance(first, mlkem.MLKEM1024PrivateKey)
        and isinstance(second, ec.EllipticCurvePrivateKey)
        and isinstance(second.curve, ec.SECP384R1)
    ):
        return "mlkem1024-p384"
    raise ValueError("no pair of keys of one scheme")


def _joined(scheme: Scheme, parts: Sequence[Any]) -> Any:
    kind = {
        "mlkem768-x25519": hpke.MLKEM768X25519PrivateKey,
        "mlkem1024-p384": hpke.MLKEM1024P384PrivateKey,
    }[scheme]
    return kind(parts[0], parts[1])


def _public_bytes(scheme: Scheme, parts: Sequence[Any]) -> bytes:
    """Return the public key: that of ML-KEM, then the point."""
    first: bytes = parts[0].public_key().public_bytes_raw()
    if scheme == "mlkem768-x25519":
        return first + bytes(parts[1].public_key().public_bytes_raw())
    return first + bytes(
        parts[1]
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )


def _public_key(scheme: Scheme, raw: bytes) -> Any:
    """Return the key of these bytes; ValueError for others."""
    cut = {"mlkem768-x25519": 1184, "mlkem1024-p384": 1568}[scheme]
    if scheme == "mlkem768-x25519":
        return hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(raw[:cut]),
            x25519.X25519PublicKey.from_public_bytes(raw[cut:]),
        )
    return hpke.MLKEM1024P384PublicKey(
        mlkem.MLKEM1024PublicKey.from_public_bytes(raw[:cut]),
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), raw[cut:]),
    )


def _keyid(scheme: Scheme, public: bytes) -> str:
    return hashlib.sha256(scheme.encode() + b"\0" + public).hexdigest()


def _base64(text: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError as error:
        raise RefusedError("transit.malformed", f"{TRANSIT}: {error!s:.120}") from error

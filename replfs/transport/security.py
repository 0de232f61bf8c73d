"""Who may connect: CURVE keys, the allow-list, and the ZAP handler that applies it.

A node has one key pair in a file only its owner can read, and an allow-list: one `NAME = PUBLIC`
a line, the public keys of the nodes it talks to. The listening side admits the keys in it, the
dialling side proves that it reached the owner of the key under the peer's name. Without keys a
node talks only over loopback and ipc, unless told to be insecure.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import stat
from collections import Counter
from typing import Final

import msgspec
import trio
import zmq
from zmq.utils import z85

from replfs.errors import UsageError
from replfs.transport.socket import Seldom

logger = logging.getLogger(__name__)

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_DOMAIN: Final = "replfs"
FILE_MAX: Final = 1 << 20
"""Bytes; a longer key file or allow-list is not one."""

_Z85: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z")
_LINE: Final = re.compile(r"(\S+)\s+=\s+(\S+)\s*\Z")
_ZAP_FRAMES: Final = 7
_KEY_BYTES: Final = 32


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair, each key 40 characters of Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def generate_keypair() -> KeyPair:
    """A new random key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def save_keypair(path: str, keys: KeyPair) -> None:
    """Write *keys* to a new file of mode 0600.

    Raises:
        UsageError: *path* exists already, or cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise UsageError(f"{path} exists already: move it away to make a new key") from error
    except OSError as error:
        raise UsageError(f"cannot write the key file {path}: {error.strerror}") from error
    with open(fd, "w", encoding="ascii") as file:
        os.fchmod(fd, 0o600)  # whatever the umask was
        file.write(
            f"# replfs key: keep it secret\npublic = {keys.public}\nsecret = {keys.secret}\n"
        )
        file.flush()
        os.fsync(fd)


def load_keypair(path: str) -> KeyPair:
    """Read a file written by `save_keypair`.

    Raises:
        UsageError: it is missing, damaged, or others than its owner can read it.
    """
    lines = _read_entries(path, secret=True)
    entries = dict(lines)
    if set(entries) != {"public", "secret"} or len(lines) != 2:
        raise UsageError(f"{path} is not a replfs key file: make one with 'replfs keygen'")
    keys = KeyPair(entries["public"], entries["secret"])
    if zmq.curve_public(keys.secret.encode()).decode() != keys.public:
        raise UsageError(f"{path} is damaged: its public key does not belong to its secret key")
    return keys


def _read_entries(path: str, *, secret: bool) -> list[tuple[str, str]]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    try:
        _require_private(path, os.fstat(fd), 0o077 if secret else 0o022)
    except UsageError:
        os.close(fd)
        raise
    with open(fd, encoding="ascii", errors="replace") as file:
        text = file.read(FILE_MAX + 1)
    if len(text) > FILE_MAX:
        raise UsageError(f"{path} is too long to be a key file")
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or not _Z85.match(match[2]):
            raise UsageError(f"{path}, line {number}: expected NAME = KEY, a key of 40 characters")
        entries.append((match[1], match[2]))
    return entries


def _require_private(path: str, info: os.stat_result, others: int) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"{path} is not a file")
    if info.st_uid not in (0, os.geteuid()):
        raise UsageError(f"{path} belongs to another user: give it to the user replfs runs as")
    if info.st_mode & others:
        raise UsageError(f"others have access to {path}: chmod {0o666 & ~others:o} it")


class AllowList:
    """The public keys of the nodes this one talks to; read again when the file changes.

    A node may have several keys while it gets a new one: any of them is its own.
    """

    def __init__(self, path: str) -> None:
        """Raises `UsageError` if the file cannot be used now."""
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[tuple[str, str]] = []
        self._refresh()

    def keys_of(self, name: str) -> list[str]:
        """The public keys of the node called *name*. Raises `UsageError` if there is none."""
        self._refresh()
        keys = [key for known, key in self._keys if known == name]
        if not keys:
            raise UsageError(f"{self._path} has no key for {name}: add a line '{name} = KEY'")
        return keys

    def name_of(self, key: str) -> str | None:
        """The node that *key* belongs to, None if it may not connect. Never raises."""
        try:
            self._refresh()
        except UsageError as error:
            logger.error("nobody new can connect: %s", error)
            return None
        return next((name for name, known in self._keys if known == key), None)

    def _refresh(self) -> None:
        try:
            info = os.stat(self._path)
        except OSError as error:
            raise UsageError(f"cannot read {self._path}: {error.strerror}") from error
        seen = (info.st_mtime_ns, info.st_size, info.st_ino)
        if seen != self._seen:
            self._keys = _read_entries(self._path, secret=False)
            self._seen = seen


class Curve:
    """What a link or a listener needs to be secure. None in its place means plain text.

    With *key_file*, another key in it is used by the connections that are made from then on. A
    listener keeps the one it began with.
    """

    def __init__(self, keys: KeyPair, allowed: AllowList, key_file: str | None = None) -> None:
        self.keys = keys
        self.allowed = allowed
        self._key_file = key_file
        self._failures: Counter[str] = Counter()

    def prepare_dialling(self, socket: zmq.Socket[bytes], peer: str) -> None:
        """Before connect. Raises `UsageError` if the key of *peer* is not known.

        Of several keys it is expected to have the same one as last time, until `failed`.
        """
        self._refresh()
        theirs = self.allowed.keys_of(peer)
        expected = theirs[self._failures[peer] % len(theirs)]
        socket.setsockopt(zmq.CURVE_SERVERKEY, expected.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret.encode())

    def failed(self, peer: str) -> None:
        """There was no answer, perhaps because the peer has another of its keys."""
        self._failures[peer] += 1

    def _refresh(self) -> None:
        if self._key_file is None:
            return
        try:
            keys = load_keypair(self._key_file)
        except UsageError as error:
            logger.error("going on with the key of before: %s", error)
            return
        if keys != self.keys:
            logger.info("%s has another key: it is used from now on", self._key_file)
            self.keys = keys

    def prepare_listening(self, socket: zmq.Socket[bytes]) -> None:
        """Before bind. Nobody can connect unless a `Zap` of the same context is running."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class Zap:
    """Answers libzmq's question whether a key may connect (RFC 27), one per context."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList) -> None:
        """Raises `zmq.ZMQError` if the context has one already."""
        self._allowed = allowed
        self._denials = Seldom()
        self.denied = 0
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(ZAP_ENDPOINT)
        except zmq.ZMQError:
            self._socket.close()
            raise

    async def run(self) -> None:
        """Serve until cancelled; closes the socket at the end."""
        fd = int(self._socket.getsockopt(zmq.FD))
        try:
            while True:
                while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    self._answer(self._socket.recv_multipart(zmq.NOBLOCK))
                await trio.lowlevel.wait_readable(fd)
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket; nobody new can connect from then on. Idempotent."""
        self._socket.close()

    def _answer(self, request: list[bytes]) -> None:
        name = None
        number = request[1] if len(request) > 1 else b""
        if len(request) == _ZAP_FRAMES and request[0] == b"1.0":
            _, _, domain, address, _, mechanism, key = request
            if domain == ZAP_DOMAIN.encode() and mechanism == b"CURVE" and len(key) == _KEY_BYTES:
                public = z85.encode(key).decode()
                name = self._allowed.name_of(public)
                if name is None:
                    self._deny(address.decode(errors="replace"), public)
        status = b"200" if name is not None else b"400"
        text = b"OK" if name is not None else b"not in the allow-list"
        user = (name or "").encode()
        self._socket.send_multipart([b"1.0", number, status, text, user, b""], zmq.NOBLOCK)

    def _deny(self, address: str, public: str) -> None:
        self.denied += 1
        held_back = self._denials.allow()
        if held_back is not None:
            logger.warning(
                "refused a connection from %s: the key %s is not in the allow-list (%d more)",
                address,
                public,
                held_back,
            )


def is_local(endpoint: str) -> bool:
    """Whether only processes of this machine can use *endpoint*."""
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_curve(endpoint: str, insecure: bool, security: Curve | None = None) -> None:
    """Refuse to talk in plain text to other machines.

    Raises:
        UsageError: *endpoint* is not local, there are no keys, and *insecure* is not set.
    """
    if security is None and not insecure and not is_local(endpoint):
        raise UsageError(
            f"{endpoint} is open to other machines: give keys (make them with 'replfs keygen'), "
            "or --insecure to go without"
        )

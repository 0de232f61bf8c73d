"""`replfs verify`: it names what differs and mends it, and says nothing of a healthy pair."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from helpers.nodes import Pair, wait_for
from helpers.tcp_proxy import TcpProxy

from replfs.cli.exit_codes import ExitCode

pytestmark = pytest.mark.mounted

MIB = 1 << 20


def verify(pair: Pair, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of `replfs verify`."""
    done = pair.mount.replfs("verify", pair.mountpoint, *arguments, check=False, timeout_s=150)
    return done.returncode, done.stdout + done.stderr


def assert_healthy(pair: Pair) -> str:
    code, printed = verify(pair)
    assert (code, "no differences" in printed) == (ExitCode.OK, True), printed
    return printed


@pytest.fixture
def filled():
    """A pair in sync with a small tree of everything."""
    with Pair() as pair:
        top = pair.mountpoint
        (top / "d/e").mkdir(parents=True)
        (top / "empty").touch()
        (top / "d/small").write_bytes(b"small")
        (top / "d/e/big").write_bytes(random.Random(1).randbytes(3 * MIB + 12345))
        (top / "d/link").symlink_to("small")
        os.link(top / "d/small", top / "d/e/hard")
        os.mkfifo(top / "fifo")
        os.setxattr(top / "d/small", "user.note", b"value")
        os.mkdir(top / "many")
        for number in range(1100):
            (top / f"many/{number}").touch()
        yield pair


def corrupt(pair: Pair) -> None:
    """Everything that can go wrong on a replica, behind the node's back."""
    there = pair.secondary_store
    with (there / "d/e/big").open("r+b") as file:
        file.seek(2 * MIB + 77)
        byte = file.read(1)
        file.seek(2 * MIB + 77)
        file.write(bytes([byte[0] ^ 1]))
    found = (pair.primary_store / "d/e/big").stat()
    os.utime(there / "d/e/big", ns=(found.st_atime_ns, found.st_mtime_ns))
    os.chmod(there / "d/small", 0o600)
    os.setxattr(there / "d/small", "user.note", b"other")
    os.chown(there / "fifo", 7, 8)
    (there / "empty").write_bytes(b"not empty")
    (there / "d/extra").write_bytes(b"extra")
    (there / "d/strange/deep").mkdir(parents=True)
    os.unlink(there / "many/500")
    os.unlink(there / "d/link")
    os.mkdir(there / "d/link")


EXPECTED = [
    "/d/e/big: contents: 65536 bytes at 2097152 or after it differ",
    "/d/small: mode: 0644 here, 0600 there",
    "/d/small: xattr user.note: differs",
    "/fifo: owner: 0:0 here, 7:8 there",
    "/empty: size: 0 here, 9 there",
    "/d/extra: only there",
    "/d/strange: only there",
    "/many/500: missing there",
    "/d/link: type: symbolic link here, directory there",
]


def test_everything_that_differs_is_named_and_mended(filled):
    assert "1 difference" not in assert_healthy(filled)
    corrupt(filled)
    code, printed = verify(filled)
    assert code == ExitCode.NOT_IN_SYNC, printed
    missing = [line for line in EXPECTED if line not in printed]
    assert not missing, printed
    # Looking changes nothing.
    assert filled.peer()["state"] == "in-sync"
    assert (filled.secondary_store / "d/extra").exists()

    code, printed = verify(filled, "--repair")
    assert code == ExitCode.OK, printed
    assert not [line for line in EXPECTED if line not in printed], printed
    filled.wait_in_sync()
    filled.assert_equal()
    assert_healthy(filled)
    # What was replaced there takes changes like everything else.
    (filled.mountpoint / "many/500").write_bytes(b"again")
    os.chmod(filled.mountpoint / "d/small", 0o640)
    filled.wait_in_sync()
    filled.assert_equal()


def test_only_what_was_asked_for_is_looked_at(filled):
    corrupt(filled)
    for path, line in (
        (filled.mountpoint / "d/e", EXPECTED[0]),
        ("d/e/big", EXPECTED[0]),
        (filled.primary_store / "fifo", EXPECTED[3]),
    ):
        code, printed = verify(filled, path)
        assert code == ExitCode.NOT_IN_SYNC, printed
        assert [each for each in EXPECTED if each in printed] == [line]
    code, printed = verify(filled, "nothing")
    assert code == ExitCode.USAGE
    assert "/nothing cannot be verified" in printed
    code, printed = verify(filled, "/elsewhere")
    assert code == ExitCode.USAGE
    assert "not on this mount" in printed


def test_a_file_put_there_in_place_of_another_is_found_and_replaced(filled):
    """The replica's node still knows the old one, and the primary believes that it does."""
    there = filled.secondary_store / "d/small"
    os.unlink(there)
    there.write_bytes(b"SMALL")
    os.rename(filled.secondary_store / "empty", filled.secondary_store / "moved")
    code, printed = verify(filled, "--repair")
    assert code == ExitCode.OK, printed
    assert "/d/small: another object there" in printed
    assert "/empty: missing there" in printed
    assert "/moved: only there" in printed
    filled.wait_in_sync()
    filled.assert_equal()
    (filled.mountpoint / "d/small").write_bytes(b"after")
    filled.wait_in_sync()
    filled.assert_equal()
    assert_healthy(filled)


def test_a_busy_pair_is_never_suspected():
    with Pair() as pair:
        stop = threading.Event()
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            top = pair.mountpoint / f"w{seed}"
            try:
                top.mkdir()
                big = os.open(top / "big", os.O_RDWR | os.O_CREAT)
                os.pwrite(big, bytes(3 * MIB), 0)
                while not stop.is_set():
                    os.pwrite(big, rng.randbytes(5000), rng.randrange(3 * MIB))
                    name = top / f"{rng.randrange(30)}"
                    other = top / f"{rng.randrange(30)}"
                    action = rng.randrange(7)
                    try:
                        if action == 0:
                            name.write_bytes(rng.randbytes(rng.choice((10, 70_000))))
                        elif action == 1:
                            os.rename(name, other)
                        elif action == 2:
                            os.unlink(name)
                        elif action == 3:
                            os.chmod(name, rng.choice((0o600, 0o644)))
                        elif action == 4:
                            os.truncate(name, rng.randrange(100_000))
                        elif action == 5:
                            os.link(name, other)
                        else:
                            os.setxattr(name, "user.x", rng.randbytes(8))
                    except (FileNotFoundError, FileExistsError):
                        pass
                os.close(big)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for worker in workers:
            worker.start()
        printed = ""
        try:
            for _ in range(6):
                printed = assert_healthy(pair)
                assert not failures
        finally:
            stop.set()
            for worker in workers:
                worker.join(60)
        assert not failures
        assert "skipped" not in printed
        pair.wait_in_sync()
        pair.assert_equal()


def test_an_interrupted_verification_goes_on_where_it_was():
    with TcpProxyPair() as (pair, proxy):
        for directory in range(40):
            (pair.mountpoint / f"d{directory:02}").mkdir()
            (pair.mountpoint / f"d{directory:02}/file").write_bytes(bytes(MIB))
        pair.wait_in_sync()
        command = pair.mount.replfs

        def interrupt() -> None:
            wait_for(lambda: (pair.mount.status().get("verify") or {}).get("files", 0) > 45)
            proxy.refuse()

        thread = threading.Thread(target=interrupt)
        thread.start()
        done = command("verify", pair.mountpoint, check=False, timeout_s=120)
        thread.join(60)
        assert done.returncode == ExitCode.DOWN, done
        assert "goes on from there" in done.stderr
        assert "is not connected" in command("verify", pair.mountpoint, check=False).stderr
        proxy.accept()
        pair.wait_in_sync()
        done = command("verify", pair.mountpoint, timeout_s=120)
        assert "goes on from where" in done.stdout
        assert "no differences" in done.stdout
        # A finished one is forgotten.
        assert "goes on from where" not in command("verify", pair.mountpoint, timeout_s=120).stdout


class TcpProxyPair:
    """A pair with a proxy between, slow enough to interrupt a verification."""

    def __enter__(self) -> tuple[Pair, TcpProxy]:
        self.proxies: list[TcpProxy] = []

        def through(endpoint: str) -> str:
            proxy = TcpProxy("127.0.0.1", int(endpoint.rpartition(":")[2]))
            self.proxies.append(proxy.__enter__())
            return proxy.endpoint

        self.pair = Pair(
            through=through, mount_arguments=("--resync-rate", "8MiB", "--peer-timeout", "2s")
        )
        try:
            self.pair.__enter__()
        except BaseException:
            self.proxies[0].__exit__()
            raise
        return self.pair, self.proxies[0]

    def __exit__(self, *error: object) -> None:
        self.pair.__exit__(*error)  # type: ignore[arg-type]
        self.proxies[0].__exit__()

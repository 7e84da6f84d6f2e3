"""One contract for every backend, then what only disk and Redis can get wrong."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from redis_fixtures import free_port, redis_server, redis_url, start_redis, stop_redis

import tiered_caching
from kvttl.storage import sealed
from tiered_caching import BaseBackend, InMemoryBackend, LocalDiskBackend, RemoteBackend

SECRET = b"a secret shared by these tests.."
PASSWORD = "pass-w0rd"
THREADS = 16
SHORT_S = 0.02  # a ttl that tests wait for
LONG_S = 600.0  # a ttl that no test outlives


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Case:
    """A backend, and the way to let its time pass."""

    backend: BaseBackend
    wait: Callable[[float], None]

    def let_expire(self) -> None:
        self.wait(3 * SHORT_S)


def memory_case(request) -> Case:
    clock = Clock()
    return Case(InMemoryBackend(timer=clock), clock.advance)


def disk_case(request) -> Case:
    clock = Clock()
    folder = request.getfixturevalue("tmp_path") / "cache"
    return Case(LocalDiskBackend(folder, timer=clock), clock.advance)


def fake_redis_case(request) -> Case:
    return Case(RemoteBackend(), time.sleep)


def redis_case(request) -> Case:
    url, name = request.getfixturevalue("redis_login_url"), request.node.name
    return Case(RemoteBackend(url, key_prefix=f"{name}:"), time.sleep)


def redis_tls_case(request) -> Case:
    url, ca = request.getfixturevalue("redis_tls")
    prefix = f"{request.node.name}:"
    return Case(RemoteBackend(url, key_prefix=prefix, ssl_ca_certs=str(ca)), time.sleep)


CASES = {
    "memory": (InMemoryBackend, memory_case),
    "disk": (LocalDiskBackend, disk_case),
    "fakeredis": (RemoteBackend, fake_redis_case),
    "redis": (RemoteBackend, redis_case),
    "redis-tls": (RemoteBackend, redis_tls_case),
}


@pytest.fixture(scope="module")
def redis_login_url():
    with redis_server(PASSWORD) as url:
        yield url


@pytest.fixture(scope="module")
def redis_tls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    with redis_server(PASSWORD, folder) as url:
        yield url, folder / "ca.crt"


@pytest.fixture(params=CASES)
def case(request):
    case = CASES[request.param][1](request)
    yield case
    case.backend.close()


@pytest.fixture
def backend(case):
    return case.backend


def subclasses(cls: type) -> set[type]:
    """Return all the concrete classes that the module derives from ``cls``."""
    below = {sub for direct in cls.__subclasses__() for sub in {direct, *subclasses(direct)}}
    ours = {sub for sub in below if sub.__module__ == tiered_caching.__name__}
    return {sub for sub in ours if not inspect.isabstract(sub)}


def test_every_backend_is_under_the_contract():
    expected = {InMemoryBackend, LocalDiskBackend, RemoteBackend}
    assert subclasses(BaseBackend) == expected == {cls for cls, _ in CASES.values()}
    assert {cls.tier for cls in expected} == {"gpu", "disk", "remote"}
    assert BaseBackend.__abstractmethods__ == {"get", "set", "delete"}
    with pytest.raises(TypeError):
        BaseBackend()


# The contract: every test from here to the next heading runs on every backend.

HOSTILE_KEYS = [
    "../../etc/passwd", "/etc/passwd", "..", ".", ".hmac_key", ".lock", "a\0b", "\n", " ",
    "k" * 9000, "schlüssel-鍵-🔑", "\ud800", "*", "%s{0}",
]  # fmt: skip
VALUES = [0, False, "", b"\0" * 100_000, [], {"a": (1, {2})}, 1.5, math.inf, Path("x"), ()]
BAD_TTLS = [0, -1, -0.0, math.nan, math.inf, -math.inf, True, False, "60", None, 1j, [1], 10**400,
            np.float64("nan"), np.True_]  # fmt: skip
UNSTORABLE = [None, lambda: 0, (n for n in range(3)), Barrier(1), [None, lambda: 0]]


def test_absent_key_is_none_and_no_error(backend):
    assert backend.get("absent") is None
    assert backend.delete("absent") is False


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_value_comes_back(backend, value):
    backend.set("key", value, LONG_S)
    assert backend.get("key") == value
    assert type(backend.get("key")) is type(value)


def test_arrays_come_back(backend):
    array = np.arange(12.0).reshape(3, 4)
    backend.set("key", array, LONG_S)
    np.testing.assert_array_equal(backend.get("key"), array)


def test_values_are_copies(backend):
    value = [1]
    backend.set("key", value, LONG_S)
    value.append(2)
    backend.get("key").append(3)
    assert backend.get("key") == [1]


def test_expired_is_none_and_not_deletable(case):
    case.backend.set("key", 1, SHORT_S)
    case.backend.set("other", 2, LONG_S)
    case.let_expire()
    assert case.backend.delete("key") is False
    assert case.backend.get("key") is None
    assert case.backend.get("other") == 2


def test_existence_is_told_without_unpickling(case, monkeypatch):
    backend = case.backend
    backend.set("key", 1, SHORT_S)
    backend.set("other", 2, LONG_S)
    monkeypatch.setattr(sealed, "load", lambda _payload: pytest.fail("was unpickled"))
    assert "other" in backend and "absent" not in backend
    case.let_expire()
    assert "key" not in backend
    backend.delete("other")
    assert "other" not in backend
    with pytest.raises(TypeError, match="key must be"):
        5 in backend  # noqa: B015


def test_overwriting_renews_value_and_ttl(case):
    case.backend.set("longer", "old", SHORT_S)
    case.backend.set("longer", "new", LONG_S)
    case.backend.set("shorter", "old", LONG_S)
    case.backend.set("shorter", "new", SHORT_S)
    case.let_expire()
    assert case.backend.get("longer") == "new"
    assert case.backend.get("shorter") is None


def test_expired_key_can_be_set_again(case):
    case.backend.set("key", "old", SHORT_S)
    case.let_expire()
    case.backend.set("key", "new", LONG_S)
    assert case.backend.get("key") == "new"


def test_delete_says_whether_it_was_there(backend):
    backend.set("key", 1, LONG_S)
    backend.set("other", 2, LONG_S)
    assert backend.delete("key") is True
    assert backend.delete("key") is False
    assert (backend.get("key"), backend.get("other")) == (None, 2)


@pytest.mark.parametrize("ttl", [1e-9, 1e-300])
def test_tiny_ttls_expire(case, ttl):
    case.backend.set("key", 1, ttl)
    case.let_expire()
    assert case.backend.get("key") is None


@pytest.mark.parametrize("ttl", [1, Fraction(600), 1e15, 1e300, np.float32(600), np.int64(600)])
def test_any_positive_number_is_a_ttl(backend, ttl):
    backend.set("key", 1, ttl)
    if ttl > 1:
        assert backend.get("key") == 1


@pytest.mark.parametrize("ttl", BAD_TTLS, ids=lambda ttl: repr(ttl)[:12])
def test_bad_ttl_is_refused_and_the_old_value_stays(backend, ttl):
    backend.set("key", "old", LONG_S)
    with pytest.raises(ValueError, match=r"ttl must be .*> 0 and finite.*, got .") as error:
        backend.set("key", "new", ttl)
    assert repr(ttl)[:20] in str(error.value)
    assert backend.get("key") == "old"


@pytest.mark.parametrize("value", UNSTORABLE, ids=lambda value: type(value).__name__)
def test_unstorable_value_is_refused_and_the_old_one_stays(backend, value):
    backend.set("key", "old", LONG_S)
    with pytest.raises(ValueError, match="^value must (be picklable|not be None)"):
        backend.set("key", value, LONG_S)
    assert backend.get("key") == "old"


@pytest.mark.parametrize(("key", "kind"), [("", ValueError), (None, TypeError), (b"k", TypeError)])
def test_bad_key_is_refused(backend, key, kind):
    calls = (backend.get, backend.delete, lambda key: backend.set(key, 1, LONG_S))
    for call in calls:
        with pytest.raises(kind, match="key must be a non-empty str, got"):
            call(key)


def test_hostile_keys_are_only_keys(backend):
    for key in HOSTILE_KEYS:
        backend.set(key, f"value of {key!r}", LONG_S)
    assert [backend.get(key) for key in HOSTILE_KEYS] == [f"value of {k!r}" for k in HOSTILE_KEYS]
    assert all(backend.delete(key) for key in HOSTILE_KEYS)


def in_threads(work: Callable[[int], object]) -> list:
    """Run ``work(0..15)`` at the same time and return the results."""
    gate = Barrier(THREADS)

    def start(thread: int):
        gate.wait()
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))


def test_threads_lose_nothing(backend):
    def work(thread: int) -> None:
        for number in range(24):
            backend.set(f"{thread}-{number}", "draft", LONG_S)
            backend.set(f"{thread}-{number}", [thread, number], LONG_S)
            backend.get(f"{(thread + 1) % THREADS}-{number}")
            if number % 3 == 0:
                assert backend.delete(f"{thread}-{number}")

    in_threads(work)
    for thread in range(THREADS):
        found = [backend.get(f"{thread}-{number}") for number in range(24)]
        assert found == [None if n % 3 == 0 else [thread, n] for n in range(24)]


def test_threads_on_one_key_see_whole_values_only(backend):
    backend.set("key", [-1] * 5000, LONG_S)

    def work(thread: int) -> list[int]:
        backend.set("key", [thread] * 5000, LONG_S)
        return backend.get("key")

    for found in in_threads(work):
        assert len(found) == 5000 and len(set(found)) == 1 and found[0] >= 0


def test_only_one_of_many_deletes_wins(backend):
    for number in range(6):
        backend.set("key", number, LONG_S)
        assert sum(in_threads(lambda _thread: backend.delete("key"))) == 1


# Against a naive model, where the clock is ours.


class AgainstModel(RuleBasedStateMachine):
    """Whatever is done, the backend answers as a dict of (value, expiry) does."""

    keys = st.sampled_from(["a", "b", "c", "../d"])

    def __init__(self):
        super().__init__()
        self.clock, self.model = Clock(), {}
        self.backend = self.make()

    def expected(self, key):
        value, expires_at_s = self.model.get(key, (None, math.inf))
        return value if self.clock() < expires_at_s else None

    @rule(key=keys, value=st.integers() | st.text(), ttl=st.floats(1e-3, 1e6) | st.just(5))
    def set(self, key, value, ttl):
        self.backend.set(key, value, ttl)
        self.model[key] = (value, self.clock() + ttl)

    @rule(key=keys)
    def delete(self, key):
        assert self.backend.delete(key) is (self.expected(key) is not None)
        self.model.pop(key, None)

    @rule(seconds=st.floats(0, 1e5) | st.just(5))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @invariant()
    def answers_as_the_model(self):
        for key in ("a", "b", "c", "../d"):
            assert self.backend.get(key) == self.expected(key)


class MemoryAgainstModel(AgainstModel):
    def make(self):
        return InMemoryBackend(timer=self.clock)


class DiskAgainstModel(AgainstModel):
    def make(self):
        self.folder = tempfile.TemporaryDirectory()
        return LocalDiskBackend(self.folder.name, timer=self.clock)

    @rule()
    def reopen(self):
        self.backend = LocalDiskBackend(self.folder.name, timer=self.clock)

    @rule()
    def purge(self):
        self.backend.purge()
        live = [key for key in self.model if self.expected(key) is not None]
        assert len(list(Path(self.folder.name).glob("[!.]*"))) == len(live)

    def teardown(self):
        self.folder.cleanup()


TestMemoryAgainstModel = MemoryAgainstModel.TestCase
TestDiskAgainstModel = DiskAgainstModel.TestCase
TestMemoryAgainstModel.settings = settings(max_examples=40, stateful_step_count=30)
TestDiskAgainstModel.settings = settings(max_examples=25, stateful_step_count=25)


class NaiveLru:
    """What InMemoryBackend promises, as plainly as it can be written."""

    def __init__(self, max_bytes: int, clock: Clock):
        self.max_bytes, self.clock, self.entries = max_bytes, clock, []  # least recent first

    def get(self, key):
        live = [entry for entry in self.entries if self.clock() < entry[2]]
        found = [entry for entry in live if entry[0] == key]
        self.entries = [entry for entry in live if entry[0] != key] + found
        return found[0][1] if found else None

    def set(self, key, value, ttl):
        self.get(key)
        self.entries = [entry for entry in self.entries if entry[0] != key]
        self.entries.append((key, value, self.clock() + ttl))
        while sum(len(pickle.dumps(entry[1], 5)) for entry in self.entries) > self.max_bytes:
            self.entries.pop(0)


def test_memory_evicts_as_a_naive_lru_does():
    clock, generator = Clock(), random.Random(7)
    backend, naive = InMemoryBackend(400, clock), NaiveLru(400, clock)
    hits = 0
    for _ in range(3000):
        key = f"k{generator.randrange(12)}"
        if generator.random() < 0.4:
            item = (key, b"x" * generator.randrange(5, 120), generator.choice([3, 30, 300]))
            backend.set(*item)
            naive.set(*item)
        found = backend.get(key)
        assert found == naive.get(key)
        hits += found is not None
        clock.advance(generator.random())
    assert 500 < hits < 2500  # the trace exercised both


def test_memory_keeps_its_bound_under_threads():
    backend = InMemoryBackend(max_bytes=2000)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that an unguarded eviction is caught half-way
    try:
        in_threads(lambda t: [backend.set(f"{n % 50}", b"x" * (n % 90), 1e-4) for n in range(800)])
    finally:
        sys.setswitchinterval(interval_s)
    backend.set("key", b"x" * 1900, LONG_S)  # evicts the rest, so the bookkeeping is sound
    assert backend.get("key") == b"x" * 1900


def test_memory_refuses_what_can_never_fit():
    backend = InMemoryBackend(max_bytes=1000)
    backend.set("key", "old", LONG_S)
    with pytest.raises(ValueError, match=r"at most max_bytes=1000 bytes when pickled, got 50\d\d"):
        backend.set("key", b"x" * 5000, LONG_S)
    assert backend.get("key") == "old"


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, None, "1"])
def test_memory_refuses_a_bad_bound(max_bytes):
    with pytest.raises(ValueError, match="max_bytes must be a whole number >= 1, got"):
        InMemoryBackend(max_bytes)


# Disk.


class Exploit:
    """Unpickling this creates the file ``proof``."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def disk(folder):
    return LocalDiskBackend(folder, timer=Clock())


def file_of(folder: Path, key: str) -> Path:
    return folder / hashlib.sha256(key.encode()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_disk_keeps_everything_private(disk, folder):
    disk.set("key", 1, LONG_S)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert modes == dict.fromkeys([file_of(folder, "key").name, ".hmac_key", ".lock"], 0o600)


def test_disk_stays_inside_its_folder(disk, folder):
    for key in HOSTILE_KEYS:
        disk.set(key, 1, LONG_S)
    assert names(folder.parent) == {folder.name}
    expected = {
        hashlib.sha256(k.encode("utf-8", "surrogatepass")).hexdigest() for k in HOSTILE_KEYS
    }
    assert names(folder) == expected | {".hmac_key", ".lock"}


def test_disk_stays_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disk = LocalDiskBackend()
    disk.set("key", 1, LONG_S)
    monkeypatch.chdir("/")
    assert disk.get("key") == 1
    assert (tmp_path / "cache_warm" / ".hmac_key").exists()


def test_torn_files_are_misses(disk, folder, caplog):
    disk.set("key", [1, 2, 3], LONG_S)
    whole = file_of(folder, "key").read_bytes()
    for length in range(len(whole)):
        file_of(folder, "key").write_bytes(whole[:length])
        assert disk.get("key") is None, length
    assert len(caplog.records) == len(whole)
    file_of(folder, "key").write_bytes(whole)
    assert disk.get("key") == [1, 2, 3]


def test_changed_files_are_misses(disk, folder, monkeypatch):
    disk.set("key", [1, 2, 3], LONG_S)
    whole = file_of(folder, "key").read_bytes()
    monkeypatch.setattr(sealed, "load", lambda _payload: pytest.fail("was unpickled"))
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        file_of(folder, "key").write_bytes(changed)
        assert disk.get("key") is None, position
    file_of(folder, "key").write_bytes(whole + b"x")
    assert disk.get("key") is None


def forgeries(exploit: bytes, genuine: bytes):
    """Yield ways to smuggle a payload in without knowing the secret."""
    foreign = sealed.Signer(b"another secret, also long", "disk")
    name = hashlib.sha256(b"key").digest()
    yield exploit
    yield genuine[:80] + exploit  # header and signature of a genuine record
    yield bytes(32) + genuine[32:80] + exploit
    yield foreign.seal(name, exploit)


def test_forged_files_run_no_code(disk, folder, tmp_path, caplog):
    proof = tmp_path / "proof"
    exploit = pickle.dumps(Exploit(proof))
    pickle.loads(exploit)  # noqa: S301 - shows that the exploit works
    proof.rmdir()
    disk.set("key", 1, LONG_S)
    for forged in forgeries(exploit, file_of(folder, "key").read_bytes()):
        file_of(folder, "key").write_bytes(forged)
        assert disk.get("key") is None
        assert "torn, forged or foreign" in caplog.messages[-1]
        disk.purge()
        disk.delete("key")
    assert not proof.exists()


def test_a_file_under_another_name_is_a_miss(disk, folder):
    disk.set("a", "value of a", LONG_S)
    os.rename(file_of(folder, "a"), file_of(folder, "b"))
    assert (disk.get("a"), disk.get("b")) == (None, None)


def test_value_whose_class_is_gone_is_a_miss(disk, monkeypatch, caplog):
    disk.set("key", Clock(), LONG_S)
    monkeypatch.delattr(sys.modules[__name__], "Clock")
    assert disk.get("key") is None
    assert "no longer readable" in caplog.text


@pytest.mark.parametrize("make", ["link", "loop", "folder", "pipe"])
def test_what_is_no_plain_file_is_a_miss(disk, folder, make, caplog):
    path = file_of(folder, "key")
    disk.set("key", 1, LONG_S)
    genuine = path.rename(folder / "genuine")
    {
        "link": lambda: path.symlink_to(genuine),
        "loop": lambda: path.symlink_to(path),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }[make]()
    assert disk.get("key") is None
    assert caplog.records
    assert disk.purge() == 0


def test_link_is_replaced_not_followed(disk, folder, tmp_path):
    (tmp_path / "victim").write_text("untouched")
    file_of(folder, "key").symlink_to(tmp_path / "victim")
    disk.set("key", 1, LONG_S)
    assert disk.get("key") == 1
    assert (tmp_path / "victim").read_text() == "untouched"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_crash_while_writing_leaves_the_old_value(disk, folder, monkeypatch, step):
    disk.set("key", "old", LONG_S)
    before = names(folder)

    def crash(*_args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(OSError, match="disk full"):
            disk.set("key", "new", LONG_S)
    assert disk.get("key") == "old"
    assert names(folder) == before


KILLED_WRITER = """
import os, signal, sys
from tiered_caching import LocalDiskBackend
disk = LocalDiskBackend(sys.argv[1])
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
disk.set("key", "new", 600)
"""


def python(program: str, *args: object) -> subprocess.Popen:
    """Start a program in a Python of its own that can import the modules under test."""
    environment = os.environ | {"PYTHONPATH": str(Path(tiered_caching.__file__).parent)}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)], env=environment)


def test_killed_writer_leaves_the_old_value_and_no_lock(folder):
    LocalDiskBackend(folder).set("key", "old", LONG_S)
    assert python(KILLED_WRITER, folder).wait(30) == -signal.SIGKILL
    (orphan,) = folder.glob(".*.part")
    disk = LocalDiskBackend(folder)
    assert disk.get("key") == "old"
    assert orphan.exists()  # so young that its writer may be at work
    os.utime(orphan, (0, 0))
    LocalDiskBackend(folder)
    assert not orphan.exists()
    disk.set("key", "newer", LONG_S)
    assert disk.get("key") == "newer"


def test_two_instances_share_a_folder(disk, folder):
    other = LocalDiskBackend(folder, timer=Clock())
    disk.set("key", 1, LONG_S)
    assert other.get("key") == 1
    other.set("key", 2, LONG_S)
    assert disk.get("key") == 2
    assert other.delete("key") is True
    assert disk.get("key") is None


def test_threads_agree_on_the_key_file(folder):
    in_threads(lambda thread: LocalDiskBackend(folder).set(f"{thread}", thread, LONG_S))
    disk = LocalDiskBackend(folder)
    assert [disk.get(f"{thread}") for thread in range(THREADS)] == list(range(THREADS))
    assert len((folder / ".hmac_key").read_bytes()) == 32


SHARING_WRITER = """
import sys
from tiered_caching import LocalDiskBackend
disk = LocalDiskBackend(sys.argv[1])
for number in range(50):
    disk.set(f"{sys.argv[2]}-{number}", number, 600)
    disk.set("contended", number, 600)
"""


def test_processes_share_a_folder(folder):
    writers = [python(SHARING_WRITER, folder, number) for number in range(3)]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    disk = LocalDiskBackend(folder)
    assert all(disk.get(f"{w}-{number}") == number for w in range(3) for number in range(50))
    assert disk.get("contended") == 49


def test_expired_file_goes_but_never_one_that_was_renewed(disk, folder, monkeypatch):
    disk.set("key", "old", 5)
    disk.set("gone", "old", 5)
    disk._folder._timer.advance(5)
    assert disk.get("gone") is None
    assert not file_of(folder, "gone").exists()
    drop = disk._folder._drop_expired

    def renewed_meanwhile(name: bytes) -> bool:
        disk.set("key", "new", LONG_S)  # as another thread may, right after get() has read
        return drop(name)

    monkeypatch.setattr(disk._folder, "_drop_expired", renewed_meanwhile)
    assert disk.get("key") is None
    assert disk.get("key") == "new"


def test_purge_removes_what_nobody_reads_any_more(disk, folder):
    for number in range(5):
        disk.set(f"{number}", number, 5 + number)
    disk._folder._timer.advance(7)
    (folder / "README").write_text("not ours")
    assert disk.purge() == 3
    assert disk.purge() == 0
    expected = {file_of(folder, key).name for key in "34"}
    assert names(folder) == expected | {"README", ".hmac_key", ".lock"}
    disk._folder._timer.advance(7)
    LocalDiskBackend(folder, timer=disk._folder._timer)
    assert names(folder) == {"README", ".hmac_key", ".lock"}


def test_touched_file_lives_by_its_signed_expiry(disk, folder):
    disk.set("key", 1, LONG_S)
    os.utime(file_of(folder, "key"), (0, 0))
    assert disk.purge() == 0
    os.utime(file_of(folder, "key"), (2.0**31, 2.0**31))
    disk._folder._timer.advance(LONG_S)
    assert disk.get("key") is None


def test_given_secret_needs_no_key_file(folder):
    LocalDiskBackend(folder, SECRET).set("key", 1, LONG_S)
    assert not (folder / ".hmac_key").exists()
    assert LocalDiskBackend(folder, SECRET).get("key") == 1
    assert LocalDiskBackend(folder, SECRET + b"x").get("key") is None


@pytest.mark.parametrize("make", [LocalDiskBackend, lambda _folder, s: RemoteBackend(secret=s)])
@pytest.mark.parametrize("secret", [b"", b"0123456789abcde", "a str that is long enough", 5])
def test_weak_secret_is_refused_and_not_shown(folder, make, secret):
    with pytest.raises(ValueError, match="^secret must be at least 16 bytes$"):
        make(folder, secret)


def test_key_file_that_others_know_is_refused(folder):
    LocalDiskBackend(folder)
    (folder / ".hmac_key").chmod(0o644)
    with pytest.raises(PermissionError, match="must hold 32 bytes, be yours and mode 0600"):
        LocalDiskBackend(folder)
    (folder / ".hmac_key").unlink()
    (folder / ".hmac_key").symlink_to(folder / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        LocalDiskBackend(folder)


# Redis.


def test_redis_expires_by_itself(redis_login_url):
    remote = RemoteBackend(redis_login_url, key_prefix="native:")
    with redis.Redis.from_url(redis_login_url) as client:
        for ttl_s, pttl_ms in ((LONG_S, 600_000), (0.25, 250), (1e300, 2**53)):
            remote.set("key", 1, ttl_s)
            assert 0.5 * pttl_ms < client.pttl("native:key") <= pttl_ms
        remote.set("key", 1, SHORT_S)
        time.sleep(3 * SHORT_S)
        assert client.exists("native:key") == 0


def test_redis_of_a_shared_secret_is_shared(redis_login_url):
    make = functools.partial(RemoteBackend, redis_login_url, "shared:")
    make(SECRET).set("key", [1], LONG_S)
    assert make(SECRET).get("key") == [1]
    assert make(SECRET + b"x").get("key") is None
    assert make().get("key") is None
    assert RemoteBackend(redis_login_url, "other:", SECRET).get("key") is None


def test_each_fake_redis_is_private():
    first, second = RemoteBackend(secret=SECRET), RemoteBackend(secret=SECRET)
    first.set("key", 1, LONG_S)
    assert second.get("key") is None


def test_forged_redis_values_run_no_code(redis_login_url, tmp_path, caplog):
    remote = RemoteBackend(redis_login_url, "forged:")
    remote.set("key", 1, LONG_S)
    with redis.Redis.from_url(redis_login_url) as client:
        genuine, exploit = client.get("forged:key"), pickle.dumps(Exploit(tmp_path / "proof"))
        for forged in (*forgeries(exploit, genuine), b"", genuine[:-1], genuine[:50]):
            client.set("forged:key", forged)
            assert remote.get("key") is None
            assert "torn, forged or foreign" in caplog.messages.pop()
        client.set("forged:moved", genuine)
        assert remote.get("moved") is None
    assert not (tmp_path / "proof").exists()


def test_record_of_one_tier_is_foreign_in_another(folder, redis_login_url):
    remote, disk = RemoteBackend(redis_login_url, "", SECRET), LocalDiskBackend(folder, SECRET)
    disk.set("crossed", 1, LONG_S)
    remote.set("crossed", 2, LONG_S)
    with redis.Redis.from_url(redis_login_url) as client:
        from_redis = client.get("crossed")
        client.set("crossed", file_of(folder, "crossed").read_bytes())
    file_of(folder, "crossed").write_bytes(from_redis)
    assert (remote.get("crossed"), disk.get("crossed")) == (None, None)


def calls_of(backend: BaseBackend):
    key = ("key",)
    return ((backend.get, key), (backend.set, ("key", 1, LONG_S)), (backend.delete, key))


def assert_fails_clearly(remote: RemoteBackend, reason: str) -> None:
    for call, args in calls_of(remote):
        with pytest.raises(ConnectionError, match=reason) as error:
            call(*args)
        assert remote.address in str(error.value)
        assert PASSWORD not in str(error.value)


def test_wrong_password_is_a_clear_error(redis_login_url):
    assert_fails_clearly(RemoteBackend(redis_login_url.replace("pass", "pas")), "password")
    without = RemoteBackend(redis_login_url.replace(f":{PASSWORD}@", ""))
    assert_fails_clearly(without, "asks for a password")


def test_address_masks_the_password():
    masked = {
        "redis://:p%40ss@host:7/3": "redis://***@host:7/3",
        "rediss://user:secret@host": "rediss://***@host:6379/0",
        "redis://host?password=secret": "redis://***@host:6379/0",
        "redis://host": "redis://host:6379/0",
        "unix://user:secret@/run/redis.sock?db=2": "redis://***@/run/redis.sock/2",
    }
    assert {url: RemoteBackend(url).address for url in masked} == masked


@pytest.mark.parametrize("how", ["url", "option"])
def test_a_certificate_is_found_at_home(redis_tls, monkeypatch, how):
    url, ca = redis_tls
    monkeypatch.setenv("HOME", str(ca.parent))
    at_home = {"ssl_ca_certs": f"~/{ca.name}"}
    query = f"?ssl_ca_certs=~/{ca.name}" if how == "url" else ""
    backend = RemoteBackend(url + query, **(at_home if how == "option" else {}))
    backend.set("k", "v", 60)
    assert backend.get("k") == "v"
    backend.delete("k")


def test_untrusted_certificate_is_a_clear_error(redis_tls):
    url, ca = redis_tls
    assert_fails_clearly(RemoteBackend(url), "certificate verify failed")
    with pytest.raises(ValueError, match="ssl_ca_certs = .*x': this file does not exist"):
        RemoteBackend(url, ssl_ca_certs=str(ca) + "x")
    assert_fails_clearly(RemoteBackend(url.replace("rediss:", "redis:")), "write rediss://")
    by_name = RemoteBackend(url.replace("127.0.0.1", "localhost"), ssl_ca_certs=str(ca))
    assert_fails_clearly(by_name, "localhost")


def test_redis_may_die_and_come_back(tmp_path):
    port = free_port()
    start = functools.partial(start_redis, port, PASSWORD, folder=str(tmp_path))
    remote = RemoteBackend(redis_url(port, PASSWORD), timeout_s=2)
    assert_fails_clearly(remote, "refused")
    server = start()
    remote.set("key", "before", LONG_S)
    server.kill()
    server.wait()
    assert_fails_clearly(remote, "refused|closed|reset")
    server = start()
    try:
        assert remote.get("key") is None  # without persistence
        remote.set("key", "after", LONG_S)
        assert remote.get("key") == "after"
        stop_redis(server)
        server = start()  # a restart between two calls goes unnoticed
        remote.set("key", "later", LONG_S)
        assert remote.get("key") == "later"
    finally:
        stop_redis(server)


def test_silent_redis_is_a_timeout(tmp_path):
    port = free_port()
    server = start_redis(port, folder=str(tmp_path))
    remote = RemoteBackend(redis_url(port), timeout_s=0.2)
    try:
        remote.set("key", 1, LONG_S)
        server.send_signal(signal.SIGSTOP)
        started_s = time.monotonic()
        assert_fails_clearly(remote, "[Tt]imeout|timed out")
        assert time.monotonic() - started_s < 3 * 2 * 0.2 + 1  # 3 calls: connect, answer
        server.send_signal(signal.SIGCONT)
        assert remote.get("key") in (1, None)  # the delete may have reached it
    finally:
        server.send_signal(signal.SIGCONT)
        stop_redis(server)


def test_given_client_is_used_and_left_open(redis_login_url, monkeypatch):
    with redis.Redis.from_url(redis_login_url) as client:
        remote = RemoteBackend(client=client, key_prefix="given:")
        remote.set("key", 1, LONG_S)
        with monkeypatch.context() as patch:
            patch.setattr(client, "close", lambda: pytest.fail("was closed"))
            remote.close()
        assert client.exists("given:key") == 1
        assert remote.get("key") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "http://host"}, "url is not allowed: scheme 'http'; only redis"),
        ({"url": "redis://:s#cret@host"}, "url is not allowed: it is no valid URL"),
        ({"url": 6379}, "url is not allowed: got a int"),
        ({"url": "redis://host", "ssl_ca_cert": "c.pem"}, "did you mean 'ssl_ca_certs'"),
        ({"url": "redis://host", "client": redis.Redis()}, "not both"),
        ({"client": redis.Redis(), "ssl": True}, "not both"),
        ({"ssl_ca_certs": "ca.crt"}, "not both"),
        ({"url": "redis://host", "timeout_s": 0}, "timeout_s must be > 0 and finite"),
        ({"url": "redis://host?decode_responses=yes"}, "decode_responses must be off"),
        ({"client": redis.Redis(decode_responses=True)}, "decode_responses must be off"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RemoteBackend(**arguments)
    assert "cret" not in str(error.value)
    assert error.value.__cause__ is None

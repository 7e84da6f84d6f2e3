"""Hostile files: seeded mutations of traces, their copies, settings and logs end in one sentence.

``KV_FUZZ=10000`` says how many of each kind (default 250), ``KV_FUZZ_SEED`` which ones.
"""

from __future__ import annotations

import copy
import gzip
import json
import logging
import math
import os
import random
import signal
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import test_trace_formats as formats
import test_trace_readers as samples
import trace_fixtures as fixtures
import zstandard
from local_managers import local_manager

from kvttl.decisions.log import DecisionRecord, read_records, to_frame
from kvttl.replay.command import main
from kvttl.settings import load_settings, to_yaml
from kvttl.stack.config import load_config
from kvttl.traces import opening
from kvttl.traces.builder import make_trace
from kvttl.traces.reading import read_trace
from kvttl.traces.trace import CACHE_VERSION, load_trace, save_trace

ROOT = Path(__file__).resolve().parents[1]
CASES = int(os.environ.get("KV_FUZZ", "250"))
SEED = int(os.environ.get("KV_FUZZ_SEED", "0"))
pytestmark = pytest.mark.timeout(max(300, CASES))
HANG_S = 120  # CPU seconds of one case, compilation included; the slowest take milliseconds
VALUES = [
    *(None, True, "", "x", "0x", "0xzz", "\ud800", "1e9", [], {}, [[]], [None], {"a": 1}, 0, -1),
    *(1, 0.5, -0.0, 1e308, -1e308, 1e-320, math.nan, math.inf, 2**31 - 1, 2**31, 2**63, 2**64),
    *(-(2**63), -(2**63) - 1, 10**400, list(range(50)), "9" * 50, "2026-01-01", "0001-01-01T00"),
    *("9999-12-31T23:59:59-14:00", "gpu", "done", {"requests": []}, [[1], 2], "ms", "order"),
]
BYTES = [
    b"\0",
    b"\n",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\xef\xbb\xbf",
    b"9" * 99,
]
BYTES += [b"NaN", b"-", b"null", b"\x1f\x8b", b"PK\x03\x04", b"&a", b"*a", b"!!", b"<<: "]


@contextmanager
def no_hang():
    """Interrupt what takes more CPU than any right answer can."""

    def stop(*_):
        raise AssertionError(f"more than {HANG_S} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def cases(kind):
    for number in range(CASES):
        yield random.Random(f"{SEED} {kind} {number}")


def changed_bytes(rng, data):
    """A few bytes flipped, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 3, 30, 300))]
        elif kind == 2:
            data[at:at] = rng.choice(BYTES)
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 80)]
        else:
            data[at:] = b"" if rng.random() < 0.3 else data[at:]
    return bytes(data)


def places(value, found=None):
    """Every (container, key) inside a JSON value."""
    found = [] if found is None else found
    keys = (
        range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    )
    for key in list(keys):
        found.append((value, key))
        places(value[key], found)
    return found


def changed_json(rng, record):
    """A value or two replaced, left out or moved."""
    record = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not (inside := places(record)):
            return record
        container, key = rng.choice(inside)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            names = ("block_size", "time_unit", "hash_id_scope", "timestamp_us", "kind", "t")
            container[rng.choice((*names, *container))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 2:
            other, name = rng.choice(inside)
            if isinstance(other, dict) or name < len(other):
                container[key] = copy.deepcopy(other.get(name)) if isinstance(other, dict) else 7
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return record


def lines(rng, records):
    """JSON lines with some of the records changed, now and then the bytes too."""
    chosen = [changed_json(rng, r) if rng.random() < 0.4 else r for r in records]
    data = "".join(json.dumps(record) + "\n" for record in chosen).encode()
    if rng.random() < 0.3:
        data = changed_bytes(rng, data)
    if rng.random() < 0.1:
        data = gzip.compress(data)
        data = changed_bytes(rng, data) if rng.random() < 0.5 else data
    return data


SESSIONS = [samples.SESSION, {**samples.SESSION, "hash_id_scope": "global"}]
QWEN = [samples.QWEN | {"chat_id": n, "parent_chat_id": n - 1} for n in range(4)]
DECISIONS = [
    samples.decision(["a", "b"], 70, 100.0),
    samples.decision(["a"], 40, 101.0, ttl_s=5.0, wanted_tier="gpu", prompt_digest="ab"),
    samples.decision(["a"], 40, 102.0, kind="claim", ttl_s=5.0, wanted_tier="disk"),
    samples.decision(
        ["a"], 40, 109.0, kind="expiry", moves=[{"status": "done", "from": "gpu", "to": "disk"}]
    ),
    samples.decision(["a", "b", "c"], 96, 110.0, hit_tokens={"gpu": 32}, metadata={"x": 1.0}),
]
TRACES = {
    "mooncake.jsonl": [samples.MOONCAKE | {"timestamp": 1500 + n} for n in range(4)],
    "qwen.jsonl": QWEN,
    "lmcache.jsonl": [samples.LMCACHE, samples.LMCACHE | {"model_name": "other"}],
    "decisions.jsonl": DECISIONS,
    "sessions.jsonl": SESSIONS,
    "session.json": SESSIONS[:1],
    **{f"{name}.jsonl": records for name, records in formats.SAMPLES.items()},
}
POLICIES = ("lru", "recency", "ttl", "heuristic", "heuristic_order", "optimal", "infinite", "fifo")


def replayed(path, capsys, *options):
    """Run the command: figures that can be, or one line that says why not."""
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        status = main(["--trace", str(path), "--cache-dir", "", *options])
    out, err = capsys.readouterr()
    if status:
        assert status == 1 and not out
        said = err.splitlines()[-1]
        assert said.startswith("error: ") and len(said) < 2000
        return None
    figures = json.loads(out)
    assert 0 <= figures["block_hit_ratio"] <= 1 and 0 <= figures["token_hit_ratio"] <= 1
    assert figures["requests"] > 0
    return figures


@pytest.mark.parametrize("name", TRACES)
def test_hostile_traces(tmp_path, capsys, name):
    path, read = tmp_path / name, 0
    for rng in cases(name):
        path.write_bytes(lines(rng, TRACES[name]))
        options = ["--policy", rng.choice(POLICIES), "--capacity", rng.choice(("", "2", "0.3"))]
        options += rng.choice(([], ["--skip-bad"], ["--skip-bad"], ["--block-tokens", "64"]))
        options += rng.choice(([], [], ["--time-unit", "us"], ["--subagent-times", "absolute"]))
        options += ["--output-rate", "50"]
        read += replayed(path, capsys, *options) is not None
    assert read > CASES / 20  # most of what is fuzzed is what a reader takes in


def changed_arrays(rng, arrays):
    """The arrays of a trace's copy with one or two of another kind, length or content."""
    arrays = dict(arrays)
    for name in rng.sample(sorted(arrays), rng.choice((1, 1, 2))):
        values = np.atleast_1d(arrays[name])
        kind = rng.randrange(6)
        if kind == 0:
            del arrays[name]
        elif kind == 1:
            arrays[name] = values[: rng.randrange(len(values) + 1)]
        elif kind == 2:
            numeric = values.dtype.kind in "if"
            kinds = (
                (np.int64, np.float64, np.complex128, np.uint8, "U9") if numeric else ("S9", "U2")
            )
            arrays[name] = values.astype(rng.choice(kinds))
        elif kind == 3 and values.dtype.kind in "if":
            values = values.copy()
            extreme = np.iinfo(values.dtype) if values.dtype.kind == "i" else np.finfo(values.dtype)
            values[rng.randrange(len(values))] = rng.choice((extreme.max, extreme.min, -1, 0))
            arrays[name] = values.reshape(np.shape(arrays[name]))
        elif kind == 4:
            arrays[name] = np.stack([values, values])
        else:
            arrays[name] = np.array(rng.choice((0, -1, 2**62, math.nan, "x")))
    return arrays


def test_hostile_copies_of_traces(tmp_path, capsys):
    trace, path = fixtures.random_trace(3, requests=12), tmp_path / "t.npz"
    arrays = {name: getattr(trace, name) for name in trace.__dataclass_fields__}
    save_trace(trace, path)
    good, read = path.read_bytes(), 0
    for rng in cases("copies"):
        if rng.random() < 0.3:
            path.write_bytes(changed_bytes(rng, good))
        else:
            np.savez(path, **changed_arrays(rng, {"version": CACHE_VERSION, **arrays}))
        options = ["--policy", rng.choice(POLICIES), "--capacity", rng.choice(("", "2", "0.3"))]
        read += replayed(path, capsys, *options) is not None
    assert read


def test_hostile_decision_logs(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    path, read = tmp_path / "log.jsonl", 0
    for rng in cases("decisions"):
        path.write_bytes(lines(rng, DECISIONS))
        with no_hang():
            records = list(read_records(path, kinds=None))
            assert len(to_frame(records)) == sum(record.kind != "claim" for record in records)
            assert all(isinstance(record, DecisionRecord) for record in records)
            cache = local_manager()
            cache.recover(path)
            cache.close()
        read += len(records)
    assert read > CASES


HEURISTICS = to_yaml(load_settings("no/such/file")).encode()
STACK = (ROOT / "config.yaml").read_bytes()


@pytest.mark.parametrize("load, good", [(load_settings, HEURISTICS), (load_config, STACK)])
def test_hostile_settings(tmp_path, load, good):
    path, read = tmp_path / "x.yaml", 0
    for rng in cases(load.__name__):
        data = good
        if rng.random() < 0.5:  # another value, as YAML or JSON spells it
            rows = good.split(b"\n")
            at = rng.randrange(len(rows))
            name = rows[at].partition(b":")[0]
            value = rng.choice(
                (json.dumps(rng.choice(VALUES)), "!!int ''", "!!timestamp x", "&a [*a]")
            )
            rows[at] = name + b": " + value.encode()
            data = b"\n".join(rows)
        path.write_bytes(changed_bytes(rng, data) if rng.random() < 0.6 else data)
        with no_hang():
            try:
                load(path)
                read += 1
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000
    assert read > CASES / 20


# --- bombs --------------------------------------------------------------------------------


@contextmanager
def little_memory(limit_bytes=64 << 20):
    tracemalloc.start()
    try:
        with no_hang():
            yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


BOMB = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 40)
)
YAML_BOMBS = {
    "aliases": BOMB + b"alpha: *a39\n",
    "a ring": b"alpha: &a [*a]\n",
    "merged": b"a: &a {alpha: 1}\n<<: *a\n",
    "deep lists": b"alpha: " + b"[" * 60_000,
    "deep maps": b"".join(b" " * n + b"a:\n" for n in range(300)),
    "long": b"alpha: 1\n" + b"# " + b"x" * (64 << 20),
    "long number": b"alpha: " + b"9" * 60_000,
    "long name": b"x" * 60_000 + b": 1\n",
    "UTF-16": "alpha: 1\n".encode("utf-16"),
    "no text": b"alpha: \xff\n",
}
CODE = "!!python/object/apply:os.system ['touch {}']"


@pytest.mark.parametrize("load", [load_settings, load_config])
def test_yaml_bombs_take_little_and_run_nothing(tmp_path, load):
    path = tmp_path / "x.yaml"
    for data in YAML_BOMBS.values():
        path.write_bytes(data)
        with little_memory(), pytest.raises(ValueError) as caught:
            load(path)
        assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)
    for name in ("alpha", "stack"):
        path.write_text(f"{name}: {CODE.format(tmp_path / 'ran')}\n")
        with pytest.raises(ValueError, match="not valid YAML"):
            load(path)
    assert not (tmp_path / "ran").exists()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_bombs_in_copies_take_little_and_run_nothing(tmp_path):
    trace = make_trace([[0, 1], [0]], [0.0, 1.0])
    plain = {name: getattr(trace, name) for name in trace.__dataclass_fields__}
    plain["version"] = CACHE_VERSION
    path = tmp_path / "t.npz"
    np.savez(path, **plain | {"name": np.array([Code(tmp_path / "ran")], object)})
    with pytest.raises(ValueError, match="is not a trace file of this kit"):
        load_trace(path)
    assert not (tmp_path / "ran").exists()
    zeros = np.zeros(40 << 20, np.int32)  # 160 MiB in 160 kB
    np.savez_compressed(
        path, **plain | {"block_ids": zeros, "offsets": np.array([0, 5, len(zeros)])}
    )
    with little_memory(), pytest.raises(ValueError, match="is not a trace file .* compressed"):
        load_trace(path)
    head = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1099511627776,), }"
    vast = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
    np.savez(path, **plain)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "v.npz", "w") as new:
        for name in old.namelist():
            new.writestr(name, vast if name == "block_ids.npy" else old.read(name))
    with little_memory(), pytest.raises(ValueError, match="is not a trace file"):
        load_trace(tmp_path / "v.npz")


def test_long_lines_of_logs_take_little_memory(tmp_path, caplog):
    good = DecisionRecord(1.0, "a").to_json().encode() + b"\n"
    path = tmp_path / "log.jsonl"
    with open(path, "wb") as file:
        file.write(good)
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + good)
    with little_memory(160 << 20):
        assert [record.prompt_digest for record in read_records(path)] == ["a", "a"]
    assert "line 2 is not a decision record" in caplog.text


def test_bombs_in_traces_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "LINE_LIMIT", 2 << 20)
    monkeypatch.setattr(opening, "SESSION_LIMIT", 4 << 20)
    for name, start in (("lines", b""), ("session", b'{"requests": [')):
        path = tmp_path / f"{name}.jsonl.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(start + b" " * (80 << 20))
        path.with_suffix(".zst").write_bytes(zstandard.compress(b" " * (80 << 20)))
        for format in (None, "mooncake", "weka"):
            with little_memory(64 << 20), pytest.raises(ValueError):
                read_trace(path.with_suffix(".zst"), format)
            with little_memory(32 << 20), pytest.raises(ValueError):
                read_trace(path, format)

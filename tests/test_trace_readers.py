"""Readers: every format, ordinary and broken; ids, order, memory, the compact copy."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import numpy as np
import pytest
import trace_fixtures as fixtures
from hypothesis import given
from hypothesis import strategies as st

from kvttl.decisions.log import DecisionLog, DecisionRecord, write_records
from kvttl.replay.command import main
from kvttl.traces import opening
from kvttl.traces.builder import DenseIds, TraceBuilder, make_trace
from kvttl.traces.formats import FORMATS
from kvttl.traces.generator import SAMPLE, agent_loops
from kvttl.traces.overlay import tiled
from kvttl.traces.reading import detect_format, read_trace, traces_at_hand
from kvttl.traces.source import Source
from kvttl.traces.trace import CACHE_VERSION, load_trace, save_trace

MOONCAKE = {"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 9]}
QWEN = {
    "chat_id": 1,
    "parent_chat_id": -1,
    "timestamp": 3.5,
    "input_length": 40,
    "output_length": 5,
    "type": "text",
    "turn": 1,
    "hash_ids": [8, 9, 10],
}
LMCACHE = {
    "timestamp": 1711929600.5,
    "request_id": "r",
    "model_name": "m",
    "chunk_size": 256,
    "seq_len": 600,
    "dtypes": ["bfloat16"],
    "shapes": [[1, 2]],
    "chunk_hashes": ["0x" + "ab" * 32, "0x1f"],
}
SESSION = {
    "id": "s",
    "models": ["big"],
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [
        {"t": 0.0, "type": "n", "model": "big", "in": 130, "out": 3, "hash_ids": [1, 2]},
        {
            "t": 5.0,
            "type": "subagent",
            "requests": [
                {"t": 1.0, "type": "n", "model": "small", "in": 64, "out": 2, "hash_ids": [1]}
            ],
        },
        {"t": 9.0, "type": "s", "model": "big", "in": 200, "out": 4, "hash_ids": [1, 2, 3]},
    ],
}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def decision(keys, tokens, at_s, **more):
    values = {"time_s": at_s, "prompt_digest": "d", "prompt_tokens": tokens, "chunks": len(keys)}
    return {**values, "chunk_keys": list(keys), "kind": "generation", **more}


def test_exactly_these_formats_are_known():
    new = ["mooncake_sessions", "servegen", "kvcache_simulator"]
    assert list(FORMATS)[:6] == ["qwen", *new, "mooncake", "lmcache"]
    assert list(FORMATS)[6:] == ["decisions", "tracelab", "copilot", "dynamo", "lmct", "weka"]


@pytest.mark.parametrize("zipped", [False, True])
def test_mooncake(tmp_path, zipped):
    path = write_lines(tmp_path / "a.jsonl", MOONCAKE | {"timestamp": 4000}, MOONCAKE)
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))  # found by content, not by name
    trace = read_trace(path)
    assert trace.arrival_s.tolist() == [0.0, 2.5]  # sorted, from second 0
    assert trace.block_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert (trace.block_tokens, trace.unique_blocks) == (512, 3)
    assert trace.tail_tokens().tolist() == [1100 - 1024] * 2
    assert trace.prompt_tokens.tolist() == [1100, 1100]


def test_qwen_ids_are_chained_and_chats_are_sessions(tmp_path):
    child = QWEN | {"chat_id": 2, "parent_chat_id": 1, "hash_ids": [8, 9, 11]}
    other = QWEN | {"chat_id": 3, "hash_ids": [7, 9, 10]}  # 9 and 10 after another prefix
    trace = read_trace(write_lines(tmp_path / "q.jsonl", QWEN, child, other))
    assert trace.block_ids.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert trace.sessions.tolist() == [0, 0, 2]  # a session is named after its first chat
    assert trace.block_tokens == 16


def test_lmcache_folders_and_models(tmp_path):
    write_lines(tmp_path / "lookup_hashes_20260401_1_000000.jsonl", LMCACHE)
    again = LMCACHE | {"timestamp": LMCACHE["timestamp"] + 2}
    write_lines(
        tmp_path / "lookup_hashes_20260401_2_000001.jsonl", again, again | {"model_name": "other"}
    )
    trace = read_trace(tmp_path)
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2, 3]
    assert trace.arrival_s.tolist() == [0, 2, 2]
    assert (trace.block_tokens, trace.prompt_tokens.tolist()) == (256, [600] * 3)


def test_lmcache_lines_are_those_that_lmcache_writes(tmp_path):
    from types import SimpleNamespace

    from lmcache.v1.mp_observability.subscribers.logging.lookup_hash import (
        LookupHashLogConfig,
        LookupHashLoggingSubscriber,
    )

    writer = LookupHashLoggingSubscriber(LookupHashLogConfig(output_dir=str(tmp_path)))
    for at_s, hashes in ((10.0, [b"\x01" * 32, b"\x02" * 32]), (11.5, [b"\x01" * 32])):
        metadata = {"chunk_hashes": hashes, "model_name": "m", "chunk_size": 4, "seq_len": 9}
        writer._on_lookup_hashes(SimpleNamespace(metadata=metadata, timestamp=at_s))
    writer.shutdown()
    trace = read_trace(tmp_path)
    assert trace.block_ids.tolist() == [0, 1, 0]
    assert trace.arrival_s.tolist() == [0.0, 1.5]


def test_decision_logs_give_their_generations(tmp_path):
    records = [
        decision(["a", "b"], 70, 100.0),
        decision(["a"], 40, 101.0, kind="expiry"),
        decision(["a", "b", "c"], 96, 103.0),
        decision([], 5, 104.0),
    ]
    trace = read_trace(write_lines(tmp_path / "d.jsonl", *records))
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2]
    assert trace.arrival_s.tolist() == [0, 3, 4]
    assert trace.block_tokens == 32  # the power of two that fits 70 // 2 and 96 // 3


def test_decision_records_that_this_kit_writes(tmp_path):
    path = tmp_path / "log.jsonl"
    keys = tuple(f"{number:064x}" for number in range(3))
    records = [
        DecisionRecord(50.0, "d", prompt_tokens=70, chunks=2, chunk_keys=keys[:2]),
        DecisionRecord(52.0, "d", prompt_tokens=70, kind="expiry", chunk_keys=keys[:2]),
        DecisionRecord(60.5, "e", prompt_tokens=99, chunks=3, chunk_keys=keys, session="s"),
    ]
    write_records(path, records)
    assert detect_format(path) == "decisions"
    trace = read_trace(path)
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2]
    assert (trace.block_tokens, trace.arrival_s.tolist()) == (32, [0.0, 10.5])
    assert trace.sessions[0] != trace.sessions[1]  # by its prefix the second continues the first
    more = DecisionRecord(
        60.6, "f", prompt_tokens=35, chunks=1, chunk_keys=("f" * 64,), session="s"
    )
    write_records(path, [more])
    first, second, third = read_trace(path).sessions
    assert first != second == third
    write_records(path, [DecisionRecord(61.0, "f", prompt_tokens=64, chunks=2)])
    with pytest.raises(ValueError, match="line 5: chunk_keys is missing"):
        read_trace(path)


def test_a_decision_log_is_a_folder_of_rotated_files(tmp_path):
    keys = tuple(f"{number:064x}" for number in range(3))
    with DecisionLog(tmp_path, max_bytes=1) as log:  # a file a record
        for time_s in (50.0, 53.0, 51.0):
            log.append(DecisionRecord(time_s, "d", 70, 2, chunk_keys=keys[:2]))
    with DecisionLog(tmp_path) as log:  # another writer, meanwhile
        log.append(DecisionRecord(50.5, "e", 99, 3, chunk_keys=keys, prompt='"hash_ids"'))
        log.append(DecisionRecord(52.0, "d", 70, 2, kind="expiry", chunk_keys=keys[:2]))
    assert len(list(tmp_path.iterdir())) == 4
    for format in (None, "decisions"):
        trace = read_trace(tmp_path, format)
        assert trace.arrival_s.tolist() == [0.0, 0.5, 1.0, 3.0]
        assert trace.block_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1]
        assert trace.block_tokens == 32  # fits the records of all files
    (tmp_path / "run.json").write_text("{}")  # what a run leaves beside its log
    assert detect_format(tmp_path) == "decisions"


@pytest.mark.parametrize("format, line", [("mooncake", MOONCAKE), ("qwen", QWEN)])
def test_lines_may_be_spread_over_a_folder(tmp_path, format, line):
    write_lines(tmp_path / "a.jsonl", line)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(line).encode()))
    assert detect_format(tmp_path) == format
    assert read_trace(tmp_path).requests == 2


def test_agentic_sessions_with_sub_agents(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps(SESSION))
    trace = read_trace(file)
    assert trace.arrival_s.tolist() == [0.0, 6.0, 9.0]  # the sub-agent's clock starts at 5
    assert trace.block_ids.tolist() == [0, 1, 2, 0, 1, 3]  # id 1 of another model is another
    assert trace.sessions.tolist() == [0, 0, 0]


def test_agentic_folders_are_overlaid_at_the_chosen_rate(tmp_path):
    for number in range(40):
        text = json.dumps(SESSION)
        (tmp_path / f"{number:03d}.json.gz").write_bytes(gzip.compress(text.encode()))
    one = read_trace(tmp_path, seed=3, sessions_per_hour=60)
    assert one.requests == 120 and one.unique_blocks == 160  # ids are local to a file
    assert np.array_equal(one.arrival_s, np.sort(one.arrival_s))
    assert 0.5 < one.span_s / (40 * 60) < 2
    again = read_trace(tmp_path, seed=3, sessions_per_hour=60)
    assert np.array_equal(one.arrival_s, again.arrival_s)
    faster = read_trace(tmp_path, seed=3, sessions_per_hour=600)
    assert faster.span_s < one.span_s / 5
    assert read_trace(tmp_path, max_sessions=5).requests == 15


BAD = {
    "no JSON": ("{not json", "Expecting"),
    "no object": ("[1]", "JSON object"),
    "missing": (json.dumps({k: v for k, v in MOONCAKE.items() if k != "hash_ids"}), "hash_ids"),
    "text": (json.dumps(MOONCAKE | {"timestamp": "x"}), "must be a number or an ISO date"),
    "nan": (json.dumps(MOONCAKE | {"timestamp": float("nan")}), "timestamp must be a number"),
    "negative": (json.dumps(MOONCAKE | {"input_length": -1}), "input_length must be"),
    "fraction": (json.dumps(MOONCAKE | {"input_length": 1100.5}), "input_length must be"),
    "huge": (json.dumps(MOONCAKE | {"input_length": 2**40}), "input_length must be"),
    "ids": (json.dumps(MOONCAKE | {"hash_ids": [1, "a"]}), "hash_ids must be a list"),
    "floats": (json.dumps(MOONCAKE | {"hash_ids": [1.5]}), "hash_ids must be a list"),
    "nested": (json.dumps(MOONCAKE | {"hash_ids": [[1], [2]]}), "hash_ids must be a list"),
    "ragged": (json.dumps(MOONCAKE | {"hash_ids": [[1], [2, 3]]}), "hash_ids must be a list"),
    "true": (json.dumps(MOONCAKE | {"hash_ids": [True, False]}), "hash_ids must be a list"),
    "some true": (json.dumps(MOONCAKE | {"hash_ids": [4, True]}), "hash_ids must be a list"),
    "vast ids": (json.dumps(MOONCAKE | {"hash_ids": [4, 2**70]}), "list of 64-bit integers"),
    "twice": (json.dumps(MOONCAKE | {"hash_ids": [7, 8, 7]}), "a block twice .*, got 7 again"),
    "moved": (
        json.dumps(MOONCAKE | {"hash_ids": [70, 71, 9]}),
        "id 9 follows 71 here and 5 before: ids must be prefix-chained",
    ),
    "first": (
        json.dumps(MOONCAKE | {"input_length": 512, "hash_ids": [5]}),
        "id 5 follows nothing here and 4 before",
    ),
    "late": (json.dumps(MOONCAKE | {"hash_ids": [6, 4]}), "id 4 follows 6 here and nothing before"),
    "too few": (json.dumps(MOONCAKE | {"hash_ids": [4]}), "1 blocks of 512 tokens are fewer"),
    "vast time": (json.dumps(MOONCAKE | {"timestamp": 10**400}), "too large"),
    "deep": ("[" * 200_000, "recursion"),
    "too many": (json.dumps(MOONCAKE | {"input_length": 100}), "3 blocks of 512 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, name):
    bad, reason = BAD[name]
    good = json.dumps(MOONCAKE)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=reason) as caught:
        read_trace(path)
    assert f"{path}, line 3: " in str(caught.value)
    trace = read_trace(path, skip_bad=True)
    assert (trace.requests, trace.skipped_lines) == (2, 1)
    assert trace.block_ids.tolist() == [0, 1, 2] * 2 and trace.unique_blocks == 3  # no trace of it


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path):
    path, good = tmp_path / "a.jsonl", json.dumps(MOONCAKE).encode()
    path.write_bytes(good + b"\n{\xff}\n" + good)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: 'utf-8' codec"):
        read_trace(path)
    assert read_trace(path, skip_bad=True).skipped_lines == 1


def test_ids_must_be_chained_where_a_format_says_so(tmp_path):
    hashes = ["0x" + "cd" * 32, LMCACHE["chunk_hashes"][1]]
    lines = {
        "lmcache": [LMCACHE, LMCACHE | {"chunk_hashes": hashes}],
        "decisions": [decision(["a", "b"], 70, 1.0), decision(["c", "b"], 70, 2.0)],
    }
    for format, records in lines.items():
        path = write_lines(tmp_path / format, *records)
        with pytest.raises(ValueError, match=rf"{format}, line 2: id 0x\S+ follows 0x\S+ here"):
            read_trace(path)
        assert read_trace(path, skip_bad=True).requests == 1
    requests = [SESSION["requests"][0], {**SESSION["requests"][2], "in": 130, "hash_ids": [3, 2]}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({**SESSION, "requests": requests}))
    with pytest.raises(ValueError, match="request 2: id 2 follows 3 here and 1 before"):
        read_trace(path)
    same = QWEN | {"hash_ids": [8, 8, 8]}  # a block's own id: its text may come again
    assert read_trace(write_lines(tmp_path / "q", same)).unique_blocks == 3


def test_a_bad_first_line_decides_nothing_for_the_others(tmp_path):
    bad = LMCACHE | {"chunk_size": 7, "seq_len": 1}
    path = write_lines(tmp_path / "l", bad, LMCACHE)
    trace = read_trace(path, skip_bad=True)
    assert (trace.block_tokens, trace.requests, trace.skipped_lines) == (256, 1, 1)
    records = [decision([], 9, 0.0, chunk_keys=5), decision(["a"], 1, 0.0), decision(["a"], 40, 1)]
    records[1]["chunk_keys"] = ["a", "b", "c"]  # more chunks than tokens
    path = write_lines(tmp_path / "d", *records)
    with pytest.raises(ValueError, match="d, line 1: chunk_keys must be a list"):
        read_trace(path)
    assert read_trace(path, skip_bad=True).block_tokens == 32


def damaged(data):
    """Change bytes in the middle of gzipped data."""
    half = len(data) // 2
    return data[:half] + bytes(255 - byte for byte in data[half : half + 40]) + data[half + 40 :]


BAD_FILES = {
    "cut short": lambda data: data[:-20],
    "damaged": damaged,
    "no gzip": lambda data: b"\x1f\x8b" + bytes(40),
    "deep": lambda data: b"[" * 200_000,
    "no text": lambda data: b"\xff\xfe\xfd",
    "no time": lambda data: json.dumps(
        {**SESSION, "requests": [SESSION["requests"][0], {**SESSION["requests"][2], "t": "x"}]}
    ).encode(),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_session_file_is_named_or_skipped_and_counted(tmp_path, name, capsys):
    data = gzip.compress(json.dumps({**SESSION, "id": "x" * 200}).encode())
    (tmp_path / "a.json.gz").write_bytes(data)
    (tmp_path / "b.json.gz").write_bytes(BAD_FILES[name](data))
    with pytest.raises(ValueError, match=r"b\.json\.gz, line 1: "):
        read_trace(tmp_path)
    trace = read_trace(tmp_path, skip_bad=True)
    assert (trace.requests, trace.skipped_lines) == (3, 1)
    assert main(["--trace", str(tmp_path), "--cache-dir", ""]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("at", ["first line", "later"])
def test_a_damaged_gzip_of_lines_is_an_error_also_where_bad_lines_are_skipped(tmp_path, at, capsys):
    rng, path = np.random.default_rng(0), tmp_path / "a.jsonl.gz"
    first = {"timestamp": 0, "input_length": 0, "hash_ids": []}
    lines = [first | {"x": rng.bytes(99).hex()} for _ in range(1 if at == "first line" else 9000)]
    path.write_bytes(damaged(gzip.compress(write_lines(tmp_path / "b", *lines).read_bytes())))
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line \d+: "):
            read_trace(path, skip_bad=skip_bad)
    assert main(["--trace", str(path), "--cache-dir", ""]) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # a slow machine shows a bar before it
    assert error.startswith(f"error: {path}, line ")
    assert main(["--trace", str(tmp_path), "--format", "mooncake", "--cache-dir", ""]) == 1


@pytest.mark.parametrize("zipped", [False, True])
def test_lines_have_a_longest_length(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(opening, "LINE_LIMIT", 1 << 20)
    good, path = json.dumps(MOONCAKE), tmp_path / "a.jsonl"
    fits = good + " " * ((1 << 20) - len(good))
    text = f"{good}\n{fits}\n{fits} \n{fits * 3}\n{good}"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: line longer than 1 MiB"):
        read_trace(path)
    trace = read_trace(path, skip_bad=True)
    assert (trace.requests, trace.skipped_lines) == (3, 2)
    path.write_text(fits * 2)
    assert detect_format(path) == "mooncake"  # from its beginning
    with pytest.raises(ValueError, match="line 1: line longer than 1 MiB"):
        read_trace(path)


def test_the_longest_line_is_64_mib_and_takes_little_memory(tmp_path):
    assert (opening.LINE_LIMIT, opening.SESSION_LIMIT) == (64 << 20, 256 << 20)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b" " * (1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1: line longer than 64 MiB"):
        read_trace(path, "mooncake")
    with pytest.raises(ValueError, match="no format of"):
        read_trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_sessions_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "SESSION_LIMIT", 4 << 20)
    (tmp_path / "a.json").write_text(json.dumps(SESSION))
    data = json.dumps(SESSION).encode() + b" " * (40 << 20)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(data, compresslevel=1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"b\.json\.gz, line 1: session larger than 4 MiB"):
        read_trace(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert read_trace(tmp_path, skip_bad=True).skipped_lines == 1


@pytest.mark.parametrize("zipped", [False, True])
def test_progress_counts_the_bytes_of_the_file(tmp_path, zipped):
    path, counted = tmp_path / "a.jsonl", []
    rng = np.random.default_rng(0)
    write_lines(path, *[MOONCAKE | {"x": rng.bytes(50).hex()} for _ in range(9000)])
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    for _ in opening.text_lines(path, Source(), counted.append):
        assert sum(counted) <= path.stat().st_size
    assert sum(counted) == path.stat().st_size and max(counted) < sum(counted)


def test_a_session_that_is_broken_is_named(tmp_path):
    bad = {**SESSION, "requests": [SESSION["requests"][0], {"t": 1.0, "model": "x", "in": 5}]}
    (tmp_path / "a.json").write_text(json.dumps(SESSION))
    (tmp_path / "b.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"b\.json, line 1: request 2: 'hash_ids' is missing"):
        read_trace(tmp_path)
    trace = read_trace(tmp_path, skip_bad=True)
    assert (trace.requests, trace.skipped_lines) == (4, 1)


def test_a_gzip_file_cut_short_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    rng = np.random.default_rng(0)
    lines = [MOONCAKE | {"hash_ids": rng.integers(0, 10**9, 3).tolist()} for _ in range(3000)]
    path.write_bytes(gzip.compress(write_lines(tmp_path / "b", *lines).read_bytes())[:-2000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line \d+: "):
        read_trace(path)


def test_unknown_things_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "absent")
    path = write_lines(tmp_path / "a.jsonl", {"x": 1})
    with pytest.raises(ValueError, match="no format of"):
        read_trace(path)
    with pytest.raises(ValueError, match="format must be one of"):
        read_trace(path, format="csv")
    with pytest.raises(ValueError, match="sessions_per_hour must be > 0"):
        read_trace(path, sessions_per_hour=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty, line 1: no format of"):
        read_trace(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty: no \*.json or \*.json.gz file in this folder"):
        read_trace(tmp_path / "empty", "weka")


def test_a_file_without_a_request_is_refused_and_an_empty_trace_works(tmp_path):
    (tmp_path / "e.jsonl").write_text("\n")
    for format in (None, "mooncake", "weka"):
        with pytest.raises(ValueError, match=r"e\.jsonl.* (the file is empty|not JSON)"):
            read_trace(tmp_path / "e.jsonl", format)
    expiries = write_lines(tmp_path / "x.jsonl", decision(["a"], 40, 101.0, kind="expiry"))
    with pytest.raises(ValueError, match="no request in it"):
        read_trace(expiries)
    empty = make_trace([])
    assert (empty.requests, empty.accesses, empty.span_s) == (0, 0, 0.0)


def test_the_compact_copy_is_equal_and_follows_the_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", MOONCAKE)
    first = read_trace(path, cache_dir=tmp_path / "cache")
    second = read_trace(path, cache_dir=tmp_path / "cache")
    assert np.array_equal(first.block_ids, second.block_ids) and repr(first) == repr(second)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    write_lines(path, MOONCAKE, MOONCAKE)
    assert read_trace(path, cache_dir=tmp_path / "cache").requests == 2


OPTIONS = [
    *({}, {"progress": True}, {"seed": 7}, {"sessions_per_hour": 60}, {"max_sessions": 2}),
    *({"sessions_per_hour": 60.0}, {"skip_bad": True}),
]


@pytest.mark.parametrize("name, copies", [("mooncake", 2), ("weka", 5)])
def test_a_copy_is_shared_by_all_options_that_it_does_not_depend_on(tmp_path, name, copies):
    write_lines(tmp_path / "a.jsonl", MOONCAKE)
    for number in range(3):
        (tmp_path / f"{number}.json").write_text(json.dumps(SESSION))
    path = tmp_path / "a.jsonl" if name == "mooncake" else tmp_path
    for options in OPTIONS:
        for format in (None, name) if name == "mooncake" else (name,):
            trace = read_trace(path, format, cache_dir=tmp_path / "cache", **options)
            fresh = read_trace(path, format, **options)
            assert np.array_equal(trace.arrival_s, fresh.arrival_s) and repr(trace) == repr(fresh)
    assert len(list((tmp_path / "cache").iterdir())) == copies


def test_the_command_and_the_notebook_share_a_copy(tmp_path, monkeypatch):
    (tmp_path / "mooncake").mkdir()
    path = write_lines(tmp_path / "mooncake" / "conversation_trace.jsonl", MOONCAKE)
    monkeypatch.setenv("KV_TRACE_DIR", str(tmp_path))
    traces_at_hand(cache_dir=tmp_path / "cache")
    assert main(["--trace", str(path), "--cache-dir", str(tmp_path / "cache")]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_that_is_no_copy_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="not a trace file"):
        load_trace(tmp_path / "x.npz")
    save_trace(fixtures.sample(), tmp_path / "y.npz")
    assert repr(read_trace(tmp_path / "y.npz")) == repr(fixtures.sample())


def test_a_bad_copy_is_named_and_read_anew(tmp_path):
    path, cache = write_lines(tmp_path / "a.jsonl", MOONCAKE), tmp_path / "cache"
    wanted = read_trace(path, cache_dir=cache)
    (copy,) = cache.iterdir()
    good = copy.read_bytes()
    for bad in (good[:-300], b"PK\x03\x04" + bytes(50), b"", good.replace(b"<i4", b"|O4")):
        copy.write_bytes(bad)
        with pytest.raises(ValueError, match="is not a trace file of this kit"):
            load_trace(copy)
        with pytest.warns(UserWarning, match=r"is not a trace file.*a\.jsonl is read anew"):
            assert repr(read_trace(path, cache_dir=cache)) == repr(wanted)
        assert copy.read_bytes() == good


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"block_ids": np.array([0, 1, 0], np.int64)}, "block_ids must be int32"),
        ({"block_ids": np.array([0, 1, 0], object)}, "allow_pickle"),
        ({"block_ids": int32(0, 1, 2)}, r"block_ids must be 0\.\.1"),
        ({"block_ids": int32(0, -1, 1)}, r"block_ids must be 0\.\.1"),
        ({"block_ids": int32([0, 1, 0])}, "block_ids must be int32, shape"),
        ({"offsets": np.array([0, 2])}, "offsets must be one more"),
        ({"offsets": np.array([1, 2, 3])}, "offsets must ascend"),
        ({"offsets": np.array([0, 2, 4])}, "offsets must ascend"),
        ({"offsets": np.array([0, 4, 3])}, "offsets must ascend"),
        ({"arrival_s": np.array([1.0, 0.0])}, "arrival_s must ascend"),
        ({"arrival_s": np.array([0.0, np.nan])}, "arrival_s must ascend"),
        ({"arrival_s": np.array([0.0, 1.1e12])}, "arrival_s must ascend within 1e[+]12 s"),
        ({"generation_s": np.array([0, 2e12], np.float32)}, "generation_s must be 0..1e[+]12"),
        ({"sessions": int32(0)}, "sessions must be one a request"),
        ({"prompt_tokens": int32(-1, 5)}, "tokens and skipped_lines >= 0"),
        ({"block_tokens": 0}, "block_tokens must be >= 1"),
        ({"block_tokens": "x"}, "block_tokens must be one integer"),
        ({"unique_blocks": 2**40}, "unique_blocks must be <="),
        ({"name": 5}, "name must be one text"),
        ({"version": "x"}, "not a trace file"),
    ],
)
def test_a_copy_with_other_values_is_refused(tmp_path, values, reason):
    trace, path = make_trace([[0, 1], [0]], [0.0, 1.0]), tmp_path / "t.npz"
    plain = {name: getattr(trace, name) for name in trace.__dataclass_fields__}
    np.savez(path, **{"version": CACHE_VERSION, **plain})
    assert repr(load_trace(path)) == repr(trace)
    np.savez(path, **{"version": CACHE_VERSION, **plain, **values})
    with pytest.raises(ValueError, match=reason) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)


def test_the_second_read_parses_nothing(tmp_path, monkeypatch):
    path, cache = write_lines(tmp_path / "a.jsonl", MOONCAKE), tmp_path / "cache"
    first = read_trace(path, cache_dir=cache)

    def never(files, source):
        raise AssertionError("parsed again")

    monkeypatch.setitem(FORMATS, "mooncake", FORMATS["mooncake"]._replace(read=never))
    assert repr(read_trace(path, cache_dir=cache)) == repr(first)
    with pytest.raises(AssertionError, match="parsed again"):
        read_trace(path)


@pytest.mark.parametrize("distinct", [True, False])
def test_memory_is_at_most_40_bytes_per_access(distinct):
    builder = TraceBuilder(16)
    rng, accesses = np.random.default_rng(0), 400_000
    builder.add([1, 2], 0.0, 32)  # compiled before memory is counted
    tracemalloc.start()
    for number in range(accesses // 20):
        first = 20 * int(rng.integers(1, 2**36 if distinct else 50))
        builder.add(range(first, first + 20), float(number), 320)
    trace = builder.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trace.accesses >= accesses
    assert peak / trace.accesses <= 40


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30), max_size=20))
def test_dense_ids_equal_a_dictionary(rows):
    dense, expected = DenseIds(), {}
    for row in rows:
        got = dense.ids(np.array(row, np.int64)).tolist()
        assert got == [expected.setdefault(key, len(expected)) for key in row]


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=40), st.integers(1, 2000))
def test_a_row_that_is_not_chained_is_forgotten_whole(rows, factor):
    dense, numbers, parents = DenseIds(), {}, {}
    for row in rows:
        row = [value * factor << 9 for value in row]
        new, known = dict(parents), dict(numbers)
        right = all(new.setdefault(b, a) == a for a, b in zip([None, *row], row))
        ids = [known.setdefault(key, len(known)) for key in row]
        if right:
            numbers, parents = known, new
            assert dense.prefixes(np.array(row, np.int64)).tolist() == ids
        else:
            with pytest.raises(ValueError, match="prefix-chained"):
                dense.prefixes(np.array(row, np.int64))
        assert len(dense) == len(numbers)


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=20))
def test_chained_ids_are_equal_where_prefixes_are(rows):
    builder, expected = TraceBuilder(1, chained=False), {}
    for row in rows:
        builder.add(row, 0.0, len(row))
    trace = builder.finish()
    for number, row in enumerate(rows):
        prefixes = [tuple(row[: k + 1]) for k in range(len(row))]
        wanted = [expected.setdefault(prefix, len(expected)) for prefix in prefixes]
        assert trace.request(number).tolist() == wanted


@pytest.mark.parametrize("name", ["sample", "conversation", "agentic"])
def test_every_block_has_one_parent(name):
    trace = fixtures.real_or_sample().get(name, fixtures.sample())
    parents = np.concatenate([[-1], trace.block_ids[:-1]])
    parents[trace.offsets[:-1][trace.blocks > 0]] = -1
    pairs = np.unique(np.stack([trace.block_ids, parents]), axis=1)
    assert pairs.shape[1] == trace.unique_blocks


def test_conversation_is_as_published():
    trace = fixtures.conversation()
    if trace is None:
        trace = fixtures.sample()
        assert (trace.requests, trace.accesses, trace.unique_blocks) == SAMPLE_FIGURES
    else:
        assert (trace.requests, trace.accesses, trace.unique_blocks) == (12031, 288500, 182790)


SAMPLE_FIGURES = (600, 21777, 1295)


def test_the_sample_in_data_is_the_generators(tmp_path):
    made = agent_loops(**SAMPLE)
    fixtures.write_mooncake(made, tmp_path / "s.jsonl.gz")
    again = read_trace(tmp_path / "s.jsonl.gz")
    assert np.array_equal(again.block_ids, fixtures.sample().block_ids)
    assert np.array_equal(again.arrival_s, fixtures.sample().arrival_s)
    assert fixtures.SAMPLE_FILE.stat().st_size < 100_000


def test_generated_traces_are_seeded_and_checked():
    one, two = agent_loops(50, seed=1), agent_loops(50, seed=1)
    assert np.array_equal(one.block_ids, two.block_ids)
    assert not np.array_equal(one.arrival_s, agent_loops(50, seed=2).arrival_s)
    for name, value in (("requests", 0), ("turns", 0.5), ("pause_s", 0), ("agents", float("inf"))):
        with pytest.raises(ValueError, match=f"{name} must be"):
            agent_loops(**{"requests": 10, name: value})


def test_generated_tool_calls_come_back_sooner_than_people():
    trace = agent_loops(2000, seed=1, tool_share=0.7)
    waits_s = {1: [], 2: []}
    for session in np.unique(trace.sessions):
        rows = np.flatnonzero(trace.sessions == session)
        assert trace.finish[rows[-1]] == 2  # nothing is pending at a session's end
        for code, wait_s in zip(trace.finish[rows], np.diff(trace.arrival_s[rows])):
            waits_s[code].append(wait_s)
    share = len(waits_s[1]) / (len(waits_s[1]) + len(waits_s[2]))
    assert share == pytest.approx(0.7, abs=0.03)
    assert 8 < np.median(waits_s[2]) / np.median(waits_s[1]) < 18  # twelve times
    assert not agent_loops(20).finish.any()  # by default nobody says
    with pytest.raises(ValueError, match=r"tool_share must be None or 0\.\.1, got 1\.5"):
        agent_loops(20, tool_share=1.5)


def test_sessions_are_guessed_from_prefixes():
    trace = make_trace([[0, 1, 2], [0, 9], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5]])
    assert trace.sessions.tolist() == [0, 1, 0, 0]


def test_head_and_tiled():
    trace = fixtures.random_trace(1)
    head = trace.head(10)
    assert head.requests == 10 and head.unique_blocks == head.block_ids.max() + 1
    twice = tiled(trace, 2 * trace.accesses)
    assert twice.requests == 2 * trace.requests
    assert np.all(np.diff(twice.arrival_s) >= 0)

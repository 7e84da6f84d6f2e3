"""Readers: every format, ordinary and broken; ids, order, memory, the compact copy."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc

import numpy as np
import pytest
import trace_fixtures as fixtures
from hypothesis import given
from hypothesis import strategies as st

from decision_log import DecisionRecord, write_records
from trace_builder import DenseIds, TraceBuilder, make_trace
from trace_data import load_trace, save_trace
from trace_formats import FORMATS
from trace_generator import SAMPLE, agent_loops, tiled, write_mooncake
from trace_readers import detect_format, read_trace

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
    assert list(FORMATS) == ["mooncake", "weka", "qwen", "lmcache", "decisions"]


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
        DecisionRecord(60.5, "e", prompt_tokens=99, chunks=3, chunk_keys=keys),
    ]
    write_records(path, records)
    assert detect_format(path) == "decisions"
    trace = read_trace(path)
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2]
    assert (trace.block_tokens, trace.arrival_s.tolist()) == (32, [0.0, 10.5])
    write_records(path, [DecisionRecord(61.0, "f", prompt_tokens=64, chunks=2)])
    with pytest.raises(ValueError, match="line 4: chunk_keys is missing"):
        read_trace(path)


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
    "text": (json.dumps(MOONCAKE | {"timestamp": "x"}), "timestamp must be a number"),
    "nan": (json.dumps(MOONCAKE | {"timestamp": float("nan")}), "timestamp must be a number"),
    "negative": (json.dumps(MOONCAKE | {"input_length": -1}), "input_length must be"),
    "fraction": (json.dumps(MOONCAKE | {"input_length": 1100.5}), "input_length must be"),
    "huge": (json.dumps(MOONCAKE | {"input_length": 2**40}), "input_length must be"),
    "ids": (json.dumps(MOONCAKE | {"hash_ids": [1, "a"]}), "hash_ids must be a list"),
    "floats": (json.dumps(MOONCAKE | {"hash_ids": [1.5]}), "hash_ids must be a list"),
    "nested": (json.dumps(MOONCAKE | {"hash_ids": [[1], [2]]}), "hash_ids must be a list"),
    "ragged": (json.dumps(MOONCAKE | {"hash_ids": [[1], [2, 3]]}), "inhomogeneous"),
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
    with pytest.raises(ValueError, match="no .json"):
        read_trace(tmp_path / "empty")


def test_an_empty_file_is_refused_and_an_empty_trace_works(tmp_path):
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(ValueError, match="line 1"):
        read_trace(tmp_path / "e.jsonl")
    empty = read_trace(tmp_path / "e.jsonl", format="mooncake")
    assert (empty.requests, empty.accesses, empty.span_s) == (0, 0, 0.0)


def test_the_compact_copy_is_equal_and_follows_the_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", MOONCAKE)
    first = read_trace(path, cache_dir=tmp_path / "cache")
    second = read_trace(path, cache_dir=tmp_path / "cache")
    assert np.array_equal(first.block_ids, second.block_ids) and repr(first) == repr(second)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    write_lines(path, MOONCAKE, MOONCAKE)
    assert read_trace(path, cache_dir=tmp_path / "cache").requests == 2


def test_a_file_that_is_no_copy_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="not a trace file"):
        load_trace(tmp_path / "x.npz")
    save_trace(fixtures.sample(), tmp_path / "y.npz")
    assert repr(read_trace(tmp_path / "y.npz")) == repr(fixtures.sample())


def test_second_load_takes_at_most_a_fifth_of_a_second(tmp_path):
    trace = fixtures.conversation() or agent_loops(12_000, seed=0)
    save_trace(trace, tmp_path / "t.npz")
    seconds = []
    for _ in range(5):
        start_s = time.perf_counter()
        load_trace(tmp_path / "t.npz")
        seconds.append(time.perf_counter() - start_s)
    assert np.median(seconds) <= 0.2


@pytest.mark.parametrize("distinct", [True, False])
def test_memory_is_at_most_40_bytes_per_access(distinct):
    builder = TraceBuilder(16)
    rng, accesses = np.random.default_rng(0), 400_000
    builder.add([1, 2], 0.0, 32)  # compiled before memory is counted
    tracemalloc.start()
    for number in range(accesses // 20):
        builder.add(rng.integers(0, 2**40 if distinct else 1000, 20), float(number), 320)
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
    write_mooncake(made, tmp_path / "s.jsonl.gz")
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

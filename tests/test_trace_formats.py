"""Each format's sample, made by us to its documented schema, against counts made by hand."""

from __future__ import annotations

import copy
import json
import lzma
import math

import msgspec
import numpy as np
import pytest
import zstandard

from caching_heuristics import HeuristicConfig
from kvttl.policies.template import Template
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.policies import Plan
from kvttl.traces.formats import FORMATS
from kvttl.traces.overlay import overlaid
from kvttl.traces.readers import mooncake
from kvttl.traces.reading import detect_format, read_trace
from kvttl.traces.trace import load_trace, save_trace


def event(kind, second):
    return {"event_type": kind, "timestamp": f"2026-06-01T00:00:{second:06.3f}Z"}


def tool(name, start, end):
    times = (f"2026-06-01T00:00:{second:06.3f}Z" for second in (start, end))
    return dict(zip(("tool_name", "emitted_at", "result_at"), (name, *times)))


TRACELAB = [
    {
        **{"session_id": "claude:1", "round_index": 0, "provider": "claude", "model": "opus"},
        **{"input_tokens_total": 200, "prefix_tokens": 0, "newly_append_tokens": 200},
        **{"output_tokens": 30, "first_input_event_type": "user_message", "user": "u1"},
        "timing_events": [event("user_message", 1.0), event("tool_call", 4.0)],
        "tools": [tool("Read", 4.0, 5.0), tool("Bash", 4.0, 6.5)],
    },
    {
        **{"session_id": "claude:1", "round_index": 1, "provider": "claude", "model": "opus"},
        **{"input_tokens_total": 300, "prefix_tokens": 200, "newly_append_tokens": 100},
        **{"output_tokens": 9, "first_input_event_type": "tool_result", "user": "u1"},
        "timing_events": [event("tool_result", 6.5), event("tool_result", 7.0), event("text", 9.0)],
        "tools": [],
    },
    {  # after a long pause the provider's cache holds one block of it
        **{"session_id": "claude:1", "round_index": 2, "provider": "claude", "model": "opus"},
        **{"input_tokens_total": 320, "prefix_tokens": 70, "newly_append_tokens": 250},
        **{"output_tokens": 9, "first_input_event_type": "user_message", "user": "u1"},
        "timing_events": [event("user_message", 50.0), event("text", 51.0)],
    },
]


def call(name, second, prompt, cached, initiator="agent", model="Model A"):
    return {
        **{"message_id": name, "timestamp": f"2026-06-01T00:00:{second:02d}", "duration_ms": 1500},
        **{"initiator_type": initiator, "model": model, "result": "Success"},
        "tokens": {"total": prompt + 5, "prompt": prompt, "completion": 5, "cached": cached},
    }


COPILOT = [
    {
        **{"session_id": "s", "date": "2026-06-01"},
        "turns": [
            {
                "turn_id": "t0",
                "llm_calls": [
                    call("m0", 0, 130, 0, "user"),
                    call("m1", 4, 260, 128),
                    call("m2", 5, 64, 0, model="Model B"),
                ],
                "tool_batches": [
                    {
                        **{"timestamp": "2026-06-01T00:00:02", "duration_ms": 2000.0},
                        "request_id": "m0",
                        "function_calls": [{"name": "read_file", "status": 1, "duration_ms": 9.0}],
                    }
                ],
            },
            {"turn_id": "t1", "llm_calls": [call("m3", 30, 192, 192, "user")], "tool_batches": []},
        ],
    }
]
SESSIONS = [  # ids that are not chained; lines that wait
    {
        **{"request_id": "a", "session_id": "x", "timestamp": 1000, "input_length": 1024},
        **{"output_length": 20, "hash_ids": [1, 2], "prefix_reset": True},
        "tool_events": [
            {
                **{"tool_call_id": "c", "tool_class": "web", "status": "succeeded"},
                **{"started_at_unix_ms": 5000, "ended_at_unix_ms": 5500, "duration_ms": 500},
            }
        ],
    },
    {
        **{"request_id": "b", "session_id": "x", "delay": 100, "tool_wait_ms": 500},
        **{"wait_for": ["a"], "input_length": 1536, "output_length": 10, "hash_ids": [1, 2, 7]},
    },
    {"session_id": "x", "delay": 400, "output_length": 10, "hash_ids": [1, 2, 7, 8]},
    {"session_id": "y", "timestamp": 2000, "input_length": 512, "hash_ids": [2]},
]


def request_end(name, received, ended, hashes, trajectory="t", **more):
    return {
        "timestamp": 5,
        "event": {
            **{"schema": "dynamo.agent.trace.v1", "event_type": "request_end"},
            **{"event_time_unix_ms": ended, "event_source": "dynamo"},
            "agent_context": {"session_id": "run", "trajectory_id": trajectory},
            "request": {
                **{"request_id": name, "model": "m", "output_tokens": 16},
                "request_received_ms": received,
                "replay": {
                    **{"trace_block_size": 64, "input_length": 64 * len(hashes)},
                    "input_sequence_hashes": hashes,
                },
                **more,
            },
        },
    }


BIG_HASH = 14879255164371896291
DYNAMO = [
    request_end(
        *("r0", 1000, 3000, [BIG_HASH, 7]),
        finish_reason_metadata={"finish_reason": "tool_calls", "tool_calls": [{"name": "web"}]},
    ),
    {
        "timestamp": 9,
        "event": {
            **{"schema": "dynamo.agent.trace.v1", "event_type": "tool_end"},
            "event_time_unix_ms": 4500,
            "agent_context": {"session_id": "run", "trajectory_id": "t"},
            "tool": {
                **{"tool_call_id": "c", "tool_class": "web_search", "status": "succeeded"},
                **{"started_at_unix_ms": 3080, "ended_at_unix_ms": 3500, "duration_ms": 420.0},
            },
        },
    },
    request_end("r1", 5000, 6000, [BIG_HASH, 7, 8]),
]
SERVEGEN = [
    {"request_id": 0, "type": "multimodal", "input_length": 40, "hash_ids": [5, 6], "img_ids": []},
    {"request_id": 1, "type": "text", "input_length": 48, "hash_ids": [5, 6, 9], "img_ids": []},
]
SIMULATOR = [
    {"block_size": 64, "hash_ids": [2001, 2002], "input_length": 128},
    {"block_size": 64, "hash_ids": [2001, 2003], "input_length": 100, "output_length": 4},
]
SAMPLES = {
    "tracelab": TRACELAB,
    "copilot": COPILOT,
    "mooncake_sessions": SESSIONS,
    "dynamo": DYNAMO,
    "servegen": SERVEGEN,
    "kvcache_simulator": SIMULATOR,
}
OPTIONS = {"mooncake_sessions": {"output_rate": 100.0}}


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sample(tmp_path, name):
    return read_trace(written(tmp_path / f"{name}.jsonl", SAMPLES[name]), **OPTIONS.get(name, {}))


def named(trace, column):
    return [str(trace.names[code]) if code >= 0 else None for code in getattr(trace, column)]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_known_and_its_copy_is_equal(tmp_path, name):
    path = written(tmp_path / "a.jsonl", SAMPLES[name])
    assert detect_format(path) == name == detect_format(tmp_path)
    trace = read_trace(path, **OPTIONS.get(name, {}))
    save_trace(trace, tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    for field in trace.__dataclass_fields__:
        one, two = getattr(trace, field), getattr(again, field)
        assert np.array_equal(one, two, equal_nan=np.asarray(one).dtype.kind == "f"), field


def test_tracelab(tmp_path):
    trace = sample(tmp_path, "tracelab")
    assert trace.block_tokens == 64 and trace.timed
    # 3 whole blocks; 3 of 200 tokens kept and 1 new; 1 of 70 kept and 4 new
    assert trace.block_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 4, 5, 6, 7]
    assert trace.prompt_tokens.tolist() == [200, 300, 320]
    assert trace.arrival_s.tolist() == [0.0, 6.0, 49.0]  # its last input
    assert trace.generation_s.tolist() == [3.0, 2.0, 1.0]
    assert (trace.finish.tolist(), trace.turn_kind.tolist()) == ([1, 2, 2], [1, 2, 1])
    assert named(trace, "tool") == ["Bash+Read", None, None] and trace.tool_s[0] == 2.5
    assert named(trace, "model") == ["opus"] * 3 and named(trace, "tenant") == ["u1"] * 3
    assert math.isnan(trace.think_s[0]) and trace.think_s[2] == 41.0
    assert trace.sessions.tolist() == [trace.sessions[0]] * 3
    path = tmp_path / "tracelab.jsonl"
    assert read_trace(path, block_tokens=100).block_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    other = [record | {"session_id": "claude:2"} for record in TRACELAB]
    assert read_trace(written(path, TRACELAB + other)).unique_blocks == 16  # nothing is shared


def test_copilot(tmp_path):
    trace = sample(tmp_path, "copilot")
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2]  # a model has its own KV
    assert trace.arrival_s.tolist() == [0, 4, 5, 30] and set(trace.generation_s) == {1.5}
    assert trace.turn_kind.tolist() == [1, 2, 2, 1] and trace.finish.tolist() == [1, 2, 2, 2]
    assert named(trace, "tool") == ["read_file", None, None, None] and trace.tool_s[0] == 2.0
    assert named(trace, "model") == ["Model A", "Model A", "Model B", "Model A"]
    assert np.isnan(trace.think_s[:3]).all() and trace.think_s[3] == 30 - 6.5
    assert trace.output_tokens.tolist() == [5] * 4


def test_mooncakes_sessions_wait_for_the_end_of_others(tmp_path):
    trace = sample(tmp_path, "mooncake_sessions")
    # a: 1.0 to 1.2 s; b: + 0.6 s, to 1.9 s; the third: + 0.4 s
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.8, 1.0, 1.3])
    assert trace.generation_s.tolist() == pytest.approx([0.2, 0.1, 0.0, 0.1])
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2, 4, 0, 1, 2, 3]  # 2 at first is another 2
    assert trace.prompt_tokens.tolist() == [1024, 1536, 512, 2048]
    assert named(trace, "tool")[0] == "web" and trace.tool_s[0] == 0.5
    assert trace.turn_kind.tolist() == [0, 2, 0, 0] and trace.think_s[3] == pytest.approx(0.4)
    assert len(set(trace.sessions[[0, 1, 3]])) == 1 and trace.sessions[2] not in trace.sessions[:2]
    path = tmp_path / "mooncake_sessions.jsonl"
    assert read_trace(path, output_rate=math.inf).arrival_s[-1] == pytest.approx(1.0)
    by_order = read_trace(path, time_unit="order")
    assert not by_order.timed and by_order.requests == 4


def test_sessions_that_may_hold_only_what_is_new_are_refused(tmp_path):
    turns = [{"session_id": "a", "timestamp": at, "hash_ids": [at + 1]} for at in range(3)]
    path = written(tmp_path / "a.jsonl", turns)
    with pytest.raises(ValueError, match="they may hold only what is new; whole prompts are want"):
        read_trace(path)
    written(path, [turns[0] | {"context_mode": "deltas_without_responses"}])
    with pytest.raises(ValueError, match="line 1: context_mode must not be of deltas, got"):
        read_trace(path)


def test_dynamo(tmp_path):
    trace = sample(tmp_path, "dynamo")
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2] and trace.block_tokens == 64
    assert trace.arrival_s.tolist() == [0, 4] and trace.generation_s.tolist() == [2, 1]
    assert named(trace, "tool") == ["web_search", None]  # a tool's own event says more
    assert trace.tool_s[0] == pytest.approx(0.42) and trace.finish.tolist() == [1, 0]
    assert named(trace, "model") == ["m", "m"] and trace.sessions[0] == trace.sessions[1]
    bare = written(tmp_path / "b.jsonl", [line["event"] for line in DYNAMO])
    assert read_trace(bare).block_ids.tolist() == trace.block_ids.tolist()
    del bare, DYNAMO_OLD[0]["event"]["request"]["request_received_ms"]
    assert read_trace(written(tmp_path / "o.jsonl", DYNAMO_OLD)).span_s == 2.0  # 3 s to 5 s


DYNAMO_OLD = copy.deepcopy(DYNAMO)


@pytest.mark.parametrize("name, size, ids", [("servegen", 16, 5), ("kvcache_simulator", 64, 4)])
def test_without_times_only_policies_that_go_by_order_run(tmp_path, name, size, ids):
    trace = sample(tmp_path, name)
    assert (trace.block_tokens, trace.accesses, trace.timed) == (size, ids, False)
    assert trace.unique_blocks == 3
    for policy in ("lru", "fifo", "recency", "optimal", "infinite"):
        result = replay(trace, policy, 0.9 if policy != "infinite" else None)
        assert np.isnan(result.block_seconds).all() and result.to_dict()["hit_blocks"]["gpu"] >= 1
    reason = "only the order of the requests of .*jsonl is known: TTLs need times; without run "
    reason += "lru, fifo, infinite, recency, optimal"
    for policy in ("ttl", "heuristic", "heuristic_order", "adaptive", "fixed", Template):
        with pytest.raises(ValueError, match=reason):
            replay(trace, policy, 2)
    with pytest.raises(ValueError, match=reason):
        replay_without_capacity(trace, HeuristicConfig(), "ttl")
    with pytest.raises(ValueError, match=reason):
        replay(trace, lambda index, config: Plan(index, ttl_s=np.ones(trace.requests)), 2)
    assert named(trace, "request_type") == (["multimodal", "text"] if ids == 5 else [None, None])


# --- what is damaged ----------------------------------------------------------------------


def changed(name, line, path, value):
    """A sample with one value replaced, or (value ...) without it."""
    records = copy.deepcopy(SAMPLES[name])
    place = records[line]
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return records


CALL = ("turns", 0, "llm_calls", 1)
REQUEST = ("event", "request")
REPLAY = (*REQUEST, "replay")
DAMAGED = [
    ("tracelab", 1, ("prefix_tokens",), 100, "input_tokens_total must be prefix_tokens + newly"),
    ("tracelab", 1, ("prefix_tokens",), "x", "prefix_tokens must be a number >= 0"),
    ("tracelab", 1, ("output_tokens",), -3, "output_tokens must be a number >= 0"),
    ("tracelab", 1, ("newly_append_tokens",), 2**31, "newly_append_tokens must be a whole number"),
    ("copilot", 0, (*CALL, "tokens", "prompt"), 2**30, "at most 1048576 blocks, got 16777216"),
    ("tracelab", 1, ("session_id",), 5, "session_id must be text, got 5"),
    ("tracelab", 2, ("round_index",), 0, "round_index must not fall, got 0 after 1"),
    ("tracelab", 1, ("timing_events",), ..., "'timing_events' is missing"),
    ("tracelab", 1, ("timing_events",), [], "timing_events must hold an event"),
    ("tracelab", 1, ("timing_events", 0, "timestamp"), "noon", "must be a number or an ISO date"),
    ("tracelab", 0, ("tools", 0, "emitted_at"), "2026-06-01T01:00:00Z", "a tool must not end be"),
    ("copilot", 0, (*CALL, "tokens", "cached"), 261, "cached must be at most the prompt's 260"),
    ("copilot", 0, (*CALL, "tokens", "prompt"), None, "prompt must be a number >= 0"),
    ("copilot", 0, (*CALL, "duration_ms"), -1.0, "duration_ms must be a number >= 0"),
    ("copilot", 0, (*CALL, "timestamp"), ..., "'timestamp' is missing"),
    ("copilot", 0, ("session_id",), [1], "session_id must be text"),
    ("copilot", 0, ("turns",), 7, "not iterable"),
    ("mooncake_sessions", 1, ("delay",), -1, "delay must be a number >= 0"),
    ("mooncake_sessions", 1, ("wait_for",), ["z"], "wait_for must name request_id of lines above"),
    ("mooncake_sessions", 1, ("hash_ids",), [1, "x"], "hash_ids must be a list of integers"),
    ("mooncake_sessions", 1, ("hash_ids",), ..., "'hash_ids' is missing"),
    ("mooncake_sessions", 0, ("timestamp",), ..., "'timestamp' is missing"),
    ("dynamo", 2, (*REQUEST, "replay"), ..., "made without replay hashes"),
    ("dynamo", 2, (*REPLAY, "trace_block_size"), 32, "trace_block_size must be 64"),
    ("dynamo", 2, (*REPLAY, "input_sequence_hashes"), [1.5], "hash must be text or an integer"),
    ("dynamo", 2, (*REPLAY, "input_length"), 9, "3 blocks of 64 tokens are more than 9"),
    ("dynamo", 2, (*REQUEST, "request_received_ms"), 7000, "received_ms must be before event_time"),
    ("dynamo", 2, ("event", "event_time_unix_ms"), -5, "event_time_unix_ms must be a number >= 0"),
    ("dynamo", 2, (*REPLAY, "input_sequence_hashes"), [1, 7, 8], "ids must be prefix-chained"),
    ("servegen", 1, ("input_length",), 20, "3 blocks of 16 tokens are more than 20"),
    ("servegen", 1, ("hash_ids",), None, "hash_ids must be a list of integers"),
    ("kvcache_simulator", 1, ("block_size",), 32, "block_size must be 64, as other lines have it"),
    ("kvcache_simulator", 1, ("block_tokens",), [9, 64], "block_tokens must be 64 for all blocks"),
    ("kvcache_simulator", 1, ("input_length",), ..., "'input_length' is missing"),
]


@pytest.mark.parametrize("name, line, path, value, said", DAMAGED)
def test_a_damaged_sample_is_refused_with_a_sentence(tmp_path, name, line, path, value, said):
    file = written(tmp_path / "a.jsonl", changed(name, line, path, value))
    options = OPTIONS.get(name, {})
    with pytest.raises(ValueError) as caught:
        read_trace(file, name, **options)
    assert str(caught.value).startswith(f"{file}, line {line + 1}: ") and said in str(caught.value)
    if line:
        assert read_trace(file, name, skip_bad=True, **options).skipped_lines >= 1


@pytest.mark.parametrize("name", SAMPLES)
def test_a_truncated_sample_is_refused(tmp_path, name):
    text = written(tmp_path / "a.jsonl", SAMPLES[name]).read_text()
    (tmp_path / "a.jsonl").write_text(text[:-9])
    with pytest.raises(ValueError, match=f"a.jsonl, line {len(SAMPLES[name])}: not JSON"):
        read_trace(tmp_path / "a.jsonl", name, **OPTIONS.get(name, {}))


def test_delays_need_a_rate_of_output(tmp_path):
    path = written(tmp_path / "a.jsonl", SESSIONS)
    with pytest.raises(ValueError, match="line 2: delays count from the end .* OUTPUT_RATE="):
        read_trace(path)
    with pytest.raises(ValueError, match="output_rate must be > 0 tokens a second, got -1"):
        read_trace(path, output_rate=-1)


# --- LMCache's recorded calls -------------------------------------------------------------


def recorded(path, lookups, level="storage"):
    """A trace of calls, written by LMCache's own recorder."""
    from lmcache.v1.distributed.api import (
        GroupedObjectKeys,
        MemoryLayoutDesc,
        ObjectKey,
        PrefetchLockMode,
        PrefetchTaskSpec,
    )
    from lmcache.v1.mp_observability.event import Event, EventType
    from lmcache.v1.mp_observability.trace.recorder import StorageTraceRecorder

    class Recorder(StorageTraceRecorder):
        captures_calls = False  # of this process: the calls here are made up

    recorder, layout = Recorder(str(path)), MemoryLayoutDesc(shapes=[], dtypes=[])
    recorder._level = level
    for at_s, model, hashes, mode in lookups:
        keys = [ObjectKey(bytes([value]) * 32, model, 0) for value in hashes]
        spec = PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout, -1)], 1, "prefix")
        spec = PrefetchTaskSpec(spec.key_groups, 1, "prefix", PrefetchLockMode[mode])
        name = "lmcache.v1.distributed.storage_manager.StorageManager."
        for call_name, args in (("reserve_write", {}), ("submit_prefetch_task", {"spec": spec})):
            told = {"qualname": name + call_name, "args": args, "t_mono": 0.0}
            done = Event(event_type=EventType.TRACE_CALL, metadata=told, timestamp=at_s)
            recorder._on_trace_call(done)
    assert recorder.dropped_count == 0
    recorder.close()
    return path


LOOKUPS = [(10.0, "m", [1, 2], "LOCK"), (11.0, "m", [1, 2, 3], "LOCK")]
LOOKUPS += [(11.5, "m", [1, 2, 3], "NO_LOCK"), (12.0, "n", [1], "LOCK")]


def test_lmcaches_recorded_look_ups(tmp_path):
    path = recorded(tmp_path / "a.lct", LOOKUPS)
    with pytest.raises(ValueError, match=r"a\.lct, line 1: tokens of a chunk are not said"):
        read_trace(path)
    trace = read_trace(path, block_tokens=256)
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2, 3]  # nobody reads a warm-up
    assert trace.arrival_s.tolist() == [0, 1, 2] and trace.prompt_tokens.tolist() == [512, 768, 256]
    assert named(trace, "model") == ["m", "m", "n"]
    assert detect_format(path) == "lmct" == detect_format(tmp_path)


def test_lmcaches_recorded_events_and_what_is_damaged_are_refused(tmp_path):
    path = recorded(tmp_path / "e.lct", LOOKUPS, "events")
    with pytest.raises(ValueError, match="line 1: a trace of level 'events' says what was stored"):
        read_trace(path, block_tokens=256)
    whole = recorded(tmp_path / "a.lct", LOOKUPS).read_bytes()
    for cut in (5, 2000):
        path.write_bytes(whole[:-cut] if cut == 5 else whole + b"\0\0")
        for skip_bad in (False, True):
            with pytest.raises(ValueError, match=r"e\.lct, line \d+: damaged: a record is cut"):
                read_trace(path, block_tokens=256, skip_bad=skip_bad)
    content = {"type": "record", "qualname": "x.StorageManager.submit_prefetch_task", "args": {}}
    frame = msgspec.msgpack.encode(content)
    path.write_bytes(whole + len(frame).to_bytes(4, "big") + frame)
    with pytest.raises(ValueError, match=r"line 10: 'spec' is missing"):
        read_trace(path, block_tokens=256)
    assert read_trace(path, block_tokens=256, skip_bad=True).skipped_lines == 1
    path.write_bytes(whole.replace(b"\xaeformat_version\x01", b"\xaeformat_version\x02"))
    with pytest.raises(ValueError, match="line 1: format_version must be 1, got 2"):
        read_trace(path, block_tokens=256)


# --- packings -----------------------------------------------------------------------------


def parquet(records, path):
    import pyarrow
    from pyarrow.parquet import write_table

    names = dict.fromkeys(name for record in records for name in record)
    write_table(pyarrow.Table.from_pylist([dict.fromkeys(names) | r for r in records]), path)


@pytest.mark.parametrize("name", ["servegen", "kvcache_simulator", "mooncake_sessions", "tracelab"])
def test_parquet_rows_are_read_as_lines_are(tmp_path, name):
    (tmp_path / "rows").mkdir()
    parquet(SAMPLES[name], path := tmp_path / "rows" / "x.parquet")
    plain, options = sample(tmp_path, name), OPTIONS.get(name, {})
    for target in (path, path.parent):
        assert detect_format(target) == name
        trace = read_trace(target, **options)
        assert np.array_equal(trace.block_ids, plain.block_ids)
        assert np.array_equal(trace.arrival_s, plain.arrival_s)
        assert trace.names.tolist() == plain.names.tolist()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.parquet, line 1: "):
        read_trace(path, **options)


@pytest.mark.parametrize("pack", [zstandard.compress, lzma.compress])
def test_a_packed_file_that_is_cut_short_is_an_error(tmp_path, pack):
    lines = [{"timestamp": n, "input_length": 512, "hash_ids": [n * 7919 % 4099]} for n in range(9)]
    data = written(tmp_path / "a.jsonl", lines * 400).read_bytes()
    path = tmp_path / "b.jsonl"
    path.write_bytes(pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :]))
    assert read_trace(path).requests == 3600  # several frames are one file
    path.write_bytes(pack(data)[:-30])
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=r"b\.jsonl, line \d+: damaged: "):
            read_trace(path, skip_bad=skip_bad)


# --- batches of plain lines ---------------------------------------------------------------


def plain_lines(count, seed=0):
    rng, lines = np.random.default_rng(seed), []
    for at in range(count):
        old = lines[rng.integers(at)]["hash_ids"] if at else []
        ids = [*old[: rng.integers(len(old) + 1)], *range(at * 9, at * 9 + int(rng.integers(1, 9)))]
        line = {"timestamp": 7 * at, "input_length": 512 * len(ids) - 1, "output_length": at % 5}
        lines.append(line | {"hash_ids": ids})
    return lines


SPOILT = {  # of a line, and whether it is skipped
    "nothing": ({}, False),
    "moved": ({"hash_ids": [10**9, 0]}, True),
    "few": ({"input_length": 10**6}, True),
    "time": ({"timestamp": -1}, False),
    "extra": ({"note": 1}, False),
    "twice": ({"hash_ids": [10**9, 10**9]}, True),
    "below": ({"hash_ids": [-(10**9)]}, False),
    "of 64 bits": ({"hash_ids": [2**64 - 7]}, False),
    "of 65 bits": ({"hash_ids": [2**64]}, True),
    "no block": ({"hash_ids": [], "input_length": 9}, False),
    "a list in it": ({"hash_ids": [[10**9]]}, True),
    "a number": ({"hash_ids": 10**9}, True),
    "null": ({"hash_ids": None}, True),
    **{str(value): ({"hash_ids": [value]}, True) for value in (True, "7", 7.5, 7e9, {}, None)},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_lines_in_batches_are_read_as_one_by_one(tmp_path, monkeypatch, spoilt):
    lines = plain_lines(1500)
    bad, skipped = SPOILT[spoilt]
    lines[900] |= {"input_length": 700} | bad if "hash_ids" in bad else bad
    path = written(tmp_path / "a.jsonl", lines)
    fast = read_trace(path, skip_bad=True)
    batches, adds = [], mooncake._add_plain
    monkeypatch.setattr(mooncake, "_add_plain", lambda *given: batches.append(given) and False)
    slow = read_trace(path, skip_bad=True)
    assert len(batches) == 3 and adds is not mooncake._add_plain
    assert fast.skipped_lines == slow.skipped_lines == skipped
    for field in fast.__dataclass_fields__:
        one, two = getattr(fast, field), getattr(slow, field)
        assert np.array_equal(one, two, equal_nan=np.asarray(one).dtype.kind == "f"), field


def test_names_of_overlaid_traces_stay_each_ones(tmp_path):
    one, two = (sample(tmp_path, name) for name in ("tracelab", "copilot"))
    both = overlaid([one, two], [0.0, 100.0])
    for column in ("tool", "model", "tenant", "request_type"):
        assert named(both, column) == named(one, column) + named(two, column)
    assert both.timed and sorted(both.names) == sorted(set(both.names))


def test_every_reader_of_a_format_has_a_sample_here_or_in_test_trace_readers():
    elsewhere = {"qwen", "mooncake", "lmcache", "decisions", "weka", "lmct"}
    assert set(FORMATS) == elsewhere | set(SAMPLES)

"""Files that people have: figures from them are right, or a sentence says what to do instead."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from kvttl.replay.command import main
from kvttl.traces.builder import make_trace
from kvttl.traces.reading import read_trace
from kvttl.traces.trace import save_trace

ROOT = Path(__file__).resolve().parents[1]
LINE = {"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]}
LATER = {"timestamp": 1000, "input_length": 1536, "output_length": 5, "hash_ids": [1, 2, 3]}
BIG = {"input_length": 4096, "output_length": 1, "hash_ids": [1, 2, 3, 4]}


def text(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def written(path, *records):
    path.write_text(text(*records))
    return path


def replayed(path, capsys, *options):
    """The command's figures and what it said; None and its one line where it refuses."""
    status = main(["--trace", str(path), "--cache-dir", "", *options])
    out, err = capsys.readouterr()
    if status:
        *bars, said = err.splitlines()  # a bar is shown where a busy machine takes its second
        assert status == 1 and not out and said.startswith("error: ")
        assert all("%|" in line for line in bars if line)
        return None, f"{said}\n"
    return json.loads(out), err


# --- tokens of a block --------------------------------------------------------------------


def test_a_declared_block_size_beats_the_usual_one(tmp_path, capsys):
    lines = [{"timestamp": at, "block_size": 1024, **BIG} for at in (0, 1000)]
    figures, _ = replayed(written(tmp_path / "a.jsonl", *lines), capsys)
    assert (figures["token_hit_ratio"], figures["hit_tokens"]["gpu"]) == (0.5, 4096)
    small = {"block_size": 64, "hash_ids": [7, 8], "input_length": 128}
    path = written(tmp_path / "b.jsonl", *({"timestamp": at, **small} for at in (0, 1000)))
    assert replayed(path, capsys)[0]["token_hit_ratio"] == 0.5
    assert read_trace(path, block_tokens=64).block_tokens == 64
    path = written(tmp_path / "c.jsonl", {"block_size": 1024}, *({"timestamp": 0} | BIG,) * 2)
    assert read_trace(path).block_tokens == 1024  # a line of its own, for all
    chat = {"chat_id": 1, "parent_chat_id": -1, "block_size": 32, "timestamp": 0.5, "turn": 1}
    path = written(tmp_path / "q.jsonl", {**chat, "input_length": 60, "hash_ids": [1, 2]})
    assert read_trace(path).block_tokens == 32


@pytest.mark.parametrize("sizes", [(64, 32), (64, 0), (None, 64), (64, 64.5), (64, "64")])
def test_two_block_sizes_in_a_file_are_refused(tmp_path, sizes):
    lines = [{"timestamp": 0, "block_size": size, "input_length": 512} for size in sizes]
    ids = [[1] if size is None else [*range(512 // 64)] for size in sizes]
    lines = [{**line, "hash_ids": keys} for line, keys in zip(lines, ids)]
    with pytest.raises(ValueError, match="line 2: block_size must be"):
        read_trace(written(tmp_path / "a.jsonl", *lines))


def test_a_declared_block_size_and_another_asked_for_are_refused(tmp_path, capsys):
    path = written(tmp_path / "a.jsonl", {"timestamp": 0, "block_size": 1024, **BIG})
    _, error = replayed(path, capsys, "--block-tokens", "512")
    assert "block_size must be 512, as was asked for, got 1024" in error
    save_trace(make_trace([[0]], block_tokens=16), tmp_path / "t.npz")
    assert read_trace(tmp_path / "t.npz", block_tokens=16).requests == 1
    with pytest.raises(ValueError, match="block_tokens must be 32, as was asked for, got 16"):
        read_trace(tmp_path / "t.npz", block_tokens=32)
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError, match="block_tokens must be 1 to 2147483647, got"):
            read_trace(path, block_tokens=wrong)


@pytest.mark.parametrize(
    "line, problem",
    [
        (BIG, "4 blocks of 512 tokens are fewer than 4096 tokens need"),
        ({"input_length": 655, "hash_ids": [0, 1, 2]}, "3 blocks of 512 tokens are more than 655"),
        ({"input_length": 512, "hash_ids": []}, "0 blocks of 512 tokens are fewer than 512"),
    ],
)
def test_a_block_size_that_cannot_be_is_asked_for(tmp_path, capsys, line, problem):
    path = written(tmp_path / "a.jsonl", {"timestamp": 0, **line})
    for options in ((), ("--skip-bad",)):
        _, error = replayed(path, capsys, *options)
        assert problem in error and "--block-tokens, BLOCK_TOKENS=" in error
    if line is BIG:
        figures, _ = replayed(path, capsys, "--block-tokens", "1024")
        assert figures["token_hit_ratio"] == 0.0
    assert read_trace(written(path, {"timestamp": 0} | LINE | {"input_length": 1500})).requests


def test_chunk_sizes_of_a_decision_log_that_all_fit_are_asked_for(tmp_path):
    record = {"time_s": 1.0, "prompt_digest": "d", "kind": "generation", "chunk_keys": ["a"]}
    path = written(tmp_path / "d.jsonl", {**record, "prompt_tokens": 127, "chunks": 1})
    assert read_trace(path).block_tokens == 64
    more = {**record, "prompt_tokens": 191, "chunk_keys": ["a", "b"]}
    path = written(tmp_path / "d.jsonl", {**record, "prompt_tokens": 127}, more)
    assert read_trace(path).block_tokens == 64
    more["prompt_tokens"] = 240  # 81 to 120 a chunk
    path = written(tmp_path / "d.jsonl", {**record, "prompt_tokens": 127}, more)
    with pytest.raises(ValueError, match="81 to 120 tokens .* --block-tokens, BLOCK_TOKENS="):
        read_trace(path)
    assert read_trace(path, block_tokens=96).block_tokens == 96


# --- ids ----------------------------------------------------------------------------------


def test_ids_of_any_64_bit_kind_may_be_mixed_in_one_line(tmp_path):
    ids = [-1, 2**63 + 5, 3, -(2**63), 2**63 - 1]
    lines = [{"timestamp": 0, "input_length": 2560, "hash_ids": ids[:n]} for n in (5, 5)]
    trace = read_trace(written(tmp_path / "a.jsonl", *lines))
    assert trace.block_ids.tolist() == [*range(5)] * 2
    session = {"block_size": 512, "requests": [{"t": 0, "in": 2560, "hash_ids": ids}] * 2}
    trace = read_trace(written(tmp_path / "s.json", session))
    assert trace.block_ids.tolist() == [*range(5)] * 2
    for wrong in ([1.0], ["1"], [2**64], [-(2**63) - 1], [None]):
        line = {"timestamp": 0, "input_length": 512, "hash_ids": wrong}
        with pytest.raises(ValueError, match="hash_ids must be a list of (64-bit )?integers"):
            read_trace(written(tmp_path / "b.jsonl", line))


# --- time ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, options, span_s",
    [
        (({"timestamp": 0}, {"timestamp": 5000}), {}, 5),
        (({"timestamp": 0}, {"timestamp": 5}), {"time_unit": "s"}, 5),
        (({"timestamp": 0, "time_unit": "us"}, {"timestamp": 5e6}), {}, 5),
        (({"timestamp": 0, "timestamp_unit": "seconds"}, {"timestamp": 5.5}), {}, 5.5),
        (({"timestamp_us": 0}, {"timestamp_us": 5_000_000}), {}, 5),
        (({"timestamp": 1711929600000}, {"timestamp": 1711929605000}), {}, 5),
        (({"timestamp": "2026-04-01T00:00:00Z"}, {"timestamp": "2026-04-01 00:00:05"}), {}, 5),
        (
            ({"timestamp": "2026-04-01T02:00:00+02:00"}, {"timestamp": "2026-04-01T00:00:05.5Z"}),
            {},
            5.5,
        ),
        (({}, {}), {"time_unit": "order"}, 1),
        (({"timestamp": 1711929600}, {"timestamp": 1711929605}), {"time_unit": "s"}, 5),
    ],
)
def test_the_unit_of_time_is_declared_or_given(tmp_path, times, options, span_s):
    lines = [{"input_length": 512, "hash_ids": [1], **time} for time in times]
    trace = read_trace(written(tmp_path / "a.jsonl", *lines), **options)
    assert trace.span_s == pytest.approx(span_s)


@pytest.mark.parametrize(
    "times, options, problem",
    [
        (({"timestamp": 1711929600},), {}, "a time of 1711929600 is not in ms; .* TIME_UNIT="),
        (({"timestamp": 1.7e15},), {}, "is not in ms; .* --time-unit, TIME_UNIT="),
        (({"timestamp": 0}, {"timestamp": 3.5}), {}, "line 2: a time of 3.5 is not in ms"),
        (({"timestamp": 0, "time_unit": "s"},), {"time_unit": "ms"}, "must be ms, as was asked"),
        (
            ({"timestamp": 0, "time_unit": "s"}, {"timestamp": 1, "time_unit": "ms"}),
            {},
            "line 2: time_unit must be s, as other lines have it, got ms",
        ),
        (({"timestamp": 0, "time_unit": "fortnight"},), {}, "time_unit must be one of s, ms"),
        (({"timestamp": 0, "time_unit": [1]},), {}, "time_unit must be one of s, ms"),
        (({"timestamp": 0}, {"timestamp": "2026-04-01T00:00:00"}), {}, "line 2: kind of time"),
        (({"timestamp": "1500"},), {}, "must be a number or an ISO date and time, got '1500'"),
        (({"timestamp": "2026-02-30"},), {}, "must be a number or an ISO date and time"),
        (({"timestamp": 1e300},), {"time_unit": "s"}, "timestamp must be a time within 1e"),
        (({"delay": 5},), {}, "'timestamp' is missing; --time-unit order, TIME_UNIT=order"),
        (({"timestamp": 0},), {"time_unit": "h"}, "time_unit must be one of s, ms, us, ns, order"),
    ],
)
def test_a_unit_of_time_that_cannot_be_is_asked_for(tmp_path, times, options, problem):
    lines = [{"input_length": 512, "hash_ids": [1], **time} for time in times]
    with pytest.raises(ValueError, match=problem):
        read_trace(written(tmp_path / "a.jsonl", *lines), **options)


def test_milliseconds_are_not_taken_for_seconds(tmp_path):
    chat = {"chat_id": 1, "parent_chat_id": -1, "input_length": 16, "hash_ids": [1]}
    path = written(tmp_path / "q.jsonl", {**chat, "timestamp": 1711929600000})
    with pytest.raises(ValueError, match="not in s; .* --time-unit, TIME_UNIT="):
        read_trace(path)
    assert read_trace(path, time_unit="ms").requests == 1


# --- what a file is -----------------------------------------------------------------------


def tar_of(name, data, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(name, data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
    return out.getvalue()


GOOD = text(LINE, LATER).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 27901454\n"
EVENTS = text({"ts": 1.5, "events": [{"type": "BlockStored", "block_hashes": [1]}]}).encode()
CSV = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.97,4808,10\r\n"
READ = {  # name, content: read by content, whatever the name
    "mooncake.json": GOOD,
    "gz_named.json": gzip.compress(GOOD),
    "trace.csv": GOOD,
    "plain.gz": GOOD,
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD,
    "bom.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + GOOD),
    "z.jsonl.zst": zstandard.compress(GOOD),
    "z.jsonl": zstandard.compress(GOOD),
    "plain.jsonl.xz": lzma.compress(GOOD),
    "plain.json": bz2.compress(GOOD),
    "crlf.jsonl": GOOD.replace(b"\n", b"\r\n"),
}
REFUSED = {  # name, content, what is said
    "array.json": (json.dumps([LINE, LATER]).encode(), "a JSON array; JSON lines are wanted"),
    "pretty.json": (json.dumps([LINE], indent=1).encode(), "JSON lines are wanted"),
    "qwen_blksz_16.jsonl": (POINTER, "a Git LFS pointer, not the data: .*git lfs pull"),
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n \n", "the file is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "the file is empty"),
    "plain.tgz": (tar_of("a.jsonl", GOOD, "w:gz"), r"an archive \(tar\): unpack it first"),
    "plain.jsonl.tar": (tar_of("a.jsonl", GOOD), r"an archive \(tar\)"),
    "a.zip": (zip_of("a.jsonl", GOOD), r"an archive \(zip\)"),
    "twice.gz": (gzip.compress(gzip.compress(GOOD)), "compressed with gzip twice"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "UTF-16: save it as UTF-8"),
    "utf16le.jsonl": (GOOD.decode().encode("utf-16-le"), "UTF-16: save it as UTF-8"),
    "cut.jsonl.zst": (zstandard.compress(GOOD)[:-9], "damaged: ended before the end of a frame"),
    "t.parquet": (b"PAR1\x15\x04", "t.parquet, line 1: .*[Pp]arquet"),
    "azure.csv": (CSV, "no block ids in it, so no hits can be counted"),
    "lengths.jsonl": (text({"request_id": 0, "input_length": 9}).encode(), "no block ids in it"),
    "kv_events.jsonl": (EVENTS, "KV events of vLLM .* not requests"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-9], "damaged"),
    "words.txt": (b"hello\n", "no format of .* fits: 'hello'"),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_by_its_content(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(READ[name])
    figures, _ = replayed(tmp_path / name, capsys)
    assert (figures["requests"], figures["token_hit_ratio"]) == (2, 0.4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_says_what_it_is(tmp_path, capsys, name):
    content, said = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    for options in ((), ("--skip-bad",)):
        _, error = replayed(tmp_path / name, capsys, *options)
        assert str(tmp_path / name) in error
        with pytest.raises(ValueError, match=said):
            raise ValueError(error)


@pytest.mark.parametrize("name", [name for name in REFUSED if ".jsonl" in name])
def test_a_folder_with_such_a_file_is_refused_too(tmp_path, capsys, name):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / f"b{name.partition('.')[0]}.jsonl").write_bytes(REFUSED[name][0])
    figures, error = replayed(tmp_path, capsys)
    if "empty" in name or "blank" in name:
        assert figures["requests"] == 2
    else:
        assert figures is None and "/b" in error


def test_with_skipping_bad_lines_are_counted_and_one_has_to_be_left(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{broken\n" + GOOD + b"[]\n")
    figures, said = replayed(path, capsys, "--skip-bad")
    assert (figures["requests"], figures["skipped_lines"]) == (2, 2)
    assert "2 bad lines skipped" in said
    path.write_bytes(GOOD.replace(b"1024", b'"x"').replace(b"1536", b"-1"))
    for target in (path, tmp_path):
        _, error = replayed(target, capsys, "--skip-bad")
        assert "no request in it: 2 bad lines skipped, the first: " in error
        assert "line 1: input_length must be" in error


def test_delays_in_place_of_times_are_refused_by_name(tmp_path, capsys):
    turns = {"session_id": "a", **LINE}, {"session_id": "a", "delay": 9, "hash_ids": [1]}
    _, error = replayed(written(tmp_path / "a.jsonl", turns[0], turns[1] | BIG), capsys)
    assert "line 2: " in error and "BLOCK_TOKENS=" in error
    turns[1].update(input_length=512)
    _, error = replayed(written(tmp_path / "a.jsonl", *turns), capsys)
    assert "line 2: delays count from the end of requests; " in error and "OUTPUT_RATE=" in error
    figures, _ = replayed(tmp_path / "a.jsonl", capsys, "--output-rate", "inf")
    assert (figures["requests"], figures["hit_blocks"]["gpu"]) == (2, 1)


# --- agentic sessions ---------------------------------------------------------------------


def asked(at, ids, **more):
    return {
        "t": at,
        "type": "n",
        "model": "m",
        "in": 64 * len(ids),
        "out": 1,
        "hash_ids": ids,
    } | more


def session(marker, nested, *, after=130.0, scope="local", **more):
    """A session whose turn at 0, sub-agent from `marker` and turn after it share a block."""
    agent = {"t": marker, "type": "subagent", "requests": [asked(t, [1]) for t in nested], **more}
    requests = [asked(0.0, [1]), agent, asked(after, [1, 2])]
    return {"id": "s", "block_size": 64, "hash_id_scope": scope, "requests": requests}


@pytest.mark.parametrize(
    "nested, times",
    [
        ([100.0, 110.0], [0, 100, 110, 130]),  # AgentX: from the session's start
        ([100.4, 110.0], [0, 100.4, 110, 130]),
        ([0.0, 10.0], [0, 100, 110, 130]),  # kv-cache-tester: from the marker
        ([0.5, 150.0], [0, 100.5, 130, 250]),
    ],
)
def test_times_of_sub_agents_are_absolute_or_relative(tmp_path, nested, times):
    trace = read_trace(written(tmp_path / "s.json", session(100.0, nested)))
    assert trace.arrival_s.tolist() == pytest.approx(times)
    for told, shift in (("absolute", 0.0), ("relative", 100.0)):
        trace = read_trace(tmp_path / "s.json", subagent_times=told)
        wanted = sorted([0.0, 130.0, *(t + shift for t in nested)])
        assert trace.arrival_s.tolist() == pytest.approx(wanted)


def test_one_convention_holds_for_all_sessions(tmp_path, capsys):
    unclear, later = session(10.0, [70.0]), session(10.0, [85.0], duration_ms=9e4)
    path = written(tmp_path / "a.jsonl", unclear)
    _, error = replayed(path, capsys)
    assert "sub-agents may be" in error and "--subagent-times, SUBAGENT_TIMES=" in error
    for other, shift in ((session(50.0, [0.0]), 10.0), (session(50.0, [50.0]), 0.0)):
        path = written(tmp_path / "b.jsonl", unclear, other)
        first = read_trace(path)
        times = first.arrival_s[first.sessions == first.sessions[0]]
        both = np.concatenate([first.arrival_s[first.sessions == s] for s in (0, 1)])
        assert len(both) == 6 and len(times) == 3
        spans = sorted(np.diff(np.sort(first.arrival_s[first.sessions == s]))[0] for s in (0, 1))
        assert max(spans) == pytest.approx(70.0 + shift)  # the sub-agent of `unclear`
        few = read_trace(path, max_sessions=1)  # the rest of the input decides all the same
        assert few.requests == 3
    path = written(tmp_path / "c.jsonl", session(50.0, [0.0]), session(50.0, [50.0]))
    assert "sub-agents disagree" in replayed(path, capsys)[1]
    assert "sub-agents may be" in replayed(written(tmp_path / "d.jsonl", later), capsys)[1]
    short = session(100.0, [105.0, 108.0], duration_ms=9000)  # no request 105 s after its start
    assert read_trace(written(tmp_path / "e.jsonl", short)).arrival_s.tolist()[1] == 105.0
    same = session(0.0, [3.0])  # both conventions are one
    assert read_trace(written(tmp_path / "f.jsonl", same)).arrival_s.tolist() == [0, 3, 130]


def test_sub_agents_of_sub_agents(tmp_path):
    inner = {"t": 5.0, "requests": [asked(0.0, [1]), asked(2.0, [1])]}
    outer = session(20.0, [0.0])
    outer["requests"][1]["requests"].append(inner)
    trace = read_trace(written(tmp_path / "a.json", outer))
    assert trace.arrival_s.tolist() == [0, 20, 25, 27, 130]
    inner["t"], inner["requests"] = 25.0, [asked(25.0, [1]), asked(27.0, [1])]
    outer["requests"][1]["requests"][0]["t"] = 20.0
    trace = read_trace(written(tmp_path / "a.json", outer))
    assert trace.arrival_s.tolist() == [0, 20, 25, 27, 130]


@pytest.mark.parametrize("scope, unique", [("global", 2), ("local", 4)])
def test_ids_are_of_a_session_or_of_all(tmp_path, scope, unique):
    sessions = [session(10.0, [0.0], scope=scope)] * 2
    trace = read_trace(written(tmp_path / "a.jsonl", *sessions))
    assert (trace.requests, trace.unique_blocks) == (6, 2 if scope == "global" else 4)
    other = json.loads(json.dumps(sessions[0]).replace('"m"', '"n"'))  # KV of another model
    assert read_trace(written(tmp_path / "b.jsonl", sessions[0], other)).unique_blocks == 4
    assert trace.unique_blocks == unique


def test_an_unknown_scope_is_refused(tmp_path):
    path = written(tmp_path / "a.jsonl", session(10.0, [0.0], scope="planet"))
    with pytest.raises(ValueError, match="hash_id_scope must be one of local, global, got 'planet"):
        read_trace(path)


@pytest.mark.parametrize("packed", [False, True])
def test_sessions_may_be_a_line_or_a_file_each(tmp_path, packed):
    sessions = [session(10.0 + n, [0.0, 3.0], scope="local") for n in range(5)]
    (tmp_path / "files").mkdir()
    (tmp_path / "rows").mkdir()
    for number, content in enumerate(sessions):
        file = tmp_path / "files" / f"{number}.json"
        file.write_text(json.dumps(content, indent=2 if number % 2 else None))
    data = text(*sessions).encode()
    rows = tmp_path / "rows" / ("traces.jsonl.gz" if packed else "traces.jsonl")
    rows.write_bytes(gzip.compress(data) if packed else data)
    (tmp_path / "rows" / "README.md").write_text("# what it is")
    for options in ({}, {"max_sessions": 3, "seed": 4}, {"sessions_per_hour": 600.0}):
        by_file = read_trace(tmp_path / "files", **options)
        for path in (rows, rows.parent):
            by_row = read_trace(path, **options)
            assert np.array_equal(by_row.arrival_s, by_file.arrival_s)
            assert np.array_equal(by_row.sessions, by_file.sessions)
            assert repr(by_row) == repr(by_file)


def test_a_bad_session_of_many_is_named_or_counted(tmp_path, capsys):
    bad = session(10.0, [0.0]) | {"block_size": 32}
    path = written(tmp_path / "traces.jsonl", session(10.0, [0.0]), bad, {"requests": [1]})
    _, error = replayed(path, capsys, "--max-sessions", "3")
    assert ", line " in error
    figures, _ = replayed(path, capsys, "--skip-bad")
    assert (figures["requests"], figures["skipped_lines"]) == (3, 2)


# --- make replay --------------------------------------------------------------------------


def test_make_replay_passes_what_a_trace_does_not_say(tmp_path):
    said = {"FORMAT": "weka", "BLOCK_TOKENS": "64", "TIME_UNIT": "ms", "SUBAGENT_TIMES": "absolute"}
    said |= {"OUTPUT_RATE": "30"}
    make = ["make", "-n", "-C", str(ROOT), "replay", "TRACE=x", *map("=".join, said.items())]
    shown = subprocess.run(make, capture_output=True, text=True, check=True).stdout
    command = next(line for line in " ".join(shown.split("\\\n")).splitlines() if "--trace" in line)
    for name, value in said.items():
        assert f"--{name.lower().replace('_', '-')} '{value}'" in " ".join(command.split())
    shown = subprocess.run([*make[:6]], capture_output=True, text=True, check=True).stdout
    assert "--format" not in shown and "--block-tokens" not in shown

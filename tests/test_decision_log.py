"""The decision log: what is written is read again, and damage is reported, not fatal."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from kvttl.decisions.log import (
    KINDS,
    SOURCES,
    DecisionLog,
    DecisionRecord,
    read_records,
    to_frame,
    write_records,
)
from kvttl.decisions.record import parse_record

MOVE = {"from": "gpu", "to": "disk", "moved_chunks": 2, "status": "ok"}
NO_MOVE = {"from": "disk", "to": "remote", "moved_chunks": 0, "status": "not stored yet"}
MANAGED = DecisionRecord(
    time_s=1_760_000_000.25,
    prompt_digest="ab12",
    prompt_tokens=300,
    chunks=4,
    metadata={"perplexity": 12.5, "time_variance": 0.08},
    ttl_s=3693.6,
    wanted_tier="disk",
    hit_tokens={"gpu": 64, "none": 236},
    tier_before={"gpu": 4},
    tier_after={"gpu": 2, "disk": 2},
    moves=(MOVE, NO_MOVE),
    generate_s=0.5,
    manage_s=0.002,
)
FULL = replace(
    MANAGED,
    kind="generation",
    prompt="a secret\n",
    chunk_keys=tuple(f"{number:064x}" for number in range(16)),
    metadata_sources={"perplexity": "prompt", "time_variance": "history"},
    cache_salt="tenant-a",
    tier_errors={"disk": "full"},
    hints={"tier": "accepted", "ttl": "refused: ttl must be >= 0"},
    session="a conversation",
    wanted_again={"ttl": 64},
    finish_reason="tool_calls",
    output_tokens=17,
    policy="adaptive",
    decided=({"chunks": 4, "tier": "disk", "ttl_s": 9.5, "value": 0.25, "price": 0.125},),
    policy_error="policy adaptive: ValueError: as an example",
    moves=(MOVE | {"reason": "", "moved_tokens": 512, "skipped": 0, "latency_s": 0.25},) * 2,
)
CLAIM = DecisionRecord(1_760_000_002.0, "ab12", kind="claim", wanted_tier="gpu", ttl_s=9.0)
EXPIRY = DecisionRecord(1_760_000_003.0, "ab12", kind="expiry", from_tier="remote")
SHED = DecisionRecord(1_760_000_004.0, "ab12", kind="shed", error="the queue is full")
REFUSED = DecisionRecord(1_760_000_001.0, "cd“34”", error="perplexity must be > 0 — got -1")


def test_records_round_trip(tmp_path):
    path = tmp_path / "decisions.jsonl"
    assert write_records(path, [MANAGED, REFUSED]) == 2
    assert list(read_records(path)) == [MANAGED, REFUSED]


def test_writing_appends_and_counts(tmp_path):
    path = tmp_path / "decisions.jsonl"
    assert write_records(path, []) == 0
    assert list(read_records(path)) == []
    write_records(path, [MANAGED])
    assert write_records(path, iter([REFUSED, MANAGED])) == 2
    assert list(read_records(path)) == [MANAGED, REFUSED, MANAGED]


def test_a_record_is_one_line_of_json(tmp_path):
    path = tmp_path / "decisions.jsonl"
    write_records(path, [DecisionRecord(0.0, "a", error="two\nlines\u2028here")])
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["error"] == "two\nlines\u2028here"


def test_a_torn_last_line_is_reported_and_skipped(tmp_path, caplog):
    path = tmp_path / "decisions.jsonl"
    write_records(path, [MANAGED, REFUSED])
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert list(read_records(path)) == [MANAGED]
    (report,) = caplog.messages
    assert f"{path} line 2 is not a decision record" in report


def test_writing_after_a_torn_line_loses_only_that_line(tmp_path, caplog):
    path = tmp_path / "decisions.jsonl"
    write_records(path, [MANAGED, MANAGED])
    path.write_bytes(path.read_bytes()[:-20])
    write_records(path, [REFUSED])
    assert list(read_records(path)) == [MANAGED, REFUSED]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"hello",
        b"{}",
        b"[1, 2]",
        b"null",
        b"3",
        b'{"time_s": 1}',
        b"\xff\xfe",
        b'{"moves": 3}',
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"9" * 5_000, id="huge"),
        b'{"time_s": NaN, "prompt_digest": "a"}',
        b'{"time_s": null, "prompt_digest": "a"}',
        *(
            b'{"time_s": 1, "prompt_digest": "a", %s}' % wrong
            for wrong in (
                b'"time_s": "1"',
                b'"time_s": true',
                b'"prompt_digest": 7',
                b'"prompt_tokens": 1.5',
                b'"prompt_tokens": -1',
                b'"chunks": 1' + b"0" * 30,
                b'"chunk_keys": "abc"',
                b'"chunk_keys": [1]',
                b'"kind": "claims"',
                b'"kind": ["claim"]',
                b'"metadata": [1]',
                b'"metadata_sources": {"perplexity": 1}',
                b'"hit_tokens": {"gpu": "many"}',
                b'"tier_after": 3',
                b'"ttl_s": "long"',
                b'"wanted_tier": 1',
                b'"moves": {"from": "gpu"}',
                b'"moves": [1]',
                b'"moves": [{"from": "gpu", "to": "disk", "moved_chunks": "2"}]',
            )
        ),
    ],
)
def test_a_foreign_line_is_reported_and_skipped(tmp_path, caplog, foreign):
    path = tmp_path / "decisions.jsonl"
    lines = [MANAGED.to_json().encode(), foreign, REFUSED.to_json().encode(), b""]
    path.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert list(read_records(path)) == [MANAGED, REFUSED]
    (report,) = caplog.messages
    assert "line 2 is not a decision record" in report


def test_no_field_is_lost_in_the_log(tmp_path):
    records = [FULL, EXPIRY, SHED]  # together, they show every field
    names = {f.name for f in fields(DecisionRecord)} - {"time_s", "prompt_digest"}
    plain = DecisionRecord(FULL.time_s, FULL.prompt_digest)
    assert names == {n for r in records for n in names if getattr(r, n) != getattr(plain, n)}
    write_records(tmp_path / "a.jsonl", records)
    assert list(read_records(tmp_path / "a.jsonl")) == records


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"chunks": -1}, "`int` >= 0 - at `$.chunks`, got -1"),
        ({"ttl_s": "long"}, "`float | null`, got `str` - at `$.ttl_s`, got 'long'"),
        (
            {"moves": [MOVE, MOVE | {"moved_chunks": -2}]},
            "`int` >= 0 - at `$.moves[1].moved_chunks`",
        ),
        ({"hit_tokens": {"gpu": 1.5}}, "`$.hit_tokens[...]`, got {'gpu': 1.5}"),
        (
            {"kind": "claims"},
            "(generation|claim|expiry|settled|shed)$' - at `$.kind`, got 'claims'",
        ),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(wrong, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        parse_record(json.dumps({"time_s": 1, "prompt_digest": "a"} | wrong))


def test_fields_of_a_later_version_are_ignored(tmp_path, caplog):
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({**json.loads(MANAGED.to_json()), "colour": "red"}) + "\n")
    assert list(read_records(path)) == [MANAGED]
    assert caplog.messages == []


def test_fields_of_an_earlier_version_get_their_defaults(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"time_s": 1.5, "prompt_digest": "ef"}\n')
    assert list(read_records(path)) == [DecisionRecord(1.5, "ef")]
    assert next(read_records(path)).kind == "generation"


def test_yesterdays_lines_are_read(tmp_path, caplog):
    new = ("kind", "prompt", "chunk_keys", "metadata_sources", "from_tier")
    line = {k: v for k, v in json.loads(MANAGED.to_json()).items() if k not in new}
    (tmp_path / "decisions.jsonl").write_text(json.dumps(line) + "\n")
    assert list(read_records(tmp_path)) == [MANAGED]
    assert caplog.messages == []


# To JSON


def strict(line):
    """Parse JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


class Rude:
    def __str__(self):
        raise RuntimeError("no")


class View(Mapping):
    """A mapping that is no dict."""

    def __getitem__(self, key):
        return {"a": np.float32(1.5)}[key]

    def __iter__(self):
        return iter(["a"])

    def __len__(self):
        return 1


def circle():
    values = {}
    values["self"] = values
    return values


@pytest.mark.parametrize(
    "value, shown",
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32(math.inf), None),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.longdouble(0.5), 0.5),
        (np.longdouble(math.nan), None),
        (np.str_("x"), "x"),
        (1 + 2j, "(1+2j)"),
        pytest.param(10**5_000, "<int>", id="huge"),
        (b"raw", "cmF3"),
        (np.arange(3), "[0 1 2]"),
        (Rude(), "<Rude>"),
        ({"a": [math.nan, None, "b"]}, {"a": [None, None, "b"]}),
        ({(1, 2): 3}, {"(1, 2)": 3}),
        (View(), {"a": 1.5}),
        ("\ud800 alone", "\\ud800 alone"),
    ],
)
def test_any_metadata_becomes_strict_json(value, shown, tmp_path):
    record = DecisionRecord(1.0, "a", metadata={"perplexity": value, "ok": 1})
    assert strict(record.to_json())["metadata"] == {"perplexity": shown, "ok": 1}
    with DecisionLog(tmp_path) as log:
        log.append(record)
    assert next(read_records(tmp_path)).metadata == {"perplexity": shown, "ok": 1}


@pytest.mark.parametrize("metadata", [circle(), {np.int64(1): math.nan}, {math.nan: 1}])
def test_odd_metadata_still_gives_a_line(metadata):
    assert strict(DecisionRecord(1.0, "a", metadata=metadata).to_json())["time_s"] == 1.0


def test_what_is_not_finite_outside_the_metadata_is_null(tmp_path):
    moves = ({**MOVE, "latency_s": math.nan},)
    record = DecisionRecord(1.0, "a", ttl_s=math.inf, generate_s=math.nan, moves=moves)
    values = strict(record.to_json())
    assert values["ttl_s"] is values["generate_s"] is values["moves"][0]["latency_s"] is None
    write_records(tmp_path / "a.jsonl", [record])
    read = next(read_records(tmp_path))
    assert (read.ttl_s, read.generate_s) == (None, 0.0)
    assert to_frame([record, read])["move_s"].tolist() == [0.0, 0.0]


# The log


def test_the_log_writes_one_private_file_lazily(tmp_path):
    folder = tmp_path / "new" / "log"
    with DecisionLog(folder) as log:
        assert log.path is None and not folder.exists()
        for record in (MANAGED, CLAIM, REFUSED):
            log.append(record)
        (path,) = folder.iterdir()
        assert log.path == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert log.path is None
    stamp, pid, random, sequence = path.stem.removeprefix("decisions-").split("-")
    assert time.strptime(stamp, "%Y%m%dT%H%M%S")
    assert (int(pid), len(random), sequence, path.suffix) == (os.getpid(), 4, "0001", ".jsonl")
    assert list(read_records(path)) == [MANAGED, REFUSED]
    assert list(read_records(folder, None)) == [MANAGED, REFUSED, CLAIM]


def test_prompts_are_written_on_request_only(tmp_path):
    for prompts, expected in ((False, None), (True, FULL.prompt)):
        folder = tmp_path / str(prompts)
        with DecisionLog(folder, prompts=prompts) as log:
            log.append(FULL)
            assert (b"secret" in log.path.read_bytes()) == prompts
        assert list(read_records(folder)) == [replace(FULL, prompt=expected)]


def test_each_line_is_one_write(tmp_path, monkeypatch):
    writes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(bytes(data)) or write(fd, data))
    with DecisionLog(tmp_path) as log:
        log.append(MANAGED)
        log.append(FULL)
    assert len(writes) == 2
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in writes)


def test_short_writes_are_carried_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:100]))
    with DecisionLog(tmp_path, prompts=True) as log:
        log.append(FULL)
    assert list(read_records(tmp_path)) == [FULL]


def test_rotation_keeps_files_below_the_limit(tmp_path):
    line = len(MANAGED.to_json()) + 1
    with DecisionLog(tmp_path, max_bytes=3 * line) as log:
        for number in range(8):
            log.append(replace(MANAGED, time_s=1_760_000_000.25 + number))
    paths = sorted(tmp_path.iterdir())
    assert [path.stem[-4:] for path in paths] == ["0001", "0002", "0003"]
    assert len({path.stem[:-4] for path in paths}) == 1
    assert max(path.stat().st_size for path in paths) <= 3 * line
    assert [r.time_s - 1_760_000_000.25 for r in read_records(tmp_path)] == list(range(8))


def test_only_the_writers_own_oldest_files_are_deleted(tmp_path):
    write_records(tmp_path / "decisions-00000000T000000-1-0000-0001.jsonl", [REFUSED])
    with DecisionLog(tmp_path, max_bytes=1, keep_files=2) as log:  # a line a file
        for number in range(5):
            log.append(replace(MANAGED, time_s=2e9 + number))
    assert [record.time_s for record in read_records(tmp_path)] == [
        REFUSED.time_s,
        2e9 + 3,
        2e9 + 4,
    ]


def test_a_closed_log_goes_on_in_the_next_file(tmp_path):
    log = DecisionLog(tmp_path)
    for _ in range(2):
        log.append(MANAGED)
        log.close()
        log.close()
    assert [path.stem[-4:] for path in sorted(tmp_path.iterdir())] == ["0001", "0002"]


def test_a_deleted_file_is_noticed(tmp_path):
    with DecisionLog(tmp_path) as log:
        log.append(MANAGED)
        log.path.unlink()
        log.append(REFUSED)
    assert list(read_records(tmp_path)) == [REFUSED]


def test_two_writers_of_one_process_in_one_second_have_a_file_each(tmp_path, monkeypatch):
    tokens = iter(["aaaa", "aaaa", "bbbb"])  # the second writer collides at first
    monkeypatch.setattr("kvttl.decisions.log.secrets.token_hex", lambda count: next(tokens))
    monkeypatch.setattr("kvttl.decisions.log.time.strftime", lambda *args: "20260101T000000")
    for _ in range(2):
        DecisionLog(tmp_path).append(MANAGED)
    assert [path.stem[-9:] for path in sorted(tmp_path.iterdir())] == ["aaaa-0001", "bbbb-0001"]


@pytest.mark.parametrize("name", ["max_bytes", "keep_files"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True])
def test_wrong_limits_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1, got {value!r}"):
        DecisionLog(tmp_path, **{name: value})


def test_a_folder_that_cannot_be_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        DecisionLog(tmp_path / "file").append(MANAGED)


FULL_DISK = """
import resource, sys
from kvttl.decisions.log import DecisionLog, DecisionRecord
log = DecisionLog(sys.argv[1])
log.append(DecisionRecord(1.0, "before"))
size = log.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        log.append(DecisionRecord(2.0, "lost"))  # begins, and cannot end
    except OSError as error:
        print(error.strerror, log.path.stat().st_size - size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
log.append(DecisionRecord(3.0, "after"))
"""


def test_a_full_disk_is_an_os_error_and_leaves_no_torn_line(tmp_path, caplog):
    done = child(FULL_DISK, tmp_path, stdout=subprocess.PIPE, text=True)
    out, _ = done.communicate(timeout=60)
    assert (done.returncode, out) == (0, "File too large 0\n" * 2)
    assert [record.prompt_digest for record in read_records(tmp_path)] == ["before", "after"]
    assert len(list(tmp_path.iterdir())) == 1 and caplog.messages == []


def test_threads_share_a_log(tmp_path):
    log = DecisionLog(tmp_path, max_bytes=20_000)

    def write(name):
        for number in range(200):
            log.append(replace(MANAGED, prompt_digest=f"{name}-{number}"))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record.prompt_digest for record in read_records(tmp_path)}) == 1_600


def child(code, *args, **options):
    """Start a Python of its own on the same modules."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, **path}, **options)


APPENDING = """
import sys, time
from kvttl.decisions.log import DecisionLog, DecisionRecord
log = DecisionLog(sys.argv[1], max_bytes=300_000)
for number in range(int(sys.argv[3])):
    log.append(DecisionRecord(time.time(), f"{sys.argv[2]}-{number}", error="x" * 5_000))
    print(number, flush=True)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_writer_loses_no_whole_line(tmp_path, caplog, attempt):
    with child(APPENDING, tmp_path, "a", 10**9, stdout=subprocess.PIPE) as writer:
        for _ in range(100 + 37 * attempt):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        reported = [line for line in writer.stdout.read().split(b"\n") if line]
    last = int(reported[-1]) if reported else 99 + 37 * attempt
    found = [int(record.prompt_digest[2:]) for record in read_records(tmp_path)]
    assert found == list(range(len(found)))
    assert len(found) >= last  # `last` itself may be cut in its print
    assert len(caplog.messages) <= 1


def test_several_processes_write_into_one_folder(tmp_path, caplog):
    writers = [child(APPENDING, tmp_path, name, 200, stdout=subprocess.DEVNULL) for name in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    records = list(read_records(tmp_path))
    names = Counter(record.prompt_digest[0] for record in records)
    assert names == {"a": 200, "b": 200, "c": 200}
    times = [record.time_s for record in records]
    assert times == sorted(times)
    assert caplog.messages == []


FORKING = """
import os, sys, threading
from kvttl.decisions.log import DecisionLog, DecisionRecord
log = DecisionLog(sys.argv[1], max_bytes=1, keep_files=3)
for number in range(3):
    log.append(DecisionRecord(float(number), "parent"))
held = log.path
log._lock.acquire()  # another thread is writing when this one forks
child = os.fork()
if not child:
    for number in range(4):
        log.append(DecisionRecord(9.0 + number, "child"))
    os._exit(0 if log.path != held else 1)
assert os.waitpid(child, 0)[1] == 0
log._lock.release()
assert log.path == held
log.append(DecisionRecord(5.0, "parent"))
"""


def test_the_child_of_a_fork_has_files_of_its_own(tmp_path):
    assert child(FORKING, tmp_path).wait(timeout=60) == 0
    found = [(record.prompt_digest, record.time_s) for record in read_records(tmp_path)]
    parent = [("parent", time_s) for time_s in (1.0, 2.0, 5.0)]
    assert found == parent + [("child", time_s) for time_s in (10.0, 11.0, 12.0)]
    assert len({path.stem.split("-")[2] for path in tmp_path.iterdir()}) == 2  # process ids


# Reading


def test_a_folder_is_read_in_time_order(tmp_path, caplog):
    write_records(tmp_path / "a.jsonl", [SHED, MANAGED])
    write_records(tmp_path / "b.jsonl", [replace(MANAGED, prompt_digest="second"), EXPIRY])
    (tmp_path / "notes.txt").write_text("not a log")
    (tmp_path / "c.jsonl").mkdir()  # cannot be read
    found = list(read_records(tmp_path))
    assert [record.prompt_digest for record in found] == ["ab12", "second", "ab12", "ab12"]
    assert [record.kind for record in found] == ["generation", "generation", "expiry", "shed"]
    assert "c.jsonl cannot be read" in caplog.messages[0]


@pytest.mark.parametrize(
    "kinds, expected",
    [
        (("generation",), ["generation"]),
        (("claim", "shed"), ["claim", "shed"]),
        (None, ["generation", "claim", "expiry", "shed"]),
        ((), []),
    ],
)
def test_kinds_are_chosen(tmp_path, kinds, expected):
    write_records(tmp_path / "a.jsonl", [MANAGED, CLAIM, EXPIRY, SHED])
    for path in (tmp_path, tmp_path / "a.jsonl"):
        assert [record.kind for record in read_records(path, kinds)] == expected


def test_unknown_kinds_and_missing_files_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="kinds must be among generation, claim, expiry, settled, shed"
    ):
        read_records(tmp_path, ["claims"])
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "none.jsonl"))
    assert list(read_records(tmp_path)) == []


def test_a_log_can_be_read_while_it_is_written(tmp_path):
    with DecisionLog(tmp_path, prompts=True) as log:
        log.append(FULL)
        assert list(read_records(log.path)) == [FULL]
        log.append(FULL)
        assert list(read_records(tmp_path)) == [FULL, FULL]


# The frame


def test_frame_has_a_row_each_with_times_and_tier_columns():
    frame = to_frame([MANAGED, REFUSED])
    assert len(frame) == 2
    assert frame["time"].dt.tz is not None
    assert frame["time"][0] == pd.Timestamp("2025-10-09T08:53:20.25Z")
    assert frame["perplexity"].tolist()[0] == 12.5 and pd.isna(frame["perplexity"][1])
    assert frame.loc[0, ["hit_tokens_gpu", "tier_before_gpu", "tier_after_disk"]].tolist() == [
        64,
        4,
        2,
    ]
    assert frame["moves"].tolist() == [2, 0]
    assert frame["moved"].tolist() == ["gpu→disk", ""]
    assert not {"time_s", "metadata", "hit_tokens", "tier_before", "tier_after"} & set(frame)


@pytest.mark.parametrize("records", [[MANAGED, REFUSED], [REFUSED], [MANAGED]])
def test_frame_columns_have_types_to_compute_with(records):
    frame = to_frame(iter(records))
    for name in ("ttl_s", "generate_s", "manage_s"):
        assert frame[name].dtype == float, name
    for name in ("prompt_tokens", "chunks", "moves"):
        assert frame[name].dtype == int, name
    assert frame["ttl_s"].isna().tolist() == [record.ttl_s is None for record in records]


def test_an_empty_frame_has_the_same_columns():
    empty, refused = to_frame([]), to_frame([REFUSED])
    assert len(empty) == 0
    assert list(empty) == list(refused)
    assert empty["time"].dt.tz is not None and empty["ttl_s"].dtype == float
    assert empty["ttl_s"].sum() == 0


def test_the_frame_of_any_records_has_the_same_types():
    lists = [], [REFUSED], [FULL, EXPIRY, SHED], [DecisionRecord(0.0, "a")], [CLAIM]
    frames = [to_frame(records) for records in lists]
    for frame in frames[1:]:
        assert frame.dtypes.to_dict() == frames[0].dtypes.to_dict()
    assert len(frames[-1]) == 0  # write-ahead lines are not decisions
    dtypes = frames[0].dtypes
    for name in ("kind", "wanted_tier", "from_tier", "perplexity_source", "access_count_source"):
        assert isinstance(dtypes[name], pd.CategoricalDtype), name
    assert list(dtypes["kind"].categories) == list(KINDS)
    assert list(dtypes["perplexity_source"].categories) == list(SOURCES)
    for name in ("hit_tokens_remote", "tier_before_none", "tier_after_none", "moved_chunks"):
        assert dtypes[name] == np.int64, name
    for name in ("perplexity", "time_variance", "access_count", "seconds_since_access", "move_s"):
        assert dtypes[name] == np.float64, name
    assert "chunk_keys" not in dtypes and "prompt" in dtypes


def test_the_frame_shows_what_the_records_say():
    frame = to_frame([FULL, CLAIM, EXPIRY, SHED])
    assert frame["kind"].tolist() == ["generation", "expiry", "shed"]
    first, expiry = frame.iloc[0], frame.iloc[1]
    assert first["perplexity_source"] == "prompt" and pd.isna(first["access_count_source"])
    assert (first["moves"], first["moved_chunks"], first["move_s"]) == (2, 4, 0.5)
    assert (first["moved"], first["move_status"]) == ("gpu→disk, gpu→disk", "ok, ok")
    assert (first["hit_tokens_disk"], first["tier_after_disk"]) == (0, 2)
    assert expiry["from_tier"] == "remote" and pd.isna(expiry["wanted_tier"])
    assert frame["error"].tolist() == ["", "", "the queue is full"]


@pytest.mark.parametrize("value", ["15", None, [1], math.nan, 10**400, Rude(), {"a": 1}])
def test_metadata_that_is_no_number_is_nan_in_the_frame(value):
    frame = to_frame([DecisionRecord(0.0, "a", metadata={"perplexity": value, "error": 5})])
    assert frame["perplexity"].isna().tolist() == [True]
    assert frame["error"].tolist() == [""]  # metadata takes no other column's place


def test_unknown_names_get_categories_of_their_own():
    record = DecisionRecord(0.0, "a", wanted_tier="tape", metadata_sources={"perplexity": "oracle"})
    frame = to_frame([record, FULL])
    assert frame["wanted_tier"].tolist() == ["tape", "disk"]
    assert frame["perplexity_source"].tolist() == ["oracle", "prompt"]


def test_a_time_that_no_calendar_has_is_no_time():
    assert to_frame([DecisionRecord(1e200, "a")])["time"].isna().tolist() == [True]

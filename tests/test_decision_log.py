"""The decision log: what is written is read again, and damage is reported, not fatal."""

from __future__ import annotations

import json
import logging

import pandas as pd
import pytest

from decision_log import DecisionRecord, read_records, to_frame, write_records

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
    (line,) = path.read_text().splitlines()
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


def test_fields_of_a_later_version_are_ignored(tmp_path, caplog):
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({**json.loads(MANAGED.to_json()), "colour": "red"}) + "\n")
    assert list(read_records(path)) == [MANAGED]
    assert caplog.messages == []


def test_fields_of_an_earlier_version_get_their_defaults(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text('{"time_s": 1.5, "prompt_digest": "ef"}\n')
    assert list(read_records(path)) == [DecisionRecord(1.5, "ef")]


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

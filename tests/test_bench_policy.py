"""`make bench-policy`, on the sample trace: every key of its report, from one short run."""

from __future__ import annotations

import json
from pathlib import Path

from kvttl.bench import policy as bench

ROOT = Path(__file__).resolve().parents[1]


def test_a_report_has_the_gap_the_worst_loss_and_the_speeds(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KV_TRACE_DIR", raising=False)
    monkeypatch.chdir(ROOT)
    path = tmp_path / "policy.json"
    assert bench.main(["--shares", "0.1", "--chunks", "5000", "--report", str(path)]) == 0
    printed, report = (
        json.loads(capsys.readouterr().out.splitlines()[-1]),
        json.loads(path.read_text()),
    )
    assert set(printed) <= set(report)
    (trace,) = report["gap_closed"]
    hits = {row["policy"]: row["token_hits"] for row in report["rows"]}
    gap = (hits["adaptive"] - hits["recency"]) / (hits["optimal"] - hits["recency"])
    assert report["gap_closed"][trace]["0.1"] == gap
    assert set(report["gap_closed_due"][trace]) == {"0.1"}
    assert hits[next(name for name in hits if "libCacheSim" in name)] <= hits["optimal"]
    losses = [hits["recency"] - hits[name] for name in ("adaptive", bench.DUE)]
    losses += [row["recency"] - row["token_hits"] for row in report["lmcache"]]
    assert report["worst_below_lru"] == max(0.0, *losses)
    for name in ("sweep_ms_1m", "sweep_ms_1m_separate", "learn_us_per_request", "accesses_per_s"):
        assert report[name] > 0, name
    assert report["state_bytes_per_chunk"] <= bench.GOALS["state_bytes_per_chunk"]

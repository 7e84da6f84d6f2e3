"""The fault campaign in its short form, the machinery that judges, and what it must notice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import requests
from chaos.campaign import deck
from chaos.faults import KINDS
from chaos.module import Endings
from chaos.proxy import Proxy
from chaos.report import add, merged, percentiles, shortened
from chaos.worker import note_ends

from kvttl.manager.claims import ClaimLedger

ROOT = Path(__file__).resolve().parents[1]
DEALT = [name for name, kind in KINDS.items() if not kind.sabotage and not kind.inside]

# Cheap faults of every family, half of them outside, half on a server with a module; which half is
# the seed's. Outside the library dies and goes on as a gateway, where the campaign has to notice
# the sabotage; inside the library has it.
SEED = 1
EITHER = (
    "coordinator_stopped server_killed redis_killed redis_slow redis_full redis_read_only "
    "redis_evicting disk_full disk_emptied files_flipped files_truncated values_flipped "
    "values_swapped clock_forward clock_back clock_broken http_dropped http_answers_lost "
    "http_delayed calls_interrupted"
).split()
MODULE = [name for name, kind in KINDS.items() if kind.inside]
FIRST = random.Random(SEED).sample(EITHER, len(EITHER) // 2 + 3)
KINDS_OF = {
    "outside": [*FIRST, "log_torn", "clients_gone"],
    "inside": [*(name for name in EITHER if name not in FIRST), *MODULE],
}
SABOTAGE = {
    "outside": {
        "sabotage_process": "processes left over",
        "sabotage_orphan": "have no claim|stay after all TTLs",
    },
    "inside": {"sabotage_text": "wrong text", "sabotage_copies": "last copy of"},
}
AT_GATEWAY = ("clients_gone", *SABOTAGE["outside"])
CARDS = {place: [*kinds, *SABOTAGE[place]] for place, kinds in KINDS_OF.items()}


def door_of(kind):
    return "gateway" if kind in AT_GATEWAY else "library"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The reports of two short campaigns with sabotage at their ends, at the same time."""
    folder = tmp_path_factory.mktemp("chaos")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": paths}, "text": True}
    running = {}
    for place, kinds in CARDS.items():
        cards = ",".join(f"{door_of(kind)}:{kind}" for kind in kinds)
        command = [sys.executable, "-m", "chaos", "--seed", str(SEED), "--cards", cards]
        command += ["--inside", str(int(place == "inside")), "--keep", str(folder / place)]
        command += ["--out", str(folder / f"{place}.json")]
        running[place] = subprocess.Popen(
            command, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    for place, process in running.items():
        print(process.communicate()[0])
        assert process.returncode == 1, f"{place} the sabotage went unnoticed, or it failed"
    return {place: json.loads((folder / f"{place}.json").read_text())[place] for place in CARDS}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("place", CARDS)
def test_a_short_campaign_ends_without_a_violation_but_those_of_the_sabotage(short, place):
    report, dealt = short[place], KINDS_OF[place]
    assert [v for v in report["violations"] if v["kind"] not in SABOTAGE[place]] == []
    assert report["faults"] == len(CARDS[place])
    assert {name: report["kinds"][name]["faults"] for name in dealt} == dict.fromkeys(dealt, 1)
    assert all(report["kinds"][name]["recover_s"]["max"] is not None for name in dealt)
    assert report["outcomes"]["calls"] > 2 * len(dealt)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "place, kind", [(p, kind) for p, kinds in SABOTAGE.items() for kind in kinds]
)
def test_what_breaks_a_rule_is_reported_with_seed_and_step(short, place, kind):
    found = [v for v in short[place]["violations"] if v["kind"] == kind]
    parts = SABOTAGE[place][kind].split("|")
    assert any(part in v["what"] for v in found for part in parts), found
    assert {(v["seed"], v["door"]) for v in found} == {(SEED, door_of(kind))}
    assert {v["step"] for v in found} == {CARDS[place].index(kind) + 1}


# ---- dealing ---------------------------------------------------------------------------------


def test_a_thousand_faults_have_each_kind_at_least_twenty_times():
    cards = [card for seed in range(10) for card in deck(seed, 100)]
    assert len(cards) == 1000
    counts = Counter(name for _, name in cards)
    assert set(counts) == set(DEALT) and min(counts.values()) >= 20
    assert {(door, name) for name in DEALT for door in KINDS[name].doors} == set(cards)
    inside = Counter(name for seed in range(10) for _, name in deck(seed, 100, inside=True))
    assert set(inside) - set(DEALT) == {name for name, kind in KINDS.items() if kind.inside}
    assert set(inside) > set(DEALT) and min(inside.values()) >= 10


def test_a_seed_deals_the_same_deck_again_and_one_door_after_the_other():
    cards = deck(7, 100)
    assert cards == deck(7, 100) != deck(8, 100)
    doors = [door for door, _ in cards]
    assert doors == sorted(doors, key=("library", "gateway").index) and set(doors) == {
        "library",
        "gateway",
    }
    assert all(door in KINDS[name].doors for door, name in cards)


def test_a_chunk_is_excused_if_its_last_claim_ended_but_not_if_it_was_renewed_or_shared():
    ledger, ended = ClaimLedger(), set()
    note_ends(ledger, ended)
    ledger.claim("0a", ["shared", "a"], "remote", now_s=0, ttl_s=100)
    ledger.claim("0b", ["shared", "b"], "remote", now_s=0, ttl_s=5_000)
    ledger.claim("0a", ["shared", "a"], "remote", now_s=50, ttl_s=100)
    assert ended == set()
    ledger.claim("0a", ["shared", "a"], "disk", now_s=3_600, ttl_s=100)
    assert ledger.wanted(["shared", "a"], 3_600) == ["disk", "disk"] and ended == {"a"}


def record(owner, kind, chunks, time_s, tier, ttl_s=None):
    return {
        "prompt_digest": owner,
        "kind": kind,
        "chunk_keys": chunks,
        "time_s": time_s,
        "wanted_tier": tier,
        "ttl_s": ttl_s,
    }


def test_records_excuse_a_chunk_whose_last_claim_has_ended_and_none_that_another_claims():
    endings = Endings()
    for owner in ("a", "b"):
        endings.take(record(owner, "generation", ["shared", owner], 0, "disk", 100))
    endings.take(record("a", "expiry", [], 100, "remote", 400))
    assert not endings.excuses(("a", ""))
    for _ in range(2):  # of the server, and of the log
        endings.take(record("a", "expiry", [], 500, None))
        assert endings.excuses(("a", "")) and not endings.excuses(("shared", ""))
    endings = endings.go_on()
    assert not endings.excuses(("a", ""))
    endings.take(record("b", "expiry", [], 500, None))
    assert endings.excuses(("shared", "")) and not endings.excuses(("shared", "tenant"))


# ---- the report ------------------------------------------------------------------------------


def part(seed, *rows, inside=False):
    steps = [
        {
            "number": number,
            "kind": kind,
            "door": "library",
            "calls": 2,
            "failed": 0,
            "recover_s": recover_s,
            "took_s": 3.0,
            "violations": violations,
        }
        for number, (kind, recover_s, violations) in enumerate(rows, start=1)
    ]
    return {"seed": seed, "inside": inside, "chosen": False, "load": 1.0, "steps": steps}


def test_parts_merge_by_seed_and_a_later_one_replaces_the_earlier(tmp_path):
    path = tmp_path / "reports" / "chaos.json"
    add(path, part(1, ("redis_slow", 1.0, ["wrong text"]), ("redis_full", None, [])))
    add(path, part(2, ("redis_slow", 3.0, [])))
    report = add(path, part(1, ("redis_slow", 2.0, []), ("disk_full", 4.0, ["lost"])))
    assert report["inside"]["faults"] == 0
    report = add(path, part(1, ("redis_slow", 9.0, []), inside=True))
    assert report == json.loads(path.read_text())
    outside, inside = report["outside"], report["inside"]
    assert (outside["seeds"], outside["faults"]) == ([1, 2], 3)
    assert (inside["seeds"], inside["faults"], inside["violations"]) == ([1], 1, [])
    assert outside["kinds"]["redis_slow"]["faults"] == 2
    assert outside["kinds"]["redis_slow"]["recover_s"] == {"p50": 2.0, "p90": 3.0, "max": 3.0}
    (violation,) = outside["violations"]
    assert violation == {
        "seed": 1,
        "inside": False,
        "step": 2,
        "kind": "disk_full",
        "door": "library",
        "what": "lost",
    }
    assert merged(report["parts"]) == report


def test_percentiles_are_of_those_that_recovered():
    assert percentiles([None]) == {"p50": None, "p90": None, "max": None}
    assert percentiles([None, *range(1, 11)]) == {"p50": 5, "p90": 9, "max": 10}
    assert shortened(part(3, ("redis_slow", None, ["never"])))["kinds"]["redis_slow"]["clean"] == 0


# ---- the proxy -------------------------------------------------------------------------------


@pytest.fixture
def proxied():
    behind = Proxy(1)  # nothing listens there: it closes connections unanswered
    front = Proxy(behind.port)
    yield front
    front.close()
    behind.close()


def test_a_proxy_before_a_dead_service_answers_nothing(proxied):
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{proxied.port}/healthz", timeout=10)


def test_a_proxy_passes_on_replaces_and_makes_trouble(stack):
    port = stack.config.server_http_port
    proxy = Proxy(stack.port, {f'"http_port":{port}': '"http_port":4242'})
    try:
        url = f"http://127.0.0.1:{proxy.port}/instances"
        assert requests.get(url, timeout=10).json()["instances"][0]["http_port"] == 4242
        for trouble in ("drop", "lose", "cut"):
            proxy.make_trouble(trouble)
            with pytest.raises(requests.RequestException):
                requests.get(url, timeout=10).json()
            assert proxy.troubled >= 1
        proxy.make_trouble("delay", delay_s=1.0)
        with pytest.raises(requests.ReadTimeout):
            requests.get(url, timeout=0.2)
        proxy.trouble = ""
        assert requests.get(url, timeout=10).ok
    finally:
        proxy.close()

"""The server module on a real LMCache server; no engine: clients speak as its worker does."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from inside_server import CHUNK, Client, inside_server, prompt
from waiting import wait_until

from kvttl.lmcache.lease import AlreadyManaged, ServerLease
from kvttl.server.guard import Guard
from kvttl.server.hints import Hints
from kvttl.server.requests import RequestHooks

ONE_HOUR = {"heuristics": {"base_ttl": 3600.0}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, redis_port):
    """Room for 64 chunks in gpu, disk and remote; TTLs of an hour."""
    with inside_server(tmp_path_factory.mktemp("inside"), ONE_HOUR, redis=redis_port) as running:
        yield running


@pytest.fixture
def client(server):
    client = Client(server.url)
    yield client
    client.close()


def held(client):
    """Chunks by tier, once nothing waits for a decision."""
    status = wait_until(lambda: (s := client.status())["waiting_decisions"] == 0 and s)
    return status["chunks"]


def last(client, count=1):
    """The newest records of generations, once there are so many."""
    wait_until(lambda: len(client.generations()) >= count)
    return client.generations()[-count:]


def test_a_ttl_ends_on_the_ladder_and_copies_are_made_where_they_are_missing(tmp_path, redis_port):
    short = {"heuristics": {"base_ttl": 1.0, "min_ttl": 0.1, "remote_ttl_factor": 0.5}}
    short["heuristics"]["disk_ttl_factor"] = 0.5
    short["save"] = "demotion"
    with inside_server(tmp_path, short, redis=redis_port) as running:
        client = Client(running.url)
        assert client.serve(prompt(1, 7), tier="gpu", ttl=1.0) == 0
        seen = [{"gpu": 7, "disk": 0, "remote": 0}]  # nothing is written down at birth
        assert held(client) == seen[0]

        def ends():
            if (now := client.status()["chunks"]) != seen[-1]:
                seen.append(now)
            return not any(now.values())

        wait_until(ends)
        tiers = [[tier for tier, count in each.items() if count == 7] for each in seen]
        order = [step for at, step in enumerate(tiers) if step and step != tiers[at - 1]]
        assert [step[-1] for step in order][-1] == "remote" and ["disk"] in tiers
        kinds = [(r.kind, r.from_tier, r.wanted_tier) for r in client.records()]
        assert kinds == [
            ("generation", None, "gpu"),
            ("expiry", "gpu", "disk"),
            ("expiry", "disk", "remote"),
            ("expiry", "remote", None),
        ]
        assert not any((tmp_path / "disk").iterdir())
        assert client.look_up(prompt(1, 7)) == 0
        client.close()


def test_what_is_wanted_below_is_written_once_and_a_hit_gives_its_bytes(client):
    tokens = prompt(2, 5)
    client.serve(tokens, tier="disk")
    (record,) = last(client)
    assert (record.wanted_tier, record.tier_after, record.error) == ("disk", {"disk": 5}, "")
    assert client.look_up(tokens) == 5
    assert client.serve(tokens, tier="disk") == 5


def test_copies_go_from_disk_to_remote_and_back_and_up(client):
    tokens = prompt(3, 5)
    for tier in ("disk", "remote", "disk", "gpu"):
        count = len(client.generations())
        client.serve(tokens, tier=tier)
        record = wait_until(lambda n=count: client.generations()[n:])[0]
        assert (record.error, list(record.tier_after)[:1]) == ("", [tier]), record
    assert client.look_up(tokens) == 5


def test_a_store_after_the_requests_end_is_managed(client):
    tokens = prompt(4, 3)
    count = len(client.generations())
    key = client._key(tokens, "late", 0, "", {"lmcache.kvttl.tier": "disk"})
    client._call("lookup", key, 1)
    client._call("wait_prefetch_status", "late", 60.0)
    client._call("end_session", "late")
    client.store(tokens, "late")
    (record,) = wait_until(lambda: client.generations()[count:])
    assert (record.wanted_tier, record.chunks) == ("disk", 3)
    wait_until(lambda: client.status()["done"].get("copied to disk", 0) >= 3)
    assert client.look_up(tokens) == 3


def test_hints_are_checked_and_answered_in_the_record(client):
    count = len(client.generations())
    hints = {"perplexity": 12.5, "pin": 1e5, "tier": "warm", "ttl": -1, "colour": 1, "store": "no"}
    client.serve(prompt(5, 2), **hints, session="s 1")
    (record,) = wait_until(lambda: client.generations()[count:])
    assert record.metadata["perplexity"] == 12.5
    assert record.metadata_sources["perplexity"] == "caller"
    assert (record.wanted_tier, record.ttl_s) == ("gpu", 3600.0)
    assert record.hints["pin"] == "clipped to 3600 s"
    assert (record.session, record.hints["session"]) == ("s 1", "accepted")
    refused = {name for name, answer in record.hints.items() if answer.startswith("refused: ")}
    assert refused == {"tier", "ttl", "colour", "store"}


def test_what_is_not_worth_storing_is_not_stored_and_what_was_goes(client):
    tokens, before = prompt(6, 4), client.status()["done"].get("not stored", 0)
    for hints in ({"store": False}, {"ttl": 0}):
        client.serve(tokens, **hints)
        assert client.look_up(tokens) == 0  # before anything is decided
    assert client.status()["done"]["not stored"] == before + 8
    client.serve(tokens, pin=60, ttl=0)
    assert client.look_up(tokens) == 4
    client.serve(tokens, store=False)
    wait_until(lambda: client.look_up(tokens) == 0)
    assert client.status()["failures"] == {}


@pytest.mark.parametrize("has_slots", [True, False])
def test_an_engine_is_told_what_needs_no_event_and_no_slot(has_slots):
    """Of a GPU's store, and of slots in shared memory, that no test has: as LMCache says it."""
    pool = {"shm_name": "pool" if has_slots else ""}
    listeners = SimpleNamespace(destroy_listeners=[])
    context = SimpleNamespace(shm_pool_info=pool, session_manager=listeners, chunk_size=CHUNK)
    hands = SimpleNamespace(done=Counter())
    hooks = RequestHooks(context, None, hands, Guard(), None)
    key = SimpleNamespace(request_configs={"lmcache.kvttl.store": False}, start=0, end=5 * CHUNK)
    called = lambda *_args: "as LMCache answers"  # noqa: E731
    assert hooks.store(called, key, 1, [[]], b"event") == (b"", True)
    answer = hooks.prepare_store(called, key, 1)
    assert answer == called() if not has_slots else answer.context == NO_SLOTS
    assert hands.done == {"not stored": 5 * (1 + has_slots)}


NO_SLOTS = {"slots": [], "chunk_indices": []}


def test_what_pressure_put_down_comes_back_once_there_is_room(tmp_path):
    """Of 64 chunks 54 are too many, and 48 are left then; below 42 there is room again."""
    with inside_server(tmp_path, ONE_HOUR, l1_chunks=64) as running:
        client = Client(running.url)
        client.serve(prompt(1, 30), tier="gpu", ttl=1000.0)
        client.serve(prompt(2, 30), tier="gpu", ttl=2000.0)
        wait_until(lambda: client.status()["put_down"])
        assert held(client) == {"gpu": 48, "disk": 60}
        assert client.status()["done"]["brought back"] == 0
        client.serve(prompt(2, 30), ttl=0.0)  # a hit, and its end
        wait_until(lambda: client.status()["chunks"] == {"gpu": 30, "disk": 30})
        status = client.status()
        assert (status["done"]["brought back"], status["put_down"]) == (12, 0)
        settled = [record for record in client.records() if record.kind == "settled"]
        moved = [
            (move["from"], move["to"], move["moved_chunks"]) for r in settled for move in r.moves
        ]
        assert moved == [("disk", "gpu", 12)] and settled[0].wanted_tier == "gpu"
        client.serve(prompt(1, 30), tier="gpu", ttl=1000.0)
        assert last(client, 4)[-1].hit_tokens == {"gpu": 30 * CHUNK}
        assert client.status()["failures"] == {}
        client.close()


def test_a_hit_below_gpu_is_loaded_whole_where_gpu_is_full(tmp_path):
    """What goes for it has another copy; LMCache would cut the hit where there is no room."""
    with inside_server(tmp_path, {**ONE_HOUR, "save": "end"}, l1_chunks=64) as running:
        client = Client(running.url)
        for number in range(1, 6):  # 100 chunks, all of them wanted
            client.serve(prompt(number, 20))  # the next may take its room: not before it is saved
            wait_until(lambda n=number: client.status()["chunks"]["disk"] == 20 * n)
        wait_until(lambda: not client.status()["waiting_decisions"])
        assert held(client)["gpu"] > 44
        hits = [client.serve(prompt(number, 20)) for number in (1, 2, 3, 4, 5, 1, 3)]
        assert hits == [20] * 7
        assert client.status()["failures"] == {}
        client.close()


def test_tenants_have_their_own(client):
    tokens = prompt(7, 3)
    client.serve(tokens, salt="tenant-a", tier="gpu")
    assert client.look_up(tokens) == 0 and client.look_up(tokens, "tenant-a") == 3
    record = wait_until(
        lambda: client.generations()[-1].cache_salt == "tenant-a" and client.generations()[-1]
    )
    assert all(key.endswith("@tenant-a") for key in record.chunk_keys)


@pytest.mark.parametrize("transport, save", [("zmq", "demotion"), ("zmq", "end"), ("grpc", "end")])
def test_no_store_is_refused_while_something_can_go(tmp_path, transport, save):
    """Four clients, each of whose stores takes a quarter of gpu."""
    options = ("--transport", transport, "--max-workers", "4")
    config = {**ONE_HOUR, "save": save}
    with inside_server(tmp_path, config, l1_chunks=64, options=options) as running:
        clients = [Client(running.url, number) for number in range(1, 5)]

        def work(number, client):
            for turn in range(8):
                client.serve(prompt(100 * number + turn, 14))

        threads = [threading.Thread(target=work, args=each) for each in enumerate(clients, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log = running.log.read_text()
        assert "Traceback" not in log
        status = clients[0].status()
        assert status["failures"] == {} and "refused" not in status["done"]
        assert status["done"]["given up"] >= 32 * 14 - 64
        for client in clients:
            client.close()


def test_what_ends_last_is_kept_longest(tmp_path):
    with inside_server(tmp_path, {**ONE_HOUR, "save": "demotion"}, l1_chunks=64) as running:
        client = Client(running.url)
        client.serve(prompt(1, 10), tier="gpu", ttl=9000.0)
        for number in range(2, 12):
            client.serve(prompt(number, 10), tier="gpu", ttl=200.0)
        record = last(client, 11)[0]
        assert record.ttl_s == 9000.0
        for _ in range(3):
            client.serve(prompt(1, 10), tier="gpu", ttl=9000.0)
        assert client.generations()[-1].hit_tokens == {"gpu": 10 * CHUNK}
        client.close()


@pytest.mark.parametrize("feature", ["late writes", "policies"])
def test_what_an_lmcache_lacks_switches_off_only_what_needs_it(tmp_path, feature):
    lacking = f"""
import sys
from kvttl.server import module
missing = module.missing
module.missing = lambda *of: missing(*of) | {{{feature!r}: ["some name"]}}
from lmcache.cli.main import main
main(sys.argv[1:])
"""
    with inside_server(tmp_path, ONE_HOUR, program=[sys.executable, "-c", lacking]) as running:
        client = Client(running.url)
        client.serve(prompt(1, 5), tier="disk")  # written through, as LMCache does
        wait_until(lambda: client.status()["chunks"] == {"gpu": 0, "disk": 5})
        assert client.status()["switched_off"] == {feature: ["some name"]}
        assert client.look_up(prompt(1, 5)) == 5
        client.close()


def test_a_plain_lmcache_server_can_load_the_module(tmp_path):
    plain = [sys.executable, "-m", "lmcache.cli.main"]
    with inside_server(tmp_path, ONE_HOUR, program=plain) as running:
        client = Client(running.url)
        client.serve(prompt(1, 5), tier="disk")
        (record,) = last(client)
        assert record.tier_after == {"disk": 5} and client.status()["switched_off"] == {}
        client.close()


def test_a_second_manager_of_the_server_is_refused(server):
    port = server.url.rpartition(":")[2]
    with pytest.raises(AlreadyManaged, match=f"process {server.process.pid}"):
        ServerLease(f"inside-{port} at port:{port}")


def test_wrong_settings_stop_the_start_with_a_sentence(tmp_path):
    with pytest.raises(AssertionError, match="low must be > 0 and <= high"):
        with inside_server(tmp_path, {"low": 0.9}):
            pass


def test_hints_without_the_prefix_are_others():
    assert Hints({"lmcache.max_offload_tokens": 64}, 60.0).answers == {}

"""One manager for one LMCache server, and KV cache that nobody has claimed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from local_managers import CONFIG, Clock, hottest, local_manager

from cache_controller import LMCacheController
from kvttl.lmcache.lease import AlreadyManaged, ServerLease
from tiered_caching import MultiTierCache

HOLDER = """
import sys, time
from cache_controller import LMCacheController
from tiered_caching import MultiTierCache
cache = MultiTierCache(LMCacheController(port=int(sys.argv[1]), instance_id=sys.argv[2]))
print("managing", flush=True)
time.sleep(600)
"""
INSTANCE = f"lease-test-{os.getpid()}"


def manager(host="localhost", instance_id=INSTANCE, port=1, **options):
    """Return a manager of a server that is away: a lease needs none."""
    controller = LMCacheController(host, port, instance_id=instance_id)
    return MultiTierCache(controller, notify=None, sweep_every_s=None, **options)


def test_a_server_that_another_process_manages_is_refused_until_that_one_ends():
    command = [sys.executable, "-c", HOLDER, "1", INSTANCE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "managing\n"
            for host in ("localhost", "127.0.0.1"):
                with pytest.raises(AlreadyManaged) as refused:
                    manager(host)
                assert f"{INSTANCE} at 127.0.0.1:1" in str(refused.value)
                assert f"process {holder.pid}" in str(refused.value)
            manager(instance_id=f"{INSTANCE}-other").close()  # another server is nobody's
            manager(port=2).close()
        finally:
            holder.send_signal(signal.SIGKILL)
    manager().close()


def test_close_gives_the_server_back():
    cache = manager()
    cache.close()
    command = [sys.executable, "-c", HOLDER.replace("time.sleep(600)", ""), "1", INSTANCE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "managing\n", done.stderr


def test_a_lease_that_nobody_has_any_more_is_free():
    lease = ServerLease(INSTANCE)
    del lease
    ServerLease(INSTANCE).release()


def test_a_later_manager_of_the_same_process_takes_over():
    first = manager()
    second = manager()
    with pytest.raises(AlreadyManaged, match="a later manager of this process"):
        first.sweep()
    record = first.manage("text", SimpleNamespace(prompt_token_ids=[1] * 40, outputs=[])).result()
    assert "a later manager of this process has taken over" in record.error
    assert second.sweep() == []
    first.close()  # does not take the server from the second one
    assert second.sweep() == []
    second.close()


def test_a_forked_child_holds_no_lease():
    lease = ServerLease(INSTANCE)
    read, write = os.pipe()
    ready, say_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.write(say_ready, b"!")
        os.read(read, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        lease.release()
        ServerLease(INSTANCE).release()  # free although the child lives
    finally:
        for pipe in (read, write, ready, say_ready):
            os.close(pipe)
        os.waitpid(child, 0)


def test_kv_without_a_claim_gets_one_at_the_second_look():
    clock = Clock()
    cache = local_manager(clock=clock)
    cache.sweep()
    cache.controller.store(list(b"stored by others"))
    clock.now_s += CONFIG.base_ttl / 2
    cache.sweep()  # first look: a decision about it may be under way
    assert len(cache.claims) == 0
    clock.now_s += CONFIG.base_ttl / 2
    cache.sweep()
    assert len(cache.claims) == 2
    assert cache.claims.next_due_s == clock.now_s + CONFIG.base_ttl
    clock.now_s += 100 * CONFIG.base_ttl
    cache.sweep()
    assert hottest(cache, "stored by others") == [None, None]


def test_looks_go_on_after_the_clock_was_put_back():
    clock = Clock(1e9)
    cache = local_manager(clock=clock)
    cache.sweep()
    clock.now_s = 1e6
    cache.sweep()
    cache.controller.store(list(b"stored by others"))
    for _ in range(2):
        clock.now_s += CONFIG.base_ttl / 2
        cache.sweep()
    assert len(cache.claims) == 2

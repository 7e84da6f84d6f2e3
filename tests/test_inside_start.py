"""How a server with the module is started: by the kit's own stack, and by what can be copied."""

from __future__ import annotations

import pytest
from inside_server import CHUNK, Client, prompt
from waiting import wait_until

from kvttl.lmcache.client import server_settings
from kvttl.stack.config import load_config
from kvttl.stack.lifecycle import LMCacheStack, StackError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inside")


@pytest.fixture(scope="module")
def stack(folder):
    """The kit's own stack, its adapters and its embedded Redis; it decides inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KV_HEURISTICS_FILE", str(folder / "mine.yaml"))
        (folder / "mine.yaml").write_text("base_ttl: 1234")
        places = {"disk_path": str(folder / "disk"), "run_dir": str(folder / "run")}
        config = load_config(inside=True, l1_size_gb=0.01, **places)
        with LMCacheStack(config, free_ports=True) as stack:
            yield stack


def test_the_kits_own_stack_decides_inside(stack):
    client = Client(f"tcp://{stack.host}:{stack.server_port}")
    settings = client.status()["settings"]
    assert settings["heuristics"] == {"base_ttl": 1234.0}
    assert (settings["high"], settings["low"]) == (0.95, 0.9025)
    tokens = prompt(1, 5)
    for number, tier in enumerate(("disk", "remote", "disk", "gpu"), 1):
        client.serve(tokens, tier=tier)
        record = wait_until(lambda n=number: (r := client.records())[n - 1 :] and r[-1])
        assert (record.error, list(record.tier_after)[:1]) == ("", [tier])
    assert client.look_up(tokens) == len(tokens) // CHUNK
    status = client.status()
    assert status["failures"] == status["switched_off"] == status["tier_errors"] == {}
    client.close()


def test_a_stack_that_decides_elsewhere_is_not_attached_to(stack):
    assert server_settings(stack.server_http_url)["inside"] is True
    other = LMCacheStack(stack.config.replaced(inside=False))
    with pytest.raises(StackError, match="runs with inside = True, but False is asked for"):
        other.start()

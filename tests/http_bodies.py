"""Hostile HTTP requests, seeded: bodies that are almost right, headers and routes that are not."""

from __future__ import annotations

import gzip
import json
import random
from typing import NamedTuple

ROUTES = ("/v1/completions", "/v1/chat/completions")
OTHER_ROUTES = (
    *("/v1/models", "/v1/models/demo_model", "/healthz", "/metrics", "/v1", "/", "//", "/v1/"),
    *("/v1/chat/completions/batch", "/v1/embeddings", "/kv", "/v1/kv/lookup", "/%2e%2e/%00"),
    *("/v1/completions/", "/v1/completions?x=%ff", "/é", "/" + "x" * 3000),
)
FIELDS = (
    *("model", "prompt", "messages", "kv", "n", "stop", "seed", "temperature", "top_p", "top_k"),
    *("min_p", "logprobs", "top_logprobs", "echo", "stream", "stream_options", "suffix", "user"),
    *("logit_bias", "best_of", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("length_penalty", "stop_token_ids", "bad_words", "min_tokens", "ignore_eos", "tools"),
    *("tool_choice", "response_format", "structured_outputs", "guided_json", "prompt_embeds"),
    *("prompt_logprobs", "cache_salt", "kv_transfer_params", "vllm_xargs", "request_id"),
    *("truncate_prompt_tokens", "add_special_tokens", "chat_template", "chat_template_kwargs"),
    *(
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "priority",
        "logits_processors",
    ),
    *("return_token_ids", "return_tokens_as_token_ids", "allowed_token_ids", "reasoning_effort"),
    *("parallel_tool_calls", "max_completion_tokens", "use_beam_search", "mm_processor_kwargs"),
    *("", "\u0000", "\ud800", "__class__", "x" * 300),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e308, -1e308, 10**30, 2**31, 2**63, 10**4000),
    *(float("nan"), float("inf"), "", " ", "Hi", "\u0000", "\ud800", "\uffff", "é実😀", "x" * 3000),
    *("1", "null", "auto", "none", "required", "../../etc/passwd", "${jndi:ldap://x}", "(a+)+$"),
    *("{{ 7*7 }}", "{% for i in range(9) %}{% endfor %}", [], [[]], ["Hi", 3], {}, {"a": 1}),
    *([0], [-1], [300_000], [2**40], [[1, 2], [3]], ["a"] * 50, {"type": "json_object"}),
    *({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}),
    *({"type": "text"}, {"include_usage": True}, {"include_usage": 7}, {"regex": "(a|b)+"}),
    *({"json": "{"}, {"grammar": "root ::= root"}, {"choice": []}, {"perplexity": "hot"}),
    *({"perplexity": 5.0}, {"type": "function", "function": {"name": "f"}}, [{"type": "function"}]),
    *([{"role": "user"}], [{"role": 7, "content": "Hi"}], [{"role": "tool"}]),
    *([{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text"}]}]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
)
TYPES = (
    *("application/json", "application/json; charset=utf-16", "APPLICATION/JSON", "text/plain", ""),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"),
)


class Request(NamedTuple):
    """One request, as bytes go over the wire."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def hostile_request(seed: int, number: int, model: str) -> Request:
    """The same request for the same seed and number."""
    rng = random.Random(f"{seed} {number}")
    chat = rng.random() < 0.5
    body = {"model": model, "max_tokens": rng.choice((1, 2))}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.1:
        del body[rng.choice(list(body))]
        body.setdefault("max_tokens", 2)
    for name in (
        "n",
        "best_of",
        "max_completion_tokens",
        "min_tokens",
    ):  # long answers are fine
        if isinstance(body.get(name), int) and abs(body[name]) > 8:
            body[name] = 8
    raw = mutated(rng, text_of(rng, body))
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.1:
        headers["Content-Type"] = rng.choice(TYPES)
    if rng.random() < 0.05:
        headers |= {"Content-Encoding": "gzip"}
        raw = gzip.compress(raw)
    if rng.random() < 0.05:
        headers |= {rng.choice(("Connection", "Upgrade", "Origin", "X-Request-Id")): "websocket"}
    method, path = "POST", ROUTES[chat]
    if rng.random() < 0.1:
        method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "QUERY"))
    if rng.random() < 0.1:
        path = rng.choice(OTHER_ROUTES)
    return Request(method, path, headers, raw)


def text_of(rng, body):
    """JSON text, also of what JSON has no words for."""
    kind = rng.random()
    if kind < 0.02:
        return "[" * 100_000
    if kind < 0.04:
        return json.dumps(rng.choice(VALUES[:40]), default=str)
    if kind < 0.06:  # one key twice
        return json.dumps(body)[:-1] + ', "model": "other", "prompt": ["a"]}'
    return json.dumps(body, ensure_ascii=rng.random() < 0.5)


def mutated(rng, text):
    """Bytes, mostly as they should be."""
    encoding = rng.choice(("utf-8",) * 12 + ("utf-16", "utf-8-sig", "latin-1"))
    raw = bytearray(text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace"))
    if rng.random() < 0.2:
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(len(raw) + 1)
            match rng.choice(("flip", "cut", "insert", "double")):
                case "flip" if at < len(raw):
                    raw[at] ^= 1 << rng.randrange(8)
                case "cut":
                    del raw[at:]
                case "insert":
                    raw[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
                case "double":
                    raw[at:at] = raw[max(0, at - 20) : at]
    return bytes(raw)

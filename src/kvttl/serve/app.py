"""The gateway's HTTP side: vLLM's own OpenAI routes, metadata in ``kv``, health and metrics.

Only the routes named here exist: vLLM's application has more, and some of them
generate without asking for the API key.
"""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from caching_heuristics import TIERS, check_metadata
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.client import LMCacheError
from kvttl.lmcache.requests import check_fields
from kvttl.serve.engine import KV_METADATA
from kvttl.serve.vllm_parts import vllm_parts
from tiered_caching import MultiTierCache

BODY_LIMIT = 4 * 2**20  # bytes: some million tokens


async def openai_app(engine: Any, arguments: Any, body_limit: int = BODY_LIMIT) -> Any:
    """Return vLLM's routes ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    vllm = vllm_parts()
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=vllm.lifespan)
    for attach in (vllm.attach_models, vllm.attach_completion, vllm.attach_chat):
        attach(app)
    vllm.init_exception_handler(app)
    vllm.init_entrypoints_middleware(arguments, app, ("generate",))
    app.user_middleware.insert(0, Middleware(_openai_errors))
    # Innermost, so that a body is read only after the API key has been checked.
    app.user_middleware.append(Middleware(_limit_bodies, limit_bytes=body_limit))
    await vllm.init_app_state(engine, app.state, arguments, ("generate",))
    app.state.openai_serving_chat_batch = None  # "not implemented": one `kv` for many prompts
    # vLLM's server ends itself after the engine; this one stays, to say what happened.
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def _openai_errors(app):
    """Wrap an ASGI application: the body of every error is OpenAI's, whoever it comes from."""

    async def shaped(scope, receive, send):
        start, body = None, bytearray()

        async def send_shaped(message):
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    await _as_openai(scope, start, bytes(body))(scope, receive, send)

        try:
            await app(scope, receive, send_shaped)
        except Exception as error:  # vLLM's checks stumble over some bodies
            if scope.get("kv_accepted") or scope.get("method") != "POST":
                raise
            said = f"the request cannot be understood: {error}".encode(errors="backslashreplace")
            start = {"status": 400, "headers": []}
            await _as_openai(scope, start, said)(scope, receive, send)

    return shaped


def _as_openai(scope, start, body):
    """Return an error as a response, its body as it is if it is OpenAI's already."""
    from starlette.responses import JSONResponse

    status = HTTPStatus(start["status"])
    try:
        said = json.loads(body)
    except ValueError:
        said = body.decode(errors="replace")
    if not (isinstance(said, dict) and isinstance(said.get("error"), dict)):
        said = said.get("detail") if isinstance(said, dict) else said
        text = _in_words(scope, status) or (said if isinstance(said, str) else "")
        said = error_body(text or status.phrase, status)
    response = JSONResponse(said, status)
    named = (b"content-length", b"content-type")
    response.raw_headers += [each for each in start["headers"] if each[0].lower() not in named]
    return response


def _in_words(scope, status):
    """Return what a client should know about an error that has no words of its own."""
    if status == HTTPStatus.UNAUTHORIZED:
        return "the API key is missing or wrong: send `Authorization: Bearer <key>`"
    if status not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        return None
    routes = (f"{'/'.join(sorted(r.methods))} {r.path}" for r in scope["app"].routes)
    here = ", ".join(route for route in routes if not route.endswith("/batch"))
    return f"there is no route {scope['method']} {scope['path'][:200]}; this server has {here}"


def error_body(message: str, status: HTTPStatus) -> dict[str, Any]:
    """Return an error as OpenAI words it."""
    return vllm_parts().create_error_response(message, status.phrase, status).model_dump()


def _limit_bodies(app, limit_bytes):
    """Wrap an ASGI application: vLLM's handler of HTTP errors answers a longer body."""
    from fastapi import HTTPException

    async def limited(scope, receive, send):
        left_bytes = limit_bytes

        async def receive_limited():
            nonlocal left_bytes
            message = await receive()
            left_bytes -= len(message.get("body", b""))
            if left_bytes < 0:
                raise HTTPException(413, f"the body must have at most {limit_bytes} bytes")
            return message

        await app(scope, receive_limited, send)

    return limited


def manage_app(app: Any, cache: MultiTierCache, metrics: DecisionMetrics) -> None:
    """Read ``kv`` from every request of `openai_app`; add ``/healthz`` and ``/metrics``."""
    from fastapi import Response
    from fastapi.responses import JSONResponse
    from prometheus_client import generate_latest

    state = app.state
    chat, completion = state.openai_serving_chat, state.openai_serving_completion
    chat.create_chat_completion = _with_kv(chat.create_chat_completion)
    completion.create_completion = _with_kv(completion.create_completion)

    def healthz():  # not async: asking LMCache must not hold the event loop up
        health = health_of(state.engine_client, cache, metrics)
        if health["engine"] == "running":
            return JSONResponse(health)
        return JSONResponse(health | error_body(health["status"], HTTPStatus(503)), 503)

    def show_metrics():  # vLLM's and this kit's
        registries = (vllm_parts().get_prometheus_registry(), metrics.registry)
        text = b"".join(map(generate_latest, registries))
        return Response(text, media_type="text/plain; version=0.0.4")

    app.add_api_route("/healthz", healthz)
    app.add_api_route("/metrics", show_metrics)


def health_of(engine: Any, cache: MultiTierCache, metrics: DecisionMetrics) -> dict[str, Any]:
    """Return what ``/healthz`` shows: engine, LMCache, manager, and one word for all."""
    engine_state = "dead" if engine.errored else "running"
    try:
        cache.controller.check_health()
        lmcache = "running"
    except LMCacheError as error:
        lmcache = f"away: {error}"
    tiers = dict.fromkeys(TIERS, "ok") | dict(cache.controller.tier_errors())
    whole = lmcache == "running" and set(tiers.values()) == {"ok"}
    healthy = "ok" if whole else "degraded"  # generation goes on
    return {
        "status": healthy if engine_state == "running" else "engine dead",
        "engine": engine_state,
        "lmcache": lmcache,
        "tiers": tiers,
        "manager": {
            name.removesuffix("_total"): _sum(metrics, f"kvttl_{name}")
            for name in ("queue_depth", "live_claims", "not_managed_total", "shed_total")
        },
    }


def _sum(metrics, name):
    families = metrics.registry.collect()
    value = sum(s.value for family in families for s in family.samples if s.name == name)
    return int(value) if math.isfinite(value) else None  # a gauge that cannot be read


def _with_kv(create):
    """Wrap one of vLLM's ``create_...`` so that the engine knows the request's metadata."""

    async def create_managed(request, raw_request=None):
        if raw_request is not None:  # from here on an exception is not the client's fault
            raw_request.scope["kv_accepted"] = True
        try:
            check_fields(request)
            metadata = kv_of(request)
        except ValueError as error:
            return vllm_parts().create_error_response(str(error), param="kv")
        KV_METADATA.set(metadata)  # every request sets its own, also where it has none
        return await create(request, raw_request)

    return create_managed


def kv_of(request: Any) -> dict[str, float] | None:
    """Return the metadata in a request's ``kv``; None if it has none.

    Raises
    ------
    ValueError
        Names the field, its value and the allowed range.

    Examples
    --------
    >>> kv_of(SimpleNamespace(kv={"perplexity": 12.5}))
    {'perplexity': 12.5}
    >>> kv_of(SimpleNamespace(kv={"time_variance": 3}))
    Traceback (most recent call last):
        ...
    ValueError: kv: time_variance must be 0..1, got 3
    """
    given = getattr(request, "kv", None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"kv must be an object with numbers, got {given!r:.80}")
    try:
        return check_metadata(given)
    except ValueError as error:
        raise ValueError(f"kv: {error}") from None

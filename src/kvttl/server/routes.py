"""What the LMCache server's own HTTP port shows of this kit, and who may see and change it."""

from __future__ import annotations

import functools
import hmac
import os
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from kvttl.decisions.metrics import is_loopback
from kvttl.lmcache.client import TOKEN_VARIABLE
from kvttl.server.compat import http_app, http_host


@functools.cache
def token() -> str:
    """Return the bearer token of all ``/kvttl`` routes of this process; empty = there is none.

    It is taken out of the environment, which LMCache shows to anybody at ``/env``.
    """
    return os.environ.pop(TOKEN_VARIABLE, "").strip()


def guarded(host: str) -> Callable[[Request], None]:
    """Return what lets only those into routes who may use them: a dependency for FastAPI.

    With a token, whoever sends it. Without one, this machine alone: a server that the network
    reaches answers nobody, and of a browser's requests only those to and from a page of this
    machine count, since any other page could send them too.

    Parameters
    ----------
    host : str
        What the HTTP server is bound to.
    """

    def allow(request: Request) -> None:
        if token():
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), token().encode())
            if not same or scheme.lower() != "bearer":
                problem = "the token is missing or wrong: send `Authorization: Bearer <token>`"
                raise HTTPException(401, problem, {"WWW-Authenticate": "Bearer"})
            return
        client = request.client.host if request.client else ""
        if not (is_loopback(host) and is_loopback(client)):
            problem = f"set {TOKEN_VARIABLE} where the server starts: the network can reach it"
            raise HTTPException(403, problem)
        named = "//" + request.headers.get("host", "")
        if not all(map(_is_of_this_machine, (named, request.headers.get("origin", named)))):
            raise HTTPException(403, "Host and Origin must be names of this machine's loopback")

    return allow


def _is_of_this_machine(url):
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def mount(module: Any) -> None:
    """Add all routes of a module to its server, before that is started."""
    allowed = Depends(guarded(http_host()))
    for router in (routes(module), module.handover.router()):
        http_app().include_router(router, prefix="/kvttl", dependencies=[allowed])


async def json_object(request: Request) -> Mapping[str, Any]:
    """Return a request's body, which must be a JSON object; anything else is a 400."""
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


def routes(module: Any) -> APIRouter:
    """Return the routes of a module: its status, its decisions and its settings."""
    router = APIRouter()

    @router.get("/status")
    def status() -> dict[str, Any]:
        return module.status()

    @router.patch("/config")
    async def config(request: Request) -> dict[str, Any]:
        changes = await json_object(request)
        try:
            return await run_in_threadpool(module.change, changes)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    return router

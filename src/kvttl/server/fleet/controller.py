"""All servers with the module at once: what they do, and the settings of all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from typing import Any

import httpx
from fastapi import APIRouter, Depends, HTTPException, Request
from lmcache.v1.mp_coordinator.controllers.base import Controller
from lmcache.v1.mp_coordinator.views.instance_registry import InstanceRegistry
from prometheus_client.parser import text_string_to_metric_families

from kvttl.server.routes import check_names, guarded, json_object, merged, token

logger = logging.getLogger(__name__)

_EVERY_S = 2.0  # servers are told the settings that have not been
_ANSWER_S = 10.0  # that a server has to answer
_NO_SUMS = ("_created", "_age_seconds")
_THIS_MACHINE = ("127.0.0.0/8", "::1/128")


class Fleet(Controller):
    """Shows what all servers do, and has all of them keep to the same settings.

    Whoever registers with a coordinator is a server to it, without a login: only servers on this
    machine, and in networks that are named, are asked and given the token.

    Parameters
    ----------
    config : MPCoordinatorConfig
        Its ``extra_config["kvttl"]`` may have ``settings`` that every server is to have, and
        ``networks`` of servers.
    views : Registry
        LMCache's, with the list of servers.

    Raises
    ------
    ValueError
        Another option.
    """

    def __init__(self, config: Any, views: Any) -> None:
        options = config.extra_config.get("kvttl", {})
        check_names("option of kvttl.server.fleet", options, ("settings", "networks"))
        self._host, self._instances = config.host, views.get(InstanceRegistry)
        self._settings = dict(options.get("settings", {}))
        self._networks = list(map(ip_network, (*options.get("networks", ()), *_THIS_MACHINE)))
        self._bearer = f"Bearer {token()}" if token() else ""
        self._told: dict[str, tuple] = {}  # server -> when it came, and the settings it was told
        self._telling = asyncio.Lock()

    @classmethod
    def from_config(cls, config: Any, views: Any) -> Fleet:
        """Make it, as LMCache's coordinator does."""
        return cls(config, views)

    @contextlib.asynccontextmanager
    async def run(self, runtime: Any) -> AsyncIterator[None]:
        """Tell servers that come, while the coordinator runs."""
        self._client = runtime.http_client
        task = asyncio.create_task(self._tell_newcomers())
        try:
            yield
        finally:
            task.cancel()

    def get_routers(self) -> list[APIRouter]:
        """Return the routes on the coordinator's port."""
        router = APIRouter(prefix="/kvttl/fleet", dependencies=[Depends(guarded(self._host))])
        router.get("")(self.show)
        router.patch("")(self.change)
        return [router]

    async def show(self, request: Request) -> dict[str, Any]:
        """Return each server's status, or why there is none, and the sums of their metrics."""
        sums: Counter[str] = Counter()
        statuses = await self._ask_all("GET", "/kvttl/status", _bearer(request) or self._bearer)
        for code, text in (await self._ask_all("GET", "/metrics")).values():
            with contextlib.suppress(ValueError):
                sums.update(_numbers(text) if code == 200 else {})
        return {"servers": _said(statuses), "settings": self._settings, "metrics": sums}

    async def change(self, request: Request) -> dict[str, Any]:
        """Set settings of all servers, or of none where one refuses; the others' when they come."""
        changes = await json_object(request)
        async with self._telling:
            self._bearer = _bearer(request) or self._bearer
            settings = merged(self._settings, changes)
            tried = await self._ask_all("PATCH", "/kvttl/config?trial=true", self._bearer, settings)
            for name, (code, said) in tried.items():
                if code == 400:
                    raise HTTPException(400, f"{name}: {said}")
            self._settings = settings
            servers = _said(await self._tell(self._instances.all_instances()))
        return {"servers": servers, "settings": self._settings}

    async def _tell_newcomers(self):
        while True:
            await asyncio.sleep(_EVERY_S)
            async with self._telling:
                there = self._instances.all_instances() if self._settings else ()
                self._told = {i.instance_id: self._told.get(i.instance_id) for i in there}
                await self._tell([i for i in there if self._told[i.instance_id] != self._wanted(i)])

    def _wanted(self, instance):
        return instance.registration_time, self._settings

    async def _tell(self, instances):
        asks = "PATCH", "/kvttl/config", self._bearer, self._settings
        answers = await self._ask_all(*asks, instances)
        for each in instances:
            code, said = answers[each.instance_id]
            if code in (200, 400):  # else it is asked again
                self._told[each.instance_id] = self._wanted(each)
            if code == 400:
                logger.error("server %s refuses the fleet's settings: %s", each.instance_id, said)
        return answers

    async def _ask_all(self, method, path, bearer="", body=None, instances=None):
        instances = self._instances.all_instances() if instances is None else instances
        asked = (self._ask(each, method, path, bearer, body) for each in instances)
        answers = await asyncio.gather(*asked)
        return {each.instance_id: answer for each, answer in zip(instances, answers, strict=True)}

    async def _ask(self, instance, method, path, bearer, body):
        """Return a server's status code and answer, or why there is none: a sentence."""
        host = f"[{instance.ip}]" if ":" in instance.ip else instance.ip
        url = f"http://{host}:{instance.http_port}{path}"
        try:
            if not any(ip_address(instance.ip) in each for each in self._networks):
                raise ValueError("its address is in none of the fleet's `networks`")
            options = {"headers": {"Authorization": bearer} if bearer else {}, "json": body}
            answer = await self._client.request(method, url, **options, timeout=_ANSWER_S)
            said = answer.text if path == "/metrics" else answer.json()
            return answer.status_code, said if answer.is_success else said["detail"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            return 0, f"no usable answer from {url}: {type(error).__name__}: {error}"


def _bearer(request):
    return request.headers.get("authorization", "")


def _said(answers):
    """Return what servers answered, or why they did not."""
    good = {name: answer for name, (code, answer) in answers.items() if code == 200}
    return {name: good.get(name, {"error": said}) for name, (_, said) in answers.items()}


def _numbers(text):
    """Return this kit's metrics by name and labels, those that can be summed."""
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    ours = [s for s in samples if s.name.startswith("kvttl_") and not s.name.endswith(_NO_SUMS)]
    return {f"{s.name}{{{','.join(map('='.join, s.labels.items()))}}}": s.value for s in ours}

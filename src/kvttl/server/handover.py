"""A manager outside hands its decisions over: routes on the server's HTTP port.

There is one decider. What a manager outside measures and decides comes here, and the server's own
manager claims, moves and lets TTLs end, by that manager's clock. What its requests were about and
nobody hands over in time is decided here.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from caching_heuristics import TIERS
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import LMCacheError, LMCacheUnavailable
from kvttl.lmcache.lease import AlreadyManaged
from kvttl.server.hints import PREFIX, Hints
from kvttl.server.places import Model
from kvttl.server.routes import json_object

_MAX_WAITING = 10_000  # requests whose decision may still come, and decisions that came
HANDED_OVER = "handed over"

_Tier = Literal["gpu", "disk", "remote"]


class Who(msgspec.Struct):
    """A manager outside: a process, and of its managers the newest counts."""

    process: str
    number: int
    now_s: float  # its clock
    ladder: dict[_Tier, float]


class _Hello(msgspec.Struct):
    who: Who
    policy: str | None = None  # another one than the server's is refused: nothing is taken over
    until_s: float | None = None  # TTLs are to end until then
    leaves: bool = False


class _About(msgspec.Struct):
    model: str
    world_size: int = 1
    keys: list[str] | None = None
    tokens: list[int] | None = None
    cache_salt: str = ""
    now_s: float = 0.0


class _Move(_About, kw_only=True):
    source: _Tier
    target: _Tier
    timeout_s: float | None = None


class _Manage(_About, kw_only=True):
    who: Who
    tokens: list[int]
    cached_tokens: int
    decided: DecisionRecord  # as far as it goes outside


class _Given(Hints):
    """What a manager outside has measured and decided; nothing, where the policy here decides."""

    def __init__(self, made: DecisionRecord) -> None:
        super().__init__(None, 0.0)
        self.answers["manager"], self._metadata = HANDED_OVER, made.metadata
        if made.wanted_tier is not None:
            self.wishes = {"ttl": made.ttl_s, "tier": made.wanted_tier}


class ManagerOutside:
    """Lets one manager outside lead a server's module; its public methods with `ask` are routes.

    Parameters
    ----------
    module : KvttlModule
        Decides.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._lock = module, threading.Lock()
        module.places.clock = self.clock
        self._who: Who | None = None
        self._heard_s, self._until_s = 0.0, -math.inf  # monotonic
        self._handed: dict[tuple, tuple] = {}  # request -> when its decision came, and the record
        self._waiting: deque[tuple[float, Any]] = deque()

    def router(self) -> APIRouter:
        """Return the routes: JSON there and back; what is refused is a sentence."""
        router = APIRouter()
        for name, method in inspect.getmembers(self, inspect.ismethod):
            if "ask" in inspect.signature(method).parameters and not name.startswith("_"):
                router.add_api_route(f"/{name}", _endpoint(method), methods=["POST"])
        return router

    # ---- who leads -------------------------------------------------------------------------

    @property
    def leader(self) -> str | None:
        """The process whose manager leads now."""
        return self._who.process if self._who and time.monotonic() < self._until_s else None

    def is_led(self) -> bool:
        """Say whether a manager outside leads: then TTLs end when it says so."""
        return self.leader is not None

    def clock(self) -> float:
        """Return Unix time; of a manager outside what it told last, which goes on without it."""
        with self._lock:
            if self._who is None:
                return time.time()
            passed_s = 0.0 if self.is_led() else time.monotonic() - self._heard_s
            return self._who.now_s + passed_s

    def _meet(self, who):
        """Take a manager as the one that leads, or raise AlreadyManaged."""
        if set(who.ladder) != set(TIERS) or not all(0 < f < math.inf for f in who.ladder.values()):
            raise ValueError(f"ladder must have {', '.join(TIERS)}, each > 0, got {who.ladder}")
        server = f"LMCache server {self._module.instance_id}"
        with self._lock:
            earlier = self._who
            if earlier and earlier.process == who.process:
                if who.number < earlier.number:
                    raise AlreadyManaged(f"a later manager of this process has taken over {server}")
            elif self.is_led():
                raise AlreadyManaged(
                    f"{server} has a manager already, {earlier.process}: a second one would let "
                    "the first one's KV cache expire; close() that one or end its process, and "
                    f"try again after {self._module.settings.handover_s:g} s"
                )
            self._who, self._heard_s = who, time.monotonic()
            self._until_s = self._heard_s + self._module.settings.handover_s
        for manager in list(self._module.managers.values()):
            self.lead(manager)

    def lead(self, manager: Any) -> None:
        """Let a model's manager have the ladder of the one outside."""
        manager.be_led(self.is_led)
        if self._who is not None:
            manager.claims.set_ladder(self._who.ladder)

    def hello(self, ask: _Hello) -> dict[str, Any]:
        """Begin, go on or end to lead; let TTLs end if that is asked for."""
        settings = self._module.settings
        told = {"silent_s": settings.handover_s, "policy": settings.policy}
        if ask.policy not in (None, settings.policy):
            return told | {"time_s": time.time()}
        self._meet(ask.who)
        if ask.leaves:
            self._until_s = -math.inf
        for manager in list(self._module.managers.values()) if ask.until_s is not None else ():
            manager.sweep(ask.until_s)
        return told | {"time_s": time.time()}

    # ---- decisions ---------------------------------------------------------------------------

    def manage(self, ask: _Manage) -> dict[str, Any]:
        """Carry a decision out; returns the record."""
        self._meet(ask.who)
        model, made = self._model(ask), ask.decided
        answer = {"finish_reason": made.finish_reason, "token_ids": range(made.output_tokens)}
        answer |= {"text": None, "logprobs": None}
        prompt = {"prompt_token_ids": ask.tokens, "num_cached_tokens": ask.cached_tokens}
        output = SimpleNamespace(**prompt, outputs=[SimpleNamespace(**answer)])
        request, now_s = _request(model, made.cache_salt, ask.tokens), time.time()
        with self._lock:
            self._handed.pop(request, None)
            if len(self._handed) >= _MAX_WAITING:
                del self._handed[next(iter(self._handed))]
            self._handed[request] = now_s, None
        what = output, _Given(made), made.generate_s, made.cache_salt
        try:
            record = self._module.decide(model, *what, lambda: made.time_s)
        except BaseException:
            self._handed.pop(request, None)  # the server decides alone, in time
            raise
        self._handed[request] = now_s, record
        return {"record": msgspec.Raw(record.to_json().encode())}

    def leaves(self, ended: Any) -> bool:
        """Say whether a request that has ended is left to the manager outside."""
        if (ended.key.request_configs or {}).get(f"{PREFIX}manager") is not True:
            return False
        if not self.is_led() or len(self._waiting) >= _MAX_WAITING:
            return False
        self._waiting.append((time.monotonic() + self._module.settings.handover_s, ended))
        return True

    def overdue(self) -> Iterator[Any]:
        """Yield the requests about which no decision has come in time."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            ended = self._waiting.popleft()[1]
            key = ended.key
            model = Model(key.model_name, key.world_size)
            request = _request(model, key.cache_salt, key.token_ids)
            came_s, record = self._handed.get(request, (0.0, None))
            if came_s < ended.began_s:
                yield ended
            elif record is not None:  # by now all that was under way is stored
                self._module.note(model, record)

    # ---- where KV cache is, and what is wanted where -----------------------------------------

    def claims(self, ask: _About) -> dict[str, Any]:
        """Return how many claims live, when the next one ends, and where they want chunks."""
        manager, keys = self._module.managers.get(Model(ask.model, ask.world_size)), ask.keys or []
        if manager is None:
            return {"count": 0, "next_due_s": None, "wanted": [None] * len(keys)}
        claims = manager.claims  # a step that waits is due at once
        wanted, due_s = claims.wanted(keys, ask.now_s), max(claims.next_due_s, 0.0)
        return {"count": len(claims), "next_due_s": due_s, "wanted": wanted}  # infinity is null

    def layout(self, ask: _About) -> dict[str, Any]:
        """Return where chunks are: of a prompt, by their keys, or all of a model.

        None, not even a prompt's, of a model that no engine has come with.
        """
        if ask.keys is None and not self._knows(ask):
            return {"keys": [], "tiers": []}
        controller = self._controller(ask)
        if ask.tokens is not None:
            return self._shown(controller.layout(ask.tokens, ask.cache_salt))
        return self._shown(controller.layout_of(ask.keys))

    def move(self, ask: _Move) -> dict[str, Any]:
        """Move chunks from one tier to another."""
        controller = self._controller(ask)
        here, options = controller.instance_id, {"keys": ask.keys, "timeout_s": ask.timeout_s}
        done = controller.move([here, ask.source], [here, ask.target], **options)
        moved = {"moved": done["moved_chunks"], "skipped": done["skipped"]}
        return moved | self._shown(controller.layout_of(ask.keys))

    def discard(self, ask: _About) -> dict[str, Any]:
        """Delete every copy of some chunks; returns how many keep one."""
        return {"left": self._controller(ask).discard(ask.keys or [])}

    def room(self, ask: _About) -> dict[str, Any]:
        """Return how many chunks tiers have room for (null: unknown), and why some take none."""
        if not self._knows(ask):
            return {"chunks": [None] * len(TIERS), "errors": {}}
        controller = self._controller(ask)
        return {"chunks": controller.room_chunks(), "errors": controller.tier_errors()}

    def _shown(self, layout):
        return {"keys": layout.keys, "tiers": layout.of(self._module.instance_id)}

    def _controller(self, ask):
        return self._module.manager(self._model(ask)).controller

    def _knows(self, ask):
        return self._module.places.space(ask.model, ask.world_size, "") is not None

    def _model(self, ask):
        if not self._knows(ask):
            raise LMCacheUnavailable(f"no engine of {ask.model!r:.200} has come to this server yet")
        return Model(ask.model, ask.world_size)


def _request(model, salt, tokens):
    return model, salt, hash(tuple(tokens))


def _endpoint(method: Callable[[Any], dict]) -> Callable:
    shape = inspect.signature(method, eval_str=True).parameters["ask"].annotation

    def answer(body):
        return Response(msgspec.json.encode(method(msgspec.convert(body, shape))))

    async def endpoint(request: Request) -> Response:
        body = await json_object(request)
        try:
            return await run_in_threadpool(answer, body)
        except (ValueError, LMCacheError) as error:
            status = 409 if isinstance(error, AlreadyManaged) else 400
            raise HTTPException(status, str(error)) from None

    return endpoint

"""The server module: one decider for an LMCache server, inside of it.

Threads: LMCache's request workers (`requests`), its store loop and prefetch loop (`targets`,
`written`, `retained`), its event bus; of this kit's own those that decide, one a model that lets
TTLs end, and one that keeps gpu below its watermark.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.multiprocess.ext_server_module import server_module_handler

from caching_heuristics import SETTINGS, HeuristicConfig, check_number
from kvttl import user_path
from kvttl.background import JobQueue, Repeater, check_whole
from kvttl.decisions.log import DecisionLog, DecisionRecord
from kvttl.lmcache.lease import ServerLease
from kvttl.lmcache.tiers import LMCACHE_TIERS, pages
from kvttl.server.compat import LATE_WRITES, POLICIES, WRAPPED, missing, use_policies, wrapped
from kvttl.server.controller import InsideController
from kvttl.server.guard import Guard
from kvttl.server.handover import ManagerOutside
from kvttl.server.hands import Hands, by_space
from kvttl.server.hints import HINTS, Hinted, Hints, ModelManager, as_output
from kvttl.server.places import BIT_OF, TIERS_OF, Chunk, Model, Places
from kvttl.server.policies import KvttlPrefetchPolicy, KvttlStorePolicy, are_in_use, serve
from kvttl.server.requests import Ended, RequestHooks
from kvttl.server.routes import Shown, check_names, merged, mount

logger = logging.getLogger(__name__)

_LONG_S = 60.0  # of a request, after which its chunks may go before it has ended
_SOON_S = 2.0  # after a request's end it is decided about
_RELIEF_CHUNKS = 256  # written down at once when gpu is too full
_CHANGES = 100  # of settings, that the status shows
LIVE = ("heuristics", "birth", "save", "high", "low", "max_pin_s", "budgets")  # can be changed


@dataclass(frozen=True)
class ServerSettings:
    """``config`` of ``--server-module``.

    Raises
    ------
    ValueError
        Names the setting, the value and what is allowed.
    """

    heuristics: Mapping[str, float] = field(default_factory=dict)  # of `HeuristicConfig`
    birth: str = "none"  # what is written down when it is stored: "none", or "all" as LMCache does
    save: str = "end"  # what is wanted in gpu is written down at its request's "end", or "demotion"
    high: float = 0.85  # gpu's share from which on it is relieved, down to `low`
    low: float = 0.75
    pass_s: float = 0.1  # how often that is looked at
    sweep_s: float = 0.2  # how often TTLs are looked at
    workers: int = 2  # decisions at the same time
    max_pin_s: float = 3600.0
    handover_s: float = 10.0  # how long a manager outside may be silent, and its decision take
    budgets: Mapping[str, float] = field(default_factory=dict)  # `cache_salt` -> share of gpu
    log: str = ""  # folder of decision logs, from which a restart takes claims up again
    adapters: Mapping[str, str] = field(
        default_factory=lambda: {t: row.adapter for t, row in LMCACHE_TIERS.items() if row.adapter}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("birth", ("none", "all")), ("save", ("end", "demotion"))):
            if getattr(self, name) not in allowed:
                one = " or ".join(allowed)
                raise ValueError(f"{name} must be {one}, got {getattr(self, name)!r:.80}")
        check_number("high", self.high, 0.0, 1.0, open_low=True)
        check_number("low", self.low, 0.0, self.high, open_low=True, high_name="high")
        for name in ("pass_s", "sweep_s", "max_pin_s", "handover_s"):
            check_number(name, getattr(self, name), 0.0, 604_800.0, open_low=True)
        check_whole("workers", self.workers)
        kinds = {"heuristics": Mapping, "budgets": Mapping, "adapters": Mapping, "log": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                a_kind = "a text" if kind is str else "a mapping"
                raise ValueError(f"{name} must be {a_kind}, got {getattr(self, name)!r:.80}")
        check_names("setting of heuristics", self.heuristics, SETTINGS)
        for salt, share in self.budgets.items():
            check_number(f"budgets[{salt!r:.80}]", share, 0.0, 1.0, open_low=True)
        _ = self.formula

    @functools.cached_property
    def formula(self) -> HeuristicConfig:
        """What decides."""
        return HeuristicConfig(**self.heuristics)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ServerSettings:
        """Return the settings in a mapping; unknown ones are a ValueError."""
        check_names("setting of kvttl.server", config, [each.name for each in fields(cls)])
        return cls(**config)

    def changed(self, changes: Mapping[str, Any]) -> ServerSettings:
        """Return other settings: of a mapping's names only those in `changes`, without null ones.

        Raises
        ------
        ValueError
            A setting is unknown, wrong, or cannot be changed while the server runs.
        """
        settings = asdict(self)
        for name in changes:
            if name in settings and name not in LIVE:
                problem = f"cannot be changed while the server runs, got {changes[name]!r:.80}"
                raise ValueError(f"{name} {problem}: it must be one of {', '.join(LIVE)}")
        settings = merged(settings, changes)
        for name, known in (("heuristics", SETTINGS), ("budgets", settings["budgets"])):
            if isinstance(settings[name], dict):
                check_names(f"setting of {name}", settings[name], known)
                settings[name] = {n: v for n, v in settings[name].items() if v is not None}
        return self.of(settings)


class KvttlModule:
    """An LMCache ``EngineModule``; see `build`.

    Parameters
    ----------
    build_context : ExtServerModuleBuildContext
        LMCache's.
    """

    def __init__(self, build_context: Any) -> None:
        self._context = context = build_context.server_context
        self.settings = ServerSettings.of(build_context.config)
        self.guard, self.places = Guard(), Places(context)
        self._sm, self.instance_id = context.storage_manager, build_context.mp_config.instance_id
        self.absent = missing(self._sm, build_context.modules)
        by_name = are_in_use()
        can_copy = not {LATE_WRITES, *([] if by_name else [POLICIES])} & {*self.absent}
        self.hands = Hands(self._sm, self.places, self.settings.adapters, self.guard, can_copy)
        self.requests = RequestHooks(context, self.places, self.hands, self.guard, self._ended)
        url = build_context.coordinator_config.url or f"port:{build_context.mp_config.port}"
        self._lease = ServerLease(f"{self.instance_id} at {url.rpartition('/')[2]}")
        self._managers: dict[Model, ModelManager] = {}
        self._making, self.shed, self._passed_s = threading.Lock(), 0, time.monotonic()
        self._doubtful: list = []  # objects that LMCache had no room for
        self._decisions = JobQueue(self._manage, self._shed, 1_000, workers=self.settings.workers)
        self._keeper = Repeater(self.guard(self.keep_room, "pass"), self.settings.pass_s)
        for name in ("targets", "written", "retained"):
            setattr(self, name, self.guard(getattr(self, name), name))
        serve(self)
        self.changes: deque = deque(maxlen=_CHANGES)
        self.handover = ManagerOutside(self)
        self.shown = Shown(self)
        self.shown.watch("queue_depth", lambda: len(self._decisions))
        self.places.set_budgets(self.settings.budgets)
        self.guard(mount, "routes")(self)
        if not by_name and POLICIES not in self.absent:
            both = KvttlStorePolicy(), KvttlPrefetchPolicy()
            use_policies(self._sm, *both)
        bus = context.event_bus
        bus.subscribe(EventType.L1_KEYS_EVICTED, self.guard(self._gone, "deletes"))
        bus.subscribe(EventType.L1_ALLOCATION_FAILED, self.guard(self._refused, "refusals"))
        self._keeper.start()
        if self.absent:
            logger.warning("switched off, since this LMCache lacks what they need: %s", self.absent)

    # ---- LMCache's EngineModule --------------------------------------------------------------

    @property
    def context(self) -> Any:
        """LMCache's server."""
        return self._context

    def report_status(self) -> dict[str, Any]:
        """Return what LMCache's ``/status`` shows to anybody: nothing of tenants and settings."""
        status = self.guard(self.status, "status", {})()
        return {"kvttl": {n: v for n, v in status.items() if n not in ("settings", "changes")}}

    def close(self) -> None:
        """Stop; LMCache goes on with its own shutdown whatever happens here."""
        self._keeper.close()
        self.requests.endings.release(0.0)
        self._decisions.close(timeout_s=5.0)
        for manager in self._managers.values():
            self.guard(manager.close, "close")()
        self._lease.release()

    @server_module_handler("kvttl.status")
    def status_call(self, payload: bytes) -> bytes:
        """Return `status` as JSON; for LMCache's own request clients."""
        return json.dumps(self.status()).encode()

    @server_module_handler("kvttl.decisions")
    def decisions_call(self, payload: bytes) -> bytes:
        """Return the last records, one a line of JSON."""
        return "\n".join(record.to_json() for record in list(self.shown.records)).encode()

    @server_module_handler("kvttl.ended")
    def ended_call(self, payload: bytes) -> bytes:
        """Hear from an engine how a request ended: its id, finish reason and answer's tokens."""
        request_id, finish, tokens = json.loads(payload)
        finish = None if finish is None else HINTS["finish"]("finish", finish)
        tokens = int(HINTS["output_tokens"]("output_tokens", tokens))
        self.requests.endings.meet(request_id, {"finish": finish, "output_tokens": tokens})
        return b""

    def status(self) -> dict[str, Any]:
        """Return what is where, what was done and what fails."""
        chunks, (used, total) = self.places.chunks(), self._sm.get_l1_usage()
        tiers = [tier for chunk in chunks for tier in TIERS_OF[chunk.bits]]
        managers = {model.name: manager for model, manager in self._managers.items()}
        return {
            "chunks": {tier: tiers.count(tier) for tier in ("gpu", *self.hands.tiers)},
            "gpu_bytes": [used, total],
            "claims": {name: len(manager.claims) for name, manager in managers.items()},
            "manager_outside": self.handover.leader,
            "open_requests": len(self.requests.open),
            "unseen_requests": self.requests.unseen,
            "waiting_decisions": len(self._decisions),
            "shed_decisions": self.shed,
            "done": dict(self.hands.done),
            "tier_errors": dict(self.hands.errors),
            "switched_off": self.absent,
            "failures": dict(self.guard.failures),
            "left_out": self.guard.resting,
            "seconds_since_pass": time.monotonic() - self._passed_s,
            "settings": asdict(self.settings),
            "changes": list(self.changes),
        }

    def change(self, changes: Mapping[str, Any], is_trial: bool = False) -> dict[str, Any]:
        """Put other settings in force, all of `changes` or none; returns all that hold then.

        Raises
        ------
        ValueError
            See `ServerSettings.changed`.
        """
        with self._making:
            settings = self.settings.changed(changes)
            if not is_trial:
                self.settings = settings
                self.places.set_budgets(settings.budgets)
                for manager in self._managers.values():
                    manager.claims.set_ladder(settings.formula.ladder)
                self.changes.append({"time_s": time.time(), "settings": dict(changes)})
                logger.warning("settings changed: %s", json.dumps(changes))
        return asdict(settings)

    # ---- decisions -----------------------------------------------------------------------------

    def _ended(self, ended):
        if not self.handover.leaves(ended):
            self._decisions.put(ended)

    def _shed(self, ended):
        self.shed += 1  # its chunks are strays, which the manager claims in time
        what = {"prompt_tokens": len(ended.tokens), "cache_salt": ended.key.cache_salt}
        self.shown.observe(DecisionRecord(ended.ended_s, "", kind="shed", **what))

    def manager(self, model: Model) -> ModelManager:
        """Return the manager of a model, the same one for all who ask."""
        with self._making:
            if model not in self._managers:
                name = hashlib.sha256(f"{model.name}@{model.world_size}".encode()).hexdigest()[:16]
                folder = self.settings.log and user_path(self.settings.log) / name
                parts = self.places, self.hands, self.instance_id, self._lease
                manager = self._managers[model] = ModelManager(
                    InsideController(self._context, model, *parts),
                    config=Hinted(lambda: self.settings.formula),
                    notify=None,
                    clock=self.handover.clock,
                    sweep_every_s=self.settings.sweep_s,
                    log=DecisionLog(folder) if folder else None,
                    metrics=self.shown,
                )
                self.handover.lead(manager)
                if folder:
                    self.guard(manager.recover, "recovery")(folder)
            return self._managers[model]

    def _manage(self, ended: Ended) -> None:
        """Decide about a request that has ended, and have its KV cache placed."""
        key, hints = ended.key, Hints(ended.key.request_configs, self.settings.max_pin_s)
        model = Model(key.model_name, key.world_size)
        output = as_output(ended, hints)
        self.decide(model, output, hints, ended.ended_s - ended.began_s, key.cache_salt)

    def decide(
        self,
        model: Model,
        output: Any,
        hints: Hints,
        took_s: float,
        cache_salt: str,
        now: Callable[[], float] | None = None,
    ) -> DecisionRecord:
        """Have a model's manager decide about a request, and take note of it; see `manage`."""
        record = self.manager(model).decide(output, hints, took_s, cache_salt, now)
        chunks, hot = self.note(model, record)
        below = next(iter(self.hands.tiers), None)
        if hot and below and self.settings.save == "end" and below not in self.hands.errors:
            unsaved = [chunk for chunk in chunks if chunk.bits == BIT_OF["gpu"]]
            self.hands.copy(unsaved, below, 0.0)
        return record

    def note(self, model: Model, record: DecisionRecord) -> tuple[list[Chunk], bool]:
        """Have gpu's order follow a decision; returns its chunks, and if it wants them there."""
        chunks = self.places.of_keys(model, record.chunk_keys)
        chunks = [chunk for chunk in chunks if chunk.bits]
        hot = record.wanted_tier == "gpu" and bool(record.ttl_s)
        self.places.decided(chunks, record.time_s + (record.ttl_s if hot else 0.0))
        return chunks, hot

    @property
    def managers(self) -> dict[Model, ModelManager]:
        """Those of all models that anything was decided about."""
        return dict(self._managers)

    # ---- LMCache's loops ask ---------------------------------------------------------------------

    def targets(self, keys: list, adapters: list) -> dict[int, list]:
        """Return what LMCache's store loop is to write down, by adapter."""
        writes_through = self.settings.birth == "all" or not self.hands.can_copy
        birth = [each.index for each in adapters] if writes_through else []
        return self.hands.targets(keys, birth)

    def written(self, keys: list) -> None:
        """Hear of copies that the store loop has made."""
        self.hands.written(keys)

    def retained(self, keys: list) -> list[bool]:
        """Say which objects that a hit loads from below stay in gpu: what a claim wants there."""
        wanted: dict[bytes, Any] = {}
        for space, chunks in by_space(self.places.of_objects(keys)):
            if manager := self._managers.get(space.model):
                tiers = manager.claims.wanted([chunk.key for chunk in chunks], manager.clock())
                hot = [chunk for chunk, tier in zip(chunks, tiers) if tier == "gpu"]
                self.places.came(hot, "gpu")
                wanted |= dict.fromkeys((chunk.digest for chunk in hot), True)
        return [key.chunk_hash in wanted for key in keys]

    def _gone(self, event):
        self.places.went(
            list(self.places.of_objects(event.metadata["keys"])), "gpu", event.timestamp
        )

    def _refused(self, event):
        self._doubtful += event.metadata["keys"]
        self.hands.done["refused"] += len(event.metadata["keys"])

    # ---- room in gpu -------------------------------------------------------------------------

    def keep_room(self) -> None:
        """Keep gpu below its watermark: what goes first goes, written down if it is wanted."""
        self._passed_s = time.monotonic()
        self.requests.forget_lost()
        for ended in self.handover.overdue():
            self._decisions.put(ended)
        if self._doubtful:
            doubtful, self._doubtful = self._doubtful, []
            chunks = set(self.places.of_objects(doubtful))
            self.places.went(chunks - self.hands.in_gpu(chunks), "gpu")
        (used, total), settings = self._sm.get_l1_usage(), self.settings
        if used > settings.high * total:
            # Not the chunks of requests that run; a decision that was lost must not keep its own.
            now_s = time.time()
            oldest_s = max(min(list(self.requests.open.values()), default=now_s), now_s - _LONG_S)
            self.hands.give_up(self._relieve, 0, settings.low, oldest_s - _SOON_S)

    def _relieve(self, chunks):
        """Write chunks down that are wanted and have no other copy; delete them from gpu."""
        for space, some in by_space(chunks):
            unsaved = [chunk for chunk in some if chunk.bits == BIT_OF["gpu"]]
            manager = self._managers.get(space.model)
            if manager and unsaved and self.hands.tiers:
                keys = [chunk.key for chunk in unsaved]
                tiers = manager.claims.wanted(keys, manager.clock())
                wanted = [chunk for chunk, tier in zip(unsaved, tiers) if tier is not None]
                for part in pages(wanted, _RELIEF_CHUNKS):
                    self.hands.copy(part, self.hands.tiers[0], 0.0)
        return self.hands.delete(chunks, "gpu")


def build(build_context: Any) -> KvttlModule:
    """Make the module of one server; only wrong settings and another manager raise."""
    methods = wrapped(build_context.modules, WRAPPED)
    module = type("KvttlServerModule", (KvttlModule,), methods)(build_context)
    gc.collect()
    gc.freeze()  # what is here now stays: no collection has to look at it, for 0.1 s, again
    return module

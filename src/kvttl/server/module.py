"""The server module: one decider for an LMCache server, inside of it.

Threads: LMCache's request workers (`requests`), its store loop and prefetch loop (`targets`,
`written`, `retained`), its event bus; of this kit's own those that decide, one a model that lets
TTLs end, and one that keeps gpu below its watermark.
"""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.multiprocess.ext_server_module import server_module_handler

from kvttl import user_path
from kvttl.background import JobQueue, Repeater
from kvttl.decisions.log import DecisionLog, DecisionRecord
from kvttl.lmcache.lease import ServerLease
from kvttl.replay.costs import TierCosts
from kvttl.server.compat import (
    LATE_WRITES,
    POLICIES,
    REQUESTS,
    WRAPPED,
    KvttlPrefetchPolicy,
    KvttlStorePolicy,
    are_in_use,
    missing,
    reaches,
    serve,
    use_policies,
    warning_of,
    wrapped,
)
from kvttl.server.controller import InsideController, PutDown
from kvttl.server.guard import Guard
from kvttl.server.handover import ManagerOutside
from kvttl.server.hands import Hands, by_space
from kvttl.server.hints import HINTS, Hinted, Hints, ModelManager
from kvttl.server.journal import digest_of, open_journals, take_up
from kvttl.server.places import HOT, PINNED, TIERS_OF, UNDECIDED, Chunk, Model, Places
from kvttl.server.requests import Ended, RequestHooks, as_output
from kvttl.server.routes import Shown, mount
from kvttl.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_LONG_S = 60.0  # of a request, after which its chunks may go before it has ended
_SOON_S = 2.0  # after a request's end it is decided about
_CHANGES = 100  # of settings, that the status shows
_WRITE_DOWN_S = 0.25  # between two looks at what the journal lacks
_CLOSE_S = 30.0  # that LMCache waits for at most


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
        self._config = build_context.mp_config
        self.absent = missing(self._sm, build_context.modules)
        by_name = are_in_use()
        can_copy = not {LATE_WRITES, *([] if by_name else [POLICIES])} & {*self.absent}
        self.hands = Hands(self._sm, self.places, self.settings.adapters, self.guard, can_copy)
        self.put_down = PutDown(self._sm.get_l1_usage, self.places)
        self.hands.gave_up = self.put_down.note
        self.requests = RequestHooks(context, self.places, self.hands, self.guard, self._ended)
        url = build_context.coordinator_config.url or f"port:{build_context.mp_config.port}"
        self._lease = ServerLease(f"{self.instance_id} at {url.rpartition('/')[2]}")
        self.managers: dict[Model, ModelManager] = {}  # of models that were decided about
        self._making, self.shed, self._passed_s = threading.Lock(), 0, time.monotonic()
        base_path = self.hands.address("disk")[0]
        self.journals = open_journals(self.settings.journal, base_path, self.places)
        self._doubtful: list = []  # objects that LMCache had no room for
        self._decisions = JobQueue(self._manage, self._shed, 1_000, workers=self.settings.workers)
        self._keeper = Repeater(self.guard(self.keep_room, "pass"), self.settings.pass_s)
        self._lifter = Repeater(self.guard(self.bring_back, "promotion"), self.settings.pass_s)
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
            use_policies(self._sm, KvttlStorePolicy(), KvttlPrefetchPolicy())
        bus = context.event_bus
        bus.subscribe(EventType.L1_KEYS_EVICTED, self.guard(self._gone, "deletes"))
        bus.subscribe(EventType.L1_ALLOCATION_FAILED, self.guard(self._refused, "refusals"))
        self._writer = Repeater(self.guard(self._write_down, "journal"), _WRITE_DOWN_S)
        for thread in (self._keeper, self._lifter, self._writer):
            thread.start()
        beginning = self.guard(self._begin, "beginning")
        threading.Thread(target=beginning, name="kv-begin", daemon=True).start()
        self._warn(warning_of(self.absent))

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
        """Stop; LMCache goes on with its own shutdown whatever happens here, or hangs."""
        closing = threading.Thread(target=self.guard(self._close, "close"), daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def _close(self):
        self._keeper.close()
        self._lifter.close()
        self.requests.endings.release(0.0)
        self._decisions.close(timeout_s=5.0)
        for manager in list(self.managers.values()):
            self.guard(manager.close, "close")()
        self._writer.close()
        if self.journals:
            self.journals.close()
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
        return {
            "chunks": {tier: tiers.count(tier) for tier in ("gpu", *self.hands.tiers)},
            "gpu_bytes": [used, total],
            "claims": {m.name: len(each.claims) for m, each in list(self.managers.items())},
            "manager_outside": self.handover.leader,
            "open_requests": len(self.requests.open),
            "unseen_requests": self.requests.unseen,
            "waiting_decisions": len(self._decisions),
            "shed_decisions": self.shed,
            "done": dict(self.hands.done),
            "put_down": len(self.put_down),
            "tier_errors": self.hands.failing(),
            "switched_off": self.absent,
            "failures": dict(self.guard.failures),
            "left_out": self.guard.resting,
            "seconds_since_pass": time.monotonic() - self._passed_s,
            "threads": {
                name: {"busy_s": min(each.busy_s, 1e9), "restarts": each.restarts}
                for name, each in self._threads().items()
            },
            "journal": self.journals.status() if self.journals else "off",
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
                for manager in list(self.managers.values()):
                    manager.claims.set_ladder(settings.formula.ladder)
                self.changes.append({"time_s": time.time(), "settings": dict(changes)})
                logger.warning("settings changed: %s", json.dumps(changes))
        return asdict(settings)

    # ---- decisions -----------------------------------------------------------------------------

    def _ended(self, ended):
        self._keeper.revive(self.settings.stuck_s)  # which looks after the other threads
        if not self.handover.leaves(ended):
            self._decisions.put(ended)

    def _shed(self, ended):
        self.shed += 1  # its chunks are strays, which the manager claims in time
        what = {"prompt_tokens": len(ended.tokens), "cache_salt": ended.key.cache_salt}
        self.shown.observe(DecisionRecord(ended.ended_s, "", kind="shed", **what))

    def manager(self, model: Model) -> ModelManager:
        """Return the manager of a model, the same one for all who ask."""
        with self._making:
            if model not in self.managers:
                folder, costs = self.settings.log, self.settings.costs
                log = DecisionLog(user_path(folder) / digest_of(model)) if folder else None
                journal = self.journals.of(model, log) if self.journals else None
                parts = self.places, self.hands, self.instance_id, self._lease
                manager = ModelManager(
                    InsideController(self._context, model, *parts),
                    self.settings,
                    config=Hinted(lambda: self.settings.formula),
                    costs=TierCosts(**costs) if costs else None,
                    clock=self.handover.clock,
                    log=journal or log,
                    metrics=self.shown,
                )
                manager.tell_values(self.guard)
                self.handover.lead(manager)
                if journal:
                    self.guard(manager.take_up, "recovery")(journal)
                self.managers[model] = manager
            return self.managers[model]

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
        if hot and below and self.settings.save == "end" and below not in self.hands.failing():
            unsaved = [chunk for chunk in chunks if chunk.bits == HOT]
            self.hands.copy(unsaved, below, 0.0)
        return record

    def note(self, model: Model, record: DecisionRecord) -> tuple[list[Chunk], bool]:
        """Have gpu's order follow a decision; returns its chunks, and if it wants them there."""
        chunks = self.places.of_keys(model, record.chunk_keys)
        chunks = [chunk for chunk in chunks if chunk.bits]
        hot = record.wanted_tier == "gpu" and bool(record.ttl_s)
        ends_s = record.time_s + (record.ttl_s if hot else 0.0)
        if self.settings.policy == "formula":
            self.places.decided(chunks, ends_s)
        elif not record.hints.get("pin", "refused").startswith("refused"):
            self.places.valued(chunks, [(PINNED, ends_s)] * len(chunks))
        else:  # what the policy knows nothing of goes first
            unknown = [chunk for chunk in chunks if chunk.ends_s is UNDECIDED]
            self.places.valued(unknown, [(-1, ends_s)] * len(unknown))
        return chunks, hot

    # ---- from start to start, and threads that fail ---------------------------------------------

    def _begin(self):
        take_up(self)
        if REQUESTS not in self.absent and not reaches(self._config, self.requests.reached):
            self.absent[REQUESTS] = ["the last handler of an operation is the one that counts"]
            self._warn(warning_of(self.absent))

    def _warn(self, text):
        if text:
            logger.warning(text)

    def _threads(self):
        sweeps = {f"sweep of {m.name}": each.sweeper for m, each in list(self.managers.items())}
        own = {"pass": self._keeper, "promotion": self._lifter, "journal": self._writer}
        return own | {"decisions": self._decisions} | sweeps

    def _write_down(self):
        self._keeper.revive(self.settings.stuck_s)
        if self.journals:
            self.journals.flush()

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
            if manager := self.managers.get(space.model):
                hot = manager.wanted_hot(chunks)
                self.places.came(hot, "gpu")
                wanted |= dict.fromkeys((chunk.digest for chunk in hot), True)
        return [key.chunk_hash in wanted for key in keys]

    def _gone(self, event):
        chunks = list(self.places.of_objects(event.metadata["keys"]))
        self.places.went(chunks, "gpu", event.timestamp)

    def _refused(self, event):
        self._doubtful += event.metadata["keys"]
        self.hands.done["refused"] += len(event.metadata["keys"])

    # ---- room in gpu -------------------------------------------------------------------------

    def keep_room(self) -> None:
        """Keep gpu below its watermark: what goes first goes, written down if it is wanted."""
        self._passed_s = time.monotonic()
        for name, thread in self._threads().items():
            if name != "pass":
                thread.revive(self.settings.stuck_s)
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
            if manager := self.managers.get(space.model):
                manager.save(some, self.hands)
        return self.hands.delete(chunks, "gpu")

    def bring_back(self) -> None:
        """Have what pressure has put down in gpu again, once there is room."""
        chunks = self.put_down.take(self.settings.high, self.settings.low)
        for space, some in by_space(chunks):
            if manager := self.managers.get(space.model):
                manager.bring_back(some)
        self.hands.done["brought back"] += sum(bool(chunk.bits & HOT) for chunk in chunks)


def build(build_context: Any) -> KvttlModule:
    """Make the module of one server; only wrong settings and another manager raise."""
    methods = wrapped(build_context.modules, WRAPPED)
    module = type("KvttlServerModule", (KvttlModule,), methods)(build_context)
    gc.collect()
    gc.freeze()  # what is here now stays: no collection has to look at it, for 0.1 s, again
    return module

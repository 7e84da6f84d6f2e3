"""An LMCache server that decides by itself (`kvttl.server`), as a manager outside sees it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvttl.background import Repeater
from kvttl.lmcache.client import LMCacheError, LMCacheHTTP
from kvttl.lmcache.layout import KVLayout, Outcome, check_tokens
from kvttl.lmcache.lease import AlreadyManaged
from kvttl.lmcache.salts import kept_under

logger = logging.getLogger(__name__)

HINTED = {"lmcache.kvttl.manager": True}  # a request whose decision is handed over
_HELLO_S = 2.0
_UUID, _numbers = uuid.uuid4().hex[:8], itertools.count()
# What a decision that was handed over comes back with.
_MADE = (
    "ttl_s wanted_tier chunks chunk_keys hit_tokens tier_before tier_after moves tier_errors "
    "policy decided policy_error hints wanted_again error"
).split()


class ServerModule:
    """Where the KV cache of one model is, and what moves it: no directory, no delay.

    Parameters
    ----------
    http : LMCacheHTTP
        The calls.
    instance_id : str
        The server's.
    about : callable
        Returns the model's name, its world size, and the only tenant that is shown (empty: all).
    """

    def __init__(
        self, http: LMCacheHTTP, instance_id: str, about: Callable[[], tuple[str, int, str]]
    ) -> None:
        self._http, self._instance, self._about = http, instance_id, about

    def ask(self, name: str, **body: Any) -> Mapping[str, Any]:
        """Return the answer to a call about the model.

        Raises
        ------
        AlreadyManaged
            Another manager leads.
        LMCacheUnavailable, LMCacheError
            The server does not answer, or refuses.
        """
        model, world_size, _ = self._about()
        body |= {"model": model, "world_size": world_size}
        try:
            return self._http.ask_module(self._instance, f"/kvttl/{name}", body)
        except LMCacheError as error:
            if error.status != 409:
                raise
            raise AlreadyManaged(json.loads(error.text)["detail"]) from None

    def decisions(self, since_s: float) -> Mapping[str, Any]:
        """Return a page of the records that the server has made since, of all models."""
        path = f"/kvttl/decisions?since={since_s!r}&limit=1000"
        return self._http.ask_module(self._instance, path)

    def layout(self, tokens: Sequence[int], cache_salt: str = "") -> KVLayout:
        """Return where each complete chunk of a prompt is, under a salt."""
        salt = kept_under(cache_salt) or self._about()[2]
        return self._read(self.ask("layout", tokens=check_tokens(tokens), cache_salt=salt))

    def layout_of(self, keys: Sequence[str], _instance_id: str = "") -> KVLayout:
        """Return where chunks are, by their keys; these have the salt in any case."""
        return self._read(self.ask("layout", keys=list(keys)))

    def listed(self, _instance_id: str = "") -> KVLayout:
        """Return where all chunks are."""
        layout, salt = self._read(self.ask("layout")), self._about()[2]
        return layout.under(salt) if salt else layout

    def move(self, layout: KVLayout, source: str, target: str, timeout_s: float | None) -> Outcome:
        """Move chunks from one tier to another."""
        what = {"source": source, "target": target, "timeout_s": timeout_s}
        done = self.ask("move", keys=list(layout.keys), **what)
        return Outcome(moved=done["moved"], skipped=done["skipped"], layout=self._read(done))

    def discard(self, layout: KVLayout, _instance_id: str = "") -> int:
        """Delete every copy of some chunks; returns how many chunks keep one."""
        return self.ask("discard", keys=list(layout.keys))["left"]

    def _read(self, answer):
        tiers = tuple(map(tuple, answer["tiers"]))
        return KVLayout(tuple(answer["keys"]), {self._instance: tiers} if any(tiers) else {})


class Handover:
    """A manager whose decisions are carried out in the server: its claims, placement and lease.

    Parameters
    ----------
    module : ServerModule
        Of the server.
    ladder : mapping
        See `kvttl.manager.policy.Policy`.
    clock : callable
        The manager's; the server's managers follow it as long as this one leads.
    policy : str or object
        ``"formula"``: tier and TTL are decided here; else by the server's policy of this name.
    """

    def __init__(
        self,
        module: ServerModule,
        ladder: Mapping[str, float],
        clock: Callable[[], float],
        policy: Any,
    ) -> None:
        self._module, self._clock = module, clock
        self._policy = policy if isinstance(policy, str) else type(policy).__name__
        process = f"process {os.getpid()} on {socket.gethostname()} ({_UUID})"
        self._who = {"process": process, "number": next(_numbers), "ladder": dict(ladder)}
        self._refusal, self._since_s = "", 0.0
        self._hellos: Repeater | None = None

    def begin(self) -> Handover:
        """Lead from now on, until `release` or this process ends.

        Raises
        ------
        AlreadyManaged
            Another process leads; from then on, and from `check`: a later manager has taken over.
        ValueError
            The server has another policy.
        """
        answer = self._tell("hello", policy=self._policy)
        self._since_s = answer["time_s"]
        if answer["policy"] != self._policy:
            raise ValueError(
                f"policy must be {answer['policy']!r}, which the LMCache server's module has as "
                f"its setting, got {self._policy!r}: one of the two decides"
            )
        self._hellos = Repeater(self._hello, min(answer["silent_s"] / 4, _HELLO_S))
        self._hellos.start()
        return self

    def _hello(self):
        try:
            self._tell("hello")
        except AlreadyManaged:
            self._hellos.close()
        except LMCacheError as error:
            logger.info("the server does not hear of its manager: %s", error)

    def _tell(self, name, **body):
        self.check()
        try:
            return self._module.ask(name, who={**self._who, "now_s": self._clock()}, **body)
        except AlreadyManaged as error:
            self._refusal = str(error)
            raise

    # ---- as a lease ------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AlreadyManaged if another manager leads."""
        if self._refusal:
            raise AlreadyManaged(self._refusal)

    def release(self) -> None:
        """Let the server decide alone, or another manager lead."""
        if self._hellos is not None:
            self._hellos.close()
        with contextlib.suppress(LMCacheError):  # it will notice
            self._tell("hello", leaves=True)

    # ---- as a placement, and what settles ---------------------------------------------------

    def place(self, draft: Any, tokens: Sequence[int], cached_tokens: int) -> None:
        """Have a decision carried out; see `kvttl.manager.placement.KVPlacement`."""
        decided = json.loads(draft.record("generation", "").to_json())
        if self._policy != "formula":
            decided["wanted_tier"] = None
        what = {"tokens": tokens, "cached_tokens": cached_tokens, "decided": decided}
        made = self._tell("manage", **what)["record"]
        vars(draft).update({name: made[name] for name in _MADE}, claimed=True)
        draft.chunk_keys = tuple(made["chunk_keys"])

    def claim_later(self, *_wish: Any) -> None:
        """Do nothing: what is not handed over the server decides alone."""

    def sweep(self, until_s: float) -> list[Mapping[str, Any]]:
        """Let TTLs end; returns the records that the server has made since, in order.

        None while the server is away: they come later.
        """
        records, more = [], True
        try:
            self._tell("hello", until_s=until_s)
            while more:
                answer = self._module.decisions(self._since_s)
                self._since_s, more = answer["next"], answer["more"]
                records += answer["records"]
        except AlreadyManaged:
            raise
        except LMCacheError as error:
            logger.info("a sweep failed: %s", error)
        return [each for each in records if each["hints"].get("manager") != "handed over"]

    # ---- as a ledger of claims --------------------------------------------------------------

    def __len__(self) -> int:
        return self._module.ask("claims")["count"]

    @property
    def next_due_s(self) -> float:
        """When the next claim ends, seconds; infinite if there is none, or nobody answers."""
        try:
            due_s = self._module.ask("claims")["next_due_s"]
        except LMCacheError:
            due_s = None
        return math.inf if due_s is None else due_s

    def wanted(self, chunks: Sequence[str], now_s: float) -> list[str | None]:
        """Return the hottest tier that a live claim asks for, for each chunk."""
        return self._module.ask("claims", keys=list(chunks), now_s=now_s)["wanted"]

"""What a request says about its own KV cache: ``lmcache.kvttl.*`` of its ``kv_transfer_params``.

Anybody who may send a request may send these: each is checked, and the decision's record says
what has become of it. One that is refused counts as none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from caching_heuristics import METADATA_FIELDS, TIERS, HeuristicConfig, check_number, unknown_name
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.tiers import pages
from kvttl.meter.live import RegretMeter
from kvttl.server.hands import Hands
from kvttl.server.places import HOT, Chunk
from tiered_caching import MultiTierCache

PREFIX = "lmcache.kvttl."
MAX_TTL_S = 604_800.0
_MAX_CHARS = 128
_RELIEF_CHUNKS = 256  # written down at once when gpu is too full


def _number(high, low=0.0, open_low=False):
    return lambda name, value: check_number(name, value, low, high, open_low)


def _text(name, value):
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_CHARS:
        raise ValueError(
            f"{name} must be a text of 1 to {_MAX_CHARS} characters, got {value!r:.80}"
        )
    return value


def _tier(name, value):
    if value not in TIERS:
        raise ValueError(f"{name} must be one of {', '.join(TIERS)}, got {value!r:.80}")
    return value


def _flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}")
    return value


HINTS: dict[str, Callable[[str, Any], Any]] = {
    "ttl": _number(MAX_TTL_S),  # seconds in the tier that is asked for
    "tier": _tier,
    "pin": _number(MAX_TTL_S),  # seconds in gpu, however full it is; clipped
    "session": _text,  # which conversation it is of
    "finish": _text,  # how the turn ended: "stop", "tool_calls", ...
    "output_tokens": _number(2.0**53),
    "store": _flag,  # false: not worth keeping
    "manager": _flag,  # true: a manager outside hands its decision over
    **{name: _number(f.high, f.low, f.open_low) for name, f in METADATA_FIELDS.items()},
}


class Hints(Mapping):
    """A request's hints as the metadata that they are (a mapping), and as wishes.

    Parameters
    ----------
    configs : mapping or None
        A request's settings for LMCache; those without `PREFIX` are others'.
    max_pin_s : float
        Longer pins are clipped.

    Attributes
    ----------
    wishes : dict
        Hint -> its value, of those that were accepted.
    answers : dict
        Hint -> ``"accepted"``, or what else became of it.

    Examples
    --------
    >>> hints = Hints({"lmcache.kvttl.ttl": 60, "lmcache.kvttl.tier": "warm"}, max_pin_s=600)
    >>> hints.wishes, hints.answers["tier"]
    ({'ttl': 60.0}, "refused: tier must be one of gpu, disk, remote, got 'warm'")
    """

    def __init__(self, configs: Mapping[str, Any] | None, max_pin_s: float) -> None:
        self.wishes: dict[str, Any] = {}
        self.answers: dict[str, str] = {}
        for name, value in (configs or {}).items():
            if name.startswith(PREFIX):
                self._take(name.removeprefix(PREFIX), value)
        if self.wishes.get("pin", 0.0) > max_pin_s:
            self.wishes["pin"] = max_pin_s
            self.answers["pin"] = f"clipped to {max_pin_s:g} s"
        self._metadata = {n: v for n, v in self.wishes.items() if n in METADATA_FIELDS}

    def _take(self, name, value):
        try:
            if name not in HINTS:
                raise ValueError(unknown_name("hint", name, HINTS))
            self.wishes[name] = HINTS[name](name, value)
            self.answers[name] = "accepted"
        except ValueError as error:
            self.answers[name[:_MAX_CHARS]] = f"refused: {error}"

    def __getitem__(self, name: str) -> float:
        return self._metadata[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata)

    def __len__(self) -> int:
        return len(self._metadata)

    @property
    def decide(self) -> bool:
        """Whether the request says itself where its KV cache goes, or for how long."""
        return not self.wishes.keys().isdisjoint(("tier", "ttl", "pin", "store"))

    @property
    def admitted(self) -> bool:
        """Whether the KV cache is worth storing, as far as that is known before the answer."""
        return bool(self.wishes.get("manager") or self.decided("gpu", 1.0)[1])

    def decided(self, tier: str, ttl_s: float) -> tuple[str, float]:
        """Return what a policy has decided, where the request says nothing else."""
        wishes = self.wishes
        if not wishes.get("store", True):
            return tier, 0.0
        if "pin" in wishes:
            return "gpu", wishes["pin"]
        return wishes.get("tier", tier), wishes.get("ttl", ttl_s)


class Hinted:
    """A manager's policy: the one in force, whose answers a request may have changed."""

    def __init__(self, in_force: Callable[[], HeuristicConfig]) -> None:
        self.in_force, self.request = in_force, threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.in_force(), name)  # `base_ttl` and `ladder`

    def _decided(self, metadata):
        policy, hints = getattr(self.request, "asks", (self.in_force(), None))
        decided = policy.tier(metadata), policy.ttl(metadata)
        return decided if hints is None else hints.decided(*decided)

    def tier(self, metadata: Mapping[str, float]) -> str:
        return self._decided(metadata)[0]

    def ttl(self, metadata: Mapping[str, float]) -> float:
        return self._decided(metadata)[1]


class ModelManager(MultiTierCache):
    """The manager of one model's KV cache, as outside; a request's hints count for it."""

    def __init__(self, controller: Any, settings: Any, *, config: Hinted, **options: Any) -> None:
        meter = RegretMeter(controller, config, options["metrics"]) if settings.meter else None
        told = {"policy": settings.policy, "sweep_every_s": settings.sweep_s, "notify": None}
        super().__init__(controller, config=config, meter=meter, **told, **options)

    @property
    def sweeper(self) -> Any:
        """The thread that lets TTLs end."""
        return self._decider.sweeper

    def tell_values(self, guard: Callable) -> None:
        """Let a policy that decides as it goes say in which order gpu gives chunks up."""
        if advisor := self._decider.advisor:
            in_force = lambda: getattr(advisor.policy, "index_in_force", False)  # noqa: E731
            valued = self.controller.valued
            advisor.heard = guard(lambda *said: valued(in_force(), *said), "values")

    def take_up(self, journal: Any) -> None:
        """Make the claims of before the start again; until all is found, they may be anywhere."""
        journal.restore(self.claims)
        self._decider.settler.may_be_unseen = True
        self._decider.start()

    def account(self) -> None:
        """Claim what was found without a claim, once it is known what is where."""
        self._decider.settler.may_be_unseen = False
        self.recover(())

    def _decide(self, draft, made):
        draft.hints, draft.asked_for = made.metadata.answers, made.metadata.decide
        draft.session = made.metadata.wishes.get("session", "")
        self.config.request.asks = self.config.in_force(), made.metadata  # one for both answers
        super()._decide(draft, made)

    def wanted_hot(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return those of some chunks that a claim wants in gpu."""
        tiers = self.claims.wanted([chunk.key for chunk in chunks], self.clock())
        return [chunk for chunk, tier in zip(chunks, tiers) if tier == "gpu"]

    def save(self, chunks: Iterable[Chunk], hands: Hands) -> None:
        """Write down what is wanted and has no other copy, some chunks at a time."""
        unsaved = [chunk for chunk in chunks if chunk.bits == HOT] if hands.tiers else []
        tiers = self.claims.wanted([chunk.key for chunk in unsaved], self.clock())
        wanted = [chunk for chunk, tier in zip(unsaved, tiers) if tier is not None]
        for part in pages(wanted, _RELIEF_CHUNKS):
            hands.copy(part, hands.tiers[0], 0.0)

    def bring_back(self, chunks: Sequence[Chunk]) -> None:
        """Have chunks of one salt that pressure has put down in gpu again, if wanted there."""
        if keys := tuple(chunk.key for chunk in self.wanted_hot(chunks)):
            record = self._decider.settler.bring_back(keys, self.clock())
            self._decider.records.keep(record)

    def be_led(self, is_led: Callable[[], bool]) -> None:
        """End TTLs by itself only while nobody leads."""
        self._decider.is_led = is_led

    def decide(
        self, output: Any, hints: Hints, took_s: float, salt: str, now: Callable[[], float] | None
    ) -> DecisionRecord:
        """Decide about a request as of `now`, and return the record."""
        self._decider.start()
        return self._decider.submit(None, output, hints, took_s, now or self.clock, salt).result()

"""What a policy of one's own must be for the live manager, and how one is asked.

A `Policy` decides by a request's metadata alone. A policy that decides as it goes, of
`kvttl.policies`, is told of each generation by an `Advisor`, which checks what it says: a failure
is a reason in the record, never an error, and the first kind decides then.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from caching_heuristics import TIERS, HeuristicConfig
from kvttl import whole_file
from kvttl.lmcache.client import LMCacheError
from kvttl.lmcache.layout import BaseController
from kvttl.lmcache.salts import salt_of
from kvttl.manager.claims import Part
from kvttl.manager.draft import Draft

if TYPE_CHECKING:  # compiled code: seconds, and not needed for the formula
    from kvttl.policies import CachePolicy

logger = logging.getLogger(__name__)

POLICY_NAMES = ("formula", "adaptive", "recency", "fixed")  # who decides: of `kvttl.policies`
_SET_BACK_S = 3600.0  # generations of a longer time ago: the clock was set back
_SWEEP = (1.0, 0.95, 0.05)  # of the policy's own caches, as LMCache's: see `sweep_due`


class Policy(Protocol):
    """Decides for how long a prompt's KV cache is kept, and in which tier.

    `caching_heuristics.HeuristicConfig` is one; any object with these four will do. The
    manager asks after every generation, on the thread that decides (several at once if
    several threads generate), and hands over only what is known then: the metadata
    (``perplexity``, ``time_variance``, ``access_count``, ``seconds_since_access``; unknown
    ones are absent). A policy sees no text, no token ids, no clock and not what other
    prompts wish; it must neither block nor change the metadata. What it raises, and an
    answer that is not allowed, becomes the decision's record with its reason: the text is
    returned all the same, and the KV cache is claimed for `base_ttl` in gpu.
    """

    @property
    def base_ttl(self) -> float:
        """TTL of KV cache about which nothing could be decided, seconds, > 0."""

    @property
    def ladder(self) -> Mapping[str, float]:
        """Tier -> what the TTL is multiplied by when a claim comes down to it; all three, > 0."""

    def ttl(self, metadata: Mapping[str, float]) -> float:
        """Return the TTL in the wanted tier, from the access on: seconds, >= 0 and finite."""

    def tier(self, metadata: Mapping[str, float]) -> str:
        """Return the wanted tier: ``"gpu"``, ``"disk"`` or ``"remote"``."""


class Advisor:
    """One policy for all generations of a manager; safe to share between threads.

    Parameters
    ----------
    name : str
        Of the policy, for records.
    make : callable
        Returns the policy; called at the first generation.
    controller : BaseController
        Says what model the KV is of.
    log : DecisionLog, optional
        In its `folder` the policy is saved, and goes on after a restart.

    Attributes
    ----------
    heard : callable
        (chunk keys, answer) -> None: gets what the policy says; others' locks are held.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], CachePolicy],
        controller: BaseController,
        log: Any = None,
    ) -> None:
        self.name, self._make, self._controller = name, make, controller
        self._file = None if log is None else log.folder / f"policy-{name}.npz"
        self._policy: CachePolicy | None = None
        self.heard: Callable[[Sequence[str], Any], None] = lambda _keys, _answer: None
        self._told_s, self._saved_s = 0.0, time.monotonic()
        self._lock = threading.Lock()

    @property
    def policy(self) -> CachePolicy:
        """The policy: made, and where it was saved loaded, when it is first needed."""
        if self._policy is None:
            self._policy = self._make()
            self._load()
        return self._policy

    def prepare(self) -> None:
        """Make the policy before the first generation, if that can be done by now."""
        try:
            with self._lock:
                _ = self.policy
        except LMCacheError as error:
            logger.info("policy %s is made with the first generation: %s", self.name, error)
        except Exception as error:
            self._why(error)

    def _load(self):
        if self._file is None or not self._file.exists():
            return
        try:
            with np.load(self._file, allow_pickle=False) as file:
                state = dict(file)
            told_s = float(state.pop("told_s"))
            self._policy.load(state)
            self._told_s = told_s
        except Exception as error:  # damaged, or of another version
            logger.warning("policy starts cold, %s is of no use: %r", self._file, error)

    def save(self, every_s: float = 0.0) -> None:
        """Write what the policy knows to its file, whole or not at all, if it is time to."""
        if self._file is None or self._policy is None:
            return
        if time.monotonic() - self._saved_s < every_s:
            return
        self._saved_s = time.monotonic()
        try:
            with self._lock:
                state = dict(self._policy.state(), told_s=np.array(self._told_s))
            with whole_file(self._file) as file:
                np.savez(file, **state)
        except Exception as error:
            logger.warning("policy %s was not saved: %r", self.name, error)

    def decide(self, draft: Draft, keys: Sequence[str]) -> None:
        """Tell the policy of a generation, and fill in what it says; else why it says nothing."""
        try:
            numbers, metadata = self._numbers(keys), draft.metadata
            with self._lock:
                span_s = draft.time_s - draft.generate_s, draft.time_s
                ended = draft.finish_reason, draft.output_tokens
                told = numbers, span_s, draft.prompt_tokens, ended, metadata
                self._told_s = tell(self.policy, self._told_s, *told)
                answer = _checked(self.policy.ask(numbers, self._told_s), len(keys))
                said = stretches(answer, getattr(self.policy, "prices", tuple)())
        except Exception as error:
            draft.policy_error = self._why(error)
            return
        self.heard(keys, answer)
        draft.policy, draft.decided = self.name, tuple(said)
        if said and not draft.asked_for:
            draft.wanted_tier, draft.ttl_s = draft.decided[-1]["tier"], draft.decided[-1]["ttl_s"]
            draft.parts = parts_of(answer)

    def ask(self, keys: Sequence[str], now_s: float) -> tuple[list[Part] | None, str]:
        """Return the parts of a prompt as they are wanted now; None, and why, if it cannot say."""
        if self._policy is None:  # this must not wait for the server
            return None, ""
        try:
            with self._lock:
                answer = self._policy.ask(self._numbers(keys), now_s)
            answer = _checked(answer, len(keys))
        except Exception as error:
            return None, self._why(error)
        if answer.value[-1] == -np.inf:  # forgotten, or of an earlier process
            return None, ""
        self.heard(keys, answer)
        return parts_of(answer), ""

    def _why(self, error):
        logger.warning("policy %s failed: %r", self.name, error, exc_info=error)
        return f"policy {self.name}: {type(error).__name__}: {error}"

    def _numbers(self, keys):
        return chunk_numbers(keys, getattr(self._controller, "model", ""))


def chunk_numbers(keys: Sequence[str], model: str = "") -> np.ndarray:
    """Return chunk keys as int64; equal ones of two tenants, adapters or models differ."""
    scope = f"{model}@{salt_of(keys[0]) if keys else ''}"
    scope = hashlib.blake2b(scope.encode(), digest_size=8).digest()
    hashes = bytes.fromhex("".join(key[:16] for key in keys))
    return np.frombuffer(hashes, ">u8").astype(np.int64) ^ np.frombuffer(scope, np.int64)


def tell(
    policy: CachePolicy,
    told_s: float,
    keys: np.ndarray,
    span_s: tuple[float, float],
    prompt_tokens: int,
    ended: tuple[str | None, int],
    hints: Mapping[str, Any],
) -> float:
    """Tell a policy of a generation once it has ended; returns until when it has been told.

    Parameters
    ----------
    told_s : float
        Until when before; times do not go back, whatever ran at once.
    span_s : tuple of float
        When it came, and when it ended.
    ended : tuple
        Its finish reason, and the tokens of its answer.
    """
    set_back = span_s[1] < told_s - _SET_BACK_S
    begin_s = span_s[0] if set_back else max(span_s[0], told_s)
    end_s = max(span_s[1], begin_s)
    number = policy.begin(keys, begin_s, prompt_tokens, hints)
    policy.end(number, end_s, *ended)
    if sweep := getattr(policy, "sweep", None):
        sweep(end_s, _SWEEP)
    return end_s


def stretches(answer: Any, prices: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Return an answer as stretches of chunks that it says the same of, for a record."""
    same = [column[1:] == column[:-1] for column in (answer.value, answer.ttl_s, answer.tier)]
    ends = [*np.flatnonzero(~np.all(same, axis=0)).tolist(), len(answer.ttl_s) - 1]
    said = []
    for at in ends if len(answer.ttl_s) else ():
        tier = int(answer.tier[at])
        worth = {"ttl_s": float(answer.ttl_s[at]), "value": float(answer.value[at])}
        said.append({"chunks": at + 1, "tier": TIERS[tier], **worth})
        said[-1] |= {"price": float(prices[tier])} if len(prices) else {}
    return said


def parts_of(answer: Any) -> list[Part]:
    """Return one part a tier, up to the last chunk that is wanted there; the last has all chunks.

    A part's TTL is that of its end, which is the shortest: then the policy is asked again.
    """
    chunks, wanted = len(answer.ttl_s), answer.ttl_s > 0
    ends = [np.flatnonzero(wanted & (answer.tier == code))[-1:] for code in range(len(TIERS))]
    ends = [int(end[0]) for end in ends if len(end)]
    ends += [chunks - 1] if chunks and not wanted[-1] else []
    return [Part(at + 1, TIERS[answer.tier[at]], float(answer.ttl_s[at])) for at in ends]


def _checked(answer, chunks):
    """Return an answer as arrays, or raise where it is not one."""
    value, ttl_s, tier = (np.asarray(getattr(answer, n)) for n in ("value", "ttl_s", "tier"))
    if not (value.shape == ttl_s.shape == tier.shape == (chunks,)):
        raise ValueError(f"value, ttl_s and tier must have shape ({chunks},)")
    if not ((ttl_s >= 0) & (ttl_s <= HeuristicConfig.max_ttl)).all():
        raise ValueError(f"ttl_s must be 0..{HeuristicConfig.max_ttl}, got {ttl_s}")
    if chunks and not (0 <= tier[0] <= tier[-1] < len(TIERS) and (tier[1:] >= tier[:-1]).all()):
        raise ValueError(f"tier must be indices into {TIERS} that do not fall, got {tier}")
    if (value != value).any():
        raise ValueError("value must not be NaN")
    return answer._replace(value=value, ttl_s=ttl_s, tier=tier)


def who_decides(
    policy: str | CachePolicy,
    controller: BaseController,
    config: Policy,
    clock: Callable[[], float],
    costs: Any = None,
    log: Any = None,
) -> dict[str, Any]:
    """Return a `Decider`'s ``handover`` where the server decides, else its ``advisor``."""
    handover = controller.hand_over(config.ladder, policy, clock)
    if handover is not None:
        return {"handover": handover}
    return {"advisor": advisor_of(policy, controller, config, costs, log)}


def advisor_of(
    policy: str | CachePolicy,
    controller: BaseController,
    config: Policy,
    costs: Any = None,
    log: Any = None,
) -> Advisor | None:
    """Return who is asked of each generation; None where `config` alone decides.

    Raises
    ------
    ValueError
        No policy is called so, or the object is none.
    """
    if isinstance(policy, str) and policy == "formula":
        return None
    if isinstance(policy, str) and policy in POLICY_NAMES:
        from kvttl.policies import FAMILIES  # seconds, and not needed for the formula

        options = {"ttl_s": config.base_ttl} if policy == "fixed" else {}
        options |= {"costs": costs} if policy == "adaptive" else {}
        compile_policy(policy)
        make = functools.partial(_for_controller, FAMILIES[policy], controller, options)
        return Advisor(policy, make, controller, log)
    if all(callable(getattr(policy, name, None)) for name in ("begin", "end", "ask")):
        return Advisor(type(policy).__name__, lambda: policy, controller, log)
    allowed = f"one of {', '.join(POLICY_NAMES)}, or have begin, end and ask"
    raise ValueError(f"policy must be {allowed}, got {policy!r:.80}")


def _for_controller(family, controller, options):
    """Return a policy for the chunks that a controller's tiers have room for."""
    return family(controller.room_chunks(), controller.chunk_size_tokens, **options)


def compile_policy(name: str) -> None:
    """Call all that a decision calls: compiling takes minutes, the first time on a machine."""
    if name == "formula":
        return
    from kvttl.policies import FAMILIES

    policy = FAMILIES[name]()
    policy.end(policy.begin([1], 0.0), 0.0)
    policy.sweep(0.0, _SWEEP)
    policy.ask([1], 0.0)

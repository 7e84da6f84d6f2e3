"""What other settings would have decided in a run: tiers that change, memory-time that moves."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from caching_heuristics import METADATA_FIELDS, TIER_CODES, TIERS, HeuristicConfig, check_metadata
from kvttl.decisions.log import DecisionRecord


@dataclass(frozen=True, eq=False)
class Decisions:
    """A run's decisions as arrays, in the order of time; shape (n,) each.

    ``metadata`` has an array a field, NaN where nothing was known. ``gap_s`` are the
    seconds until the same prompt was decided again; infinite where it never came back.
    """

    metadata: dict[str, np.ndarray]
    tokens: np.ndarray
    gap_s: np.ndarray
    ttl_s: np.ndarray
    tier: np.ndarray  # codes: indices into TIERS

    def __len__(self) -> int:
        return len(self.tier)

    def decide(self, config: HeuristicConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return TTLs (s) and tier codes that `config` would have chosen, shape (n,) each."""
        return _decide(self, config)


@lru_cache(maxsize=1)  # both tier panels and the readout ask about the same settings in turn
def _decide(decisions, config):
    return config.ttl(decisions.metadata), tier_codes(config.tier(decisions.metadata))


@dataclass(frozen=True)
class Changes:
    """What changes between a run and other settings.

    ``moved[i, j]`` prompts go from tier i to tier j, shape (3, 3);
    ``before_token_s`` and ``after_token_s`` are memory-time by tier, in
    token-seconds, shape (3,).
    """

    moved: np.ndarray
    before_token_s: np.ndarray
    after_token_s: np.ndarray

    @property
    def changed(self) -> int:
        """How many decisions choose another tier."""
        return int(self.moved.sum() - np.trace(self.moved))


def decisions_of(records: Iterable[DecisionRecord]) -> Decisions:
    """Return the generations of a log that were decided, as arrays.

    Examples
    --------
    >>> records = [DecisionRecord(t, "a", 8, ttl_s=60.0, wanted_tier="gpu") for t in (0.0, 5.0)]
    >>> decisions_of(records).gap_s
    array([ 5., inf])
    """
    decided = sorted(filter(_is_decided, records), key=lambda record: record.time_s)

    times = pd.DataFrame([(r.time_s, r.prompt_digest) for r in decided], columns=["s", "prompt"])
    gap_s = times.groupby("prompt")["s"].shift(-1) - times["s"]

    def column(name):
        return np.array([r.metadata.get(name) for r in decided], dtype=float)  # None is NaN

    return Decisions(
        metadata={name: column(name) for name in METADATA_FIELDS},
        tokens=np.array([float(r.prompt_tokens) for r in decided]),
        gap_s=gap_s.to_numpy(float, na_value=np.inf),  # not again: never
        ttl_s=np.array([float(r.ttl_s) for r in decided]),
        tier=np.array([TIER_CODES[r.wanted_tier] for r in decided], dtype=int),
    )


def changes(
    decisions: Decisions, config: HeuristicConfig, before: HeuristicConfig | None = None
) -> Changes:
    """Compare what a run decided with what `config` would have decided.

    Parameters
    ----------
    decisions : Decisions
        Of the run; its own TTLs and tiers are the "before".
    config : HeuristicConfig
        The other settings.
    before : HeuristicConfig, optional
        The run's settings; only their ladder factors count. Default `HeuristicConfig()`.

    Examples
    --------
    >>> record = DecisionRecord(
    ...     0.0, "a", 100, metadata={"perplexity": 12.0}, ttl_s=60.0, wanted_tier="gpu"
    ... )
    >>> found = changes(decisions_of([record]), HeuristicConfig(hot_threshold=10.0))
    >>> found.changed, found.moved[0].tolist()  # from gpu to gpu, disk, remote
    (1, [0, 1, 0])
    """
    ttl_s, tier = decisions.decide(config) if len(decisions) else (np.zeros(0), decisions.tier)
    moved = np.zeros((3, 3), dtype=int)
    np.add.at(moved, (decisions.tier, tier), 1)
    old_s = held_seconds(decisions.ttl_s, decisions.tier, decisions.gap_s, before)
    new_s = held_seconds(ttl_s, tier, decisions.gap_s, config)
    return Changes(moved, old_s @ decisions.tokens, new_s @ decisions.tokens)


def held_seconds(
    ttl_s: np.ndarray, tier: np.ndarray, gap_s: np.ndarray, config: HeuristicConfig | None = None
) -> np.ndarray:
    """Return how long each decision holds its KV in each tier, seconds, shape (3, n).

    A decision places KV in `tier` for `ttl_s`; then it goes one rung down the
    ladder gpu -> disk -> remote, for the TTL times the factor of the new rung,
    until it is dropped. The prompt's next access (after `gap_s`) ends all that.

    Examples
    --------
    >>> held_seconds(np.array([60.0]), np.array([1]), np.array([100.0])).ravel()
    array([ 0., 60., 40.])
    """
    ladder = (config or HeuristicConfig()).ladder
    held, start_s = np.zeros((3, len(ttl_s))), np.zeros(len(ttl_s))
    for code, name in enumerate(TIERS):
        below_s = np.where(tier < code, ttl_s * ladder[name], 0.0)
        stay_s = np.where(tier == code, ttl_s, below_s)
        held[code] = np.clip(gap_s - start_s, 0.0, stay_s)
        start_s = start_s + stay_s
    return held


def tier_codes(names: np.ndarray) -> np.ndarray:
    """Return tier names as indices into `TIERS`, shape (n,) -> (n,).

    Examples
    --------
    >>> tier_codes(np.array(["remote", "gpu"]))
    array([2, 0])
    """
    order = np.argsort(TIERS)
    return order[np.searchsorted(TIERS, names, sorter=order)]


def _is_decided(record):
    """Say whether a record is of a generation whose metadata the heuristics accept."""
    if record.kind != "generation" or not record.ttl_s or record.wanted_tier not in TIER_CODES:
        return False
    try:
        check_metadata({name: record.metadata.get(name) for name in METADATA_FIELDS})
    except ValueError:  # a log that somebody edited
        return False
    return True

"""What a replay found: hits by request and tier, memory-time, tokens moved."""

from dataclasses import dataclass

import numpy as np

from caching_heuristics import TIERS
from kvttl.traces.trace import Trace

_SIZES = ("unique_blocks", "accesses", "requests")  # of a trace
PLACES = (*TIERS, "none")  # rows and columns of `moved_tokens`


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """Hits, memory-time and moves of one policy on one trace.

    Parameters
    ----------
    trace : Trace
        What was replayed.
    policy : str
        The policy's name.
    capacity_blocks : tuple of int
        Blocks that gpu, disk and remote could hold; -1 = unlimited.
    hit_blocks, hit_tokens : numpy.ndarray
        Shape (requests, 3): blocks and tokens of each request's longest
        resident prefix, by the tier they were in.
    block_seconds, token_seconds : numpy.ndarray
        Shape (3,): residence, summed over blocks or tokens, until the last arrival; NaN where
        only the order of requests is known.
    moved_tokens : numpy.ndarray
        Shape (4, 4), from row to column, in the order of `PLACES`: from "none"
        are tokens computed and stored, to "none" tokens dropped.
    block_level_hits : int or None
        Accesses whose block was resident when its turn came, whether or not its
        prefix was; only LRU, FIFO and libCacheSim's policies know it.
    stored_tokens : numpy.ndarray or None
        Shape (requests,): tokens that were stored; only the models of LMCache know it.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> from kvttl.replay.engine import replay
    >>> result = replay(make_trace([[0, 1], [0, 2], [0, 1]]), "infinite")
    >>> result.block_hit_ratio, result.token_hit_ratio
    (0.5, 0.5)
    """

    trace: Trace
    policy: str
    capacity_blocks: tuple[int, int, int]
    hit_blocks: np.ndarray
    hit_tokens: np.ndarray
    block_seconds: np.ndarray
    token_seconds: np.ndarray
    moved_tokens: np.ndarray
    block_level_hits: int | None = None
    stored_tokens: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.trace.timed:  # how long something was held is then unknown
            for name in ("block_seconds", "token_seconds"):
                object.__setattr__(self, name, np.full(3, np.nan))

    # Shares of block accesses, and of prompt tokens, inside the longest resident prefix.
    block_hit_ratio = property(lambda self: self.since(-np.inf)["block_hit_ratio"])
    token_hit_ratio = property(lambda self: self.since(-np.inf)["token_hit_ratio"])

    def since(self, start_s: float) -> dict[str, float]:
        """Return both hit ratios of the requests from a second on (after a warm-up)."""
        first = int(np.searchsorted(self.trace.arrival_s, start_s))
        blocks, prompts = self.trace.blocks[first:], self.trace.prompt_tokens[first:]
        return {
            "block_hit_ratio": _ratio(self.hit_blocks[first:].sum(), blocks.sum()),
            "token_hit_ratio": _ratio(self.hit_tokens[first:].sum(), prompts.sum(dtype=np.int64)),
        }

    def by_session(self):
        """Return a DataFrame: a session a row; requests, prompt and hit tokens, ratio."""
        return self._grouped(self.trace.sessions, "session")

    def over_time(self, step_s: float = 60.0):
        """Return a DataFrame: a step a row (its first second); requests, tokens, ratio."""
        if not step_s > 0:
            raise ValueError(f"step_s must be > 0, got {step_s!r}")
        frame = self._grouped((self.trace.arrival_s // step_s).astype(np.int64), "start_s")
        frame.index = frame.index * step_s
        return frame

    def _grouped(self, groups, name):
        import pandas as pd

        columns = {"requests": 1, "prompt_tokens": self.trace.prompt_tokens.astype(np.int64)}
        hits = self.hit_tokens  # NaN where nothing is known, which a plain sum would make 0
        columns |= {f"hit_tokens_{tier}": hits[:, code] for code, tier in enumerate(TIERS)}
        groups = pd.DataFrame(columns, index=pd.Index(groups, name=name)).groupby(level=0)
        frame = groups.sum(min_count=1)
        hit = frame[[f"hit_tokens_{tier}" for tier in TIERS]].sum(axis=1, min_count=1)
        return frame.assign(token_hit_ratio=hit / frame["prompt_tokens"].clip(lower=1))

    def moved(self) -> dict[str, int]:
        """Return the tokens moved, by way: ``{"none→gpu": 512, ...}``."""
        ways = np.ndenumerate(self.moved_tokens)
        return {f"{PLACES[a]}→{PLACES[b]}": int(tokens) for (a, b), tokens in ways if tokens}

    def moved_bytes(self, bytes_per_token: float) -> dict[str, float]:
        """Return `moved` in bytes, for a KV cache of so many bytes a token."""
        return {way: tokens * bytes_per_token for way, tokens in self.moved().items()}

    def to_dict(self) -> dict[str, object]:
        """Return the headline figures, fit for JSON."""
        hits = {name: getattr(self, name).sum(axis=0) for name in ("hit_blocks", "hit_tokens")}
        by_tier = hits | {name: getattr(self, name) for name in ("block_seconds", "token_seconds")}
        capacity = [None if c < 0 else c for c in self.capacity_blocks]
        return {
            "trace": self.trace.name,
            "policy": self.policy,
            "capacity_blocks": dict(zip(TIERS, capacity)),
            **self.since(-np.inf),
            **{name: getattr(self.trace, name) for name in _SIZES},
            **{name: dict(zip(TIERS, values.tolist())) for name, values in by_tier.items()},
            "moved_tokens": self.moved(),
        }


def _ratio(part, whole):
    return float(part) / float(whole) if whole else 0.0

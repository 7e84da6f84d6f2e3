"""Time to first token, and cost, of requests whose hits per tier are known.

A linear model: every request costs the engine's fixed time, each tier that serves it
its latency once and its bandwidth for what it loads; what no tier has is prefilled. The
defaults were measured on this kit's stack with two cores and no GPU; `calibrate` measures yours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np

from caching_heuristics import FINITE, TIERS, check_number
from kvttl.replay.result import ReplayResult

# Measured on 2 CPU cores (design notes, section 5): seconds to serve a prompt of
# 1,545 tokens, by model: a Gemma-3-270M shape (18 layers x 2 x 1 KV head x 256 x
# 2 B = 18,432 B a token; recomputed in 7.9 to 10.9 s) and a 3.3 M-parameter model
# (4 x 2 x 1 x 64 x 2 B = 1,024 B a token; the notes do not repeat its prompt's
# length, taken as the same). The line through both points gives latency and bandwidth.
_PROMPT_TOKENS = 1_545
_LARGE_S, _LARGE_BYTES = (0.76, 0.83, 1.14), 1_545 * 18_432
_SMALL_S, _SMALL_BYTES = (0.13, 0.19, 0.24), 1_545 * 1_024
_RECOMPUTE_S = (7.9 + 10.9) / 2

_MORE_BYTES = _LARGE_BYTES - _SMALL_BYTES
# 43, 42, 30 MB/s
_BANDWIDTH = tuple(_MORE_BYTES / (a - b) for a, b in zip(_LARGE_S, _SMALL_S))
_LATENCY_S = tuple(s - _SMALL_BYTES / b for s, b in zip(_SMALL_S, _BANDWIDTH))


@dataclass(frozen=True)
class TierCosts:
    """What loading from each tier and prefilling take.

    Parameters
    ----------
    latency_s : tuple of float
        Seconds until the first byte comes, by tier: gpu, disk, remote; >= 0.
    bytes_per_s : tuple of float
        Bandwidth by tier, > 0.
    bytes_per_token : float
        KV cache of a token, > 0.
    prefill_tokens_per_s : float
        Rate at which missing tokens are computed, > 0.
    engine_price_per_hour : float
        Any currency, >= 0.
    price_per_gib_hour : tuple of float
        Of memory held in each tier, the same currency; nobody's prices are
        assumed, so 0 until given.
    start_s : float
        Fixed time of the engine, seconds of every request, hit or not, >= 0.

    Raises
    ------
    ValueError
        Names the field, the value and the range.

    Examples
    --------
    >>> costs = TierCosts()
    >>> costs.request_ttft_s([0, 0, 0], 1545).round(1), costs.request_ttft_s([1545, 0, 0], 1545)
    (np.float64(9.4), np.float64(0.76))
    """

    latency_s: tuple[float, float, float] = _LATENCY_S
    bytes_per_s: tuple[float, float, float] = _BANDWIDTH
    bytes_per_token: float = 18_432.0
    prefill_tokens_per_s: float = _PROMPT_TOKENS / _RECOMPUTE_S
    engine_price_per_hour: float = 1.0
    price_per_gib_hour: tuple[float, float, float] = (0.0, 0.0, 0.0)
    start_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            by_tier = isinstance(field.default, tuple)
            if by_tier and len(values) != len(TIERS):
                raise ValueError(f"{field.name} must have one value for each of {TIERS}")
            may_be_zero = field.name in ("latency_s", "start_s") or "price" in field.name
            for value in values if by_tier else (values,):
                check_number(field.name, value, 0, FINITE, open_low=not may_be_zero)

    def request_ttft_s(self, hit_tokens, prompt_tokens) -> np.ndarray:
        """Return seconds to the first token; hits (..., 3), prompts (...)."""
        hits, prompts = np.asarray(hit_tokens, float), np.asarray(prompt_tokens, float)
        loads_s = np.where(hits > 0, self.latency_s, 0.0)
        loads_s = loads_s + hits * self.bytes_per_token / np.array(self.bytes_per_s)
        missing = prompts - hits.sum(axis=-1)
        return self.start_s + loads_s.sum(axis=-1) + missing / self.prefill_tokens_per_s

    def memory_price(self, token_seconds) -> float:
        """Return the price of memory-time, token-seconds by tier (3,)."""
        gib_hours = np.asarray(token_seconds) * self.bytes_per_token / 2**30 / 3600
        return float(gib_hours @ np.array(self.price_per_gib_hour))


def result_costs(result: ReplayResult, costs: TierCosts | None = None) -> dict[str, float]:
    """Return TTFT percentiles and cost of a replay, beside those of no cache at all.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> from kvttl.replay.engine import replay
    >>> figures = result_costs(replay(make_trace([range(90), range(90)]), "infinite"))
    >>> round(figures["speedup"], 2)  # one of two prompts is loaded instead of computed
    1.85
    """
    costs = costs or TierCosts()
    prompts = result.trace.prompt_tokens
    ttft_s = costs.request_ttft_s(result.hit_tokens, prompts)
    total_s = float(ttft_s.sum())
    without_s = float(costs.request_ttft_s(np.zeros_like(result.hit_tokens), prompts).sum())
    ttft_s = ttft_s if len(ttft_s) else np.zeros(1)
    engine = costs.engine_price_per_hour / 3600
    memory = costs.memory_price(np.nan_to_num(result.token_seconds))
    return {
        **{f"ttft_p{rank}_s": float(np.percentile(ttft_s, rank)) for rank in (50, 90, 99)},
        "ttft_mean_s": float(ttft_s.mean()),
        "speedup": without_s / total_s if total_s else 1.0,
        "engine_price": total_s * engine,
        "memory_price": memory,
        "price": total_s * engine + memory,
        "price_without_cache": without_s * engine,
    }


def fit_costs(records: Iterable[object], costs: TierCosts | None = None) -> TierCosts:
    """Return costs fitted to decision records of real generations.

    The engine's fixed time and the prefill rate come from records without hits,
    then, with both taken off, each tier's latency and bandwidth from the records
    that it alone served, by least squares; no time is taken for less than 0.
    What has no two prompt lengths keeps what it had.

    Parameters
    ----------
    records : iterable of DecisionRecord
        ``prompt_tokens``, ``hit_tokens`` by tier, ``generate_s``.
    costs : TierCosts, optional
        Supplies ``bytes_per_token``, prices, and what cannot be fitted.
    """
    costs, rows = costs or TierCosts(), list(records)
    cold = [(r.prompt_tokens, r.generate_s) for r in rows if not sum(r.hit_tokens.values())]
    start_s, prefill_s = _line(cold) or (costs.start_s, 1 / costs.prefill_tokens_per_s)
    start_s = max(0.0, start_s)
    latency_s, bytes_per_s = list(costs.latency_s), list(costs.bytes_per_s)
    for code, tier in enumerate(TIERS):
        loads = [
            (tokens, max(0.0, r.generate_s - start_s - (r.prompt_tokens - tokens) * prefill_s))
            for r in rows
            if (tokens := r.hit_tokens.get(tier, 0)) == sum(r.hit_tokens.values()) > 0
        ]
        if line := _line(loads):
            latency_s[code] = max(0.0, line[0])
            bytes_per_s[code] = costs.bytes_per_token / line[1]
    loading = {"latency_s": tuple(latency_s), "bytes_per_s": tuple(bytes_per_s)}
    return replace(costs, **loading, prefill_tokens_per_s=1 / prefill_s, start_s=start_s)


def _line(points):
    """Return (seconds at 0, seconds a token > 0) of the least-squares line, or None."""
    tokens, seconds = np.array(points, float).reshape(-1, 2).T
    if len(np.unique(tokens)) < 2:
        return None
    slope, start = np.polyfit(tokens, seconds, 1)
    if slope > 0:
        return float(start), float(slope)
    return float(seconds.mean()), 1e-9  # flat within the noise: a latency and nothing else

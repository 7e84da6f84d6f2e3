"""Time to first token, and cost, of requests whose hits per tier are known.

Every request costs the engine's fixed time and its look-up, each tier that serves it its latency
once and its bandwidth for what it loads; what no tier has is prefilled, along a curve, and stored.
Clients that ask at once wait for each other (`queued_ttft_s`). The defaults were measured on
this kit's stack with two cores and no GPU; `calibrate` measures yours.
"""

from collections.abc import Iterable, Sequence
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
        Rate at which missing tokens are computed, > 0, less what attention adds.
    engine_price_per_hour : float
        Any currency, >= 0.
    price_per_gib_hour : tuple of float
        Of memory held in each tier, the same currency; nobody's prices are
        assumed, so 0 until given.
    start_s : float
        Fixed time of the engine, seconds of every request, hit or not, >= 0.
    prefill_s_per_pair : float
        What attention adds to computing a token, seconds for each token before it, >= 0: the
        quadratic part of the prefill curve.
    store_s_per_token : float
        Seconds that the engine waits for a computed token to be stored, >= 0.
    lookup_s_per_token : tuple of float
        By tier, >= 0: all tiers are asked for the whole prompt at once, hit or not, and the
        slowest is waited for.

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
    prefill_s_per_pair: float = 0.0
    store_s_per_token: float = 0.0
    lookup_s_per_token: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            by_tier = isinstance(field.default, tuple)
            if by_tier and len(values) != len(TIERS):
                raise ValueError(f"{field.name} must have one value for each of {TIERS}")
            may_be_zero = field.default in (_LATENCY_S, 0.0, (0.0,) * 3) or "price" in field.name
            for value in values if by_tier else (values,):
                check_number(field.name, value, 0, FINITE, open_low=not may_be_zero)

    def prefill_s(self, first, last) -> np.ndarray:
        """Return seconds to compute a prompt's tokens from number `first` up to `last`."""
        first, last = np.asarray(first, float), np.asarray(last, float)
        pairs = (last**2 - first**2) / 2
        return (last - first) / self.prefill_tokens_per_s + pairs * self.prefill_s_per_pair

    def request_ttft_s(self, hit_tokens, prompt_tokens, stored_tokens=None) -> np.ndarray:
        """Return seconds to the first token of requests that wait for no other.

        Hits (..., 3), prompts (...), stored tokens (...); these None: all that is computed.
        """
        hits, prompts = np.asarray(hit_tokens, float), np.asarray(prompt_tokens, float)
        hit = hits.sum(axis=-1)
        stored = prompts - hit if stored_tokens is None else np.asarray(stored_tokens, float)
        loads_s = np.where(hits > 0, self.latency_s, 0.0)
        loads_s = loads_s + hits * self.bytes_per_token / np.array(self.bytes_per_s)
        other_s = max(self.lookup_s_per_token) * prompts + self.store_s_per_token * stored
        return self.start_s + loads_s.sum(axis=-1) + self.prefill_s(hit, prompts) + other_s

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


def queued_ttft_s(
    costs: TierCosts,
    arrival_s: Sequence[float],
    hit_tokens: Sequence[Sequence[float]],
    prompt_tokens: Sequence[float],
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Return seconds to the first token of requests that several clients send one engine.

    As vLLM serves them: in steps, first come first served, each of at most `batch_tokens` tokens
    that are computed; what does not fit goes on in the next step, and all that a step
    completes have their token at its end. Later tokens of answers cost nothing here.

    Examples
    --------
    >>> costs = TierCosts(prefill_tokens_per_s=1000.0)
    >>> queued_ttft_s(costs, [0, 0, 9], [[0, 0, 0]] * 3, [800, 700, 500], batch_tokens=1000)
    array([1. , 1.5, 0.5])
    """
    check_number("batch_tokens", batch_tokens, 1, FINITE)
    hits, prompts = np.asarray(hit_tokens, float).reshape(-1, 3), np.asarray(prompt_tokens, float)
    done, now_s, ttft_s = hits.sum(axis=1), 0.0, np.zeros(len(prompts))
    left = prompts - done
    other_s = costs.request_ttft_s(hits, prompts) - costs.start_s - costs.prefill_s(done, prompts)
    waiting = np.argsort(arrival_s, kind="stable").tolist()
    while waiting:
        now_s = max(now_s, float(arrival_s[waiting[0]]))
        room, step_s, ready = float(batch_tokens), costs.start_s, []
        for at in waiting:
            if room <= 0 or arrival_s[at] > now_s:
                break
            some = min(room, left[at])
            step_s += costs.prefill_s(done[at], done[at] + some) + other_s[at]
            done[at], left[at], other_s[at], room = (
                done[at] + some,
                left[at] - some,
                0.0,
                room - some,
            )
            ready += [] if left[at] > 0 else [at]
        now_s += float(step_s)
        ttft_s[ready] = now_s - np.asarray(arrival_s, float)[ready]
        waiting = [at for at in waiting if at not in ready]
    return ttft_s


def fit_costs(
    records: Iterable[object],
    costs: TierCosts | None = None,
    stored_tokens: Sequence[float] | None = None,
) -> TierCosts:
    """Return costs fitted to decision records of real generations.

    The engine's fixed time and the prefill curve come from records without hits, then, with
    both taken off, each tier's latency and bandwidth from the records that it alone served; all
    by the least sum of relative errors, so that a few slow generations do not count, and no
    time is taken for less than 0. The curve's quadratic part needs three prompt lengths; what
    has no two keeps what it had. So does the look-up, which no record tells apart from
    prefill and loads: where `costs` has none it is in theirs.

    Parameters
    ----------
    records : iterable of DecisionRecord
        ``prompt_tokens``, ``hit_tokens`` by tier, ``generate_s``.
    costs : TierCosts, optional
        Supplies ``bytes_per_token``, prices, and what cannot be fitted.
    stored_tokens : sequence of float, optional
        Tokens that were stored, one a record, for some prompts none: the store's time is fitted
        too. None: all that were computed.
    """
    costs, rows = costs or TierCosts(), list(records)
    hits = np.array([[r.hit_tokens.get(tier, 0) for tier in TIERS] for r in rows]).reshape(-1, 3)
    prompts, took_s = np.array([(r.prompt_tokens, r.generate_s) for r in rows]).reshape(-1, 2).T
    hit = hits.sum(axis=1)
    stored = prompts - hit if stored_tokens is None else np.array(stored_tokens, float)
    known_s = max(costs.lookup_s_per_token) * prompts
    costs = _fit_prefill(costs, hit == 0, prompts, stored, took_s - known_s)
    known_s += costs.start_s + costs.prefill_s(hit, prompts) + costs.store_s_per_token * stored
    latency_s, bytes_per_s = list(costs.latency_s), list(costs.bytes_per_s)
    for code in range(len(TIERS)):
        alone = (hits[:, code] == hit) & (hit > 0)
        if len(np.unique(hit[alone])) > 1:
            columns = np.stack([hit * 0 + 1, hit], axis=1)[alone]
            latency_s[code], token_s = _least_relative(columns, took_s[alone], known_s[alone])
            bytes_per_s[code] = costs.bytes_per_token / max(token_s, _LEAST_S)
    return replace(costs, latency_s=tuple(latency_s), bytes_per_s=tuple(bytes_per_s))


def _fit_prefill(costs, cold, prompts, stored, took_s):
    """Return costs with the fixed time, the curve and, if it shows, the store of prompts."""
    prompts, stored, took_s = prompts[cold], stored[cold], took_s[cold]
    lengths, shows = len(np.unique(prompts)), bool((stored == 0).any() and stored.any())
    if lengths < 2:
        return costs
    columns = [prompts * 0 + 1, prompts, prompts**2 / 2 * (lengths > 2), stored * shows]
    known_s = 0.0 if shows else costs.store_s_per_token * stored
    found = _least_relative(np.stack(columns, axis=1), took_s, known_s)
    return replace(
        costs,
        start_s=found[0],
        prefill_tokens_per_s=1 / max(found[1], _LEAST_S),
        prefill_s_per_pair=found[2],
        store_s_per_token=found[3] if shows else costs.store_s_per_token,
    )


_LEAST_S = 1e-9  # a token: flat within the noise
_NEAR = 0.02  # relative errors below this count as squares


def _least_relative(columns, seconds, known_s=0.0):
    """Return coefficients >= 0 with the least sum of errors of `known_s` and them, by `seconds`."""
    weights = np.ones(len(seconds))
    for _ in range(50):  # least squares, reweighted towards least absolute values
        scaled = columns * (weights / seconds)[:, None]
        found = _not_negative(scaled, (seconds - known_s) * weights / seconds)
        errors = np.abs(known_s + columns @ found - seconds) / seconds
        weights = np.maximum(errors, _NEAR) ** -0.5
    return found.tolist()


def _not_negative(columns, values):
    """Return the least-squares solution without the columns that would go below 0."""
    found, used = np.zeros(columns.shape[1]), columns.any(axis=0)
    while used.any():
        scale = np.abs(columns[:, used]).max(axis=0)
        found[used] = np.linalg.lstsq(columns[:, used] / scale, values, rcond=None)[0] / scale
        if (found >= 0).all():
            break
        used &= found > 0
        found[:] = 0.0
    return found

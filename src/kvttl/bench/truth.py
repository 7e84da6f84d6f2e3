"""Does the replay tell the truth? What it predicts, request by request, beside what was measured.

Twice: by `kvttl.replay.engine`, which knows a capacity and a policy, and by
`kvttl.lmcache.model`, which knows LMCache's own rules and runs the manager's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.bench.contenders import CONTENDERS, RETAIN
from kvttl.bench.workloads import CHUNK_TOKENS
from kvttl.lmcache.model import EVICTION_WATERMARK
from kvttl.replay.costs import fit_costs
from kvttl.replay.engine import replay
from kvttl.replay.on_lmcache import replay_on_lmcache

_COLUMNS = [f"hit_{tier}" for tier in TIERS]


def replay_truth(result: Any, settings: Mapping[str, HeuristicConfig]) -> pd.DataFrame:
    """Compare predictions with measurements of all contenders on LMCache.

    Parameters
    ----------
    result : BenchResult
        A run.
    settings : mapping
        Contender -> its settings, of those that were managed.

    Returns
    -------
    pandas.DataFrame
        A row a workload, hot tier and contender: ``replay_equal`` and
        ``model_equal``, the share of requests with equal hit tokens in every tier;
        ``model_differ``; ``ttft_error``, the median of \\|predicted - measured\\| /
        measured, with the model's hits and the calibrated costs; ``ttft_error_fitted``,
        with measured hits and costs fitted to the first seed, on the other seeds.
    """
    rows = []
    keys = ["workload", "hot_share", "contender"]
    for (workload, share, name), part in result.requests.groupby(keys, sort=False):
        if CONTENDERS[name].stack is None:  # not on LMCache
            continue
        checks = [
            predict(result, seed_part, name, settings.get(name))
            for _, seed_part in part.groupby("seed", sort=False)
        ]
        equal, by_model, errors = (np.concatenate(c) for c in zip(*checks))
        rows.append(
            {
                "workload": workload,
                "hot_share": share,
                "contender": name,
                "requests": len(equal),
                "replay_equal": float(equal.mean()),
                "model_equal": float(by_model.mean()),
                "model_differ": int((~by_model).sum()),
                "ttft_error": float(np.median(errors)),
                "ttft_error_fitted": float(np.median(_fitted_errors(result.costs, part))),
            }
        )
    return pd.DataFrame(rows)


def predict(
    result: Any, measured: pd.DataFrame, name: str, config: HeuristicConfig | None
) -> tuple[np.ndarray, ...]:
    """Return, by request of one pass: equal by replay, by the model, and the TTFT's error."""
    first = measured.iloc[0]
    workload = result.workloads[(first["workload"], first["seed"])]
    at = ["workload", "hot_share", "seed", "contender"]
    same = (result.totals[at] == first[at]).all(axis=1)
    hot_chunks = int(result.totals.loc[same, "hot_tokens"].iloc[0]) // CHUNK_TOKENS
    hits = measured[_COLUMNS].to_numpy()
    fast = _fast(workload, hot_chunks, config, measured)
    model = replay_on_lmcache(
        workload.trace,
        workload.prompts,
        hot_chunks,
        config,
        retain=name == RETAIN,
        perplexity=measured["perplexity"].to_numpy(),
    ).hit_tokens
    prompts, ttft_s = measured["prompt_tokens"].to_numpy(), measured["ttft_s"].to_numpy()
    error = np.abs(result.costs.request_ttft_s(model, prompts) - ttft_s) / ttft_s
    return (fast == hits).all(axis=1), (model == hits).all(axis=1), error


def _fitted_errors(costs, part):
    """Return errors of costs that were fitted to one seed, on the others (if there are any)."""
    first = part["seed"] == part["seed"].iloc[0]
    records = [
        SimpleNamespace(
            prompt_tokens=row.prompt_tokens,
            hit_tokens={tier: getattr(row, f"hit_{tier}") for tier in TIERS},
            generate_s=row.ttft_s,
        )
        for row in part[first].itertuples()
    ]
    rest = part if first.all() else part[~first]
    fitted = fit_costs(records, costs)
    ttft_s = rest["ttft_s"].to_numpy()
    predicted = fitted.request_ttft_s(rest[_COLUMNS].to_numpy(), rest["prompt_tokens"].to_numpy())
    return np.abs(predicted - ttft_s) / ttft_s


def _fast(workload, hot_chunks, config, measured):
    """Replay with the capacity at which LMCache starts to evict; disk and Redis hold all."""
    capacity = (int(EVICTION_WATERMARK * hot_chunks), None, None)
    if config is None:
        return replay(workload.trace, "recency", capacity).hit_tokens
    perplexity = measured["perplexity"].to_numpy()  # NaN where none was measured
    return replay(workload.trace, "heuristic", capacity, config, perplexity=perplexity).hit_tokens

"""Does the replay tell the truth? What it predicts, request by request, beside what was measured.

Twice: by `kvttl.replay.engine`, which knows a capacity and a policy, and by
`kvttl.lmcache.model`, which knows LMCache's own rules and runs the manager's code.
"""

import numpy as np
import pandas as pd

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.bench.contenders import CONTENDERS, KIT
from kvttl.bench.workloads import CHUNK_TOKENS
from kvttl.replay.costs import fit_costs
from kvttl.replay.engine import replay
from kvttl.replay.on_lmcache import replay_on_lmcache

KEYS = ["workload", "hot_share", "contender"]
_COLUMNS = [f"hit_{tier}" for tier in TIERS]


def replay_truth(result: object, settings: dict[str, HeuristicConfig]) -> pd.DataFrame:
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
    for (*at, name), part in result.requests.groupby(KEYS, sort=False):
        if CONTENDERS[name].rules:  # on LMCache's own rules
            figures = _truth_figures(result, part, name, settings.get(name))
            rows.append(dict(zip(KEYS, (*at, name))) | figures)
    return pd.DataFrame(rows)


def _truth_figures(result, part, name, config):
    passes = part.groupby("seed", sort=False)
    checks = [predict(result, measured, name, config) for _, measured in passes]
    equal, by_model, errors = (np.concatenate(check) for check in zip(*checks))
    return {
        "requests": len(equal),
        "replay_equal": float(equal.mean()),
        "model_equal": float(by_model.mean()),
        "model_differ": int((~by_model).sum()),
        "ttft_error": float(np.median(errors)),
        "ttft_error_fitted": float(np.median(_fitted_errors(result.costs, part))),
    }


def predict(
    result: object, measured: pd.DataFrame, name: str, config: HeuristicConfig | None
) -> tuple[np.ndarray, ...]:
    """Return, by request of one pass: equal by replay, by the model, and the TTFT's error."""
    first = measured.iloc[0]
    workload = result.workloads[(first["workload"], first["seed"])]
    at = [*KEYS, "seed"]
    hot_tokens = result.totals.set_index(at)["hot_tokens"]
    hot_chunks = int(hot_tokens[tuple(first[at])]) // CHUNK_TOKENS
    hits = measured[_COLUMNS].to_numpy()
    perplexity = measured["perplexity"].to_numpy()  # NaN where none was measured
    row, policy = CONTENDERS[name], result.policy if name == KIT else "formula"
    room = int(row.rules["watermark"] * hot_chunks)
    fast = _fast(workload.trace, room, config, perplexity, policy)
    run = (workload.trace, workload.prompts, hot_chunks, config)
    model = replay_on_lmcache(*run, policy=policy, perplexity=perplexity, **row.rules).hit_tokens
    prompts, ttft_s = measured["prompt_tokens"].to_numpy(), measured["ttft_s"].to_numpy()
    error = np.abs(result.costs.request_ttft_s(model, prompts) - ttft_s) / ttft_s
    return (fast == hits).all(axis=1), (model == hits).all(axis=1), error


def _fitted_errors(costs, part):
    """Return errors of costs that were fitted to one seed, on the others (if there are any)."""
    first = part["seed"] == part["seed"].iloc[0]
    known = part[first].rename(columns={"ttft_s": "generate_s"})
    known["hit_tokens"] = known[_COLUMNS].set_axis(list(TIERS), axis=1).to_dict("records")
    fitted = fit_costs(known.itertuples(), costs)
    rest = part if first.all() else part[~first]
    ttft_s = rest["ttft_s"].to_numpy()
    predicted = fitted.request_ttft_s(rest[_COLUMNS].to_numpy(), rest["prompt_tokens"].to_numpy())
    return np.abs(predicted - ttft_s) / ttft_s


def _fast(trace, hot_chunks, config, perplexity, policy):
    """Replay with the capacity at which LMCache starts to evict; disk and Redis hold all."""
    capacity = (hot_chunks, None, None)
    if config is None:
        return replay(trace, "recency", capacity).hit_tokens
    if policy != "formula":
        return replay(trace, policy, capacity, config).hit_tokens
    return replay(trace, "heuristic", capacity, config, perplexity=perplexity).hit_tokens

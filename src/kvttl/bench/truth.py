"""Does the replay tell the truth? What it predicts, request by request, beside what was measured.

Twice: by `kvttl.replay.engine`, which knows a capacity and a policy, and by
`kvttl.lmcache.model`, which knows LMCache's rules and the server module's, and runs the
manager's code.
"""

import numpy as np
import pandas as pd

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.bench.contenders import CONTENDERS, KIT
from kvttl.bench.runners import DAY_S
from kvttl.bench.workloads import CHUNK_TOKENS
from kvttl.policies import FAMILIES
from kvttl.replay.costs import fit_costs, queued_ttft_s
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
        A row a workload, hot tier and contender: ``replay_equal`` and ``model_equal``, the share
        of requests with equal hit tokens in every tier; ``model_differ``; of the time to first
        token that is predicted from the model's hits, \\|predicted - measured\\| / measured:
        ``ttft_error`` and ``ttft_error_p90``, with the costs fitted to the contender's first seed,
        on the others (if there are any), ``ttft_error_calibrated``, with the run's own
        calibration, on all; ``ttft_noise``, the same of two contenders that had equal hits
        for the same request: what no prediction from hits can avoid.
    """
    runs = result.requests.groupby(KEYS[1:], sort=False)
    runs = [(*at, part) for at, part in runs if CONTENDERS[at[1]].stack is not None]
    found = pd.concat([_predicted(result, *each, settings) for each in runs])
    alike = found.groupby([*KEYS[:2], "seed", "request", *_COLUMNS])["ttft_s"]
    found["noise"] = (alike.transform("sum") - found["ttft_s"]) / (alike.transform("size") - 1)
    for name in ("calibrated", "fitted", "noise"):  # NaN where no other one is alike
        found[name] = (found[name] / found["ttft_s"] - 1).abs()
    cells = found.groupby(KEYS, sort=False)
    checked = found[found["checks"]].groupby(KEYS, sort=False)["fitted"]
    columns = {
        "requests": cells.size(),
        "replay_equal": cells["replay_equal"].mean(),
        "model_equal": cells["model_equal"].mean(),
        "model_differ": cells.size() - cells["model_equal"].sum(),
        "ttft_error": checked.median(),
        "ttft_error_p90": checked.quantile(0.9),
        "ttft_error_calibrated": cells["calibrated"].median(),
        "ttft_noise": cells["noise"].median(),
    }
    return pd.DataFrame(columns).reset_index()


def _predicted(result, share, name, part, settings):
    """Return a contender's requests at one hot tier, pass by pass, with what is predicted.

    A policy that learns has learned in one pass when the next begins.
    """
    stack, rules = CONTENDERS[name].stack, CONTENDERS[name].rules
    config, start_s, found = settings.get(name), 0.0, []
    hot = result.totals.query("hot_share == @share")["hot_tokens"].iloc[0] // CHUNK_TOKENS
    policy = decider = result.policy if name == KIT else "formula"
    if rules["inside"]:
        config = config or HeuristicConfig()
    if isinstance(stack["inside"], str):
        decider = stack["inside"]
        policy = FAMILIES[decider]((hot, None, None), CHUNK_TOKENS)
    for (workload, seed), measured in part.groupby(["workload", "seed"], sort=False):
        load, known = result.workloads[workload, seed], measured["perplexity"].to_numpy()
        turns = getattr(load, "turns", [[row] for row in range(len(measured))])
        room = int(rules["watermark"] * hot)
        fast = _fast(load.trace, room, config, known, decider)
        options = {"policy": policy, "perplexity": known, "turns": turns, "start_s": start_s}
        run = load.trace, load.prompts, hot, config
        model = replay_on_lmcache(*run, **options, **rules)
        hits = measured[_COLUMNS].to_numpy()
        measured = measured.assign(
            replay_equal=(fast == hits).all(axis=1),
            model_equal=(model.hit_tokens == hits).all(axis=1),
            model_hits=model.hit_tokens.tolist(),
            model_stored=model.stored_tokens,
        )
        found += [measured.iloc[turn].assign(at_once=len(turn)) for turn in turns]
        start_s += load.span_s + DAY_S
    return _with_times(found, result.costs)


def _with_times(turns, costs):
    """Add the times to first token, of requests that were served at once too."""
    found = pd.concat(turns)
    first = found["seed"] == found["seed"].iloc[0]
    known = found[first & (found["at_once"] == 1)].rename(columns={"ttft_s": "generate_s"})
    known["hit_tokens"] = known[_COLUMNS].set_axis(list(TIERS), axis=1).to_dict("records")
    found["checks"] = ~first | first.all()
    for name, each in (("calibrated", costs), ("fitted", fit_costs(known.itertuples(), costs))):
        found[name] = np.concatenate([_turn_s(each, turn) for turn in turns])
    return found


def _turn_s(costs, turn):
    hits, prompts = np.array(turn["model_hits"].tolist()), turn["prompt_tokens"].to_numpy()
    if len(turn) == 1:
        return costs.request_ttft_s(hits, prompts, turn["model_stored"].to_numpy())
    return queued_ttft_s(costs, np.zeros(len(turn)), hits, prompts)


def _fast(trace, hot_chunks, config, perplexity, policy):
    """Replay with the capacity at which LMCache starts to evict; disk and Redis hold all."""
    capacity = (hot_chunks, None, None)
    if config is None:
        return replay(trace, "recency", capacity).hit_tokens
    if policy == "formula":
        return replay(trace, "heuristic", capacity, config, perplexity=perplexity).hit_tokens
    return replay(trace, policy, capacity, config).hit_tokens

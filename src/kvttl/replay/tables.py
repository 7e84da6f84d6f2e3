"""Tables of replays: all policies at several capacities, and memory against hits."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from caching_heuristics import HeuristicConfig
from kvttl import plain_name, user_path
from kvttl.replay.baselines import BASELINES, replay_baseline
from kvttl.replay.costs import TierCosts, result_costs
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.policies import POLICIES
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs
from kvttl.traces.trace import Trace

SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50)  # of a trace's unique blocks


def policy_table(
    trace: Trace | RunIndex,
    shares: Sequence[float] = SHARES,
    policies: Sequence[str] = (*POLICIES, *BASELINES),
    config: HeuristicConfig | None = None,
    costs: TierCosts | None = None,
    since_s: float = 0.0,
    progress: bool = False,
) -> pd.DataFrame:
    """Replay every policy at every capacity, in one tier.

    Parameters
    ----------
    trace : Trace or RunIndex
        What to replay.
    shares : sequence of float
        Capacities, as shares ]0, 1] of the unique blocks.
    policies : sequence of str
        Names of `kvttl.replay.policies.POLICIES` and `kvttl.replay.baselines.BASELINES`.
    config, costs
        Settings of the TTL policies; of the estimated TTFT.
    since_s : float
        Requests before this second warm the caches up and do not count in the ratios.
    progress : bool
        Show a bar on stderr once it takes more than a second.

    Returns
    -------
    pandas.DataFrame
        A row a policy and share: policy, share, capacity_blocks,
        block_hit_ratio, token_hit_ratio, ttft_p50_s, ttft_mean_s, speedup,
        mean_blocks_held (NaN where the policy does not say). Below the
        `kvttl.replay.baselines.LEAST_BLOCKS` of a policy all of them are NaN: left out
        of figures, empty in CSV.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> table = policy_table(agent_loops(50), (0.1, 0.5), ("lru", "optimal"))
    >>> table.shape
    (4, 9)
    """
    index = trace if isinstance(trace, RunIndex) else index_runs(trace)
    rows = []
    steps = list(product(policies, shares))
    for policy, share in tqdm(steps, "policies", unit="replay", delay=1, disable=not progress):
        if policy in BASELINES:
            result = replay_baseline(index.trace, policy, share)
        else:
            result = replay(index, policy, share, config)
        row = {"policy": policy, "share": share, "capacity_blocks": result.capacity_blocks[0]}
        row |= result.since(since_s) | result_costs(result, costs)
        rows.append(row | {"mean_blocks_held": mean_blocks_held(result)})
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = ["policy", "share", "capacity_blocks", "block_hit_ratio", "token_hit_ratio"]
_COLUMNS += ["ttft_p50_s", "ttft_mean_s", "speedup", "mean_blocks_held"]


def mean_blocks_held(result: ReplayResult) -> float:
    """Return the blocks that all tiers held on average over the trace's time."""
    span_s = result.trace.span_s
    return float(result.block_seconds.sum() / span_s) if span_s else 0.0


def at_same_memory(index: RunIndex, result: ReplayResult) -> dict[str, ReplayResult]:
    """Replay recency and the optimum with as much memory as a result held on average."""
    blocks = max(1, round(mean_blocks_held(result)))
    return {name: replay(index, name, blocks) for name in ("recency", "optimal")}


def trade_off(
    index: RunIndex,
    config: HeuristicConfig | None = None,
    base_ttls_s: Sequence[float] = (3, 10, 30, 100, 300, 1_000, 3_600, 10_000),
) -> pd.DataFrame:
    """Sweep the base TTL: memory held and hits, beside recency and optimum at that memory.

    Returns
    -------
    pandas.DataFrame
        A row a base TTL: base_ttl_s, mean_blocks_held, share_held (of unique
        blocks), and token hit ratios of heuristic, ttl, recency and optimal. The
        plain ``ttl`` has a memory of its own, ``ttl_share_held``.
    """
    config, rows = config or HeuristicConfig(), []
    unique = max(index.trace.unique_blocks, 1)
    for base_s in base_ttls_s:
        changed = replace(config, base_ttl=base_s, min_ttl=min(config.min_ttl, base_s))
        result = replay_without_capacity(index, changed)
        plain = replay_without_capacity(index, changed, "ttl")
        same = at_same_memory(index, result)
        held, plain_held = mean_blocks_held(result), mean_blocks_held(plain)
        shares = (held / unique, result.token_hit_ratio, plain_held / unique, plain.token_hit_ratio)
        rows.append((base_s, held, *shares, *(other.token_hit_ratio for other in same.values())))
    return pd.DataFrame(rows, columns=_SWEEP_COLUMNS)


_SWEEP_COLUMNS = ["base_ttl_s", "mean_blocks_held", "share_held", "heuristic", "ttl_share_held"]
_SWEEP_COLUMNS += ["ttl", "recency", "optimal"]


def wide(table: pd.DataFrame, value: str = "token_hit_ratio") -> pd.DataFrame:
    """Return a policy table, a policy a row and a share a column; best in the middle first."""
    frame = table.pivot(index="policy", columns="share", values=value)
    order = np.argsort(-frame.to_numpy()[:, frame.shape[1] // 2], kind="stable")
    return frame.iloc[order]


def export(folder: str | Path, name: str, frame: pd.DataFrame, figure=None) -> list[Path]:
    """Write a table as CSV and, if given, its figure as PNG; returns the files."""
    folder, name = user_path(folder), plain_name(name, "the export")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.csv"]
    frame.to_csv(paths[0], index=False)
    if figure is not None:
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[1], dpi=150)
    return paths

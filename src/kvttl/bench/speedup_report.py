"""What `make bench` measured: tables with intervals, a figure, a text that says who lost.

A row a contender, hot tier and workload; means over seeds with 95 % confidence
intervals (Student's t). Comparisons are paired: the same seed, the same requests.
"""

import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from caching_heuristics import TIERS, HeuristicConfig
from kvttl import PROJECT, user_path
from kvttl.bench.contenders import (
    ADAPTIVE,
    CONTENDERS,
    KIT,
    LMCACHE,
    MAIN_SHARE,
    ORDER,
    PEER,
    TUNED,
)
from kvttl.bench.figures import write_json
from kvttl.bench.truth import KEYS, replay_truth
from kvttl.bench.workloads import CHUNK_TOKENS, Workload
from kvttl.plots.panels import OwnFigure, own_style
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import replay
from kvttl.settings import save_settings

RUNS, REQUESTS, FIGURES = "speedup.csv", "speedup_requests.csv.gz", "speedup.json"
SETTINGS, PICTURE = "speedup_heuristics.yaml", "speedup.png"
_TIMES = {q: f"ttft_p{q}_ms" for q in (50, 90, 99)}
# What is compared with LMCache, and how a verdict calls it
_GOAL = {"hot_mb_s": "memory", "ttft_p50_ms": "p50", "ttft_p90_ms": "p90"}
_GOAL |= {"ttft_mean_ms": "mean", "written_mb": "written"}
_RATIO_TOKENS = 1_800  # of the prompt whose miss and hits are compared
BOUND = "optimum"
FIELD = PROJECT / "data" / "field_ratios.csv"  # of deployments; data/README.md has the sources
# 97.5 % quantiles of Student's t, by degrees of freedom from 1
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, eq=False)
class BenchResult:
    """What a run measured.

    Parameters
    ----------
    requests : pandas.DataFrame
        A row a request and contender.
    totals : pandas.DataFrame
        A row a pass and contender: hot-tier byte·seconds, expired chunks, sizes.
    workloads : dict
        By name and seed; what the truth check replays.
    costs : TierCosts
        As calibrated in the same run.
    policy : str
        That of the kit with its default settings.
    """

    requests: pd.DataFrame
    totals: pd.DataFrame
    workloads: dict[tuple[str, int], Workload]
    costs: TierCosts
    policy: str = "formula"


def by_seed(result: BenchResult) -> pd.DataFrame:
    """Return the figures of each workload, hot tier, contender and seed, a row each."""
    keys = [*KEYS, "seed"]
    groups = result.requests.eval("added_s = call_s - engine_s").groupby(keys, sort=False)
    frame = pd.DataFrame({n: groups["ttft_s"].quantile(q / 100) * 1e3 for q, n in _TIMES.items()})
    frame["ttft_mean_ms"] = groups["ttft_s"].mean() * 1e3
    prompts = groups["prompt_tokens"].sum()
    for tier in ("gpu", "disk", "remote", "none"):
        frame[f"hit_{tier}"] = groups[f"hit_{tier}"].sum() / prompts
    frame["recomputed_tokens"] = prompts - groups["cached_tokens"].sum()
    frame["moved_chunks"] = groups["moved_chunks"].sum()
    for name, q in (("manage", 50), ("manage", 90), ("added", 50)):
        frame[f"{name}_p{q}_ms"] = groups[f"{name}_s"].quantile(q / 100) * 1e3
    frame["not_managed"] = groups["error"].apply(lambda errors: sum(map(bool, errors)))
    totals = result.totals.set_index(keys)
    frame["moved_chunks"] += totals["expired_chunks"]
    frame["hot_mb_s"] = totals["hot_byte_seconds"] / 1e6
    frame["hot_mean_mb"] = frame["hot_mb_s"] / totals["span_s"]
    frame["written_mb"] = totals[["disk_written", "remote_written"]].sum(axis=1) / 1e6
    return frame.join(totals[["hot_tokens", "working_set", "span_s", "wall_s"]]).reset_index()


def summary(seeds: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds, and the half widths of their 95 % intervals (columns ``±...``)."""
    means, half = _means(seeds.drop(columns="seed"))
    return means.join(half.add_prefix("±")).reset_index()


def _means(frame):
    """Return means over seeds by `KEYS`, and the half widths of their intervals."""
    groups = frame.groupby(KEYS, sort=False)
    counts = groups.size()
    return groups.mean(), groups.std().mul(counts.map(t_quantile).div(np.sqrt(counts)), axis=0)


def t_quantile(seeds: int) -> float:
    """Return Student's t for a 95 % interval of so many seeds' mean; NaN for one seed.

    Raises
    ------
    ValueError
        More seeds than the table has.
    """
    if not 1 <= seeds <= len(_T) + 1:
        raise ValueError(f"seeds must be 1..{len(_T) + 1} for an interval, got {seeds}")
    return _T[seeds - 2] if seeds > 1 else math.nan


def compared(seeds: pd.DataFrame, to: str = LMCACHE) -> pd.DataFrame:
    """Return each contender's figures as multiples of another's, paired by seed, with intervals."""
    at = ["workload", "hot_share", "seed"]
    peer = seeds[seeds["contender"] == to].set_index(at)[[*_GOAL]]
    others = seeds.set_index([*at, "contender"])[[*_GOAL]]
    # Logarithms: ratios of times are skewed, and their mean is not that of the inverse.
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(others.div(peer)).replace(-np.inf, np.nan)
    mean, half = _means(logs.reset_index("seed", drop=True))
    frames = {"": np.exp(mean), "_low": np.exp(mean - half), "_high": np.exp(mean + half)}
    return pd.concat([f.add_suffix(end) for end, f in frames.items()], axis=1).reset_index()


# ---- text ------------------------------------------------------------------------


def table(seeds: pd.DataFrame) -> str:
    """Return the summary as text: a line a contender, the reader's units."""
    rows = summary(seeds)
    lines = []
    for (workload, _share), part in rows.groupby(["workload", "hot_share"], sort=False):
        hot, working = part["hot_tokens"].iloc[0], part["working_set"].iloc[0]
        lines.append(
            f"\n{workload}, hot tier {hot / working:.0%} of the working set"
            f" ({hot:.0f} of {working:.0f} tokens)\n"
            f"{'TTFT ms':>31}{'tokens served by':>57}{'recomputed':>19}{'hot tier':>10}"
            f"{'written':>11}\n{'mean':>28}{'p50':>13}{'p90':>13}{'p99':>13}{'gpu':>11}{'disk':>6}"
            f"{'remote':>8}{'tokens':>11}{'MB held':>12}{'MB':>12}"
        )
        lines += [_line(row) for _, row in part.sort_values("contender", key=_order).iterrows()]
    return "\n".join(lines)


def _order(names):
    return names.map(ORDER.index)


def _line(row):
    names = ("ttft_mean_ms", *_TIMES.values())
    times = " ".join(f"{row[n]:5.0f} {_half(row['±' + n], 0):6}" for n in names)
    served = f"{row.hit_gpu:5.0%} {row.hit_disk:5.0%} {row.hit_remote:7.0%}"
    held = f"{row.hot_mean_mb:6.3f} {_half(row['±hot_mean_mb'], 3):7}"
    tokens = f"{row.recomputed_tokens:8.0f}"
    return f"  {row.contender:20} {times} {served}   {tokens}    {held} {row.written_mb:7.2f}"


def _half(width, digits):
    return f"±{width:.{digits}f}" if math.isfinite(width) else ""


def verdict(seeds: pd.DataFrame) -> str:
    """Return who needs how much hot memory at which TTFT, against LMCache."""
    peers = {"as it comes": LMCACHE, "tuned": PEER}
    there = set(seeds["contender"])
    return "\n".join(_verdict(seeds, name, to) for name, to in peers.items() if to in there)


def _verdict(seeds, name, to):
    lines = [f"\nAgainst LMCache {name}, paired by seed (95 % interval); below 1 is better:"]
    rows = compared(seeds, to)
    rows = rows[rows["ttft_mean_ms"].notna() & (rows["contender"] != to)]
    for row in rows.sort_values("contender", key=_order, kind="stable").itertuples():
        lines.append(
            f"  {row.contender:20} {row.workload:8} {row.hot_share:4.0%}"
            f"  TTFT mean {_ratio(row, 'ttft_mean_ms')}  p90 {_ratio(row, 'ttft_p90_ms')}"
            f"  hot memory {_ratio(row, 'hot_mb_s')}  written {_ratio(row, 'written_mb')}"
            f"  {_word(row)}"
        )
    return "\n".join(lines)


def _ratio(row, name):
    low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
    value = getattr(row, name)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if low <= high else f"{value:<17.2f}"


def _word(row):
    """Say in a word what the intervals allow to say."""
    if math.isnan(row.ttft_mean_ms_low):
        return "one seed: no interval"
    won = [short for name, short in _GOAL.items() if getattr(row, f"{name}_high") < 1]
    lost = [short for name, short in _GOAL.items() if getattr(row, f"{name}_low") > 1]
    words = (("better", won), ("WORSE", lost))
    parts = [f"{word}: {', '.join(names)}" for word, names in words if names]
    return "; ".join(parts) or "no difference beyond noise"


def headline(result: BenchResult) -> dict[str, object]:
    """Return the goal's figures: agentic sessions at `MAIN_SHARE`, the kit against LMCache.

    Names that end in ``_peer``: against LMCache tuned, the peer to beat; ``tuned_`` and
    ``adaptive_`` are inside LMCache's server. NaN: it did not run. And what misses and hits cost.
    """
    seeds, figures = by_seed(result), {}
    for to, end in ((LMCACHE, ""), (PEER, "_peer")):
        rows = compared(seeds, to).set_index(KEYS)
        for name, short in ((KIT, "kit"), (TUNED, "tuned"), (ADAPTIVE, "adaptive")):
            at = ("agentic", MAIN_SHARE, name)
            row = rows.loc[at] if at in rows.index else {}
            for high, key in product(("", "_high"), _GOAL):
                figures[f"{short}_{key}_ratio{high}{end}"] = float(row.get(key + high, math.nan))
    return figures | {"miss_s": _predicted_s(result.costs, 0)} | miss_to_hit(result.costs)


def _predicted_s(costs, gpu=0, disk=0, remote=0):
    return float(costs.request_ttft_s([gpu, disk, remote], _RATIO_TOKENS))


def miss_to_hit(costs: TierCosts) -> dict[str, float]:
    """Return how many hits in each tier a miss of 1,800 tokens costs, as calibrated."""
    tokens = _RATIO_TOKENS // CHUNK_TOKENS * CHUNK_TOKENS
    miss_s = _predicted_s(costs)
    return {f"miss_to_{t}": miss_s / _predicted_s(costs, **{t: tokens}) for t in TIERS}


def bounds(result: BenchResult) -> pd.DataFrame:
    """Return by workload, hot tier and seed what an offline optimum would reach, predicted.

    It knows the future and keeps in gpu what hits most; disk holds all. TTFTs are those of the
    calibrated costs, of the contenders that follow LMCache's rules too, to compare it with.
    """
    rows = []
    for row in result.totals.drop_duplicates(["workload", "hot_share", "seed"]).itertuples():
        room = row.hot_tokens // CHUNK_TOKENS, None, None
        best = replay(result.workloads[row.workload, row.seed].trace, "optimal", room)
        ttft_s = result.costs.request_ttft_s(best.hit_tokens, best.trace.prompt_tokens)
        hits = best.hit_tokens.sum(axis=0) / best.trace.prompt_tokens.sum()
        figures = {"ttft_mean_ms": ttft_s.mean() * 1e3, "hit_gpu": hits[0], "hit_disk": hits[1]}
        at = {"workload": row.workload, "hot_share": row.hot_share, "contender": BOUND}
        rows.append(at | figures | {"seed": row.seed})
    return pd.DataFrame(rows)


def bound_text(bound: pd.DataFrame) -> str:
    """Return the bounds as text."""
    lines = [
        "\nThe bound: an offline optimum in gpu over a disk that holds all, costs as calibrated"
    ]
    for at, part in bound.groupby(["workload", "hot_share"], sort=False):
        mean = part[["ttft_mean_ms", "hit_gpu", "hit_disk"]].mean()
        lines.append(
            f"  {BOUND:20} {at[0]:8} {at[1]:4.0%}  TTFT mean {mean.ttft_mean_ms:5.0f} ms"
            f"  gpu {mean.hit_gpu:4.0%}  disk {mean.hit_disk:4.0%}"
        )
    return "\n".join(lines)


def costs_text(costs: TierCosts) -> str:
    """Return what a miss costs beside a hit in each tier, here and in the field, as text."""
    lines = [f"A miss of {_RATIO_TOKENS:,} tokens takes {_predicted_s(costs):.2f} s here."]
    lines += [f"{'Times a hit in':40} gpu  disk  remote", _ratios("here", miss_to_hit(costs))]
    lines += [
        _ratios(f"{r['model']}, {r['gpu']}", r) for r in pd.read_csv(FIELD).to_dict("records")
    ]
    return "\n".join(lines)


def _ratios(name, row):
    gpu, disk, remote = (row[f"miss_to_{tier}"] for tier in TIERS)
    return f"  {name:36} {gpu:5.1f} {disk:5.1f} {remote:7.1f}"


# ---- figure ----------------------------------------------------------------------


@own_style()
def picture(seeds: pd.DataFrame) -> Figure:
    """Draw who helps, and when not: by workload and hot tier, the TTFT as a multiple of LMCache's.

    Filled: the mean. Hollow: p90. Left of 1 is faster than LMCache tuned.
    """
    rows = compared(seeds, PEER)
    rows = rows[(rows["contender"] != PEER) & rows["ttft_mean_ms"].notna()]
    panels = list(rows.groupby(["workload", "hot_share"], sort=False))
    lines = -(-len(panels) // _COLUMNS)
    figure = OwnFigure((9.6, 2.2 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, min(len(panels), _COLUMNS), squeeze=False).ravel()
    for axes, ((workload, share), part) in zip(grid, panels):
        _panel(axes, part.sort_values("contender", key=_order, ascending=False))
        axes.set_title(f"{workload}, hot tier {share:.0%}", fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(f"TTFT as a multiple of that of {PEER} (95 % interval)", fontsize=10)
    keys = [Line2D([], [], ls="", marker="o", color="black", mfc=f) for f in ("black", "white")]
    figure.legend(keys, ["mean", "p90"], loc="outside upper right", ncols=2, frameon=False)
    return figure


_COLUMNS = 3


def _panel(axes, part):
    for at, row in enumerate(part.itertuples()):
        colour = CONTENDERS[row.contender].colour
        for name, fill, up in (("ttft_mean_ms", colour, 0.12), ("ttft_p90_ms", "white", -0.12)):
            value, ends = getattr(row, name), (getattr(row, f"{name}_{end}") for end in _ENDS)
            wide = [[abs(end - value)] for end in ends]
            axes.errorbar(value, at + up, xerr=wide, fmt="o", color=colour, mfc=fill, capsize=2)
    axes.axvline(1.0, color="#888888", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(part)), part["contender"], fontsize=8)
    axes.set_ylim(-0.6, len(part) - 0.4)
    axes.xaxis.set_major_formatter("{x:g}")
    is_narrow = np.ptp(np.log10(axes.get_xlim())) < 0.7  # of a decade: there is room for all
    shown = lambda x, _at: f"{x:.2g}" if is_narrow or round(x, 9) in _TICKS else ""  # noqa: E731
    axes.xaxis.set_minor_formatter(shown)
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(alpha=0.3)


_ENDS = ("low", "high")
_TICKS = (0.3, 0.5, 0.7, 2.0, 3.0, 5.0)


# ---- files -----------------------------------------------------------------------


def write_report(
    result: BenchResult, settings: dict[str, HeuristicConfig], figures: dict, folder: Path
) -> str:
    """Write the tables, the figures, the settings and the picture; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds, truth = by_seed(result), replay_truth(result, settings)
    bound = bounds(result)
    parts = costs_text(result.costs), table(seeds), verdict(seeds), bound_text(bound)
    text = "\n".join((*parts, truth_text(truth)))
    seeds.round(4).to_csv(folder / RUNS, index=False)
    packed = {"method": "gzip", "mtime": 0}  # equal tables give equal files
    result.requests.round(5).to_csv(folder / REQUESTS, index=False, compression=packed)
    if TUNED in set(seeds["contender"]):
        save_settings(settings[TUNED], folder / SETTINGS)
    report = {**figures, **headline(result), "costs": asdict(result.costs)}
    report |= {"bound": bound.to_dict("records"), "field": pd.read_csv(FIELD).to_dict("records")}
    report |= {"truth": truth.to_dict("records"), "text": text.splitlines()}
    write_json(folder / FIGURES, report)
    picture(seeds).savefig(folder / PICTURE, dpi=150)
    return text


def truth_text(truth: pd.DataFrame) -> str:
    """Return the truth check as text."""
    lines = [
        "\nDoes the replay tell the truth? Requests whose hit tokens by tier are equal, and the"
        " error of the TTFT predicted from the model's hits, by costs fitted to one seed, on the"
        " others (by the calibrated costs, on all; between contenders that had equal hits):"
    ]
    for row in truth.itertuples():
        lines.append(
            f"  {row.contender:14} {row.workload:8} {row.hot_share:4.0%}"
            f"  trace_replay {row.replay_equal:6.1%}  model of LMCache {row.model_equal:6.1%}"
            f"  ({row.model_differ} of {row.requests} differ)"
            f"  TTFT {row.ttft_error:5.1%}, p90 {row.ttft_error_p90:5.1%}"
            f" (calibrated: {row.ttft_error_calibrated:5.1%}; alike differ: {row.ttft_noise:5.1%})"
        )
    return "\n".join(lines)


def read_report(folder: str | Path = "data/reports") -> tuple[pd.DataFrame, dict[str, object]]:
    """Return the figures by seed and the JSON report of the last (or the committed) run.

    Raises
    ------
    FileNotFoundError
        Nothing was run or committed there.
    """
    folder = user_path(folder)
    return pd.read_csv(folder / RUNS), json.loads((folder / FIGURES).read_text())

"""Figures of replays: plain functions from results and tables to a matplotlib figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from caching_heuristics import TIERS
from kvttl.plots.decision_plots import TIER_COLOURS
from kvttl.replay.policies import POLICIES
from kvttl.replay.result import ReplayResult
from kvttl.replay.tables import mean_blocks_held


def plot_policies(table: pd.DataFrame, value: str = "token_hit_ratio") -> Figure:
    """Draw a `policy_table`: hits against capacity, a line a policy, named at its end."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    others = iter("xsv^D+<>PX*hd12348" * 3)
    for policy, rows in table.groupby("policy", sort=False):
        if policy in POLICIES and POLICIES[policy].colour:
            line = {"color": POLICIES[policy].colour, "linestyle": POLICIES[policy].dash}
            style = {**line, "marker": "o", "linewidth": 1.8}
        else:
            style = {"color": "#999999", "linestyle": ":", "marker": next(others), "linewidth": 1.0}
        axes.plot(rows["share"], rows[value], markersize=4, label=policy, **style)
    axes.set(xscale="log", xlabel="capacity, share of unique blocks", ylabel=_words(value))
    axes.set_xticks(sorted(table["share"].unique()), minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    _finish(axes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_trade_off(sweep: pd.DataFrame, result: ReplayResult | None = None) -> Figure:
    """Draw a `trade_off` sweep: hits against the memory that they took.

    Parameters
    ----------
    sweep : pandas.DataFrame
        Of `kvttl.replay.tables.trade_off`.
    result : ReplayResult, optional
        One setting more, drawn as a star.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, column in (
        ("optimal", "share_held"),
        ("heuristic", "share_held"),
        ("ttl", "ttl_share_held"),
        ("recency", "share_held"),
    ):
        style = {"color": POLICIES[name].colour, "marker": "o", "ms": 4}
        axes.plot(sweep[column], sweep[name], POLICIES[name].dash, label=name, **style)
    if result is not None:
        share = mean_blocks_held(result) / max(result.trace.unique_blocks, 1)
        axes.plot([share], [result.token_hit_ratio], "*", color="#D55E00", ms=15, label="now")
    axes.set(
        xscale="log",
        xlabel="blocks held on average, share of unique blocks",
        ylabel="token hit ratio",
    )
    axes.set_ylim(bottom=0)
    _finish(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_over_time(result: ReplayResult, step_s: float = 60.0) -> Figure:
    """Draw the share of prompt tokens that each tier served, over time."""
    frame = result.over_time(step_s)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    prompts = frame["prompt_tokens"].clip(lower=1)
    shares = [frame[f"hit_tokens_{tier}"] / prompts for tier in TIERS]
    colours = [TIER_COLOURS[tier] for tier in TIERS]
    axes.stackplot(frame.index, shares, labels=TIERS, colors=colours)
    axes.set(xlabel="seconds", ylabel="share of prompt tokens", ylim=(0, 1))
    _finish(axes)
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper right")
    return figure


def _words(name):
    return name.replace("_", " ").removesuffix(" s") + (" (s)" if name.endswith("_s") else "")


def _finish(axes):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)

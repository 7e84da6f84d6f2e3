"""Figures of decisions: plain functions from data to a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from caching_heuristics import TIERS
from decision_log import DecisionRecord

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey.
TIER_COLOURS = {"gpu": "#D55E00", "disk": "#56B4E9", "remote": "#004D73", "none": "#CCCCCC"}


def plot_session(records: Sequence[DecisionRecord], labels: Sequence[str] | None = None) -> Figure:
    """Draw a session: where each prompt's chunks were served from, and are afterwards.

    Parameters
    ----------
    records : sequence of DecisionRecord
        One row each, in order.
    labels : sequence of str, optional
        Names of the rows; default the prompts' digests.

    Returns
    -------
    matplotlib.figure.Figure
        Left the prompt's tokens by the tier that served them, in the middle its
        chunks by hottest tier now, right the TTL on a log axis.
    """
    labels = list(labels or (record.prompt_digest for record in records))
    figure = Figure(figsize=(11, 1.6 + 0.17 * len(records)), layout="constrained")
    hits, tiers, ttls = figure.subplots(1, 3, sharey=True, width_ratios=[3, 2, 2])
    rows = range(len(records))
    _stack(hits, [_served(record) for record in records])
    hits.set(xlabel="prompt tokens, by the tier that served them", yticks=list(rows))
    hits.set_yticklabels([f"{label}  {row + 1}" for row, label in zip(rows, labels)], fontsize=6.5)
    _stack(tiers, [record.tier_after for record in records])
    tiers.set_xlabel("complete chunks, by hottest tier now")
    colours = [TIER_COLOURS[record.wanted_tier or "none"] for record in records]
    ttls.scatter([record.ttl_s or 1 for record in records], rows, s=14, c=colours)
    ttls.set(xscale="log", xlabel="TTL (s), coloured by wanted tier")
    ttls.grid(axis="x", which="both", alpha=0.3)
    for set_formatter in (ttls.xaxis.set_major_formatter, ttls.xaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    ttls.tick_params(axis="x", which="both", labelsize=8)
    hits.invert_yaxis()
    hits.margins(y=0.01)
    for axes in (hits, tiers, ttls):
        axes.spines[["top", "right"]].set_visible(False)
    handles = [hits.barh([0], [0], color=TIER_COLOURS[name])[0] for name in (*TIERS, "none")]
    names = [*TIERS, "computed / not seen"]
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _served(record):
    """Return a prompt's tokens by source; what no tier served was computed ("none")."""
    computed = record.prompt_tokens - sum(record.hit_tokens.values())
    return {**record.hit_tokens, "none": computed + record.hit_tokens.get("none", 0)}


def _stack(axes, counts):
    left = [0] * len(counts)
    for tier in (*TIERS, "none"):
        widths = [count.get(tier, 0) for count in counts]
        axes.barh(range(len(counts)), widths, left=left, height=0.8, color=TIER_COLOURS[tier])
        left = [a + b for a, b in zip(left, widths)]

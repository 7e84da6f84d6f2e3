"""Figures of what a policy learned: plain functions from `kvttl.plots.learned` to a figure."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvttl.plots.learned import CLASSES, Watched, classes
from kvttl.plots.panels import open_axes, own_style
from kvttl.policies.adaptive import ATTENTION_TOKENS, Adaptive
from kvttl.policies.hazard import EDGES_S, LEAST, Learning
from kvttl.replay.engine import replay, replay_online
from kvttl.replay.policies import POLICIES, capacities
from kvttl.replay.result import ReplayResult

_COLOURS = dict(zip(CLASSES, ("#D55E00", "#0072B2", "#009E73", "#666666")))
_INDEX, _PRICE, _VALUE = "#D55E00", "#0072B2", "hits a chunk and second"
_ABOVE = {"loc": "outside upper center", "ncols": 5, "frameon": False, "fontsize": 9}
_SMALL = {"frameon": False, "fontsize": 8}


@own_style()
def plot_hazards(table: pd.DataFrame) -> Figure:
    """Draw a `hazard_table`: a panel a class, what was expected as a line, what came as dots."""
    groups = list(table.groupby("class", sort=False))
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = open_axes(2 + 2.7 * len(groups), 3.4, 1, max(len(groups), 1), **shared)
    for each, (name, rows) in zip(axes.flat, groups):
        bars = np.abs(rows[["low", "high"]].to_numpy().T - rows["counted"].to_numpy())
        dots = {"fmt": "o", "ms": 4, "color": _COLOURS[name], "ecolor": "#999999"}
        at_s = _middle_s(rows["from_s"])
        each.errorbar(at_s, rows["counted"], bars, **dots, label="counted, 95 %")
        each.plot(at_s, rows["expected"], color="black", lw=1.8, label="expected")
        each.set_title(f"{name}\n{rows['examples'].iloc[0]:,} examples", fontsize=10)
        each.set(xscale="log", yscale="log", xlabel="seconds since the end")
        each.grid(alpha=0.3)
        each.legend(loc="lower left", **_SMALL)
    axes[0, 0].set_ylabel("next uses a second")
    return figure


@own_style()
def plot_life(seen: Watched) -> Figure:
    """Draw one chunk's life: its index and the price, its TTL, its uses, and when it was there."""
    life = seen.life.set_index("seconds")
    figure, (index, ttl) = open_axes(9, 5, 2, 1, sharex=True, height_ratios=[3, 2])
    index.plot(life["index"], color=_INDEX, lw=1.4, label="its index")
    index.plot(_paid(life["price"]), color=_PRICE, lw=1.0, label="price of its place")
    ttl.plot(life["ttl_s"].where(life["resident"] & (life["ttl_s"] > 0)), color=_INDEX, lw=1.4)
    for axes in (index, ttl):
        _shade(axes, life.index, life["resident"], "#CCEBE0", "resident")
    top = {"transform": index.get_xaxis_transform(), "clip_on": False, "color": "black", "ms": 5}
    for hit, mark, label in ((1.0, "o", "used: hit"), (0.0, "x", "used: miss")):
        used_s = life.index[life["hit"] == hit]
        index.plot(used_s, np.ones(len(used_s)), mark, label=label, **top)
    index.set_ylabel(_VALUE)
    ttl.set(xlabel="seconds since its first use", ylabel="TTL from then on (s)")
    ttl.set_ylim(bottom=0.1)
    figure.legend(*index.get_legend_handles_labels(), **_ABOVE)
    return figure


@own_style()
def plot_price(seen: Watched) -> Figure:
    """Draw the price of a place over time, and when recency was in force."""
    figure, axes = open_axes(9, 3)
    ends = seen.ends.set_index("seconds")
    axes.plot(_paid(ends["price"]), color=_PRICE, lw=1, label="price")
    _shade(axes, ends.index, ~ends["index_in_force"], "#DDDDDD", "recency in force")
    axes.set(xlim=(0, ends.index.max()), xlabel="seconds", ylabel=_VALUE)
    figure.legend(*axes.get_legend_handles_labels(), **_ABOVE)
    return figure


@own_style()
def plot_settings(
    seen: Watched, capacity, half_life_s=1200.0, guard=0.002, cost_weight=0.0
) -> Figure:
    """Replay `Adaptive` with other settings: what it hits over time, and what it expects then.

    Parameters
    ----------
    half_life_s : float
        Of what an example weighs; the average that is in force has a quarter of it.
    guard : float
        Share of the tokens by which the learned order must lead recency to come into force.
    cost_weight : float
        0: hits count alike; 1: as the work they save, with `ATTENTION_TOKENS`.
    """
    trace, names = seen.trace, classes(seen.trace)
    options = {"learning": Learning(forget_s=half_life_s, average_s=half_life_s / 4)}
    options |= {"lead": guard, "deeper": cost_weight / ATTENTION_TOKENS}
    policy = Adaptive(capacities(capacity, trace)[0], trace.block_tokens, **options)
    results = [replay(trace, name, capacity) for name in ("optimal", "recency")]
    figure, (hits, hazards) = open_axes(10, 4, 1, 2, width_ratios=[3, 2])
    for result in (*results, replay_online(trace, policy, "adaptive")):
        look, over_time = POLICIES[result.policy], result.over_time(max(trace.span_s / 39.9, 1.0))
        label = f"{result.policy}: {result.token_hit_ratio:.1%} of tokens"
        label += f", {saved_work(result):.1%} of the work"
        hits.plot(over_time["token_hit_ratio"], look.dash, color=look.colour, label=label)
    for name in (name for name in CLASSES if (names == name).any()):
        expected = policy.hazards(seen.codes[names == name]).mean(axis=0)
        hazards.plot(_middle_s(EDGES_S), expected, color=_COLOURS[name], label=name)
    hits.set(ylim=(0, 1), xlabel="seconds", ylabel="token hits")
    hazards.set(xscale="log", yscale="log", ylim=(1e-5, 1))
    hazards.set(xlabel="seconds since the end", ylabel="expected uses a second, at the end")
    for axes in (hits, hazards):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), **_SMALL)
    return figure


def saved_work(result: ReplayResult) -> float:
    """Return the share of all prefill that hits saved, attention included."""
    hits, prompts = result.hit_tokens.sum(axis=1), result.trace.prompt_tokens.astype(float)
    hits, prompts = (n * (1.0 + n / (2 * ATTENTION_TOKENS)) for n in (hits, prompts))
    return float(hits.sum() / max(prompts.sum(), 1.0))


def _middle_s(from_s):
    """Return where an age that begins at so many seconds is drawn: in its middle, as logs go."""
    return np.maximum(from_s, 0.5) * np.where(from_s < 1, 1.0, 1.5**0.5)


def _paid(price):
    """Return the prices for which something went."""
    return price.where(price > 1e3 * LEAST)


def _shade(axes, times_s, when, colour, label):
    """Shade when something was so, on axes of values over time."""
    style = {"step": "post", "transform": axes.get_xaxis_transform(), "lw": 0, "zorder": 0.5}
    axes.fill_between(times_s, 0, 1, where=when, color=colour, label=label, **style)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)

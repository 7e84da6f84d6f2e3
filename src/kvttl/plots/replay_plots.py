"""Figures of replays: plain functions from results and tables to a matplotlib figure."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from caching_heuristics import TIERS
from kvttl.plots.panels import TIER_COLOURS, open_axes, own_style, tier_keys
from kvttl.replay.policies import POLICIES
from kvttl.replay.result import ReplayResult
from kvttl.replay.tables import mean_blocks_held


@own_style()
def plot_policies(table: pd.DataFrame, value: str = "token_hit_ratio") -> Figure:
    """Draw a `policy_table`: hits against capacity, a line a policy, named at its end."""
    figure, axes = open_axes(9, 5.2)
    others = iter("xsv^D+<>PX*hd12348" * 3)
    for policy, rows in table.groupby("policy", sort=False):
        if policy in POLICIES and POLICIES[policy].colour:
            colour, dash, marker, width = POLICIES[policy].colour, POLICIES[policy].dash, "o", 1.8
        else:
            colour, dash, marker, width = "#999999", ":", next(others), 1.0
        style = {"color": colour, "ls": dash, "marker": marker, "lw": width, "ms": 4}
        axes.plot(rows["share"], rows[value], label=policy, **style)
    axes.set(xscale="log", xlabel="capacity, share of unique blocks", ylabel=_words(value))
    axes.set_xticks(sorted(table["share"].unique()), minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@own_style()
def plot_trade_off(sweep: pd.DataFrame, result: ReplayResult | None = None) -> Figure:
    """Draw a `trade_off` sweep: hits against the memory that they took.

    Parameters
    ----------
    sweep : pandas.DataFrame
        Of `kvttl.replay.tables.trade_off`.
    result : ReplayResult, optional
        One setting more, drawn as a star.
    """
    figure, axes = open_axes(7, 4.6)
    for name in ("optimal", "heuristic", "ttl", "recency"):
        held = sweep["ttl_share_held" if name == "ttl" else "share_held"]
        style = {"color": POLICIES[name].colour, "marker": "o", "ms": 4}
        axes.plot(held, sweep[name], POLICIES[name].dash, label=name, **style)
    if result is not None:
        share = mean_blocks_held(result) / max(result.trace.unique_blocks, 1)
        axes.plot([share], [result.token_hit_ratio], "*", color="#D55E00", ms=15, label="now")
    axes.set(xscale="log", xlabel="blocks held on average, share of unique blocks")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.minorticks_off()
    axes.set(ylim=(0, None), ylabel="token hit ratio")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


@own_style()
def plot_over_time(result: ReplayResult, step_s: float = 60.0) -> Figure:
    """Draw the share of prompt tokens that each tier served, over time."""
    frame = result.over_time(step_s)
    figure, axes = open_axes(9, 3)
    prompts = frame["prompt_tokens"].clip(lower=1)
    shares = [frame[f"hit_tokens_{tier}"] / prompts for tier in TIERS]
    axes.stackplot(frame.index, shares, colors=[TIER_COLOURS[tier] for tier in TIERS])
    axes.set(xlabel="seconds", ylabel="share of prompt tokens", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.legend(handles=tier_keys(), loc="outside upper center", ncols=3, frameon=False)
    return figure


@own_style()
def plot_tuning(trials: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw what a search tried, what nothing beats in two measures, and how that does on the rest.

    Parameters
    ----------
    trials : pandas.DataFrame
        Of `policy_tuning.Tuning`.
    labels : mapping
        The columns on the x and on the y axis -> what the axes say.
    """
    figure, axes = open_axes(7, 4.6)
    x, y = labels
    axes.plot(trials[x], trials[y], ".", color="#BBBBBB", ms=4, label="tried")
    looks = {"front": ("o", 4), "start": ("D", 7), "taken": ("*", 15)}
    for part, colour in (("", "#0072B2"), ("_rest", "#E69F00")):
        for role, (mark, size) in looks.items():
            rows = trials[trials["role"] == role].sort_values(x)
            style = {"color": colour, "marker": mark, "ms": size, "ls": "--" if part else "-"}
            axes.plot(
                rows[x + part], rows[y + part], label=f"{role}, {part[1:] or 'tuned'}", **style
            )
    axes.set(xlabel=labels[x], ylabel=labels[y])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


@own_style()
def plot_published(table: pd.DataFrame, title: str = "") -> Figure:
    """Draw figures that others published, and ours beside them, a line a figure.

    Parameters
    ----------
    table : pandas.DataFrame
        Indexed by figure: theirs, ours, ratio (NaN where ours is of other traffic), measure
        (``memory``: a multiple, else a share).
    title : str
        What it shows.
    """
    memory = table["measure"] == "memory"
    panels = {
        "share of prompt tokens hit": table[~memory],
        "suspended KV cache / active KV cache (times)": table[memory],
    }
    rows = [len(part) + 1 for part in panels.values()]
    figure, axes = open_axes(9, 1 + 0.3 * sum(rows), 2, height_ratios=rows)
    for each, (words, part) in zip(axes, panels.items()):
        place, own = pd.Series(range(len(part)), part.index), part["ratio"].notna()
        each.plot(
            part["theirs"], place, "o", mfc="none", mec="#0072B2", mew=2, ms=10, label="published"
        )
        each.plot(
            part["ours"][own], place[own], "D", color="#D55E00", ms=5, label="ours, their file"
        )
        other = {"mfc": "none", "mec": "#777777", "ms": 6, "label": "ours, other traffic"}
        each.plot(part["ours"][~own], place[~own], "s", **other)
        each.set_yticks(place, part.index, fontsize=8)
        each.set(xlabel=words, xlim=(0, None), ylim=(len(part) - 0.4, -0.6))
        each.grid(alpha=0.3)
    axes[0].set_xlim(0, 1.02)
    figure.suptitle(title, fontsize=11)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def _words(name):
    return name.replace("_", " ").removesuffix(" s") + (" (s)" if name.endswith("_s") else "")

"""Figures of decisions: plain functions from data to a matplotlib figure.

Equal data give equal figures, and equal bytes when saved by `kvttl.plots.export`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.decisions.log import DecisionRecord
from kvttl.plots import panels
from kvttl.plots.panels import TIER_COLOURS, OwnFigure, open_axes, own_style, tier_keys
from kvttl.plots.what_if import decisions_of

# (perplexity, time variance, access count) of the worked examples of the requirements.
PINNED_EXAMPLES = ((15.0, 0.05, 0.0), (12.5, 0.08, 0.0))

_LABEL_BOX = {"boxstyle": "round", "fc": "white", "ec": "none", "alpha": 0.85}
_ROW_INCHES = 0.19
_MAX_ROWS = 200  # of a timeline; more cannot be read on a page


@own_style()
def ttl_curves(config: HeuristicConfig, *curves: Sequence[float]) -> Figure:
    """Draw the TTL against the access count, a line per perplexity and time variance.

    Parameters
    ----------
    config : HeuristicConfig
        The settings.
    *curves : sequence of float
        Perplexities (colours), access counts (points), variances (line styles), as in `TtlPanel`.

    Examples
    --------
    >>> line = ttl_curves(HeuristicConfig(), [15.0], [0, 1], [0.05]).axes[0].lines[0]
    >>> line.get_label(), round(float(line.get_ydata()[0]), 1)
    ('perplexity 15, variance 0.05', 3693.6)
    """
    figure = OwnFigure(figsize=(5.5, 4.2), layout="constrained")
    panels.TtlPanel(figure.subplots(), *curves).update(config)
    return figure


@own_style()
def ttl_surface(config: HeuristicConfig, time_variance: float = 0.05) -> Figure:
    """Draw the TTL over perplexity and access count, with `PINNED_EXAMPLES` marked.

    Each mark says the TTL of its own example; the surface is that of
    `time_variance`.
    """
    figure = OwnFigure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.subplots()
    counts, perplexities = np.geomspace(1, 1001, 120) - 1, np.geomspace(1, 1000, 120)
    metadata = {"perplexity": perplexities[:, None], "time_variance": time_variance}
    ttl_s = config.ttl(metadata | {"access_count": counts[None, :]})  # shape (120, 120)
    shown = counts + 1, perplexities, ttl_s
    norm = LogNorm(ttl_s.min() * 0.999, ttl_s.max() * 1.001)
    mesh = axes.pcolormesh(*shown, norm=norm, cmap="cividis", rasterized=True)
    ticks = np.geomspace(ttl_s.min(), ttl_s.max(), 9)  # the contour lines, and the ends
    if np.ptp(ttl_s) > 1e-6 * ttl_s.max():  # the clamp can make it flat
        axes.contour(*shown, ticks[1:-1], colors="white", linewidths=0.8)
    _mark_examples(axes, config)
    axes.set(xscale="log", yscale="log", xlabel="1 + access count (log)", ylabel="perplexity (log)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    bar = figure.colorbar(mesh, label=f"TTL at time variance {time_variance:g} (log)")
    bar.set_ticks(ticks, labels=[panels.duration(tick) for tick in ticks])
    bar.minorticks_off()
    return figure


def _mark_examples(axes, config):
    for perplexity, variance, count in PINNED_EXAMPLES:
        values = {"perplexity": perplexity, "time_variance": variance, "access_count": count}
        text = f"perplexity {perplexity:g}, variance {variance:g}: {config.ttl(values):.1f} s"
        axes.plot([1 + count], [perplexity], "o", color="white", mec="black", ms=7, clip_on=False)
        place = (12, 14 if perplexity == PINNED_EXAMPLES[0][0] else -18)
        look = {"textcoords": "offset points", "fontsize": 8, "bbox": _LABEL_BOX}
        axes.annotate(text, (1 + count, perplexity), place, **look)


@own_style()
def tier_map(
    config: HeuristicConfig, against: str = "time_variance", records: Iterable[DecisionRecord] = ()
) -> Figure:
    """Draw which tier the settings choose, over perplexity and one other quantity.

    Parameters
    ----------
    config : HeuristicConfig
        The settings; their thresholds are the lines.
    against : str
        ``"time_variance"`` or ``"seconds_since_access"``.
    records : iterable of DecisionRecord
        A run; its decisions become dots in the colour of the tier it chose.

    Raises
    ------
    ValueError
        If `against` is neither of the two.
    """
    figure = OwnFigure(figsize=(5.5, 4.2), layout="constrained")
    panels.TierPanel(figure.subplots(), against, decisions_of(records)).update(config)
    figure.legend(handles=tier_keys(), loc="outside upper center", ncols=3, frameon=False)
    return figure


@own_style()
def decision_distributions(
    records: Iterable[DecisionRecord], config: HeuristicConfig | None = None
) -> Figure:
    """Draw how a run's TTLs and tiers are spread; outlined, what `config` would have decided."""
    decisions = decisions_of(records)
    figure, (ttls, tiers) = open_axes(9, 3.6, 1, 2, width_ratios=[3, 2])
    found = {"run": (decisions.ttl_s, decisions.tier)}
    if config is not None and len(decisions):
        found["settings"] = decisions.decide(config)
    _spread(ttls, found)
    _shares(tiers, found)
    keys = tier_keys()
    if "settings" in found:
        keys.append(Line2D([], [], color="black", lw=1.5, label="with these settings"))
    figure.legend(handles=keys, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _spread(axes, found):
    """TTLs as a histogram on a log axis, stacked by tier."""
    every = np.concatenate([ttl_s for ttl_s, _ in found.values()])
    low, high = (every.min() / 1.1, every.max() * 1.1) if every.size else (1.0, 10.0)
    bins = np.geomspace(low, high, 25)
    ttl_s, tier = found["run"]
    stacks = [ttl_s[tier == code] for code in range(3)]
    axes.hist(stacks, bins, stacked=True, color=[TIER_COLOURS[name] for name in TIERS])
    if "settings" in found:
        axes.hist(found["settings"][0], bins, histtype="step", color="black", lw=1.5)
    axes.set(xscale="log", xlabel="TTL (s, log)", ylabel="decisions")
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.4)))


def _shares(axes, found):
    """Decisions by tier, as bars."""
    counts = {name: np.bincount(tier, minlength=3) for name, (_, tier) in found.items()}
    axes.bar(TIERS, counts["run"], color=[TIER_COLOURS[name] for name in TIERS], width=0.7)
    if "settings" in counts:
        axes.bar(TIERS, counts["settings"], width=0.7, fill=False, ec="black", lw=1.5)
    axes.set(xlabel="tier", ylabel="decisions")


@own_style()
def plot_timeline(records: Sequence[DecisionRecord], labels: Sequence[str] | None = None) -> Figure:
    """Draw a run over time: a row per prompt, in the colour of the tier it is wanted in.

    Parameters
    ----------
    records : sequence of DecisionRecord
        Generations and expiries, in any order.
    labels : sequence of str, optional
        Names of the prompts, one a record; default their digests.

    Returns
    -------
    matplotlib.figure.Figure
        Dots are uses, triangles moves (in the colour of where to), crosses
        expiries. A bar ends when the prompt's TTL does, or is used again.
    """
    names = dict(zip((r.prompt_digest for r in records), labels)) if labels else {}
    shown = [r for r in records if r.kind in ("generation", "expiry")]
    shown.sort(key=lambda record: record.time_s)
    uses = Counter(record.prompt_digest for record in shown)
    kept = {digest for digest, _ in uses.most_common(_MAX_ROWS)}
    rows = {digest: row for row, digest in enumerate(d for d in uses if d in kept)}
    figure, axes = open_axes(10, 1.5 + _ROW_INCHES * max(len(rows), 3))
    start_s = shown[0].time_s if shown else 0.0
    end_s = (shown[-1].time_s - start_s if shown else 0.0) * 1.03 or 1.0
    _draw_rows(axes, [r for r in shown if r.prompt_digest in rows], rows, start_s, end_s)
    axes.set_yticks(range(len(rows)), [names.get(d, d[:8]) for d in rows], fontsize=7)
    left_out = f" (the {len(rows)} most used of {len(uses)})" if len(rows) < len(uses) else ""
    axes.set(xlabel="time since start (s)", ylabel=f"prompt{left_out}")
    axes.set(xlim=(-0.01 * end_s, end_s), ylim=(max(len(rows), 1) - 0.4, -0.6))
    marks = (("used", ".", "black"), ("moved", "^", "#888888"), ("expired", "x", "black"))
    keys = [Line2D([], [], ls="", marker=m, color=colour, label=name) for name, m, colour in marks]
    figure.legend(handles=[*tier_keys(), *keys], loc="outside upper center", ncols=6, frameon=False)
    return figure


def _draw_rows(axes, records, rows, start_s, end_s):
    """Where each prompt is wanted between its events, and the events."""
    bars, moves, last = [], [], {}  # bars: [row, start, width, colour]
    for record in records:
        row, time_s = rows[record.prompt_digest], record.time_s - start_s
        if row in last:  # what came before ends here, if not earlier
            last[row][2] = min(last[row][2], time_s - last[row][1])
        if record.wanted_tier in TIERS:
            width_s = min(record.ttl_s or end_s, end_s - time_s)
            last[row] = [row, time_s, width_s, TIER_COLOURS[record.wanted_tier]]
            bars.append(last[row])
        targets = [m.get("to") for m in record.moves if m.get("moved_chunks")]
        if record.kind == "generation":
            colours = [TIER_COLOURS.get(tier, TIER_COLOURS["none"]) for tier in targets]
            moves += [(time_s, row - 0.32, colour) for colour in colours]
    for y, left, width, colour in bars:
        axes.barh(y, width, left=left, height=0.66, color=colour, zorder=1)
    for kind, style in (("generation", ".k"), ("expiry", "xk")):
        events = [r for r in records if r.kind == kind]
        times = [r.time_s - start_s for r in events]
        (line,) = axes.plot(times, [rows[r.prompt_digest] for r in events], style, ms=4.5, zorder=3)
        line.set_path_effects([withStroke(linewidth=2.2, foreground="white")])
    x, y, colours = zip(*moves) if moves else ((), (), [])
    axes.scatter(x, y, 22, list(colours), "^", edgecolors="black", linewidths=0.6, zorder=4)


@own_style()
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
    grid = {"ncols": 3, "sharey": True, "width_ratios": [3, 2, 2]}
    figure, (hits, tiers, ttls) = open_axes(11, 1.6 + 0.17 * len(records), **grid)
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

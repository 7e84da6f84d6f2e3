"""Panels that change in place: made once on an axes, then `update(config)` moves what differs.

A static figure makes a panel and leaves it; the sliders keep theirs and redraw
only `artists`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, pairwise, product

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.plots.what_if import Decisions, tier_codes

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey.
TIER_COLOURS = {"gpu": "#D55E00", "disk": "#56B4E9", "remote": "#004D73", "none": "#CCCCCC"}
LINE_COLOURS = ("#004D73", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#0072B2")

PERPLEXITIES = (5.0, 15.0, 30.0, 100.0)
ACCESS_COUNTS = np.unique(np.geomspace(1, 1001, 90).round()) - 1  # 0..1000
VARIANCES = (0.0, 0.5)
AGAINST = {"time_variance": "time variance", "seconds_since_access": "since last access (log)"}

_PERPLEXITY_SPAN = (1.0, 1000.0)
_SINCE_SPAN = (1.0, 2_592_000.0)  # s: to 30 days
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_NICE_S = np.array(
    [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30]
    + [60 * n for n in (1, 2, 5, 10, 20, 30)]
    + [3600 * n for n in (1, 2, 4, 8, 12)]
    + [86_400 * n for n in (1, 2, 4, 7, 14, 30, 60, 120, 365, 1000, 3650, 36_500)]
)
_COARSE_S = np.array([0.1, 1, 10, 60, 600, 3600, 28_800, 86_400, 604_800, 2_592_000, 31_536_000])


# Equal figures give equal bytes; journals refuse Type 3 fonts, so PDFs get TrueType.
LOOK = {"svg.hashsalt": "KV cache TTL kit", "pdf.fonttype": 42}


@contextmanager
def own_style() -> Iterator[None]:
    """Let every figure that is made in a block, or function, look as it does in a paper.

    The user's style and `rcParams` do not count in it, but for their fonts: they draw the
    letters that matplotlib's own font lacks, such as Chinese ones in labels.
    """
    kinds = rcParams["font.family"]  # such as "sans-serif", or a font's name
    fonts = [font for kind in kinds for font in rcParams.get(f"font.{kind}", [kind])]
    known = set(font_manager.get_font_names())
    fonts = dict.fromkeys(["DejaVu Sans", *(font for font in fonts if font in known)])
    with context(["default", {**LOOK, "font.family": list(fonts)}]):
        yield


class OwnFigure(Figure):
    """A figure that is measured, drawn and saved in `own_style`: its ticks are made only then."""

    draw = own_style()(Figure.draw)
    get_tightbbox = own_style()(Figure.get_tightbbox)
    savefig = own_style()(Figure.savefig)


def open_axes(width: float, height: float, *rows_and_columns: int, **grid):
    """Return a figure of this size, inches, and its axes, open at the top and the right."""
    figure = OwnFigure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(*rows_and_columns, **grid)
    for each in np.ravel(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_above(axes, handles: Sequence[Line2D], **options):
    """Put a legend over an axes, outside of it; returns it."""
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
    return axes.legend(handles=handles, **place, fontsize=8, frameon=False, **options)


def duration(seconds: float) -> str:
    """Return a duration as a reader says it.

    Examples
    --------
    >>> duration(30), duration(5400), duration(604800)
    ('30 s', '1.5 h', '7 d')
    """
    size, unit = next(((s, u) for s, u in _UNITS if seconds >= s), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


class TtlPanel:
    """TTL against access count: a colour per perplexity, dashes for a varying prompt.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        An empty one.
    perplexities, access_counts, variances : sequence of float
        Colours, points on the x axis, line styles (solid, dashed, ...).
    """

    def __init__(
        self,
        axes,
        perplexities: Sequence[float] = PERPLEXITIES,
        access_counts: Sequence[float] = ACCESS_COUNTS,
        variances: Sequence[float] = VARIANCES,
    ) -> None:
        self.axes = axes
        self._counts = np.asarray(access_counts, dtype=float)
        self._pairs = np.array(list(product(perplexities, variances)), float)  # shape (lines, 2)
        colours = dict(zip(perplexities, cycle(LINE_COLOURS)))
        styles = dict(zip(variances, cycle(("-", "--", ":", "-."))))
        self.lines = []
        for p, v in product(perplexities, variances):
            look = {"color": colours[p], "label": f"perplexity {p:g}, variance {v:g}"}
            self.lines += axes.plot(self._counts, self._counts, styles[v], **look)
        limit = {"color": "#666666", "lw": 1, "ls": (0, (1, 2))}
        self.limits = [axes.axhline(1, **limit, label=name) for name in ("min_ttl", "max_ttl")]
        self.artists = [*self.limits, *self.lines]
        self._dress(colours, styles)

    def _dress(self, colours, styles):
        self.axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        ticks = [n for n in (0, 1, 10, 100, 1000, 10_000) if n <= self._counts.max()]
        self.axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        self.axes.xaxis.set_minor_locator(NullLocator())
        self.axes.set(xlim=(self._counts.min(), self._counts.max()), yscale="log")
        self.axes.set(xlabel="access count (log)", ylabel="TTL (log; s, min, h, d)")
        self.axes.grid(alpha=0.3)
        keys = [Line2D([], [], color=colour, label=f"{p:g}") for p, colour in colours.items()]
        keys[0].set_label(f"perplexity {keys[0].get_label()}")
        for v, style in styles.items():
            keys.append(Line2D([], [], color="#444444", ls=style, label=f"variance {v:g}"))
        legend_above(self.axes, keys, handlelength=1.8, columnspacing=1.2)

    def update(self, config: HeuristicConfig) -> bool:
        """Draw these settings; True if the axis' own limits changed as well."""
        metadata = {"perplexity": self._pairs[:, :1], "time_variance": self._pairs[:, 1:]}
        ttl_s = config.ttl(metadata | {"access_count": self._counts})  # shape (lines, counts)
        for line, values in zip(self.lines, ttl_s):
            line.set_ydata(values)
        for line, value in zip(self.limits, (config.min_ttl, config.max_ttl)):
            line.set_ydata([value, value])
        return self._set_span(float(ttl_s.min()), float(ttl_s.max()))

    def _set_span(self, low_s, high_s):
        """Let the axis end at round durations, so that it seldom has to change."""
        first = max(int(np.searchsorted(_NICE_S, low_s / 1.05, side="right")) - 1, 0)
        last = min(int(np.searchsorted(_NICE_S, high_s * 1.05)), len(_NICE_S) - 1)
        span = (float(_NICE_S[first]), float(_NICE_S[max(last, first + 1)]))
        if span == self.axes.get_ylim():
            return False
        self.axes.set_ylim(span)
        _set_duration_ticks(self.axes.yaxis, *span, at_most=9)
        return True


class TierPanel:
    """Which tier the settings choose, over perplexity and one other quantity.

    The regions are what `select_backend` answers between the thresholds; the
    dots are a run's decisions, in the colour of the tier that the run chose;
    those that these settings would decide differently have a black rim.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        An empty one.
    against : str
        ``"time_variance"`` (of a prompt just used), or
        ``"seconds_since_access"`` (of a prompt with time variance 0).
    decisions : Decisions, optional
        A run's.
    """

    def __init__(self, axes, against: str = "time_variance", decisions: Decisions | None = None):
        if against not in AGAINST:
            raise ValueError(f"against must be one of {', '.join(AGAINST)}, got {against!r}")
        self.axes, self.against = axes, against
        self._is_variance = against == "time_variance"
        self._span = (0.0, 1.0) if self._is_variance else _SINCE_SPAN
        self.regions = PolyCollection([], linewidths=0, zorder=0.5)
        axes.add_collection(self.regions, autolim=False)
        line = {"color": "black", "lw": 1.2, "zorder": 2.5}
        self.hot, self.cold = (axes.plot([1, 1], self._span, **line)[0] for _ in range(2))
        self.across = axes.plot([1, 1], [1, 1], ls="--", **line)[0]
        small = {"fontsize": 8, "zorder": 4, "clip_on": True}
        upright, flat = {"rotation": 90, "va": "top", "ha": "right"}, {"va": "bottom", "ha": "left"}
        self.labels = [axes.text(1, 1, "", **small, **at) for at in (upright, upright, flat)]
        self.dots = axes.scatter([], [], s=22, lw=0.7, zorder=3)
        self._show(decisions)
        self._dress()
        self.artists = [self.regions, self.hot, self.cold, self.across, self.dots, *self.labels]
        self.artists += axes.spines.values()

    def _show(self, decisions):
        self._decisions = decisions or None  # an empty run has no dots
        if not decisions:
            return
        across = np.nan_to_num(decisions.metadata[self.against], nan=0.0)  # unknown: neutral
        points = np.column_stack([decisions.metadata["perplexity"], across])
        low = [_PERPLEXITY_SPAN[0], self._span[0]]
        self.dots.set_offsets(np.clip(points, low, [_PERPLEXITY_SPAN[1], self._span[1]]))
        self.dots.set_facecolor([TIER_COLOURS[TIERS[code]] for code in decisions.tier])

    def _dress(self):
        self.axes.set(xscale="log", xlim=_PERPLEXITY_SPAN, xlabel="perplexity (log)")
        self.axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        self.axes.set(ylabel=AGAINST[self.against])
        if not self._is_variance:
            self.axes.set_yscale("log")
            _set_duration_ticks(self.axes.yaxis, *self._span, at_most=8)
        self.axes.set_ylim(self._span)

    def update(self, config: HeuristicConfig) -> bool:
        """Draw these settings; False: the axes themselves never change."""
        hot, cold = config.hot_threshold, config.cold_threshold
        across = _threshold(config, self.against)
        edges, codes = tier_regions(config, self.against, _PERPLEXITY_SPAN, self._span)
        self.regions.set_verts(edges)
        colours = to_rgba_array([TIER_COLOURS[TIERS[code]] for code in codes])[:, :3]
        self.regions.set_facecolor(0.35 * colours + 0.65)  # so that dots stay visible on them
        self.hot.set_xdata([hot, hot])
        self.cold.set_xdata([cold, cold])
        right = cold if self._is_variance else hot  # beyond it, the threshold does not decide
        self.across.set_data([_PERPLEXITY_SPAN[0], right], [across, across])
        self._label(hot, cold, across)
        if self._decisions is not None:
            changed = self._decisions.decide(config)[1] != self._decisions.tier
            self.dots.set_edgecolor(np.where(changed, "black", "white"))
            self.dots.set_linewidth(np.where(changed, 1.4, 0.7))
        return False

    def _label(self, hot, cold, across):
        if self._is_variance:
            top, low_room, text = 0.97, 0.93, f"variance {across:.3g}"  # shares of a linear axis
        else:
            top, low_room, text = 0.6, 1 / 3, f"recent {duration(across)}"  # of a logarithmic one
        top, low_room = top * self._span[1], low_room * self._span[1]
        self.labels[0].set(x=hot * 0.96, y=top, text=f"hot {hot:.4g}")
        self.labels[1].set(x=cold * 0.96, y=top, text=f"cold {cold:.4g}")
        va = "top" if across > low_room else "bottom"
        self.labels[2].set(x=1.08, y=across, text=text, va=va)


def _threshold(config, against):
    return config.variance_threshold if against == "time_variance" else config.recent_seconds


def tier_regions(
    config: HeuristicConfig, against: str, x_span: tuple[float, float], y_span: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rectangles between the thresholds, and the tier that each one is.

    Returns
    -------
    tuple of numpy.ndarray
        Corners, shape (6, 4, 2), and tier codes, shape (6,): what
        `select_backend` answers in the middle of each rectangle.
    """
    xs = np.clip([x_span[0], config.hot_threshold, config.cold_threshold, x_span[1]], *x_span)
    ys = np.clip([y_span[0], _threshold(config, against), y_span[1]], *y_span)
    sides = product(pairwise(xs), pairwise(ys))
    corners = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for (x0, x1), (y0, y1) in sides])
    x, y = ((corners[:, 0] + corners[:, 2]) / 2).T  # the middles
    return corners, tier_codes(config.tier({"perplexity": x, against: y}))


def tier_keys() -> list[Line2D]:
    """Return legend entries of the tiers: a square in each one's colour."""
    square = {"ls": "", "marker": "s", "ms": 7}
    return [Line2D([], [], **square, color=TIER_COLOURS[name], label=name) for name in TIERS]


def _set_duration_ticks(axis, low_s, high_s, at_most):
    """Put ticks on round durations between the limits, fewer where they would be many."""
    inside, fewer = (t[(t >= low_s) & (t <= high_s)] for t in (_NICE_S, _COARSE_S))
    inside = inside if len(inside) <= at_most else fewer
    axis.set_major_locator(FixedLocator(inside))
    axis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axis.set_minor_locator(NullLocator())

"""What other settings change in a run, in words and as a small table (HTML)."""

import html
from collections.abc import Iterable, Sequence

from caching_heuristics import TIERS
from kvttl.plots.panels import TIER_COLOURS
from kvttl.plots.what_if import Changes

_CELL = 'style="padding:1px 20px 1px 0;text-align:right"'
_FIRST = 'style="padding:1px 20px 1px 0;text-align:left;font-weight:normal"'


def sentence(found: Changes, decisions: int) -> str:
    """Say how many decisions change tier, and from where to where.

    Examples
    --------
    >>> import numpy as np
    >>> moved = np.array([[3, 2, 0], [0, 4, 0], [0, 1, 0]])
    >>> sentence(Changes(moved, np.ones(3), np.ones(3)), 10)
    '3 of 10 decisions change tier: gpu→disk 2, remote→disk 1'
    """
    if not decisions:
        return "There is no run to compare with"
    pairs = zip(*found.moved.nonzero())
    ways = [f"{TIERS[i]}→{TIERS[j]} {found.moved[i, j]}" for i, j in pairs if i != j]
    changed = f"{found.changed} of {decisions} decisions change tier"
    return f"{changed}: {', '.join(ways)}" if ways else changed


def readout(found: Changes, decisions: int, source: str = "") -> str:
    """Return the sentence, and a table of decisions and memory-time by tier, as HTML.

    Parameters
    ----------
    found : Changes
        Between the run and the settings.
    decisions : int
        How many the run made.
    source : str
        Where the run's log is.
    """
    text = f"<b>{sentence(found, decisions)}</b>"
    if source:
        text += f" <span style='color:var(--jp-ui-font-color2)'>({html.escape(source)})</span>"
    if not decisions:
        return text
    before, after = found.moved.sum(axis=1), found.moved.sum(axis=0)
    rows = map(_row, TIERS, before, after, found.before_token_s, found.after_token_s)
    heads = ("tier", "decisions", "memory-time (million token-seconds)", "change")
    return text + small_table(heads, rows)


def small_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells, HTML already, as a small table; the first cell of a row names it."""
    head = "".join(f"<th scope='col' {_CELL}>{title}</th>" for title in heads)
    lines = [
        f"<tr><th scope='row' {_FIRST}>{first}</th>"
        + "".join(f"<td {_CELL}>{cell}</td>" for cell in cells)
        for first, *cells in rows
    ]
    return f"<table style='line-height:1.4;margin:4px 0'><tr>{head}</tr>{''.join(lines)}</table>"


def _row(name, before, after, before_token_s, after_token_s):
    square = f"<span class='kv-colour' style='color:{TIER_COLOURS[name]}'>■</span> {name}"
    memory = f"{before_token_s / 1e6:,.2f} → {after_token_s / 1e6:,.2f}"
    change = _relative(before_token_s, after_token_s)
    return square, f"{before} → {after}", memory, change


def _relative(before, after):
    """Say how much more or less there is."""
    if abs(after - before) < 5e-4 * before or before == after:
        return "unchanged"
    if not before:
        return "new"
    return f"x {after / before:,.3g}" if after > 10 * before else f"{after / before - 1:+.1%}"

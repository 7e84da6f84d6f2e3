"""The Live tab: what is where in a running server, its hits, prices, regret and last decisions."""

from __future__ import annotations

import asyncio
import html
import time
from pathlib import Path

import ipywidgets as widgets
import msgspec
import pandas as pd

from caching_heuristics import TIERS
from kvttl import user_path
from kvttl.lmcache.client import LMCacheError
from kvttl.plots.panels import TIER_COLOURS, duration
from kvttl.replay.tables import export
from kvttl.sliders.controls import labelled, warning
from kvttl.sliders.live_source import OWN, LiveSource, Seen
from kvttl.sliders.panel import Tab, beside, heading, row
from kvttl.sliders.readout import small_table

_SHOWN = 9  # decisions
_GREY = "var(--jp-ui-font-color3)"
# The last four: what answers is of a newer kit, or of nobody's.
_NOT_READ = (LMCacheError, LookupError, TypeError, ValueError, AttributeError)
_EVERY_S = {"every second": 1.0, "every 2 s": 2.0, "every 10 s": 10.0, "every minute": 60.0}


class LiveTab(Tab):
    """What a running server says of itself, read again every few seconds while it is looked at.

    Parameters
    ----------
    url : str
        Where it answers at first; see `LiveSource`.
    folder : path
        Where exports go: ``live_<time>.csv`` and ``.json``.

    Attributes
    ----------
    seen : Seen or None
        What was read last.
    """

    def __init__(self, url: str, folder: str | Path = "data/exports") -> None:
        super().__init__()
        self.seen: Seen | None = None
        self._source, self._task, self._folder = LiveSource(url), None, user_path(folder)
        self.url = labelled(widgets.Text, "server", value=url, continuous_update=False)
        self.every_s = labelled(widgets.Dropdown, "refreshed", options=_EVERY_S.items(), value=2.0)
        self.said, self.panels = widgets.HTML(), {name: widgets.HTML() for name in _PANELS}
        for name, part in {"said": self.said, **self.panels}.items():
            part.add_class(f"kv-live-{name}")
        self.url.observe(self._moved, "value")
        press = self.exporting("Export live", "The last decisions as CSV, all else as JSON")
        left = (self.url, self.every_s, row(press), self.said, self.status)
        cards = [_card(title, self.panels[name]) for name, title in _TITLES.items()]
        grid = widgets.Layout(grid_template_columns="1fr 1fr", grid_gap="8px 32px")
        last = _card("Last decisions", self.panels["last"])
        self.children = beside(left, (widgets.GridBox(cards, layout=grid), last))

    def follow(self) -> None:
        """Begin to read again and again; needs a running event loop, as a kernel has."""
        self.rest()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def rest(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
        self._task = None

    async def _follow(self):
        while True:
            await self.refresh()
            await asyncio.sleep(self.every_s.value)

    async def refresh(self) -> None:
        """Read once, beside the kernel's loop, and show it; what cannot be read is said."""
        source = self._source
        try:
            seen = await asyncio.to_thread(source.read)
            if source is self._source:
                self.show(seen)
        except _NOT_READ as error:
            since = f" What is shown is of {_clock(self.seen.time_s)}." if self.seen else ""
            again = f"It is asked again {self.every_s.label}."
            self.said.value = warning(f"{error}. {again}{since}")

    def show(self, seen: Seen) -> None:
        """Show what was read; a panel of which nothing has changed is left alone."""
        self.seen = seen
        kind = "inside LMCache" if seen.status else "a manager outside: it serves metrics only"
        self.said.value = f"✓ {html.escape(self._source.url)} at {_clock(seen.time_s)}: {kind}"
        for name, make in _PANELS.items():
            self.panels[name].value = make(seen)

    def _moved(self, change):
        self._source, self.seen = LiveSource(change["new"]), None
        for part in (self.said, *self.panels.values()):
            part.value = ""
        if self._task is not None:
            self.follow()

    def export(self) -> list[Path]:
        """Write what is shown; returns the files."""
        if self.seen is None:
            raise ValueError("there is nothing to export: no server has answered yet")
        name = time.strftime("live_%Y%m%d_%H%M%S", time.gmtime(self.seen.time_s))
        (path,) = export(self._folder, name, pd.DataFrame(self.seen.records))
        facts = {"url": self._source.url, **self.seen._asdict(), "records": path.name}
        path.with_suffix(".json").write_bytes(msgspec.json.encode(facts))
        return [path, path.with_suffix(".json")]


def _card(title, panel):
    return widgets.VBox([heading(title), panel], layout=widgets.Layout(min_width="0"))


def _clock(time_s):
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def _bars(rows, most=1.0):
    """Return bars with what they are and their number: rows of (name, colour, number, text)."""
    return "".join(
        f"<div style='display:flex;align-items:center;line-height:1.6'>"
        f"<span style='flex:0 0 7em'>{html.escape(name)}</span>"
        "<span style='flex:1 1 0;background:var(--jp-layout-color2)'><span class='kv-colour' style="
        f"'display:block;height:12px;background:{colour};width:{number / (most or 1):.2%};"
        "max-width:100%'></span></span>"
        f"<span style='flex:0 0 9.5em;text-align:right'>{html.escape(text)}</span></div>"
        for name, colour, number, text in rows
    )


def _where(seen):
    chunks = seen.status.get("chunks", {})
    if not chunks:
        return "A manager outside does not say; its directory is LMCache's coordinator."
    used, total = seen.status["gpu_bytes"]
    rows = [(t, TIER_COLOURS[t], n, f"{n:,} chunks") for t, n in chunks.items()]
    room = f"gpu: {used / 2**20:,.1f} of {total / 2**20:,.1f} MiB"
    claims = sum(seen.status["claims"].values())
    work = f"{claims:,} claims, {seen.status['open_requests']} requests run"
    wrong = seen.status["tier_errors"] | seen.status["failures"]
    said = warning("; ".join(f"{k}: {v}" for k, v in wrong.items())) if wrong else ""
    return _bars(rows, max(chunks.values())) + f"<div>{room}; {work}</div>{said}"


def _hits(seen):
    hits = seen.hits()
    rows = [(tier, TIER_COLOURS[tier], hits[tier], f"{hits[tier]:.1%}") for tier in TIERS]
    left = 1 - sum(hits.values())
    asked = seen.of("prompt_tokens_total").get("", 0)
    rows.append(("computed", _GREY, left, f"{left:.1%}"))
    again = seen.of("wanted_again_tokens_total")
    gone = ", ".join(f"{reason} {n:,.0f}" for reason, n in again.items() if n)
    lost = f"; computed again, by why they were gone: {gone}" if gone else ""
    return _bars(rows) + f"<div>of {asked:,.0f} prompt tokens{lost}</div>"


def _price(seen):
    prices = seen.prices()
    if not prices:
        return "No price: TTLs and tier rules decide (a policy that learns has one for each tier)."
    rows = [(t, TIER_COLOURS[t], p, f"{p:.3g}") for t, p in prices.items()]
    return _bars(rows, max(prices.values())) + "<div>of a place, in the last decisions</div>"


def _regret(seen):
    found = seen.regret()
    if not found:
        return "Nothing yet: the meter counts once a minute, the optimum an hour late."
    own = found[OWN]
    rows = [
        (n, TIER_COLOURS["gpu"] if n == OWN else _GREY, x, f"{x:.1%} ({(x - own) * 100:+.1f})")
        for n, x in found.items()
    ]
    return _bars(rows) + "<div>of prompt tokens hit in gpu's room (points over this server)</div>"


def _last(seen):
    if not seen.records:
        return "None yet." if seen.status else "They are in the manager's log (Decisions)."
    heads = ("time", "what", "prompt", "tokens", "hit", "TTL", "tier", "moved", "error")
    return small_table(heads, (map(html.escape, _cells(each)) for each in seen.records[:_SHOWN]))


def _cells(record):
    yield _clock(record["time_s"])
    yield record.get("kind", "generation")
    yield record["prompt_digest"][:10]
    yield f"{record.get('prompt_tokens', 0):,}"
    yield ", ".join(f"{tier} {n}" for tier, n in record.get("hit_tokens", {}).items() if n)
    yield "" if record.get("ttl_s") is None else duration(record["ttl_s"])
    yield record.get("wanted_tier") or ""
    yield ", ".join(f"{move.get('from')}→{move.get('to')}" for move in record.get("moves", ()))
    yield (record.get("error") or "")[:60]


_TITLES = {"where": "Where it is now", "hits": "Hits by tier", "price": "Price", "regret": "Regret"}
_PANELS = {"where": _where, "hits": _hits, "price": _price, "regret": _regret, "last": _last}

"""The explorer's replay tab: choose a trace, move the sliders, see what would have been.

`replay_view` is the plain function behind it: settings in, figures and a picture out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from caching_heuristics import TIERS, HeuristicConfig
from kvttl import user_path
from kvttl.plots.panels import TIER_COLOURS, open_axes, own_style
from kvttl.replay.command import parse_capacity
from kvttl.replay.costs import TierCosts, result_costs
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.money.bills import bill
from kvttl.replay.money.tariffs import Tariff, load_tariffs
from kvttl.replay.policies import POLICIES
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs
from kvttl.replay.tables import at_same_memory, export, mean_blocks_held
from kvttl.sliders.controls import labelled
from kvttl.sliders.panel import SettingsPanel, TraceChoice, beside, row
from kvttl.sliders.picture import MovingPicture
from kvttl.sliders.readout import small_table
from kvttl.traces.trace import Trace

THIS = "this"  # the name of what is set among its peers
_ROWS = {THIS: "as set here", "recency": "recency: LMCache's LRU", "optimal": "optimum"}
_ROWS["no_cache"] = "no cache"
_CHOICES = {
    "these settings: TTL and tier": "heuristic",
    "these settings as eviction order": "heuristic_order",
    "base TTL for all": "ttl",
    "adaptive": "adaptive",
    "LRU, block by block": "lru",
}
_GIVEN = "give all prompts a perplexity"
_CURVE_SHARES = np.geomspace(0.002, 1.0, 12)  # of unique blocks


@dataclass(frozen=True, eq=False)
class ReplayView:
    """One setting's replay and its peers at the same memory; `figures` of each, by name."""

    result: ReplayResult
    peers: dict[str, ReplayResult]
    figures: dict[str, dict[str, float]]

    def summary(self) -> dict[str, float]:
        """Return the figures that the tab shows."""
        hours = self.result.block_seconds / 3600
        others = [name for name in self.figures if name != THIS]
        return {
            **self.figures[THIS],
            "block_hit_ratio": self.result.block_hit_ratio,
            **{f"block_hours_{tier}": float(h) for tier, h in zip(TIERS, hours)},
            **{f"{n}_{what}": x for n in others for what, x in self.figures[n].items()},
        }


def replay_view(
    index: RunIndex,
    config: HeuristicConfig | None = None,
    perplexity: float | None = None,
    costs: TierCosts | None = None,
    policy: str = "heuristic",
    capacity=None,
    tariff: Tariff | None = None,
) -> ReplayView:
    """Replay one setting, and recency and optimum with the same capacity.

    Without a capacity that is the memory that the setting's TTLs held on average; another policy
    than ``heuristic`` is replayed with it, too. With a `tariff`, what a million prompt tokens cost.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> view = replay_view(index_runs(agent_loops(200)), HeuristicConfig(base_ttl=60))
    >>> 0 < view.summary()["token_hit_ratio"] <= 1
    True
    """
    given = {"perplexity": perplexity} if POLICIES[policy].reads_metadata else {}
    if capacity is None:
        result = replay_without_capacity(index, config, perplexity=perplexity)
        peers = at_same_memory(index, result)
        if policy != "heuristic":
            result = replay(index, policy, peers["recency"].capacity_blocks[0], config, **given)
    else:
        result = replay(index, policy, capacity, config, **given)
        peers = {name: replay(index, name, capacity) for name in ("recency", "optimal")}
    found = {name: _figures(each, costs, tariff) for name, each in ({THIS: result} | peers).items()}
    prompts = index.trace.prompt_tokens.astype(float)
    none = {"token_hit_ratio": 0.0, "mean_blocks_held": 0.0}
    none["ttft_mean_s"] = found[THIS]["ttft_mean_s"] * found[THIS]["speedup"]
    if tariff:
        none["per_mtok"] = float(tariff.computing(prompts).sum() / max(prompts.sum(), 1) * 1e6)
    return ReplayView(result, peers, found | {"no_cache": none})


def _figures(result, costs, tariff):
    spent = result_costs(result, costs)
    return {
        "token_hit_ratio": result.token_hit_ratio,
        "mean_blocks_held": mean_blocks_held(result),
        **{name: spent[name] for name in ("ttft_p50_s", "ttft_mean_s", "speedup")},
        **({"per_mtok": bill(result, tariff)["per_mtok"]} if tariff else {}),
    }


class ReplayPicture(MovingPicture):
    """A figure that is drawn once and then only updated: hits against memory, and tiers.

    Parameters
    ----------
    index : RunIndex
        The trace; its curves of recency and optimum are replayed once.
    """

    @own_style()
    def __init__(self, index: RunIndex) -> None:
        self.index = index
        figure, axes = open_axes(9.6, 4.4, 1, 2, width_ratios=[5, 3])
        self._hits, self._tiers = axes
        self._draw_curves()
        self._draw_tiers()
        super().__init__(figure, [self._same, self._now, *self._served, *self._held])

    def _draw_curves(self):
        axes = self._hits
        for name, label in (("optimal", "optimum"), ("recency", "recency: LMCache's LRU")):
            ratios = [replay(self.index, name, s).token_hit_ratio for s in _CURVE_SHARES.tolist()]
            policy = POLICIES[name]
            axes.plot(_CURVE_SHARES, ratios, policy.dash, color=policy.colour, label=label)
        most = replay(self.index, "infinite").token_hit_ratio
        axes.set(xscale="log", xlim=(0.002, 1.2), ylim=(0, min(1.02, 1.3 * most + 0.02)))
        axes.set(xlabel="blocks held on average, share of unique", ylabel="token hit ratio")
        (self._now,) = axes.plot([], [], "*", color="#D55E00", ms=15, label=_ROWS[THIS])
        (self._same,) = axes.plot([], [], "o", color="#0072B2", ms=6, label="at the same memory")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left")

    def _draw_tiers(self):
        axes, places = self._tiers, range(len(TIERS))
        colours = [TIER_COLOURS[tier] for tier in TIERS]
        self._served = axes.bar([p - 0.2 for p in places], [0] * 3, 0.38, color=colours)
        pale = {"color": colours, "alpha": 0.4, "hatch": "//"}
        self._held = axes.bar([p + 0.2 for p in places], [0] * 3, 0.38, **pale)
        axes.set(ylim=(0, 1), ylabel="share")
        axes.set_xticks(list(places), TIERS)
        handles = [self._served[0], self._held[0]]
        axes.legend(handles, ["tokens served", "memory-time"], frameon=False, fontsize=8)

    def update(self, view: ReplayView) -> None:
        """Move the marks and bars to another setting."""
        unique = max(self.index.trace.unique_blocks, 1)
        share = mean_blocks_held(view.result) / unique
        peers = [view.peers[name].token_hit_ratio for name in ("recency", "optimal")]
        limits = view.peers["recency"].capacity_blocks
        same = 1.0 if min(limits) < 0 else min(1.0, sum(limits) / unique)
        self._now.set_data([share], [view.result.token_hit_ratio])
        self._same.set_data([same, same], peers)
        prompts = max(1, int(view.result.trace.prompt_tokens.sum(dtype=np.int64)))
        held = view.result.block_seconds / max(view.result.block_seconds.sum(), 1e-9)
        served = view.result.hit_tokens.sum(axis=0) / prompts
        for bars, heights in ((self._served, served), (self._held, held)):
            for bar, height in zip(bars, heights):
                bar.set_height(height)


class ReplayTab(SettingsPanel):
    """Sliders for every setting, a picture and a line of figures that follow; a widget.

    Parameters
    ----------
    traces : mapping of str to Trace or path
        What can be chosen, by name; a file is read when it is chosen.
    config : HeuristicConfig, optional
        Where the sliders start.
    costs : TierCosts, optional
        Of the estimated TTFT.
    folder : path
        Where exports go: ``replay_<trace>.png`` and ``.csv``.
    """

    def __init__(
        self,
        traces: Mapping[str, Trace | Path],
        config: HeuristicConfig | None = None,
        costs: TierCosts | None = None,
        folder: str | Path = "data/exports",
    ) -> None:
        choice = self._choice = TraceChoice(traces)
        super().__init__(config or HeuristicConfig())
        self.costs, self.folder = costs, user_path(folder)
        self._pictures: dict[str, ReplayPicture] = {}
        self._drawn: dict[str, object] = {}
        self.trace, self.file = choice.widgets
        self.policy = labelled(widgets.Dropdown, "policy", options=_CHOICES.items())
        limit = {"placeholder": "what the TTLs hold", "continuous_update": False}
        self.capacity = labelled(widgets.Text, "capacity", **limit)
        ends = {"min": -3.0, "max": 0.0, "step": 0.05, "readout_format": ".3g"}
        self.share = labelled(widgets.FloatLogSlider, "of unique blocks", value=0.1, **ends)
        self.tariffs = {name: t for name, t in load_tariffs().items() if not t.writes}
        self.tariff = labelled(widgets.Dropdown, "money", options=list(self.tariffs)[::-1])
        self.has_perplexity = widgets.Checkbox(False, description=_GIVEN, indent=False)
        self.perplexity = labelled(widgets.FloatSlider, "perplexity", value=30.0, min=1, max=100)
        self.share.observe(lambda change: self._limit(f"{change['new']:.3g}"), "value")
        chosen = (self.trace, self.policy, self.capacity, self.tariff, self.perplexity)
        for widget in (*chosen, self.has_perplexity):
            widget.observe(self.redraw_soon, "value")
        for mark in ("kv-share", "kv-log"):
            self.share.add_class(mark)
        self.export_button = self.exporting("Export replay", "PNG and CSV")
        asked = (self.trace, self.file, self.policy, self.capacity, self.share, self.tariff)
        known = (self.has_perplexity, self.perplexity, row(self.export_button))
        left = (*asked, *self.sliders(), *known)
        self.children = beside(left, (self.image, self.readout, self.status))
        self.redraw()

    def _limit(self, text):
        self.capacity.value = text

    def draw(self, config: HeuristicConfig) -> None:
        """Replay and draw these settings."""
        name = self.trace.value
        if name not in self._pictures:
            self._pictures[name] = ReplayPicture(index_runs(self._choice.trace()))
        picture, policy, capacity = self._pictures[name], self.policy.value, self.capacity.value
        perplexity = self.perplexity.value if self.has_perplexity.value else None
        how = (config, perplexity, self.costs, policy, parse_capacity(capacity))
        view = replay_view(picture.index, *how, self.tariffs.get(self.tariff.value))
        picture.update(view)
        self.view, self.image.value, self.readout.value = view, picture.png(), replay_readout(view)
        drawn = {"trace": name, "policy": policy, "capacity": capacity, **config.to_dict()}
        drawn |= {"perplexity": perplexity, "tariff": self.tariff.value}
        self._drawn = drawn | view.summary()

    def export(self) -> list[Path]:
        """Write what is drawn, the last possible settings, as CSV and PNG; returns the files."""
        if not self._drawn:
            raise ValueError("there is nothing to export: no trace was replayed yet")
        name = self._drawn["trace"]
        stem = re.sub(r"[^\w.-]+", "_", f"replay_{name}")
        frame = pd.DataFrame([self._drawn])
        return export(self.folder, stem, frame, self._pictures[name].figure)


def replay_readout(view: ReplayView) -> str:
    """Return the figures of a setting and its peers as a table, HTML."""
    values, unique = view.figures[THIS], max(view.result.trace.unique_blocks, 1)
    lead = values["token_hit_ratio"] - view.figures["recency"]["token_hit_ratio"]
    apart = f"{abs(lead) * 100:.1f} points {'below' if lead < 0 else 'above'} recency"
    text = f"<b>{values['token_hit_ratio']:.1%} of tokens hit</b>, {apart}"
    text += f"; {values['speedup']:.2f} times faster to the first token than no cache"
    heads = ("", "tokens hit", "TTFT mean", "TTFT median", "$ per million tokens", "blocks held")
    rows = [
        (
            title,
            f"{found['token_hit_ratio']:.1%}",
            f"{found['ttft_mean_s']:.2f} s",
            f"{found['ttft_p50_s']:.2f} s" if "ttft_p50_s" in found else "",
            f"{found['per_mtok']:.4f}" if "per_mtok" in found else "",
            f"{found['mean_blocks_held']:,.0f} ({found['mean_blocks_held'] / unique:.1%})",
        )
        for name, title in _ROWS.items()
        for found in (view.figures[name],)
    ]
    return text + small_table(heads, rows)

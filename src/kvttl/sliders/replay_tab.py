"""The explorer's replay tab: choose a trace, move the sliders, see what would have been.

`replay_view` is the plain function behind it: settings in, figures and a picture out.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg

from caching_heuristics import TIERS, HeuristicConfig
from kvttl import user_path
from kvttl.plots.panels import TIER_COLOURS, open_axes, own_style
from kvttl.replay.costs import TierCosts, result_costs
from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.policies import POLICIES
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import RunIndex, index_runs
from kvttl.replay.tables import at_same_memory, export, mean_blocks_held
from kvttl.sliders.panel import SettingsPanel, button
from kvttl.traces.trace import Trace

_CURVE_SHARES = np.geomspace(0.002, 1.0, 12)  # of unique blocks


@dataclass(frozen=True, eq=False)
class ReplayView:
    """One setting's replay, its peers at the same memory, and costs."""

    result: ReplayResult
    peers: dict[str, ReplayResult]
    costs: dict[str, float]

    def summary(self) -> dict[str, float]:
        """Return the figures that the tab shows."""
        hours = self.result.block_seconds / 3600
        return {
            "token_hit_ratio": self.result.token_hit_ratio,
            "block_hit_ratio": self.result.block_hit_ratio,
            "recency_token_hit_ratio": self.peers["recency"].token_hit_ratio,
            "optimal_token_hit_ratio": self.peers["optimal"].token_hit_ratio,
            "mean_blocks_held": mean_blocks_held(self.result),
            **{f"block_hours_{tier}": float(h) for tier, h in zip(TIERS, hours)},
            **{name: self.costs[name] for name in ("ttft_p50_s", "ttft_mean_s", "speedup")},
        }


def replay_view(
    index: RunIndex,
    config: HeuristicConfig | None = None,
    perplexity: float | None = None,
    costs: TierCosts | None = None,
    policy: str = "formula",
) -> ReplayView:
    """Replay one setting without capacity, and recency and optimum at its memory.

    Another `policy` is replayed with that memory in place of the setting.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> view = replay_view(index_runs(agent_loops(200)), HeuristicConfig(base_ttl=60))
    >>> 0 < view.summary()["token_hit_ratio"] <= 1
    True
    """
    result = replay_without_capacity(index, config, perplexity=perplexity)
    peers = at_same_memory(index, result)
    if policy != "formula":
        result = replay(index, policy, peers["recency"].capacity_blocks[0])
    return ReplayView(result, peers, result_costs(result, costs))


class ReplayPicture:
    """A figure that is drawn once and then only updated: hits against memory, and tiers.

    Parameters
    ----------
    index : RunIndex
        The trace; its curves of recency and optimum are replayed once.
    """

    @own_style()
    def __init__(self, index: RunIndex) -> None:
        self.index = index
        self.figure, axes = open_axes(9.5, 3.8, 1, 2, width_ratios=[3, 2])
        self.figure.set_dpi(90)
        FigureCanvasAgg(self.figure)
        self._hits, self._tiers = axes
        self._draw_curves()
        self._draw_tiers()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # laying out again would take half of a step

    def _draw_curves(self):
        axes = self._hits
        for name in ("optimal", "recency"):
            ratios = [replay(self.index, name, s).token_hit_ratio for s in _CURVE_SHARES.tolist()]
            policy = POLICIES[name]
            axes.plot(_CURVE_SHARES, ratios, policy.dash, color=policy.colour, label=name)
        most = replay(self.index, "infinite").token_hit_ratio
        axes.set(xscale="log", xlim=(0.002, 1.2), ylim=(0, min(1.02, 1.3 * most + 0.02)))
        axes.set(xlabel="blocks held on average, share of unique", ylabel="token hit ratio")
        (self._now,) = axes.plot([], [], "*", color="#D55E00", ms=15, label="these settings")
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
        self._now.set_data([share], [view.result.token_hit_ratio])
        self._same.set_data([share, share], peers)
        prompts = max(1, int(view.result.trace.prompt_tokens.sum(dtype=np.int64)))
        held = view.result.block_seconds / max(view.result.block_seconds.sum(), 1e-9)
        served = view.result.hit_tokens.sum(axis=0) / prompts
        for bars, heights in ((self._served, served), (self._held, held)):
            for bar, height in zip(bars, heights):
                bar.set_height(height)

    def png(self) -> bytes:
        """Return the picture."""
        buffer = io.BytesIO()
        self.figure.canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
        return buffer.getvalue()


class ReplayTab(SettingsPanel):
    """Sliders for every setting, a picture and a line of figures that follow; a widget.

    Parameters
    ----------
    traces : mapping of str to Trace
        What can be chosen, by name.
    config : HeuristicConfig, optional
        Where the sliders start.
    costs : TierCosts, optional
        Of the estimated TTFT.
    folder : path
        Where exports go: ``replay_<trace>.png`` and ``.csv``.
    """

    def __init__(
        self,
        traces: Mapping[str, Trace],
        config: HeuristicConfig | None = None,
        costs: TierCosts | None = None,
        folder: str | Path = "data/exports",
    ) -> None:
        if not traces:
            raise ValueError("traces must name at least one trace, got none")
        super().__init__(config or HeuristicConfig())
        self.costs, self.folder = costs, user_path(folder)
        self._traces, self._pictures = dict(traces), {}
        self.trace = widgets.Dropdown(options=list(traces), description="trace")
        self.perplexity = widgets.FloatSlider(30.0, min=1.0, max=100.0, description="perplexity")
        self.has_perplexity = widgets.Checkbox(False, description="give all prompts a perplexity")
        policies = {"these settings": "formula", "adaptive, with their memory": "adaptive"}
        self.policy = widgets.Dropdown(options=policies.items(), description="policy")
        chosen = (self.trace, self.policy, self.has_perplexity, self.perplexity)
        for widget in chosen:
            widget.observe(self.redraw_soon, "value")
        self.export_button = button("Export replay", "PNG and CSV", self._export_pressed)
        below = (self.image, self.readout, self.sliders(), self.export_button, self.status)
        self.children = [widgets.HBox(chosen), *below]
        self.redraw()

    def draw(self, config: HeuristicConfig) -> None:
        """Replay and draw these settings."""
        name = self.trace.value
        if name not in self._pictures:
            self._pictures[name] = ReplayPicture(index_runs(self._traces[name]))
        picture = self._pictures[name]
        perplexity = self.perplexity.value if self.has_perplexity.value else None
        policy = self.policy.value
        self.view = replay_view(picture.index, config, perplexity, self.costs, policy)
        picture.update(self.view)
        self.image.value = picture.png()
        self.readout.value = replay_readout(self.view)
        drawn = {"trace": name, "policy": policy, **config.to_dict(), "perplexity": perplexity}
        self._drawn = drawn | self.view.summary()

    def export(self) -> list[Path]:
        """Write what is drawn, the last possible settings, as CSV and PNG; returns the files."""
        name = self._drawn["trace"]
        stem = re.sub(r"[^\w.-]+", "_", f"replay_{name}")
        frame = pd.DataFrame([self._drawn])
        return export(self.folder, stem, frame, self._pictures[name].figure)

    def _export_pressed(self, _):
        self.report(lambda: f"exported to {' and '.join(map(str, self.export()))}")


def replay_readout(view: ReplayView) -> str:
    """Return the figures of a setting as a line of HTML."""
    values = view.summary()
    hours = ", ".join(f"{tier} {values[f'block_hours_{tier}']:,.0f}" for tier in TIERS)
    return (
        f"<b>{values['token_hit_ratio']:.1%}</b> of tokens hit; with the same memory recency"
        f" {values['recency_token_hit_ratio']:.1%}, optimum"
        f" {values['optimal_token_hit_ratio']:.1%}.<br>Held on average:"
        f" {values['mean_blocks_held']:,.0f} blocks; block-hours: {hours}.<br>TTFT, estimated:"
        f" median {values['ttft_p50_s']:.2f} s, mean {values['ttft_mean_s']:.2f} s,"
        f" {values['speedup']:.2f} times faster than no cache."
    )

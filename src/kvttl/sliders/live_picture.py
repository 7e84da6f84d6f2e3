"""The sliders' picture as PNG bytes: axes are drawn once, a change redraws only what moves."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from caching_heuristics import HeuristicConfig
from kvttl.plots.panels import TierPanel, TtlPanel, tier_keys
from kvttl.plots.what_if import Decisions


class LivePicture:
    """TTL curves and two tier maps side by side, for one change after the other.

    Parameters
    ----------
    decisions : Decisions
        Of a run; shown as dots.

    Examples
    --------
    >>> from decision_changes import read_decisions
    >>> picture = LivePicture(read_decisions([]))
    >>> first, other = (picture.png(HeuristicConfig(alpha=a)) for a in (0.25, 0.5))
    >>> first[1:4], first == other, first == picture.png(HeuristicConfig(alpha=0.25))
    (b'PNG', False, True)
    """

    def __init__(self, decisions: Decisions) -> None:
        self.figure = Figure(figsize=(12.4, 3.9), dpi=100, layout="constrained")
        self._canvas = FigureCanvasAgg(self.figure)
        curves, by_variance, by_recency = self.figure.subplots(1, 3)
        self.ttl = TtlPanel(curves)
        self.variance = TierPanel(by_variance, "time_variance", decisions)
        self.recency = TierPanel(by_recency, "seconds_since_access", decisions)
        self.panels = (self.ttl, self.variance, self.recency)
        for panel in self.panels[1:]:
            panel.axes.legend(
                handles=tier_keys(),
                title="dots: the run; black rim: would change" if len(decisions) else None,
                title_fontsize=8,
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                ncols=3,
                fontsize=8,
                frameon=False,
            )
        self._background = None

    def png(self, config: HeuristicConfig) -> bytes:
        """Return the picture of these settings."""
        moved = [panel.update(config) for panel in self.panels]
        if self._background is None or any(moved):
            self._draw_background()
        self._canvas.restore_region(self._background)
        for panel in self.panels:
            for artist in panel.artists:
                panel.axes.draw_artist(artist)
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)  # fast rather than small
        return buffer.getvalue()

    def _draw_background(self):
        """Draw all that stands still; after the first time it keeps its place."""
        if self._background is None:
            self._canvas.draw()  # with everything, so that the layout leaves room
            self.figure.set_layout_engine("none")
            for artist in (artist for panel in self.panels for artist in panel.artists):
                artist.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.figure.bbox)

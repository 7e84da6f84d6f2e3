"""Pictures that follow sliders: what stands still is drawn once, what moves at each step."""

import io
from collections.abc import Iterable

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from caching_heuristics import HeuristicConfig
from kvttl.plots.panels import (
    AGAINST,
    OwnFigure,
    TierPanel,
    TtlPanel,
    legend_above,
    own_style,
    tier_keys,
)
from kvttl.plots.what_if import Decisions


class MovingPicture:
    """A figure of which only some artists change.

    Parameters
    ----------
    figure : OwnFigure
        With everything on it.
    artists : iterable of Artist
        What moves.
    """

    @own_style()
    def __init__(self, figure: OwnFigure, artists: Iterable[Artist]) -> None:
        self.figure, self._artists = figure, list(artists)
        self._canvas, self._background = FigureCanvasAgg(figure), None

    @own_style()
    def png(self, anew: bool = False) -> bytes:
        """Return the picture; `anew`: more than the artists has changed."""
        if self._background is None or anew:
            self._draw_background()
        self._canvas.restore_region(self._background)
        for artist in self._artists:
            artist.axes.draw_artist(artist)
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)  # fast rather than small
        return buffer.getvalue()

    def _draw_background(self):
        """Draw all that stands still; after the first time it keeps its place."""
        if self._background is None:
            self._canvas.draw()  # with everything, so that the layout leaves room
            self.figure.set_layout_engine("none")
        for artist in self._artists:
            artist.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self.figure.bbox)


class LivePicture(MovingPicture):
    """TTL curves over two tier maps, for one change after the other.

    Parameters
    ----------
    decisions : Decisions
        Of a run; shown as dots.

    Examples
    --------
    >>> from kvttl.plots.what_if import decisions_of
    >>> picture = LivePicture(decisions_of([]))
    >>> first, other = (picture.of(HeuristicConfig(alpha=a)) for a in (0.25, 0.5))
    >>> first[1:4], first == other, first == picture.of(HeuristicConfig(alpha=0.25))
    (b'PNG', False, True)
    """

    @own_style()
    def __init__(self, decisions: Decisions) -> None:
        figure = OwnFigure(figsize=(9.6, 5.9), dpi=100, layout="constrained")
        curves, *maps = figure.subplot_mosaic("AA;BC").values()
        self.ttl = TtlPanel(curves)
        tiers = [TierPanel(axes, against, decisions) for axes, against in zip(maps, AGAINST)]
        self.panels = (self.ttl, *tiers)
        title = "dots: the run; with a rim: would change" if len(decisions) else None
        for panel in tiers:
            legend_above(panel.axes, tier_keys(), title=title, title_fontsize=8)
        super().__init__(figure, (artist for panel in self.panels for artist in panel.artists))

    @own_style()
    def of(self, config: HeuristicConfig) -> bytes:
        """Return the picture of these settings."""
        return self.png(any([panel.update(config) for panel in self.panels]))

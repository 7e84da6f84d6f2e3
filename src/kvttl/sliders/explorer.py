"""Sliders over the decision plots: tune the heuristics, see what changes, save and export."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import ipywidgets as widgets

from caching_heuristics import HeuristicConfig
from kvttl import user_path
from kvttl.decisions.log import DecisionRecord
from kvttl.plots.export import all_figures, export_plots
from kvttl.plots.what_if import changes, decisions_of
from kvttl.settings import FILE_NAME, load_settings, save_settings
from kvttl.sliders.panel import SettingsPanel, beside, button, row
from kvttl.sliders.picture import LivePicture
from kvttl.sliders.readout import readout

PRESETS = {
    "Default": {},
    "Busy traffic": {"base_ttl": 200.0, "min_ttl": 5.0, "recent_seconds": 300.0},
    "Keep long": {"base_ttl": 86_400.0, "alpha": 0.5, "recent_seconds": 86_400.0},
}

_UNDO_DEPTH = 100
_ONE_DRAG_S = 0.8  # changes of one control closer than this are undone together


class Explorer(SettingsPanel):
    """Sliders for every setting, a picture and a readout that follow; a widget.

    Parameters
    ----------
    records : iterable of DecisionRecord
        A run's log; the readout says what would change in it.
    config : HeuristicConfig, optional
        First settings; default the saved ones.
    data_folder : str or Path
        Holds ``heuristics.yaml`` and ``exports/``.
    source : str
        Where the records come from, for the readout and the exports.
    run_config : HeuristicConfig, optional
        The run's own settings: its ladder factors are the "before". Default `HeuristicConfig()`.
    clock : callable
        Seconds, for telling one drag of a slider from the next.

    Examples
    --------
    >>> explorer = Explorer([], HeuristicConfig())
    >>> explorer.update(alpha=0.5).alpha
    0.5
    >>> explorer.update(hot_threshold=80).hot_threshold  # above cold_threshold: not taken
    20.0
    >>> explorer.errors["hot_threshold"]
    'must be > 0 and <= cold_threshold (50.0), got 80.0'
    """

    def __init__(
        self,
        records: Iterable[DecisionRecord],
        config: HeuristicConfig | None = None,
        data_folder: str | Path = "data",
        source: str = "",
        run_config: HeuristicConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records, self._folder, self._source = list(records), user_path(data_folder), source
        self.settings_path = self._folder / FILE_NAME
        super().__init__(config or load_settings(self.settings_path))
        self._first, self._run_config, self._clock = self.config, run_config, clock
        self._decisions = decisions_of(self._records)
        self._undo: list[dict[str, float]] = []
        self._last_change = ("", -math.inf)
        self._picture = LivePicture(self._decisions)
        self._latest = self.values
        shown = (self.image, self.readout, self.status)
        self.children = beside([*self.sliders(), *self._buttons()], shown)
        self.redraw()

    # ---- settings ----------------------------------------------------------------

    def update(self, **settings: float) -> HeuristicConfig:
        """Set controls and redraw at once; `undo` takes it back. See `SettingsPanel.update`."""
        config = super().update(**settings)
        self._remember("")
        return config

    def undo(self) -> None:
        """Go back one change (a whole drag is one)."""
        if self._undo:
            self._last_change = ("", -math.inf)
            super().update(**self._undo.pop())
            self._latest = self.values

    def reset(self) -> None:
        """Go back to the settings that the explorer was opened with."""
        self.update(**self._first.to_dict())

    def apply_preset(self, name: str) -> HeuristicConfig:
        """Set all controls to a preset; see `PRESETS`."""
        return self.update(**HeuristicConfig(**PRESETS[name]).to_dict())

    def control_changed(self, name: str, value: float) -> None:
        """Follow a control that a person moved; `undo` takes it back."""
        self._remember(name)
        self.redraw_soon()

    def _remember(self, name):
        """Keep the values so far for undo, unless this goes on with the drag before it."""
        last_name, last_s = self._last_change
        now_s = self._clock()
        if not name or name != last_name or now_s - last_s > _ONE_DRAG_S:
            self._undo = [*self._undo, self._latest][-_UNDO_DEPTH:]
        self._last_change = (name, now_s)
        self._latest = self.values

    def draw(self, config: HeuristicConfig) -> None:
        """Show these settings, and what they would change in the run."""
        self.image.value = self._picture.of(config)
        found = changes(self._decisions, config, self._run_config)
        self.readout.value = readout(found, len(self._decisions), self._source)
        # From here on counts the pause that ends a drag: drawing may take longer than it.
        self._last_change = (self._last_change[0], self._clock())

    # ---- save and export ---------------------------------------------------------

    def save(self) -> Path:
        """Write the settings in force to ``heuristics.yaml``; returns its path."""
        return save_settings(self.config, self.settings_path)

    def export(self, name: str = "explorer") -> list[Path]:
        """Write all plots of the settings in force to ``exports/<name>/``; returns the files."""
        figures = all_figures(self.config, self._records)
        facts = {"decisions": len(self._decisions), "source": self._source}
        return export_plots(self._folder / "exports", name, figures, self.config, **facts)

    # ---- layout ------------------------------------------------------------------

    def _buttons(self):
        self.name = widgets.Text("explorer", layout=widgets.Layout(width="150px"))
        self.name.add_class("kv-export-name")
        tip = "Set all sliders"
        presets = [button(n, tip, lambda _, n=n: self.apply_preset(n)) for n in PRESETS]
        save = (f"Write {self.settings_path}", self._save_pressed, "success")
        export = ("PNG, SVG, PDF and JSON", self._export_pressed, "primary")
        undo = button("Undo", "Take the last change back", lambda _: self.undo())
        reset = button("Reset", "As opened", lambda _: self.reset())
        yield row(widgets.Label("Presets"), *presets)
        yield row(undo, reset, button("Save settings", *save))
        yield row(button("Export plots", *export), widgets.Label("as"), self.name)

    def _save_pressed(self, _):
        self.report(lambda: f"Saved {self.save()}")

    def _export_pressed(self, _):
        self.status.value = "Exporting ..."
        self.report(self._exported)

    def _exported(self):
        paths = self.export(self.name.value)
        return f"Exported {len(paths)} files to {paths[0].parent}"

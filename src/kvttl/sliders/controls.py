"""One setting's controls: a slider, a number to type, and a line that says what is wrong."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import ipywidgets as widgets

from caching_heuristics import HeuristicConfig

_SIGNIFICANT = 3  # digits that a slider can set; the entry takes any number


@dataclass(frozen=True)
class Setting:
    """What the controls of one `HeuristicConfig` field look like.

    ``low`` and ``high`` are the slider's ends (the entry may go beyond);
    ``is_log`` sliders step in decades, the others in units.
    """

    label: str
    unit: str
    low: float
    high: float
    step: float
    is_log: bool = False
    group: str = "TTL"


SETTINGS = {
    "base_ttl": Setting("base TTL", "s", 1, 604_800, 0.02, True),
    "min_ttl": Setting("min TTL", "s", 1, 86_400, 0.02, True),
    "max_ttl": Setting("max TTL", "s", 10, 2_592_000, 0.02, True),
    "alpha": Setting("alpha (access count)", "", 0, 2, 0.01),
    "gamma": Setting("gamma (variance)", "", 0, 1, 0.01),
    "hot_threshold": Setting("hot threshold", "perplexity", 1, 1000, 0.01, True, "Tier"),
    "cold_threshold": Setting("cold threshold", "perplexity", 1, 1000, 0.01, True, "Tier"),
    "variance_threshold": Setting("variance threshold", "", 0, 1, 0.01, False, "Tier"),
    "recent_seconds": Setting("recent", "s", 1, 604_800, 0.02, True, "Tier"),
    "disk_ttl_factor": Setting("after gpu, on disk", "x TTL", 0.1, 1000, 0.02, True, "Tier"),
    "remote_ttl_factor": Setting("after disk, in remote", "x TTL", 0.1, 1000, 0.02, True, "Tier"),
}


def setting_of(name: str) -> Setting:
    """Return a field's `Setting`; one that is new to this module gets a slider around its default.

    Examples
    --------
    >>> setting_of("alpha").high, setting_of("base_ttl").is_log
    (2, True)
    """
    if name in SETTINGS:
        return SETTINGS[name]
    default = next(field.default for field in fields(HeuristicConfig) if field.name == name)
    middle = float(default) or 1.0
    return Setting(name.replace("_", " "), "", middle / 100, middle * 100, 0.02, True, "Tier")


class Control:
    """A slider and a number entry that agree, and a message under them.

    Parameters
    ----------
    name : str
        Field of `HeuristicConfig`.
    value : float
        The first one. Values beyond the slider's ends are kept; only the handle stops.
    on_change : callable
        Gets (name, value) whenever a person has changed it.

    Examples
    --------
    >>> control = Control("base_ttl", 3600.0, lambda name, value: print(name, value))
    >>> control.slider.value = 123.456
    base_ttl 123.0
    >>> control.entry.value = 1e9
    base_ttl 1000000000.0
    >>> control.slider.value, control.value
    (604800.0, 1000000000.0)
    """

    def __init__(self, name: str, value: float, on_change: Callable[[str, float], None]) -> None:
        self.name, self.value = name, float(value)
        setting = self._setting = setting_of(name)
        self._on_change, self._is_setting = on_change, False
        self.slider = _slider(setting)
        self.slider.add_class(f"kv-slider-{name}")
        self.entry = widgets.FloatText(layout=_fixed("92px"))
        self.entry.add_class(f"kv-entry-{name}")
        self.message = widgets.HTML(
            layout=widgets.Layout(margin="-4px 0 2px 136px", display="none")
        )
        self.message.add_class(f"kv-message-{name}")
        label = widgets.Label(setting.label, layout=_fixed("136px"))
        unit = widgets.Label(setting.unit, layout=_fixed("74px"))
        row = widgets.HBox([label, self.slider, self.entry, unit])
        self.widget = widgets.VBox([row, self.message])
        self.set(value)
        self.slider.observe(self._slider_moved, "value")
        self.entry.observe(self._entry_changed, "value")

    def set(self, value: float) -> None:
        """Show `value` without telling anybody."""
        self.value, self._is_setting = float(value), True
        try:
            self.slider.value = min(max(self.value, self._setting.low), self._setting.high)
            self.entry.value = self.value
        finally:
            self._is_setting = False

    def say(self, text: str) -> None:
        """Show what is wrong, under the slider; empty = nothing."""
        shown = warning(text) if text else ""
        if shown != self.message.value:
            self.message.value = shown
            self.message.layout.display = None if text else "none"

    def _slider_moved(self, change):
        if not self._is_setting and not self._is_same_step(change["new"]):
            self._changed(rounded(change["new"]), self.entry)

    def _is_same_step(self, position):
        """Say whether the browser only rounded the value that it was told to show."""
        held = min(max(self.value, self._setting.low), self._setting.high)
        if self._setting.is_log:
            held, position = math.log10(held), math.log10(position)
        return abs(position - held) <= 0.501 * self._setting.step

    def _entry_changed(self, change):
        if not self._is_setting and math.isfinite(change["new"]):
            self._changed(change["new"], self.slider)

    def _changed(self, value, other):
        """A person has moved one part: take the other along, and say so."""
        self.value, self._is_setting = value, True
        try:
            if other is self.slider:
                value = min(max(value, self._setting.low), self._setting.high)
            other.value = value
        finally:
            self._is_setting = False
        self._on_change(self.name, self.value)


def warning(text: str) -> str:
    """Return a text as a warning, in HTML."""
    return f'<span style="color:#B00020">⚠ {html.escape(text)}</span>'


def rounded(value: float) -> float:
    """Return a slider's value without the digits that nobody set.

    Examples
    --------
    >>> rounded(3630.780547701014), rounded(0.30000000000000004), rounded(604800.0)
    (3630.0, 0.3, 604800.0)
    """
    if value >= 10**_SIGNIFICANT and value % 10 == 0:
        return value
    return float(f"{value:.{_SIGNIFICANT}g}")


def _fixed(width):
    return widgets.Layout(flex="0 0 auto", width=width)


def _slider(setting):
    options = {
        "readout": False,
        "layout": widgets.Layout(flex="1 1 auto", width="auto", min_width="110px"),
        "step": setting.step,
    }
    if not setting.is_log:
        return widgets.FloatSlider(min=setting.low, max=setting.high, **options)
    low, high = math.log10(setting.low), math.log10(setting.high)
    return widgets.FloatLogSlider(value=setting.low, min=low, max=high, **options)

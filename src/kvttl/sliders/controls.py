"""One setting's controls: a slider, a number to type, and a line that says what is wrong."""

import html
import math
from collections.abc import Callable

import ipywidgets as widgets

from caching_heuristics import SETTINGS

_SIGNIFICANT = 3  # digits that a slider can set; the entry takes any number
_LABEL = "136px"  # wide
_STEP = 0.01  # of a slider: in decades where its scale is logarithmic


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
        setting = self._setting = SETTINGS[name]
        self._on_change, self._is_setting = on_change, False
        self.slider, self.entry = _slider(setting), widgets.FloatText(layout=_fixed("92px"))
        hidden = widgets.Layout(margin="-4px 0 2px 136px", display="none")
        self.message = widgets.HTML(layout=hidden)
        for part in ("slider", "entry", "message"):
            getattr(self, part).add_class(f"kv-{part}-{name}")
        label = widgets.Label(setting.label, layout=_fixed(_LABEL))
        unit = widgets.Label(setting.unit, layout=_fixed("74px"))
        row = widgets.HBox([label, self.slider, self.entry, unit])
        row.add_class("kv-control")
        self.widget = widgets.VBox([row, self.message])
        self.set(value)
        self.slider.observe(self._slider_moved, "value")
        self.entry.observe(self._entry_changed, "value")

    def set(self, value: float) -> None:
        """Show `value` without telling anybody."""
        self._show(value, self.slider, self.entry)

    def _show(self, value, *parts):
        self.value, self._is_setting = float(value), True
        try:
            for part in parts:
                part.value = self._within_slider(value) if part is self.slider else self.value
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
        held = self._within_slider(self.value)
        if self._setting.slider[0] > 0:  # logarithmic
            held, position = math.log10(held), math.log10(position)
        return abs(position - held) <= 0.501 * _STEP

    def _entry_changed(self, change):
        if not self._is_setting and math.isfinite(change["new"]):
            self._changed(change["new"], self.slider)

    def _changed(self, value, other):
        """A person has moved one part: take the other along, and say so."""
        self._show(value, other)
        self._on_change(self.name, self.value)

    def _within_slider(self, value):
        low, high = self._setting.slider
        return min(max(value, low), high)


def labelled(kind: type, label: str, **options) -> widgets.Widget:
    """Return a widget whose label is as wide as those of the settings."""
    style = {"description_width": _LABEL}
    return kind(description=label, style=style, layout=widgets.Layout(width="auto"), **options)


def warning(text: str) -> str:
    """Return a text as a warning, in HTML."""
    return f'<span style="color:var(--jp-error-color1,#B00020)">⚠ {html.escape(text)}</span>'


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
    layout = widgets.Layout(flex="1 1 auto", width="auto", min_width="110px")
    options = {"readout": False, "layout": layout, "step": _STEP}
    low, high = setting.slider
    if low == 0:
        return widgets.FloatSlider(min=low, max=high, **options)
    options |= {"min": math.log10(low), "max": math.log10(high)}
    return widgets.FloatLogSlider(value=low, _dom_classes=("kv-log",), **options)

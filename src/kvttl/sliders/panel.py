"""What both explorers share: a control for every setting, and a picture that follows."""

import asyncio
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets

from caching_heuristics import TTL_SETTINGS, HeuristicConfig
from kvttl.sliders.controls import Control, labelled, warning
from kvttl.traces.reading import read_trace
from kvttl.traces.trace import Trace


class Tab(widgets.HBox):
    """Controls beside what is shown, and a status line that buttons report to."""

    def __init__(self) -> None:
        self.status = widgets.HTML()
        self.status.add_class("kv-status")
        super().__init__(layout=widgets.Layout(flex_flow="row wrap", grid_gap="0 20px"))

    def report(self, work: Callable[[], str]) -> None:
        """Do what a button asks; say what came of it, also if it failed."""
        try:
            self.status.value = html.escape(work())
        except (OSError, ValueError) as error:
            self.status.value = warning(str(error))

    def export(self) -> list[Path]:
        """Write what is shown; returns the files."""
        raise NotImplementedError

    def exporting(self, text: str, tooltip: str) -> widgets.Button:
        """Return a button that exports, and says where to."""
        return button(text, tooltip, lambda _: self.report(self._exported), "primary")

    def _exported(self):
        return f"exported to {' and '.join(map(str, self.export()))}"


class SettingsPanel(Tab):
    """Controls of a `HeuristicConfig` beside a picture, a readout and a status line.

    A subclass draws (`draw`), and puts what `beside` returns into ``children``.

    Parameters
    ----------
    config : HeuristicConfig
        First settings.

    Attributes
    ----------
    config : HeuristicConfig
        The settings in force: the last valid ones.
    errors : dict of str to str
        What is wrong with the controls as they stand, by field.
    drawn : int
        Pictures drawn so far.
    """

    def __init__(self, config: HeuristicConfig) -> None:
        self.config, self.drawn = config, 0
        self.errors: dict[str, str] = {}
        self._waiting: asyncio.Handle | None = None
        settings, changed = config.to_dict(), self.control_changed
        self.controls = {name: Control(name, value, changed) for name, value in settings.items()}
        self.image = widgets.Image(format="png", layout=widgets.Layout(width="100%"))
        self.image.add_class("kv-picture")
        self.readout = widgets.HTML()
        self.readout.add_class("kv-readout")
        super().__init__()

    @property
    def values(self) -> dict[str, float]:
        """What the controls say, valid or not."""
        return {name: control.value for name, control in self.controls.items()}

    def draw(self, config: HeuristicConfig) -> None:
        """Show these settings in `image` and `readout`."""
        raise NotImplementedError

    def update(self, **settings: float) -> HeuristicConfig:
        """Set controls and redraw at once: the plain function under the sliders.

        Parameters
        ----------
        **settings
            Fields of `HeuristicConfig`. An invalid combination is shown at its
            controls, and the last valid picture stays.

        Returns
        -------
        HeuristicConfig
            The settings in force.

        Raises
        ------
        TypeError
            If there is no such setting.
        """
        unknown = sorted(set(settings) - set(self.controls))
        if unknown:
            raise TypeError(f"no such setting: {', '.join(unknown)}")
        for name, value in settings.items():
            self.controls[name].set(value)
        self.redraw()
        return self.config

    def control_changed(self, name: str, value: float) -> None:
        """Follow a control that a person moved."""
        self.redraw_soon()

    def redraw_soon(self, _change=None) -> None:
        """Redraw once with the newest values; at once where no kernel is around us."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.redraw()
            return
        if self._waiting is None:
            self._waiting = loop.call_soon(self.redraw)

    def redraw(self) -> None:
        """Draw the newest settings; keeps the last valid picture if they are not valid."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        try:
            config = HeuristicConfig(**self.values)
        except ValueError as error:
            self._explain(str(error))
            return
        self._explain("")
        self.config = config
        self.drawn += 1
        try:
            self.draw(config)
        except (OSError, ValueError) as error:  # what is asked for beside the settings
            self.readout.value = warning(str(error))

    def _explain(self, message):
        """Show an error at every control that it names."""
        named = [name for name in self.controls if re.search(rf"\b{name}\b", message)]
        self.errors = {name: message.removeprefix(f"{name} ") for name in named}
        for name, control in self.controls.items():
            control.say(self.errors.get(name, ""))

    def sliders(self) -> list[widgets.Widget]:
        """Return the controls, those of the TTL first, under their headings."""
        groups = {"TTL": [], "Tier": []}
        for name, control in self.controls.items():
            groups["TTL" if name in TTL_SETTINGS else "Tier"].append(control.widget)
        return [part for name, group in groups.items() for part in (heading(name), *group)]

    def report(self, work: Callable[[], str]) -> None:
        """Do what a button asks; say what came of it, also if it failed."""
        invalid = f" (the last valid settings; see {', '.join(self.errors)})" if self.errors else ""
        super().report(lambda: work() + invalid)


class TraceChoice:
    """A trace from a list, or a file of one's own.

    Parameters
    ----------
    traces : mapping of str to Trace or path
        What can be chosen, by name; a file is read when it is first used.

    Attributes
    ----------
    dropdown, file, widgets
        The list, the path's entry, and both.
    """

    def __init__(self, traces: Mapping[str, Trace | Path]) -> None:
        if not traces:
            raise ValueError("traces must name at least one trace, got none")
        self._traces = dict(traces)
        path = {"placeholder": "path of your own, then Enter", "continuous_update": False}
        self.dropdown = labelled(widgets.Dropdown, "trace", options=list(traces))
        self.file = labelled(widgets.Text, "or a file", **path)
        self.widgets = (self.dropdown, self.file)
        self.file.observe(self._named, "value")

    def _named(self, change):
        if name := change["new"].strip():
            self._traces.setdefault(name, Path(name))
            self.dropdown.options = list(self._traces)
            self.dropdown.value = name

    def trace(self) -> Trace:
        """Return the chosen trace; raises OSError or ValueError where it cannot be read."""
        name = self.dropdown.value
        if not isinstance(self._traces[name], Trace):
            self._traces[name] = read_trace(self._traces[name])
        return self._traces[name]


def beside(controls: Sequence[widgets.Widget], shown: Sequence[widgets.Widget]) -> list:
    """Return two columns: what is set, and what comes of it; one above the other where narrow."""
    columns = [widgets.VBox(list(parts)) for parts in (controls, shown)]
    for column, flex, name in zip(columns, ("0 1 440px", "1 1 500px"), ("controls", "shown")):
        column.layout.flex, column.layout.min_width = flex, "0"
        column.add_class(f"kv-{name}")
    return columns


def row(*parts: widgets.Widget) -> widgets.HBox:
    """Return widgets side by side, in as many lines as they need."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def heading(text: str) -> widgets.HTML:
    """Return a heading over a group of controls."""
    return widgets.HTML(f'<h3 style="margin:2px;font-size:1em;line-height:1.7">{text}</h3>')


def button(text: str, tooltip: str, on_click: Callable, style: str = "") -> widgets.Button:
    """Return a button as wide as its text; tests and benchmarks find it by its class."""
    fit = widgets.Layout(width="auto")
    made = widgets.Button(description=text, tooltip=tooltip, button_style=style, layout=fit)
    made.add_class(f"kv-{text.lower().replace(' ', '-')}")
    made.on_click(on_click)
    return made

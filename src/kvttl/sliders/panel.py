"""What both explorers share: a control for every setting, and a picture that follows."""

import asyncio
import html
import re
from collections.abc import Callable

import ipywidgets as widgets

from caching_heuristics import TTL_SETTINGS, HeuristicConfig
from kvttl.sliders.controls import Control, warning


class SettingsPanel(widgets.VBox):
    """Controls of a `HeuristicConfig`, a picture, a readout and a status line.

    A subclass draws (`draw`), and puts `sliders()` and its own buttons into ``children``.

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
        self.readout, self.status = widgets.HTML(), widgets.HTML()
        self.readout.add_class("kv-readout")
        self.status.add_class("kv-status")
        super().__init__()
        self.layout.max_width = "1240px"

    @property
    def values(self) -> dict[str, float]:
        """What the controls say, valid or not."""
        return {name: control.value for name, control in self.controls.items()}

    def draw(self, config: HeuristicConfig) -> None:
        """Show these settings in `image` and `readout`."""
        raise NotImplementedError

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
        self.draw(config)

    def _explain(self, message):
        """Show an error at every control that it names."""
        named = [name for name in self.controls if re.search(rf"\b{name}\b", message)]
        self.errors = {name: message.removeprefix(f"{name} ") for name in named}
        for name, control in self.controls.items():
            control.say(self.errors.get(name, ""))

    def sliders(self) -> widgets.HBox:
        """Return the controls in columns, a group each."""
        groups = {"TTL": [widgets.HTML("<b>TTL</b>")], "Tier": [widgets.HTML("<b>Tier</b>")]}
        for name, control in self.controls.items():
            groups["TTL" if name in TTL_SETTINGS else "Tier"].append(control.widget)
        wide = widgets.Layout(flex="1 1 430px", max_width="560px")  # two side by side, with room
        columns = [widgets.VBox(parts, layout=wide) for parts in groups.values()]
        return widgets.HBox(columns, layout=widgets.Layout(flex_flow="row wrap", grid_gap="24px"))

    def report(self, work: Callable[[], str]) -> None:
        """Do what a button asks; say what came of it, also if it failed."""
        invalid = f" (the last valid settings; see {', '.join(self.errors)})" if self.errors else ""
        try:
            self.status.value = html.escape(work() + invalid)
        except (OSError, ValueError) as error:
            self.status.value = warning(str(error))


def button(text: str, tooltip: str, on_click: Callable, style: str = "") -> widgets.Button:
    """Return a button as wide as its text; tests and benchmarks find it by its class."""
    fit = widgets.Layout(width="auto")
    made = widgets.Button(description=text, tooltip=tooltip, button_style=style, layout=fit)
    made.add_class(f"kv-{text.lower().replace(' ', '-')}")
    made.on_click(on_click)
    return made

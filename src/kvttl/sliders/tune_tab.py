"""The Tune tab: search settings on a trace, watch it, and take them over."""

from __future__ import annotations

import asyncio
import html
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ipywidgets as widgets

from caching_heuristics import SETTINGS, HeuristicConfig
from kvttl import user_path
from kvttl.plots.replay_plots import plot_tuning
from kvttl.replay.command import parse_capacity
from kvttl.replay.tables import export
from kvttl.settings import FILE_NAME, save_settings
from kvttl.sliders.controls import labelled, warning
from kvttl.sliders.panel import Tab, TraceChoice, beside, button, row
from kvttl.sliders.readout import small_table
from kvttl.traces.trace import Trace
from policy_tuning import MEASURES, Question, Tuning, tune

_POLICIES = ("heuristic", "heuristic_order", "ttl")  # what is fast enough to search
_DRAWN_S = 1.0  # at least between two pictures of a search that runs
_ABOUT = (
    "<b>Which settings suit your traffic?</b><br>Search tries settings on the first part of the"
    " trace's time, for a goal, where something else must not get worse; then it scores the best on"
    " the rest, which it has not seen. Nothing is saved before you take it over."
)


class _Stopped(Exception):
    """The search was told to stop."""


class TuneTab(Tab):
    """A search of `policy_tuning`, beside the kernel's loop, and what it found.

    Parameters
    ----------
    traces : mapping of str to Trace or path
        As of `ReplayTab`.
    take : callable
        Is given settings that a person takes over, after they were saved.
    data_folder : path
        Holds ``heuristics.yaml``, ``exports/`` and ``runs/tune``.

    Attributes
    ----------
    tuning : Tuning or None
        What the last search found.
    """

    def __init__(
        self,
        traces: Mapping[str, Trace | Path],
        take: Callable[[HeuristicConfig], object],
        data_folder: str | Path = "data",
    ) -> None:
        super().__init__()
        self.tuning: Tuning | None = None
        self._take, self._folder, self._task = take, user_path(data_folder), None
        self._stopping, self._drawn_s = False, 0.0
        self.choice = TraceChoice(traces)
        self.policy = labelled(widgets.Dropdown, "policy", options=_POLICIES)
        self.capacity = labelled(widgets.Text, "capacity", placeholder="unlimited")
        goals = {text: name for name, (_, _, text) in MEASURES.items()}
        self.goal = labelled(widgets.Dropdown, "goal", options=goals.items(), value="memory")
        against = {"as usual for the goal": ""} | goals
        self.against = labelled(widgets.Dropdown, "not worse in", options=against.items())
        self.trials = labelled(widgets.BoundedIntText, "trials", value=200, min=1, max=100_000)
        self.seed = labelled(widgets.BoundedIntText, "seed", value=0, min=0, max=2**32 - 1)
        split = {"min": 0.1, "max": 0.9, "step": 0.05}
        self.split = labelled(widgets.FloatSlider, "tuned on, of time", value=0.5, **split)
        self.bar = widgets.IntProgress(layout=widgets.Layout(width="auto"))
        hidden = widgets.Layout(width="100%", max_width="640px", display="none")
        self.image = widgets.Image(format="png", layout=hidden)
        self.readout = widgets.HTML(_ABOUT)
        self.search = button("Search", "Go on where this question stopped", self._pressed, "info")
        self.stop = button("Stop", "Trials are kept", self._stop)
        tip = f"Write {FILE_NAME}, and set the sliders of Decisions and Replay"
        self.over = button("Take over", tip, lambda _: self.report(self._taken), "success")
        self.save = self.exporting("Export search", "All trials as CSV, and the picture")
        self.image.add_class("kv-picture")
        self.readout.add_class("kv-readout")
        asked = (self.policy, self.capacity, self.goal, self.against)
        how = (self.split, self.trials, self.seed, row(self.search, self.stop), self.bar)
        left = (*self.choice.widgets, *asked, *how, row(self.over, self.save), self.status)
        self.children = beside(left, (self.image, self.readout))
        self._enable(running=False)

    def question(self) -> Question:
        """Return what the controls ask for; raises ValueError as `Question` does."""
        names = ("policy", "goal", "against", "split", "seed")
        asked = {name: getattr(self, name).value for name in names}
        return Question(capacity=parse_capacity(self.capacity.value), **asked)

    async def run(self) -> None:
        """Search, and show what was found; what is wrong is said."""
        self._stopping, self.tuning = False, None
        self.bar.value, self.bar.max, self.status.value = 0, self.trials.value, "Searching ..."
        self._enable(running=True)
        loop = asyncio.get_running_loop()
        try:
            question, trace = self.question(), await asyncio.to_thread(self.choice.trace)
            how = (trace, question, self.trials.value, self._folder / "runs" / "tune")
            watch = self._watcher(loop, question)
            self.tuning = await asyncio.to_thread(tune, *how, watch=watch)
            self._show(self.tuning.trials, question)
            self.readout.value = readout_of(self.tuning)
            self.status.value = "Found: look at the rest before you take it over."
        except _Stopped:
            self.status.value = "Stopped; Search goes on from here."
        except Exception as error:
            self.status.value = warning(f"{error}")
        finally:
            self._enable(running=False)

    def _watcher(self, loop, question):
        def watch(trials):
            if self._stopping:
                raise _Stopped
            loop.call_soon_threadsafe(self._show, trials, question, _DRAWN_S)

        return watch

    def _show(self, trials, question, pause_s=0.0):
        """Draw what was tried, if the last picture is old enough."""
        self.bar.value, now_s = len(trials), time.monotonic()
        self.bar.description = f"{len(trials)}/{self.bar.max}"
        if now_s - self._drawn_s >= pause_s:
            axes = {name: MEASURES[name][2] for name in (question.paid_with, question.goal)}
            self._figure, buffer = plot_tuning(trials, axes), io.BytesIO()
            self._figure.savefig(buffer, dpi=140)
            self.image.value, self._drawn_s = buffer.getvalue(), time.monotonic()
            self.image.layout.display = None

    def _enable(self, running):
        self.search.disabled, self.stop.disabled = running, not running
        self.over.disabled = self.save.disabled = self.tuning is None

    def _stop(self, _):
        self._stopping = True

    def _pressed(self, _):
        self._task = asyncio.get_running_loop().create_task(self.run())

    def _taken(self):
        path = save_settings(self.tuning.config, self._folder / FILE_NAME)
        self._take(self.tuning.config)
        return f"Saved {path}; the sliders have these settings."

    def export(self) -> list[Path]:
        """Write all trials as CSV, and the picture; returns the files."""
        return export(self._folder / "exports", "tune", self.tuning.trials, self._figure)


def readout_of(tuning: Tuning) -> str:
    """Return a search's sentence, and the settings that are not as they were, HTML."""
    start, taken = HeuristicConfig().to_dict(), tuning.config.to_dict()
    changed = [
        (SETTINGS[n].label, f"{start[n]:g}", f"{value:g}", SETTINGS[n].unit)
        for n, value in taken.items()
        if value != start[n]
    ]
    lead = f"<b>{html.escape(tuning.sentence)}</b>"
    return lead + (small_table(("setting", "default", "found", ""), changed) if changed else "")

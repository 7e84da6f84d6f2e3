"""The page of `make app`: Decisions, Replay, Tune and Live as tabs of one set of settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
from IPython.display import HTML, display

from kvttl import data_folder, user_path
from kvttl.decisions.log import read_records
from kvttl.decisions.sample import latest_log, settings_of
from kvttl.sliders.controls import warning
from kvttl.sliders.explorer import Explorer
from kvttl.sliders.live_tab import LiveTab
from kvttl.sliders.panel import SettingsPanel

_WEB = Path(__file__).parent / "web"
SERVER = "http://127.0.0.1:8081"  # of `make up`: server_http_port of config.yaml
_TRACES = ("*.jsonl*", "*/*.jsonl*", "*.parquet", "*/*.parquet")  # under KV_TRACE_DIR


class Page(widgets.Tab):
    """All tabs; each is made when it is first opened. Settings go along from tab to tab.

    Parameters
    ----------
    data : str or Path, optional
        The folder of runs, settings and exports; default `kvttl.data_folder()`.
    url : str
        Of the server that Live looks at first.
    """

    def __init__(self, data: str | Path | None = None, url: str = SERVER) -> None:
        self.data = user_path(data or data_folder())
        log = user_path(latest_log(self.data))
        run = {"source": f"{log.parent.name}/{log.name}", "run_config": settings_of(log)}
        self.explorer = Explorer(read_records(log), data_folder=self.data, **run)
        self._make: dict[str, Callable[[], widgets.Widget]] = {
            "Decisions": lambda: self.explorer,
            "Replay": self._replay,
            "Tune": self._tune,
            "Live": lambda: LiveTab(url, self.data / "exports"),
        }
        self._made: dict[str, widgets.Widget] = {"Decisions": self.explorer}
        self._settings = self.explorer
        waiting = [widgets.HTML("Loading ...") for _ in self._make]
        super().__init__([self.explorer, *waiting[1:]], titles=list(self._make), selected_index=0)
        self.add_class("kv-page")
        self.observe(self._selected, "selected_index")

    def tab(self, name: str) -> widgets.Widget:
        """Return a tab's widget; the first call makes it."""
        if name not in self._made:
            try:
                made = self._made[name] = self._make[name]()
            except (OSError, ValueError) as error:  # such as tariffs.yaml; opening it tries again
                made = widgets.HTML(warning(str(error)))
            at = list(self._make).index(name)
            self.children = [*self.children[:at], made, *self.children[at + 1 :]]
        return self.children[list(self._make).index(name)]

    def _selected(self, change):
        tab = self.tab(list(self._make)[change["new"]])
        if live := self._made.get("Live"):
            live.follow() if tab is live else live.rest()
        if isinstance(tab, SettingsPanel):
            if tab.values != self._settings.values:
                tab.update(**self._settings.values)
            self._settings = tab

    def _replay(self):
        from kvttl.sliders.replay_tab import ReplayTab  # what it compiles would delay the page

        return ReplayTab(self._traces(), self._settings.config, folder=self.data / "exports")

    def _tune(self):
        from kvttl.sliders.tune_tab import TuneTab

        return TuneTab(self._traces(), self._take, self.data)

    def _take(self, config):
        for tab in self._made.values():
            if isinstance(tab, SettingsPanel):
                tab.update(**config.to_dict())

    def _traces(self):
        home = os.environ.get("KV_TRACE_DIR")
        found = [f for kind in _TRACES for f in sorted(user_path(home).glob(kind))] if home else []
        return {"sample": self.data / "sample_trace.jsonl.gz"} | {
            f"{file.parent.name}/{file.name}": file for file in found
        }


def show_page(data: str | Path | None = None) -> Page:
    """Return the page, after its style and what makes it speak to screen readers."""
    style, script = ((_WEB / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    display(HTML(f"<style>{style}</style><script>{script}</script>"))
    return Page(data)

"""Figures look alike whatever style their reader has chosen, in files and on the screen."""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from cycler import cycler
from IPython.core.pylabtools import print_figure
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from caching_heuristics import HeuristicConfig
from kvttl.agents.loop import LoopRun, plot_chunks
from kvttl.bench.speedup_report import picture, read_report
from kvttl.decisions.log import DecisionRecord
from kvttl.plots.decision_plots import plot_session, plot_timeline
from kvttl.plots.export import all_figures
from kvttl.plots.learned import hazard_table, watch
from kvttl.plots.learned_plots import plot_hazards, plot_life, plot_price, plot_settings
from kvttl.plots.replay_plots import (
    plot_over_time,
    plot_policies,
    plot_published,
    plot_trade_off,
)
from kvttl.replay import index_runs, replay_without_capacity
from kvttl.replay.tables import policy_table, trade_off
from kvttl.session.sample import sample_records
from kvttl.sliders.explorer import Explorer
from kvttl.sliders.replay_tab import ReplayTab
from kvttl.traces.reading import read_trace

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sample_records()

# As bad as it gets: no text, or text far too large, or none that can be set without LaTeX.
HOSTILE = {
    **{"text.usetex": True, "font.size": 31, "text.color": "none", "axes.labelcolor": "none"},
    **{"savefig.facecolor": "black", "savefig.transparent": True, "savefig.bbox": "tight"},
    **{"figure.facecolor": "black", "figure.dpi": 30, "savefig.dpi": 20, "font.family": "serif"},
    **{"lines.linewidth": 20, "path.sketch": (1, 100, 2), "axes.unicode_minus": False},
    **{"axes.prop_cycle": cycler(color=["white"]), "xtick.labelsize": 1, "svg.fonttype": "none"},
    **{"axes.formatter.use_locale": True, "legend.facecolor": "black", "pdf.fonttype": 3},
}
STYLES = ["dark_background", "Solarize_Light2", HOSTILE]


@cache
def replayed():
    """What the figures of replays show."""
    index = index_runs(read_trace(ROOT / "data" / "sample_trace.jsonl.gz"))
    result = replay_without_capacity(index, HeuristicConfig(base_ttl=60))
    table = policy_table(index, policies=["lru", "optimal"], shares=(0.01, 0.1))
    seen = watch(index.trace.head(200), 0.1)
    return index.trace, result, table, trade_off(index, base_ttls_s=(10, 100)), seen


def published():
    """A table as notebook 10 makes it: ours on their file, ours on other traffic, a multiple."""
    rows = {"theirs": [0.4, 0.6, 5.0], "ours": [0.41, 0.9, 9.0], "ratio": [1.02, None, None]}
    return pd.DataFrame(rows | {"measure": ["lru", "idle", "memory"]}, index=["a", "b", "c"])


def pictures(folder):
    """Every figure of the kit, as it is saved and as a notebook shows it."""
    config = HeuristicConfig(hot_threshold=9.0)
    uses = [record for record in RECORDS if record.kind == "generation"][:12]
    uses = [replace(use, chunk_keys=(f"k{i}",)) for i, use in enumerate(uses)]
    trace, result, table, sweep, seen = replayed()
    seeds, _ = read_report(ROOT / "data" / "reports")
    snapshots = [(0.0, {}), (9.0, {"k0": "gpu", "k1": "disk"})]
    made = all_figures(config, RECORDS) | {
        "plot_session": plot_session(uses),
        "plot_over_time": plot_over_time(result),
        "plot_trade_off": plot_trade_off(sweep, result),
        "plot_policies": plot_policies(table),
        "plot_published": plot_published(published(), "a finding"),
        "plot_hazards": plot_hazards(hazard_table(seen)),
        "plot_life": plot_life(seen),
        "plot_price": plot_price(seen),
        "plot_settings": plot_settings(seen, 0.1),
        "picture": picture(seeds),
        "plot_chunks": plot_chunks(LoopRun(0.0, uses, turns(uses), snapshots)),
    }
    found = {}
    for name, figure in made.items():
        found[name, "shown"] = print_figure(figure)
    made["ttl_curves"].savefig(folder / "saved.png")
    found["ttl_curves", "saved"] = (folder / "saved.png").read_bytes()
    explorer = Explorer(RECORDS, config, data_folder=folder)
    found["Explorer", "first"] = explorer.image.value
    explorer.update(alpha=0.7, base_ttl=1e6)
    found["Explorer", "moved"] = explorer.image.value
    found["ReplayTab", "first"] = ReplayTab({"sample": trace}, folder=folder).image.value
    return found


def turns(records):
    return {record.prompt_digest: ("planner", "code", 1) for record in records}


@pytest.fixture(scope="module")
def plain_pictures(tmp_path_factory):
    with matplotlib.style.context("default"):
        return pictures(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s if isinstance(s, str) else "hostile")
def test_figures_look_alike_in_every_style(style, plain_pictures, tmp_path):
    with matplotlib.style.context(["default", style]):
        before = dict(matplotlib.rcParams)
        found = pictures(tmp_path)
        assert dict(matplotlib.rcParams) == before  # the user's own figures keep theirs
    assert [name for name in plain_pictures if found[name] != plain_pictures[name]] == []


def test_every_function_that_makes_a_figure_does_it_in_its_own_style():
    made, without = 0, []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "open_axes":
                calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
                if calls & {"open_axes", "OwnFigure", "Figure", "plt.figure", "plt.subplots"}:
                    made += 1
                    styled = "own_style()" in map(ast.unparse, node.decorator_list)
                    without += [] if styled and "Figure" not in calls else [f"{path}: {node.name}"]
    assert made >= 12 and without == []


def luminance(colour):
    """WCAG's relative luminance of an RGB colour, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def colour_of(key):
    return key.get_facecolor() if hasattr(key, "get_facecolor") else key.get_color()


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_texts_and_marks_stand_out_from_what_is_behind_them():
    with matplotlib.style.context("dark_background"):
        figures = all_figures(HeuristicConfig(hot_threshold=9.0), RECORDS)
        figures["session"] = plot_session(RECORDS)
        for name, figure in figures.items():
            figure.draw_without_rendering()
            paper = figure.get_facecolor()
            texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
            assert texts and {text.get_usetex() for text in texts} == {False}
            assert min(contrast(to_rgb(text.get_color()), paper) for text in texts) >= 4.5, name
            for axes in figure.axes:
                assert contrast(axes.get_facecolor(), paper) == 1.0
            keys = [h for legend in figure.legends for h in legend.legend_handles]
            assert all(contrast(to_rgb(colour_of(key)), paper) > 1.5 for key in keys), name


def test_letters_that_the_kits_font_lacks_come_from_the_users(tmp_path):
    log = [DecisionRecord(s, "a", 64, ttl_s=9.0, wanted_tier="gpu") for s in (0.0, 9.0)]
    script = "\u2312\u2313"  # for which DejaVu Sans has no glyph, and STIX has
    missing = {}
    for fonts in ("DejaVu Sans", "STIXGeneral"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with matplotlib.rc_context({"font.sans-serif": [fonts]}):
                plot_timeline(log, [script] * 2).savefig(tmp_path / "a.png")
        missing[fonts] = [each for each in said if "missing from" in str(each.message)]
    assert missing["DejaVu Sans"] and not missing["STIXGeneral"]

"""Names in any alphabet, and paths as people write them, wherever the kit takes one."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from caching_heuristics import HeuristicConfig
from kvttl.decisions.log import DecisionLog, read_records, write_records
from kvttl.decisions.sample import latest_log, settings_of
from kvttl.plots.decision_plots import plot_timeline
from kvttl.plots.export import export_plots
from kvttl.replay.tables import export
from kvttl.serve import gateway
from kvttl.session.sample import sample_records
from kvttl.settings import default_path, load_settings, save_settings
from kvttl.sliders.explorer import Explorer
from kvttl.stack.config import load_config
from kvttl.traces.reading import read_trace
from tiered_caching import LocalDiskBackend

ROOT = Path(__file__).resolve().parents[1]
WRONG_NAMES = [
    *("", " ", ".", "..", "../up", "/tmp/x", "a/b", "a\\b", "a:b", "a*", "<a>"),
    *(".hidden", "run.", "run. ", " run", "run\u3000", "-rf"),
    *("a\n", "a\tb", "a\0b", "a\x7fb", "a\u202eb", "\ufeffa", "a\u2028b", "a\ud800"),
    *("x" * 81, "𝄞" * 61, "実" * 81),  # characters, bytes
    *("CON", "nul", "Aux.txt", "com1", "LPT9.a.b", "COM¹", "prn .txt", "CONIN$"),
]
RIGHT_NAMES = [
    *("Übung", "实验1", "run 实验1", "опыт", "تجربة", "प्रयोग", "می\u200cخواهم", "ทดลอง", "é", "😀"),
    *("run (2)", "50 % & more", "a.b-c_d", "_a", "~a", "console", "com10"),
    *("x" * 80, "実" * 80, "𝄞" * 60),
]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_an_exports_name_is_one_that_every_system_can_open(name, tmp_path):
    with pytest.raises(ValueError, match="the export's name must be letters, .*, got"):
        export_plots(tmp_path, name, {}, HeuristicConfig())
    with pytest.raises(ValueError, match="the export's name must be letters"):
        export(tmp_path, name, pd.DataFrame([{"a": 1}]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_figures_name_stays_in_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match="the figure's name must be letters"):
        export_plots(tmp_path, "a", {name: plot_timeline([])}, HeuristicConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RIGHT_NAMES)
def test_names_in_any_alphabet(name, tmp_path):
    for form in ("NFC", "NFD"):  # macOS types the latter
        (path,) = export_plots(tmp_path, unicodedata.normalize(form, name), {}, HeuristicConfig())
        (table,) = export(tmp_path, unicodedata.normalize(form, name), pd.DataFrame([{"a": 1}]))
    assert path.parent.name == name and table.name == f"{name}.csv"
    assert {each.name for each in tmp_path.iterdir()} == {name, f"{name}.csv"}


def test_a_home_is_a_home_wherever_a_path_is_given(tmp_path, monkeypatch):
    records = sample_records()
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    config = HeuristicConfig(alpha=0.5)
    (path,) = export_plots("~/exports", "a", {}, config)
    assert path == home / "exports" / "a" / "settings.json"
    assert export("~/exports", "b", pd.DataFrame([{"a": 1}])) == [home / "exports" / "b.csv"]
    assert save_settings(config, "~/data/mine.yaml") == home / "data" / "mine.yaml"
    assert load_settings("~/data/mine.yaml") == config
    monkeypatch.setenv("KV_HEURISTICS_FILE", "~/data/mine.yaml")
    assert load_settings() == config
    with DecisionLog("~/data/runs/one") as log:
        log.append(records[0])
    assert list(read_records("~/data/runs/one")) == records[:1]
    assert latest_log("~/data") == home / "data" / "runs" / "one"
    assert write_records("~/more.jsonl", records[:2]) == 2
    explorer = Explorer([], data_folder="~/data")
    assert explorer.save() == home / "data" / "heuristics.yaml"
    assert explorer.export("c")[0].parent == home / "data" / "exports" / "c"
    assert settings_of("~/data") == explorer.config
    LocalDiskBackend("~/warm").set("key", 1, ttl=60)
    shutil.copy(ROOT / "data" / "sample_trace.jsonl.gz", home)
    assert read_trace("~/sample_trace.jsonl.gz").requests == 600
    (home / "kit.yaml").write_text("stack:\n  disk_path: ~/disk\n  run_dir: rel\n")
    stack = load_config("~/kit.yaml")
    assert (stack.disk_path, stack.run_dir) == (str(home / "disk"), str(home / "rel"))
    (home / "key").write_text("sesame")
    command = gateway._options(["--api-key-file", "~/key", "--log", "~/log"])
    assert (command.api_key_file, command.log) == (home / "key", home / "log")
    assert not list(here.iterdir())
    with pytest.raises(ValueError, match="'~nobody-of-this-name/x' names a user without a home"):
        export_plots("~nobody-of-this-name/x", "a", {}, config)


def test_settings_are_found_from_a_folder_that_is_no_checkout(tmp_path, monkeypatch):
    """Also where another project has a `data/`: what is saved in the kit's counts there too."""
    monkeypatch.delenv("KV_HEURISTICS_FILE", raising=False)
    (tmp_path / "kit" / "data").mkdir(parents=True)
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.setattr("kvttl.settings.PROJECT", tmp_path / "kit")
    monkeypatch.chdir(tmp_path / "kit")
    save_settings(HeuristicConfig(alpha=0.7))
    for folder in (tmp_path / "here", tmp_path, tmp_path / "kit"):
        monkeypatch.chdir(folder)
        assert load_settings().alpha == 0.7
    monkeypatch.chdir(tmp_path / "here")
    Path("data", "heuristics.yaml").write_text("alpha: 0.9\n")
    assert load_settings().alpha == 0.9 and default_path() == Path("data", "heuristics.yaml")

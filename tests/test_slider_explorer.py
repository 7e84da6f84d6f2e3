"""The sliders without a browser: what they set, show, refuse, save and export."""

from __future__ import annotations

import asyncio
import io
import json
import random
from dataclasses import fields

import ipywidgets as widgets
import numpy as np
import pytest
from PIL import Image

from caching_heuristics import SETTINGS, HeuristicConfig
from kvttl.decisions.sample import settings_of
from kvttl.plots import what_if
from kvttl.plots.what_if import changes, decisions_of
from kvttl.session.sample import sample_records
from kvttl.settings import default_path, load_settings, save_settings, to_yaml
from kvttl.sliders.explorer import PRESETS, Explorer


@pytest.fixture(scope="module")
def records():
    return sample_records()


@pytest.fixture
def explorer(records, tmp_path):
    return Explorer(records, data_folder=tmp_path, clock=lambda: 0.0)


def drawn_ttls(explorer):
    """What the picture's curves show: (perplexity, variance) -> TTL at access count 0."""
    return [float(line.get_ydata()[0]) for line in explorer._picture.ttl.lines]


# --- settings and picture -----------------------------------------------------------------


def test_there_is_a_control_for_every_setting(explorer):
    names = [field.name for field in fields(HeuristicConfig)]
    assert list(explorer.controls) == names == list(explorer.values)
    assert explorer.values == HeuristicConfig().to_dict()


def test_times_have_log_sliders(explorer):
    for name in ("base_ttl", "min_ttl", "max_ttl", "recent_seconds"):
        assert isinstance(explorer.controls[name].slider, widgets.FloatLogSlider)


def test_the_plain_function_sets_draws_and_tells(explorer, records):
    before = explorer.image.value, explorer.readout.value
    config = explorer.update(alpha=0.5, base_ttl=400.0, hot_threshold=9.0)
    assert config == explorer.config == HeuristicConfig(alpha=0.5, base_ttl=400, hot_threshold=9)
    assert explorer.image.value != before[0] and explorer.readout.value != before[1]
    assert drawn_ttls(explorer)[0] == pytest.approx(400 * (1 + 0.24 * 25 / 35))
    found = changes(decisions_of(records), config, HeuristicConfig())
    assert f"<b>{found.changed} of 76 decisions change tier: gpu→disk" in explorer.readout.value
    for value in found.after_token_s / 1e6:
        assert f"→ {value:,.2f}<" in explorer.readout.value


def test_a_step_decides_once(explorer):
    before = what_if._decide.cache_info().misses
    explorer.update(alpha=0.7)
    assert what_if._decide.cache_info().misses == before + 1


def test_every_setting_changes_the_picture_or_the_readout(explorer):
    for name, value in HeuristicConfig().to_dict().items():
        before = explorer.image.value, explorer.readout.value
        other = {"min_ttl": 4000.0, "max_ttl": 3000.0}.get(name, value * 0.6)
        explorer.update(**{name: other})
        assert not explorer.errors
        assert (explorer.image.value, explorer.readout.value) != before, name
        explorer.reset()


def test_what_is_redrawn_in_place_equals_what_is_drawn_anew(explorer):
    rng = random.Random(0)
    for _ in range(30):
        explorer.update(
            base_ttl=10 ** rng.uniform(0, 6),
            alpha=rng.random(),
            gamma=rng.random(),
            hot_threshold=10 ** rng.uniform(0, 1.5),
            cold_threshold=10 ** rng.uniform(1.5, 3),
            variance_threshold=rng.random(),
            recent_seconds=10 ** rng.uniform(0, 6),
        )
        assert not explorer.errors
        kept = explorer.image.value
        explorer._picture._draw_background()
        assert explorer._picture.png() == kept


def test_the_picture_is_an_image_and_nothing_piles_up(explorer):
    def everything(widget):
        return [widget] + [
            w for child in getattr(widget, "children", ()) for w in everything(child)
        ]

    before = everything(explorer)
    for step in range(40):
        explorer.controls["alpha"].slider.value = step / 50
    assert everything(explorer) == before
    assert not any(isinstance(widget, widgets.Output) for widget in before)
    assert Image.open(io.BytesIO(explorer.image.value)).size == (960, 590)


def test_without_a_run_there_is_nothing_to_compare(tmp_path):
    explorer = Explorer([], data_folder=tmp_path)
    explorer.update(alpha=1.0)
    assert "no run to compare" in explorer.readout.value


def test_unknown_settings_are_a_programming_error(explorer):
    with pytest.raises(TypeError, match="no such setting: alhpa"):
        explorer.update(alhpa=1.0)


# --- sliders and entries ------------------------------------------------------------------


def test_slider_and_entry_follow_each_other(explorer):
    control = explorer.controls["base_ttl"]
    control.slider.value = 123.4567
    assert control.entry.value == explorer.config.base_ttl == 123.0
    control.entry.value = 456.789
    assert control.slider.value == explorer.config.base_ttl == 456.789


def test_an_entry_may_go_beyond_the_slider(explorer):
    control = explorer.controls["base_ttl"]
    control.entry.value = 5e6
    assert control.slider.value == pytest.approx(604_800)
    assert explorer.config.base_ttl == 5e6


def test_the_browsers_rounding_is_not_a_change(explorer):
    """Chromium answers 3600 s with the nearest step of a log slider, 3631 s."""
    drawn = explorer.drawn
    explorer.controls["base_ttl"].slider.value = 10**3.56
    explorer.controls["alpha"].slider.value = 0.2549
    assert explorer.drawn == drawn and explorer.config == HeuristicConfig()


def test_not_a_number_is_no_setting(explorer):
    explorer.controls["alpha"].entry.value = float("nan")
    explorer.controls["alpha"].entry.value = float("inf")
    assert explorer.config == HeuristicConfig()


def test_settings_beyond_the_sliders_can_be_opened(records, tmp_path):
    config = HeuristicConfig(base_ttl=3e7, max_ttl=9e8, recent_seconds=0.0)
    assert Explorer(records, config, tmp_path).config == config


# --- invalid combinations -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hot_threshold": 60.0}, {"hot_threshold", "cold_threshold"}),
        ({"cold_threshold": 10.0}, {"hot_threshold", "cold_threshold"}),
        ({"min_ttl": 1e6}, {"min_ttl", "max_ttl"}),
        ({"max_ttl": 10.0}, {"min_ttl", "max_ttl"}),
        ({"base_ttl": -1.0}, {"base_ttl"}),
        ({"gamma": 1.5}, {"gamma"}),
        ({"variance_threshold": 7.0}, {"variance_threshold"}),
        ({"disk_ttl_factor": 0.0}, {"disk_ttl_factor"}),
    ],
)
def test_invalid_combinations_are_shown_at_the_control(explorer, settings, named):
    good = explorer.update(alpha=0.4)
    picture, told = explorer.image.value, explorer.readout.value
    for name, value in settings.items():
        explorer.controls[name].entry.value = value
    assert explorer.config == good
    assert (explorer.image.value, explorer.readout.value) == (picture, told)
    shown = {n for n, c in explorer.controls.items() if c.message.layout.display != "none"}
    assert shown == set(explorer.errors) == named
    assert all("⚠" in explorer.controls[name].message.value for name in named)
    explorer.undo()
    assert explorer.config == good and not explorer.errors
    assert all(c.message.layout.display == "none" for c in explorer.controls.values())


def test_any_sequence_of_entries_leaves_a_valid_picture(explorer):
    rng = random.Random(1)
    for _ in range(150):
        control = rng.choice(list(explorer.controls.values()))
        control.entry.value = rng.choice([-1.0, 0.0, 0.3, 1.0, 20.0, 700.0, 1e6, 1e300])
        try:
            expected = HeuristicConfig(**explorer.values)
        except ValueError:
            assert explorer.errors
        else:
            assert explorer.config == expected and not explorer.errors
        assert np.isfinite(drawn_ttls(explorer)).all()


# --- dragging -----------------------------------------------------------------------------


def test_in_a_kernel_stale_redraws_are_dropped(explorer):
    async def drag():
        drawn = explorer.drawn
        for step in range(200):  # as many messages as wait when the kernel was busy
            explorer.controls["alpha"].slider.value = step / 100
        assert explorer.drawn == drawn  # the handler itself is fast
        for _ in range(20):  # turns of the kernel's loop: drawn in one, and in no other
            await asyncio.sleep(0)
            assert explorer.drawn == drawn + 1

    asyncio.run(drag())
    assert explorer.config.alpha == 1.99
    assert drawn_ttls(explorer)[0] == HeuristicConfig(alpha=1.99).ttl({"perplexity": 5.0})


def test_a_call_draws_at_once_and_cancels_what_was_waiting(explorer):
    async def mix():
        explorer.controls["alpha"].slider.value = 1.0
        drawn = explorer.drawn
        explorer.update(gamma=0.3)
        assert explorer.drawn == drawn + 1
        for _ in range(20):
            await asyncio.sleep(0)
            assert explorer.drawn == drawn + 1

    asyncio.run(mix())
    assert (explorer.config.alpha, explorer.config.gamma) == (1.0, 0.3)


# --- undo, reset, presets -----------------------------------------------------------------


def test_a_drag_is_undone_as_one(records, tmp_path):
    now = [0.0]
    explorer = Explorer(records, data_folder=tmp_path, clock=lambda: now[0])
    for name in ("alpha", "gamma", "alpha"):
        for step in range(1, 20):
            now[0] += 0.05
            explorer.controls[name].slider.value = step * 0.025
    now[0] += 2.0  # a pause: another drag
    explorer.controls["alpha"].slider.value = 2.0
    states = []
    for _ in range(5):
        states.append((explorer.config.alpha, explorer.config.gamma))
        explorer.undo()
    assert states == [(2.0, 0.475), (0.475, 0.475), (0.475, 0.475), (0.475, 1.0), (0.25, 1.0)]


def test_a_drag_is_one_change_also_where_drawing_is_slow(records, tmp_path, monkeypatch):
    now_s = [0.0]
    explorer = Explorer(records, data_folder=tmp_path, clock=lambda: now_s[0])

    def draws_for_two_seconds(config):
        now_s[0] += 2.0
        return b""

    monkeypatch.setattr(explorer._picture, "of", draws_for_two_seconds)
    for step in range(1, 9):
        explorer.controls["alpha"].slider.value = step * 0.1
    explorer.undo()
    assert explorer.config.alpha == 0.25


def test_undo_has_an_end(explorer):
    for step in range(150):
        explorer.update(alpha=step / 100)
    for _ in range(200):
        explorer.undo()
    assert explorer.config.alpha == 0.49  # the last hundred can be taken back


def test_presets_are_valid_and_set_every_control(explorer):
    for name, settings in PRESETS.items():
        explorer.update(gamma=0.1)
        assert explorer.apply_preset(name) == HeuristicConfig(**settings)
        assert explorer.values == HeuristicConfig(**settings).to_dict()
    assert HeuristicConfig(**PRESETS["Busy traffic"]).base_ttl == 200


def test_reset_goes_back_to_what_was_opened(records, tmp_path):
    save_settings(HeuristicConfig(alpha=0.7), tmp_path / "heuristics.yaml")
    explorer = Explorer(records, data_folder=tmp_path)
    explorer.apply_preset("Keep long")
    explorer.reset()
    assert explorer.config == HeuristicConfig(alpha=0.7)


# --- take it along ------------------------------------------------------------------------


def press(explorer, text):
    def buttons(widget):
        if isinstance(widget, widgets.Button):
            yield widget
        for child in getattr(widget, "children", ()):
            yield from buttons(child)

    next(b for b in buttons(explorer) if b.description == text).click()


def test_saved_settings_are_those_of_the_next_explorer(explorer, records, tmp_path):
    explorer.update(alpha=0.61, base_ttl=200.0, hot_threshold=12.5)
    press(explorer, "Save settings")
    assert "Saved" in explorer.status.value
    assert load_settings(tmp_path / "heuristics.yaml") == explorer.config
    again = Explorer(records, data_folder=tmp_path)
    assert again.values == explorer.values and again.image.value == explorer.image.value


def test_while_invalid_the_last_valid_settings_are_saved(explorer, tmp_path):
    explorer.controls["hot_threshold"].entry.value = 99.0
    press(explorer, "Save settings")
    assert "last valid settings; see hot_threshold" in explorer.status.value
    assert load_settings(tmp_path / "heuristics.yaml") == HeuristicConfig()


def test_the_export_button_writes_the_plots(explorer, tmp_path):
    explorer.update(alpha=0.61)
    explorer.name.value = "my paper"
    press(explorer, "Export plots")
    assert "Exported 19 files" in explorer.status.value
    sidecar = json.loads((tmp_path / "exports" / "my paper" / "settings.json").read_text())
    assert sidecar["settings"]["alpha"] == 0.61 and sidecar["decisions"] == 76


def test_what_cannot_be_written_is_said_and_never_raised(explorer, tmp_path):
    explorer.name.value = "../elsewhere"
    press(explorer, "Export plots")
    assert "must be letters" in explorer.status.value and "⚠" in explorer.status.value
    (tmp_path / "exports").write_text("a file in the way")
    explorer.name.value = "fine"
    press(explorer, "Export plots")
    assert "⚠" in explorer.status.value
    (tmp_path / "heuristics.yaml").mkdir()
    press(explorer, "Save settings")
    assert "⚠" in explorer.status.value


# --- the settings file --------------------------------------------------------------------


def test_settings_survive_the_file_exactly(tmp_path):
    rng = random.Random(2)
    for _ in range(50):
        config = HeuristicConfig(
            base_ttl=10 ** rng.uniform(-3, 12), alpha=rng.random(), gamma=rng.random() * 1e-7
        )
        path = save_settings(config, tmp_path / "heuristics.yaml")
        assert load_settings(path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["heuristics.yaml"]  # no scratch file


def test_every_setting_has_its_comment():
    lines = to_yaml(HeuristicConfig()).splitlines()[1:]
    assert len(lines) == len(fields(HeuristicConfig)) and all("  # " in line for line in lines)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", HeuristicConfig()),
        ("# nothing yet\n", HeuristicConfig()),
        ("alpha: 1", HeuristicConfig(alpha=1)),
        ("base_ttl: 1e3", HeuristicConfig(base_ttl=1000.0)),  # text in YAML 1.1
    ],
)
def test_fields_left_out_have_their_defaults(text, config, tmp_path):
    (tmp_path / "h.yaml").write_text(text)
    assert load_settings(tmp_path / "h.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha: -1", "alpha must be >= 0 and finite, got -1"),
        ("gamma: 2", "gamma must be 0..1, got 2"),
        ("hot_threshold: 60", r"hot_threshold must be > 0 and <= cold_threshold \(50.0\), got 60"),
        ("base_ttl: .nan", "base_ttl must be > 0 and finite"),
        ("base_ttl: soon", "base_ttl must be a number .* got 'soon'"),
        ("base_ttl: true", "base_ttl must be a number .* got True"),
        ("alpha: null", "alpha must be a number"),
        ("base_tll: 5", "unknown setting 'base_tll': did you mean 'base_ttl'"),
        ("1: 5", "unknown setting 1: known are"),
        ("just text", "must hold `name: number` lines, got 'just text'"),
        ("- 1\n- 2", "must hold `name: number` lines"),
        ("alpha: [1", "not valid YAML"),
        ("alpha: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_field_value_and_range(text, message, tmp_path):
    path = tmp_path / "h.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_or_a_binary_file_is_an_error_too(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(ValueError, match="cannot be read|not valid YAML"):
            load_settings(path)


def test_the_default_place_is_found_from_the_notebooks_too(tmp_path, monkeypatch):
    monkeypatch.setenv("KV_HEURISTICS_FILE", str(tmp_path / "elsewhere.yaml"))
    assert default_path() == tmp_path / "elsewhere.yaml"
    monkeypatch.delenv("KV_HEURISTICS_FILE")
    (tmp_path / "data").mkdir()
    (tmp_path / "notebooks").mkdir()
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        assert load_settings() == HeuristicConfig()
        assert default_path().resolve() == tmp_path / "data" / "heuristics.yaml"
    save_settings(HeuristicConfig(alpha=0.9))
    monkeypatch.chdir(tmp_path)
    assert load_settings().alpha == 0.9


def test_each_setting_says_what_it_is_and_has_its_default_on_the_slider():
    for name, setting in SETTINGS.items():
        low, high = setting.slider
        assert low <= getattr(HeuristicConfig(), name) <= high <= setting.high, name
        assert f"{name}: " in to_yaml(HeuristicConfig()) and setting.label and setting.text


def test_the_runs_own_ladder_is_the_before_whatever_was_saved_since(records, tmp_path):
    before = Explorer(records, HeuristicConfig(), tmp_path).readout.value
    saved = HeuristicConfig(disk_ttl_factor=40.0)
    opened = Explorer(records, saved, tmp_path, run_config=HeuristicConfig())
    opened.update(disk_ttl_factor=4.0)
    assert opened.readout.value == before
    folder = tmp_path / "run"
    save_settings(saved, folder / "heuristics.yaml")
    assert settings_of(folder) == saved
    assert settings_of(tmp_path / "sample.jsonl") == HeuristicConfig()

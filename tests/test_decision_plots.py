"""Figures show what the formula and the log say: drawn data against values computed here."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.decisions.log import DecisionRecord, read_records
from kvttl.decisions.sample import latest_log
from kvttl.plots.decision_plots import (
    decision_distributions,
    plot_session,
    plot_timeline,
    tier_map,
    ttl_curves,
    ttl_surface,
)
from kvttl.plots.export import all_figures, export_plots
from kvttl.plots.panels import TIER_COLOURS, duration
from kvttl.plots.what_if import changes, decisions_of, held_seconds
from kvttl.session.sample import sample_records

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [
    HeuristicConfig(),
    HeuristicConfig(base_ttl=200, alpha=1.3, gamma=0.4, hot_threshold=8, cold_threshold=120),
    HeuristicConfig(min_ttl=3000, max_ttl=4000, variance_threshold=0.2, recent_seconds=60),
]


def formula(config, perplexity, variance, count):
    """The TTL in seconds, straight from the design notes, in plain Python."""
    ttl_s = config.base_ttl * (1 + config.alpha * math.log(1 + count))
    ttl_s *= 1 + 0.24 * (30 - perplexity) / (30 + perplexity)
    ttl_s *= 1 - config.gamma * variance
    return min(max(ttl_s, config.min_ttl), config.max_ttl)


def rule(config, perplexity, variance=0.0, since_s=0.0):
    """The tier, straight from the design notes."""
    if perplexity > config.cold_threshold:
        return "remote"
    if variance >= config.variance_threshold:
        return "disk"
    hot = perplexity <= config.hot_threshold and since_s <= config.recent_seconds
    return "gpu" if hot else "disk"


@pytest.fixture(scope="module")
def records():
    return sample_records()


# --- TTL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_every_point_of_every_curve(config):
    axes = ttl_curves(config).axes[0]
    curves = [line for line in axes.lines if line.get_label().startswith("perplexity")]
    assert len(curves) == 8
    for line in curves:
        words = line.get_label().replace(",", "").split()
        perplexity, variance = float(words[1]), float(words[3])
        expected = [formula(config, perplexity, variance, n) for n in line.get_xdata()]
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
        assert line.get_linestyle() == ("-" if variance == 0 else "--")
        low, high = axes.get_ylim()
        assert low <= min(expected) and max(expected) <= high  # nothing is cut off
    assert len({line.get_color() for line in curves}) == 4


@pytest.mark.parametrize("config", CONFIGS)
def test_the_clamp_is_drawn(config):
    lines = {line.get_label(): line for line in ttl_curves(config).axes[0].lines}
    assert set(lines["min_ttl"].get_ydata()) == {config.min_ttl}
    assert set(lines["max_ttl"].get_ydata()) == {config.max_ttl}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_surface_is_the_formula(config):
    axes = ttl_surface(config, time_variance=0.1).axes[0]
    mesh = axes.collections[0]
    corners = mesh.get_coordinates()  # of the cells, shape (121, 121, 2)
    drawn = np.asarray(mesh.get_array()).reshape(120, 120)
    counts = np.geomspace(1, 1001, 120) - 1
    perplexities = np.geomspace(1, 1000, 120)
    for i, j in [(0, 0), (0, 119), (119, 0), (60, 30), (37, 101)]:
        expected = formula(config, perplexities[i], 0.1, counts[j])
        assert drawn[i, j] == pytest.approx(expected, rel=1e-12)
        (x0, y0), (x1, y1) = corners[i, j], corners[i + 1, j + 1]
        assert x0 <= counts[j] + 1 <= x1 and y0 <= perplexities[i] <= y1


def test_the_pinned_example_is_marked_with_its_ttl():
    axes = ttl_surface(HeuristicConfig()).axes[0]
    assert [(1.0, 15.0), (1.0, 12.5)] == [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines
    ]
    texts = [text.get_text() for text in axes.texts]
    assert "perplexity 15, variance 0.05: 3693.6 s" in texts


def test_a_flat_surface_can_be_drawn():
    figure = ttl_surface(HeuristicConfig(min_ttl=50.0, max_ttl=50.0))
    assert np.ptp(np.asarray(figure.axes[0].collections[0].get_array())) == 0


# --- tiers --------------------------------------------------------------------------------


def region_of(axes, x, y):
    """Colour of the region that covers a point."""
    regions = axes.collections[0]
    for path, colour in zip(regions.get_paths(), regions.get_facecolor()):
        (x0, y0), (x1, y1) = path.vertices.min(axis=0), path.vertices.max(axis=0)
        if x0 < x < x1 and y0 < y < y1:
            return tuple(colour)
    raise AssertionError(f"no region at {x}, {y}")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("against", ["time_variance", "seconds_since_access"])
def test_each_point_of_the_map_has_its_tiers_colour(config, against):
    axes = tier_map(config, against).axes[0]
    rng, colours = random.Random(0), {}
    for _ in range(500):
        perplexity = 10 ** rng.uniform(0, 3)
        y = rng.random() if against == "time_variance" else 10 ** rng.uniform(0, 6)
        point = {"variance": y} if against == "time_variance" else {"since_s": y}
        tier = rule(config, perplexity, **point)
        colours.setdefault(region_of(axes, perplexity, y), Counter())[tier] += 1
    assert [len(tiers) for tiers in colours.values()] == [1, 1, 1]  # one tier a colour
    assert {next(iter(tiers)) for tiers in colours.values()} == set(TIERS)


@pytest.mark.parametrize("config", CONFIGS)
def test_thresholds_are_lines_where_they_belong(config):
    by_variance = tier_map(config).axes[0].lines
    by_recency = tier_map(config, "seconds_since_access").axes[0].lines
    for lines in (by_variance, by_recency):
        assert set(lines[0].get_xdata()) == {config.hot_threshold}
        assert set(lines[1].get_xdata()) == {config.cold_threshold}
    assert set(by_variance[2].get_ydata()) == {config.variance_threshold}
    assert set(by_recency[2].get_ydata()) == {config.recent_seconds}


def test_dots_are_the_runs_decisions_and_changed_ones_have_a_rim(records):
    config = HeuristicConfig(hot_threshold=9.0)
    axes = tier_map(config, records=records).axes[0]
    dots = axes.collections[1]
    uses = [record for record in records if record.kind == "generation"]
    expected = [(r.metadata["perplexity"], r.metadata["time_variance"]) for r in uses]
    np.testing.assert_allclose(dots.get_offsets(), expected)
    colours = [to_hex(colour).upper() for colour in dots.get_facecolor()]
    assert colours == [TIER_COLOURS[record.wanted_tier].upper() for record in uses]
    rims = [to_hex(colour) == "#000000" for colour in dots.get_edgecolor()]
    assert rims == [
        record.wanted_tier != rule(config, *point, since_s=record.metadata["seconds_since_access"])
        for record, point in zip(uses, expected)
    ]
    assert 0 < sum(rims) < len(rims)


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match="against must be one of time_variance, seconds"):
        tier_map(HeuristicConfig(), "colour")


# --- a log --------------------------------------------------------------------------------


def test_distributions_count_every_decision(records):
    config = HeuristicConfig(hot_threshold=9.0, base_ttl=100.0)
    ttls, tiers = decision_distributions(records, config).axes
    uses = [record for record in records if record.kind == "generation"]
    counts = Counter(record.wanted_tier for record in uses)
    after = Counter(config.tier(record.metadata) for record in uses)
    assert [bar.get_height() for bar in tiers.patches[:3]] == [counts[tier] for tier in TIERS]
    assert [bar.get_height() for bar in tiers.patches[3:]] == [after[tier] for tier in TIERS]
    drawn = Counter()
    for bar in ttls.patches[:-1]:  # the last one is the outline
        tier = next(t for t in TIERS if to_hex(TIER_COLOURS[t]) == to_hex(bar.get_facecolor()))
        drawn[tier] += bar.get_height()
        inside = [r for r in uses if r.wanted_tier == tier]
        inside = [r for r in inside if bar.get_x() <= r.ttl_s < bar.get_x() + bar.get_width()]
        assert bar.get_height() == len(inside)
    assert drawn == counts


def use(time_s, digest, tier, ttl_s=100.0, **more):
    return DecisionRecord(time_s, digest, 64, ttl_s=ttl_s, wanted_tier=tier, **more)


def test_the_timeline_of_a_small_run():
    moved = ({"from": "gpu", "to": "disk", "status": "done", "moved_chunks": 2},)
    log = [
        use(1000.0, "a", "gpu"),
        use(1010.0, "b", "remote", ttl_s=20.0),
        use(1060.0, "a", "disk", moves=moved),
        use(1160.0, "a", "remote", kind="expiry", from_tier="disk", ttl_s=2400.0),
        DecisionRecord(1170.0, "b", kind="expiry", from_tier="remote"),
        use(1200.0, "c", "gpu", kind="claim"),  # no event of its own
    ]
    axes = plot_timeline(log, ["first", "second", "first", "first", "second", "third"]).axes[0]
    end_s = 170.0 * 1.03
    bars = {
        (round(bar.get_y() + bar.get_height() / 2), bar.get_x()): (
            to_hex(bar.get_facecolor()).upper(),
            bar.get_width(),
        )
        for bar in axes.patches
    }
    assert bars == {
        (0, 0.0): (TIER_COLOURS["gpu"], 60.0),  # until it is used again
        (0, 60.0): (TIER_COLOURS["disk"], 100.0),  # until its TTL has passed
        (0, 160.0): (TIER_COLOURS["remote"], pytest.approx(end_s - 160.0)),
        (1, 10.0): (TIER_COLOURS["remote"], 20.0),
    }
    marks = {line.get_marker(): line.get_xydata().tolist() for line in axes.lines}
    assert marks == {
        ".": [[0.0, 0.0], [10.0, 1.0], [60.0, 0.0]],
        "x": [[160.0, 0.0], [170.0, 1.0]],
    }
    (moves,) = axes.collections
    assert moves.get_offsets().tolist() == [[60.0, -0.32]]
    assert to_hex(moves.get_facecolor()[0]).upper() == TIER_COLOURS["disk"]
    assert axes.get_xlabel() == "time since start (s)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]


@pytest.mark.parametrize("plot", [plot_timeline, decision_distributions, plot_session])
def test_an_empty_log_can_be_drawn(plot, tmp_path):
    plot([]).savefig(tmp_path / "empty.png")


def test_axes_say_their_units(records):
    config = HeuristicConfig()
    for name, figure in all_figures(config, records).items():
        for axes in figure.axes:
            assert axes.get_ylabel(), name
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>", name
    assert "s, min, h, d" in ttl_curves(config).axes[0].get_ylabel()


def test_durations_read_well():
    shown = [duration(s) for s in (0.5, 1, 90, 3600, 3693.6, 86_400, 2_592_000)]
    assert shown == ["0.5 s", "1 s", "1.5 min", "1 h", "1.03 h", "1 d", "30 d"]


# --- what would change --------------------------------------------------------------------


def naive_changes(records, config, before):
    """Token-seconds by tier and moved prompts, one decision and one rung after the other."""
    uses = [record for record in records if record.kind == "generation"]
    moved, totals = Counter(), (Counter(), Counter())
    for index, record in enumerate(uses):
        later = [r.time_s for r in uses[index + 1 :] if r.prompt_digest == record.prompt_digest]
        until_s = later[0] - record.time_s if later else math.inf
        new = config.tier(record.metadata)
        moved[record.wanted_tier, new] += 1
        choices = ((record.wanted_tier, record.ttl_s), (new, config.ttl(record.metadata)))
        for total, (tier, ttl_s), factors in zip(totals, choices, (before, config)):
            passed_s, stay_s = 0.0, ttl_s
            for rung in TIERS[TIERS.index(tier) :]:
                if rung != tier:
                    stay_s = ttl_s * getattr(factors, f"{rung}_ttl_factor")
                held_s = max(min(stay_s, until_s - passed_s), 0.0)
                total[rung] += held_s * record.prompt_tokens
                passed_s += stay_s
    return moved, *totals


@pytest.mark.parametrize(
    "config", [*CONFIGS, HeuristicConfig(disk_ttl_factor=0.5, remote_ttl_factor=2.0)]
)
def test_changes_equal_a_naive_count(records, config):
    before = HeuristicConfig(disk_ttl_factor=3.0)
    found = changes(decisions_of(records), config, before)
    moved, old, new = naive_changes(records, config, before)
    for i, source in enumerate(TIERS):
        assert found.before_token_s[i] == pytest.approx(old[source])
        assert found.after_token_s[i] == pytest.approx(new[source])
        for j, target in enumerate(TIERS):
            assert found.moved[i, j] == moved[source, target]
    assert found.changed == sum(n for (a, b), n in moved.items() if a != b)


def test_a_longer_gap_never_holds_less():
    ttl_s, tier = np.full(50, 60.0), np.zeros(50, dtype=int)
    held = held_seconds(ttl_s, tier, np.linspace(0, 3000, 50)).sum(axis=0)
    assert (np.diff(held) >= 0).all() and held[0] == 0


def test_records_without_a_decision_do_not_count():
    log = [
        use(0.0, "a", "gpu"),
        DecisionRecord(1.0, "b", error="LMCache is away"),
        use(2.0, "a", "disk", kind="expiry"),
        use(3.0, "c", "gpu", metadata={"perplexity": "many"}),
        use(4.0, "d", "gpu", metadata={"perplexity": -1.0}),
        use(5.0, "e", "gpu", metadata={"perplexity": [12.0]}),
    ]
    decisions = decisions_of(log)
    assert len(decisions) == 1 and np.isnan(decisions.metadata["perplexity"][0])
    ttl_s, tier = decisions.decide(HeuristicConfig())  # nothing known: neutral, as live
    assert (ttl_s.tolist(), tier.tolist()) == ([3600.0], [0])


# --- files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory, records):
    config = CONFIGS[1]
    folder = tmp_path_factory.mktemp("exports")
    return config, folder, export_plots(folder, "a", all_figures(config, records), config, seed=3)


def test_an_export_has_every_figure_in_three_formats(exported):
    config, folder, paths = exported
    assert {path.parent for path in paths} == {folder / "a"}
    assert Counter(path.suffix for path in paths) == {".png": 6, ".svg": 6, ".pdf": 6, ".json": 1}
    sidecar = json.loads(paths[-1].read_text())
    assert sidecar["settings"] == config.to_dict() and sidecar["seed"] == 3
    assert sidecar["figures"] == [path.name for path in paths[:-1]]


def test_the_settings_are_inside_each_file(exported):
    config, _, paths = exported
    settings = json.dumps(config.to_dict(), sort_keys=True)
    for path in paths[:-1]:
        data = path.read_bytes()
        if path.suffix == ".png":
            image = Image.open(path)
            assert image.info["Settings"] == settings
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        elif path.suffix == ".svg":
            assert settings in data.decode().replace("&quot;", '"')
        else:
            assert b"/Keywords" in data and b'"alpha": 1.3' in data
            assert b"/CreationDate" not in data and b"/Type3" not in data


def test_equal_input_gives_equal_bytes(exported, records):
    config, folder, paths = exported
    again = export_plots(folder, "b", all_figures(config, records), config, seed=3)
    for one, other in zip(paths, again):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("name", ["", "../up", "/tmp/x", ".hidden", "a/b", "x" * 81, "a\n"])
def test_an_exports_name_is_a_plain_folder(name, tmp_path):
    with pytest.raises(ValueError, match="export's name"):
        export_plots(tmp_path, name, {}, HeuristicConfig())
    assert not list(tmp_path.iterdir())


# --- the sample ---------------------------------------------------------------------------


def test_the_shipped_sample_is_what_the_generator_makes(records):
    assert list(read_records(ROOT / "data" / "sample_decisions.jsonl")) == records


def test_the_sample_is_small_and_decided_by_the_heuristics(records):
    assert (ROOT / "data" / "sample_decisions.jsonl").stat().st_size < 110_000
    config, kinds = HeuristicConfig(), Counter(record.kind for record in records)
    assert kinds["generation"] >= 40 and kinds["expiry"] >= 5
    last = {}
    for record in records:
        if record.kind == "generation":
            m = record.metadata
            expected = formula(config, m["perplexity"], m["time_variance"], m["access_count"])
            assert record.ttl_s == pytest.approx(expected, abs=1e-3)
            assert record.wanted_tier == rule(
                config, m["perplexity"], m["time_variance"], m["seconds_since_access"]
            )
        else:  # the TTL before it has passed, one rung
            before = last[record.prompt_digest]
            assert record.time_s == pytest.approx(before.time_s + before.ttl_s, abs=0.01)
            assert record.from_tier == before.wanted_tier
        last[record.prompt_digest] = record


def test_a_long_timeline_keeps_the_prompts_used_most():
    log = [use(float(n), f"p{n % 300}", "gpu") for n in range(500)]  # p0 to p199 come twice
    axes = plot_timeline(log).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"p{n}" for n in range(200)]
    assert axes.get_ylabel() == "prompt (the 200 most used of 300)"


def test_the_newest_run_with_decisions_is_taken(tmp_path, records):
    assert latest_log(tmp_path) == tmp_path / "sample_decisions.jsonl"
    for number, name in enumerate(("old", "new", "empty")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for part in ("decisions-a.jsonl", "decisions-b.jsonl"):
            line = "" if name == "empty" else records[0].to_json() + "\n"
            (folder / part).write_text(line)
            os.utime(folder / part, (number, number))
    newest = latest_log(tmp_path)
    assert newest == tmp_path / "runs" / "new"
    assert list(read_records(newest)) == [records[0]] * 2


def test_the_generators_command(tmp_path):
    out = tmp_path / "log.jsonl"
    for _ in range(2):  # it replaces, never appends
        command = [
            sys.executable,
            "-m",
            "kvttl.session.sample",
            "--requests",
            "3",
            "--out",
            str(out),
        ]
        done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert list(read_records(out)) == sample_records(3)

"""The page of `make app`, and notebook 04 in JupyterLab, in headless Chromium."""

from __future__ import annotations

import json
import os
import sys

import browser_pages
import inside_server
import pandas as pd
import psutil
import pytest
from browser_pages import ExplorerPage
from PIL import Image
from redis_fixtures import free_port
from waiting import children_of

from caching_heuristics import HeuristicConfig
from kvttl.bench.sliders import browser, running, scratch_project
from kvttl.settings import load_settings

SERVERS = {"voila": browser_pages.served_app, "lab": browser_pages.served_lab}


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:  # no chromium: a RuntimeError that says what to install
        yield chromium


@pytest.fixture(scope="module", params=sorted(SERVERS))
def opened(request, chromium, tmp_path_factory):
    """(name of the server, its project folder, a function that opens notebook 04 anew)."""
    project = scratch_project(
        tmp_path_factory.mktemp(request.param) / "project", browser_pages.ROOT
    )
    with SERVERS[request.param](project) as open_page:
        yield request.param, project, lambda: ExplorerPage(open_page(chromium))


def test_sliders_readouts_save_and_export(opened):
    server, project, open_page = opened
    explorer = open_page()
    assert explorer.values() == HeuristicConfig().to_dict()
    assert "0 of 76 decisions change tier" in explorer.readout

    with explorer.new_picture():  # by keyboard
        explorer.press("hot_threshold", "ArrowLeft", 30)
    down = pytest.approx(20 * 10**-0.3, rel=0.03)
    explorer.until(lambda: explorer.value("hot_threshold") == down)
    explorer.until(lambda: "gpu→disk" in explorer.readout)

    before = explorer.readout
    with explorer.new_picture():  # by mouse
        explorer.drag("alpha", 60)
    explorer.until(lambda: explorer.value("alpha") > 0.5 and explorer.readout != before)

    with explorer.new_picture():  # by typing, beyond the slider's end
        explorer.type("base_ttl", 1_000_000)
    explorer.until(lambda: explorer.value("base_ttl") == 1_000_000)

    check_invalid_and_undo(explorer, server)
    explorer.screenshot(f"{server}_explorer.png")
    check_save(explorer, project)
    check_export(explorer, project, server)
    saved = explorer.values()
    explorer.page.close()
    again = open_page()
    assert again.values() == saved != HeuristicConfig().to_dict()
    again.page.close()


def check_invalid_and_undo(explorer, server):
    """A combination that cannot be is named at both controls; the picture stays."""
    picture = explorer.picture
    explorer.type("cold_threshold", 2)
    explorer.page.wait_for_selector(".kv-message-hot_threshold:visible")
    assert "must be > 0 and <= cold_threshold (2.0)" in explorer.message("hot_threshold")
    explorer.page.wait_for_selector(".kv-message-cold_threshold:visible")
    assert explorer.message("cold_threshold") and not explorer.message("alpha")
    explorer.settle()
    assert explorer.picture == picture
    explorer.screenshot(f"{server}_invalid.png")
    explorer.click("undo")
    explorer.page.wait_for_selector(".kv-message-hot_threshold", state="hidden")
    explorer.until(lambda: explorer.value("cold_threshold") == 50)


def check_save(explorer, project):
    explorer.click("save-settings")
    explorer.status("Saved")
    assert load_settings(project / "data" / "heuristics.yaml").to_dict() == explorer.values()


def check_export(explorer, project, server):
    explorer.page.locator(".kv-export-name input").fill(f"from {server}")
    explorer.page.locator(".kv-export-name input").press("Tab")
    explorer.click("export-plots")
    explorer.status("Exported 19 files")
    folder = project / "data" / "exports" / f"from {server}"
    sidecar = json.loads((folder / "settings.json").read_text())
    assert sidecar["settings"] == explorer.values()
    assert len(sidecar["figures"]) == 18
    for name in sidecar["figures"]:
        assert (folder / name).stat().st_size > 1000
    image = Image.open(folder / "ttl_curves.png")
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert json.loads(image.info["Settings"]) == explorer.values()


@pytest.mark.parametrize("opened", ["voila"], indirect=True)  # the same widgets in both
def test_a_long_drag_ends_with_the_newest_picture(opened):
    """Hundreds of positions in two seconds: what is drawn last is where the hand stopped."""
    _, _, open_page = opened
    explorer = open_page()
    explorer.click("default")
    explorer.settle()
    start = explorer.picture
    with explorer.new_picture():
        explorer.drag("variance_threshold", -60, steps=300)
    explorer.until(lambda: explorer.value("variance_threshold") < 0.4)
    explorer.settle()
    dragged, readout = explorer.value("variance_threshold"), explorer.readout

    def is_back():  # one drag is one change; more where the machine paused in it
        explorer.click("undo")
        explorer.settle()
        return explorer.value("variance_threshold") == 0.5

    explorer.until(is_back)
    with explorer.new_picture():
        explorer.type("variance_threshold", dragged)
    explorer.until(lambda: explorer.readout == readout)
    assert len({start, explorer.picture}) == 2
    assert explorer.page.locator(".kv-picture").count() == 1  # nothing piles up
    explorer.page.close()


def test_servers_and_kernels_listen_on_this_machine_only(opened, chromium):
    _, project, open_page = opened
    explorer = open_page()
    mine = [
        pid
        for pid, words in children_of(os.getpid()).items()
        if "voila" in " ".join(words) or "jupyter" in " ".join(words)
    ]
    assert mine
    listening = [
        connection.laddr.ip
        for pid in mine
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    explorer.page.close()


# --- the tabs of the page -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tabs(chromium, tmp_path_factory):
    """(project folder, the page of `make app`)."""
    project = scratch_project(tmp_path_factory.mktemp("tabs") / "project", browser_pages.ROOT)
    with browser_pages.served_app(project) as open_page:
        yield project, ExplorerPage(open_page(chromium))


def check_look(page, name):
    """Nothing is below the fold of a laptop's screen, on light and on dark; keeps screenshots."""
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        page.screenshot(f"{name}_{scheme}.png", full_page=False)
        colour = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(colour.removeprefix("rgb(").split(",")[0])
        assert (red < 64) == (scheme == "dark"), colour
    page.page.emulate_media(color_scheme="light")
    assert page.page.evaluate("document.documentElement.scrollHeight") <= 900
    for button in page.page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["y"] + box["height"] <= 900, button.inner_text()


def test_replay_follows_mouse_and_keyboard_and_exports(tabs):
    project, page = tabs
    page.page.get_by_role("tab", name="Replay").click()  # by mouse
    page.until(lambda: "of tokens hit" in page.readout)
    with page.new_picture():  # by keyboard, found as a screen reader does
        base_ttl = page.page.get_by_role("slider", name="base TTL").locator("visible=true")
        for _ in range(40):
            base_ttl.press("ArrowLeft")
    page.until(lambda: page.value("base_ttl") < 1500)
    page.until(lambda: base_ttl.get_attribute("aria-valuetext") == f"{page.value('base_ttl'):g} s")
    before = page.readout
    page.drag_in("kv-share", -60)  # by mouse
    page.until(lambda: page.readout != before)
    page.settle()
    capacity = page.page.get_by_label("capacity").locator("visible=true").input_value()
    assert 0 < float(capacity) < 0.1
    page.page.get_by_label("policy").locator("visible=true").select_option(
        label="LRU, block by block"
    )
    page.settle()
    check_look(page, "replay")
    assert page.page.locator(".kv-picture:visible").get_attribute("alt").endswith("of tokens hit")
    page.click("export-replay")
    page.status("exported to")
    row = pd.read_csv(project / "data" / "exports" / "replay_sample.csv").iloc[0]
    assert (row["policy"], row["capacity"]) == ("lru", float(capacity))
    assert row["base_ttl"] == page.value("base_ttl")
    assert f"{row['token_hit_ratio']:.1%} of tokens hit" in page.readout
    base_ttl = page.value("base_ttl")
    page.page.get_by_role("tab", name="Decisions").click()  # the settings come along
    page.until(lambda: page.value("base_ttl") == base_ttl)
    page.click("default")


def test_tune_searches_and_its_settings_go_to_file_and_sliders(tabs):
    project, page = tabs
    page.page.get_by_role("tab", name="Decisions").focus()
    page.page.keyboard.press("ArrowRight")  # by keyboard
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    page.until(lambda: "Which settings suit" in page.readout)
    page.page.get_by_label("trials").fill("16")
    page.page.get_by_label("trials").press("Enter")
    page.page.get_by_label("capacity").locator("visible=true").fill("lots")
    page.page.locator(".kv-search").press("Enter")
    assert "CAPACITY must be" in page.status("⚠")
    page.page.get_by_label("capacity").locator("visible=true").fill("")
    page.click("search")  # by mouse
    page.status("Found", timeout_s=120)
    assert "16 trials, seed 0" in page.readout and "survives" in page.readout
    page.settle()
    check_look(page, "tune")
    page.click("export-search")
    page.status("exported to")
    trials = pd.read_csv(project / "data" / "exports" / "tune.csv")
    taken = trials[trials["role"] == "taken"].iloc[0]
    page.click("take-over")
    page.status("Saved")
    saved = load_settings(project / "data" / "heuristics.yaml").to_dict()
    assert len(trials) == 16 and saved != HeuristicConfig().to_dict()
    assert all(taken[name] == value for name, value in saved.items())
    for tab in ("Decisions", "Replay"):
        page.page.get_by_role("tab", name=tab).click()
        page.until(lambda: page.values() == saved)


def test_live_follows_a_server_that_starts_serves_and_ends(tabs, tmp_path):
    project, page = tabs
    port = free_port()
    page.page.get_by_role("tab", name="Live").click()
    server = page.page.get_by_label("server")
    server.fill(f"127.0.0.1:{port}")
    server.press("Enter")
    said = page.page.locator(".kv-live-said")
    page.until(lambda: f"http://127.0.0.1:{port} is away: Connection refused" in said.inner_text())
    page.page.get_by_label("refreshed").select_option(label="every second")
    config = {"heuristics": {"base_ttl": 3600.0}}
    with inside_server.inside_server(tmp_path, config, http=port) as running:
        client = inside_server.Client(running.url)
        for _ in range(2):
            client.serve(inside_server.prompt(1, 6))
        client.close()
        where, last = (page.page.locator(f".kv-live-{name}") for name in ("where", "last"))
        page.until(lambda: "6 chunks" in where.inner_text())  # by itself, once it is there
        page.until(lambda: last.inner_text().count("generation") == 2)
        hits = page.page.locator(".kv-live-hits")
        page.until(lambda: "50.0%" in hits.inner_text())  # read before the records were
        assert "inside LMCache" in said.inner_text()
        table = last.locator("table").element_handle()
        page.page.wait_for_timeout(3000)
        assert table.evaluate("table => table.isConnected")  # what stays the same does not flicker
        check_look(page, "live")
        page.page.locator(".kv-export-live").press("Enter")  # by keyboard
        page.status("exported to")
    page.until(
        lambda: "is away" in said.inner_text() and "What is shown is of" in said.inner_text()
    )
    assert "6 chunks" in where.inner_text()
    (csv,) = (project / "data" / "exports").glob("live_*.csv")
    assert len(pd.read_csv(csv)) >= 2
    facts = json.loads(csv.with_suffix(".json").read_text())
    assert facts["status"]["chunks"]["gpu"] == 6 and facts["url"].endswith(str(port))


def test_a_server_that_cannot_start_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such notebook')"]
    with pytest.raises(RuntimeError, match="no such notebook"):
        with running(command, free_port(), tmp_path):
            pass


def test_without_chromium_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(RuntimeError, match="apt-get install chromium"):
        with browser():
            pass

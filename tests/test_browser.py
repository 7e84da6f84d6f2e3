"""Notebook 04 in headless Chromium, in Voilà and in JupyterLab: what a person does with it."""

from __future__ import annotations

import json
import os
import sys

import browser_pages
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

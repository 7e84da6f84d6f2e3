"""`make bench-sliders`: from a key on a slider to the new picture in the browser.

Voilà serves the page of `make app` to headless Chromium. The page itself takes the times: from the
key event to the first frame after the new image has loaded, on Decisions and (``replay_``) on
Replay; and from opening it to its first picture. Ends with one line of JSON.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvttl import PROJECT
from kvttl.bench.figures import machine, percentiles, publish
from kvttl.decisions.sample import FILE_NAME
from kvttl.stack.process import Child, comes_true
from kvttl.stack.services import pick_ports

APP = Path("src/kvttl/sliders/web/page.ipynb")  # that `make app` serves
NOTEBOOK = Path("notebooks/04_ttl_and_tier_plots.ipynb")
REPORT = Path("data/reports/sliders.json")
GOAL_P50_MS = 120.0
STEPS = 50
SLIDERS = ("alpha", "hot_threshold", "base_ttl", "variance_threshold", "recent_seconds")

REPLAYED = ("base_ttl",)  # of which every step changes a replay

_SHOWN = "[...document.querySelectorAll('.kv-picture')].find(p => p.checkVisibility())"
_START_S, _STOP_S = 60.0, 10.0  # of a server

_BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")  # as in .ci/setup
_FLAGS = ["--disable-gpu", "--disable-quic", "--disable-sync"]  # beside Playwright's own


def scratch_project(folder: str | Path, root: str | Path = ".") -> Path:
    """Copy what page and notebook 04 need, so that no run, settings or exports of ours matter."""
    data = (Path("data", name) for name in (FILE_NAME, "sample_trace.jsonl.gz", "tariffs.yaml"))
    for name in (APP, NOTEBOOK, *data):
        copy = Path(folder, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(root, name), copy)
    return Path(folder)


def server_command(target: str, port: int) -> list[str]:
    """Return what `make app` or `make lab` runs, with this Python and at this port."""
    make = ["make", "-n", "--no-print-directory", "-C", str(PROJECT), target]
    make += [f"PORT={port}", f"PY={sys.executable}"]
    printed = subprocess.run(make, check=True, capture_output=True, text=True).stdout
    return shlex.split(printed.splitlines()[-1])


@contextmanager
def running(command: Sequence[str], port: int, folder: Path, **environment: str) -> Iterator[str]:
    """Run a server in a folder until the block ends; yields its URL as soon as it answers.

    Its output goes to the folder's file ``log``; keywords are more environment variables.

    Raises
    ------
    RuntimeError
        If it ends at once or does not answer; with the last lines of its log.
    """
    log = Path(folder, "log")
    options = {"cwd": folder, "env": os.environ | environment, "start_new_session": True}
    with open(log, "wb") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    server = Child("server", popen.pid, time.time(), log, popen)
    try:
        comes_true(lambda: server.listens_on(port) or not server.alive(), _START_S)
        if not server.listens_on(port):
            tail = "\n".join(["The server's log ends with:", *server.last_lines(15)])
            raise RuntimeError(f"nothing answers on port {port}. {tail}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(_STOP_S)  # its kernels too


@contextmanager
def browser() -> Iterator:
    """Run headless Chromium or Chrome, or what `KV_CHROMIUM` names; yields Playwright's browser.

    Raises
    ------
    RuntimeError
        If there is no Chromium on this machine.
    """
    from playwright.sync_api import sync_playwright

    options = {"executable_path": _browser_path(), "args": _FLAGS}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as chromium:
        yield chromium


def _browser_path():
    named = os.environ.get("KV_CHROMIUM")
    for path in filter(None, map(shutil.which, [named] if named else _BROWSERS)):
        return path
    wanted = f"KV_CHROMIUM={named}" if named else "chromium"
    raise RuntimeError(f"no {wanted} on this machine; install it: apt-get install chromium")


def open_app(chromium, url: str, timeout_s: float = 60.0):
    """Open Voilà's page and wait for its picture; returns Playwright's page."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(timeout_s * 1e3)
    page.goto(url)
    wait_for_picture(page)
    return page


def wait_for_picture(page) -> None:
    """Wait until the tab that is shown has drawn something."""
    page.locator(".kv-picture:visible").wait_for()
    page.wait_for_function(f"{_SHOWN}?.naturalWidth > 0")


def slider_steps(page, steps: int, sliders: Sequence[str] = SLIDERS) -> list[float]:
    """Press an arrow key `steps` times on the sliders in turn; returns the latencies, ms."""
    page.evaluate(Path(__file__).with_name("slider_steps.js").read_text("utf-8"))
    for step in range(steps):
        name = sliders[step * len(sliders) // steps]
        page.locator(f".kv-slider-{name}:visible .noUi-handle").press("ArrowRight")
        page.wait_for_function(f"window.kvSteps.length === {step + 1}")
        page.wait_for_timeout(60)  # as a hand: faster steps would queue
    return page.evaluate("window.kvSteps")


def _measured(page, steps):
    """Return percentiles of both tabs, and how long the page took to open."""
    page.reload()
    wait_for_picture(page)
    opened_ms = page.evaluate("performance.now()")
    slider_steps(page, len(SLIDERS))  # warm-up
    named = percentiles("step", slider_steps(page, steps))
    page.get_by_role("tab", name="Replay").click()
    wait_for_picture(page)
    entry = page.locator(".kv-entry-base_ttl:visible input")
    entry.fill("60")  # s: where every step changes what is held
    entry.press("Enter")
    page.locator(".kv-entry-alpha:visible input").press("Tab")
    page.wait_for_timeout(1_000)
    slider_steps(page, len(REPLAYED), REPLAYED)
    named |= percentiles("replay", slider_steps(page, steps, REPLAYED))
    return {name.removeprefix("step_"): ms for name, ms in named.items()} | {"open_ms": opened_ms}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, write `REPORT`, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(argv)
    about = machine("ipywidgets", "ipykernel", "voila", "matplotlib", "playwright")
    (port,) = pick_ports("127.0.0.1", 1)
    with tempfile.TemporaryDirectory(prefix="kv-bench-") as folder, browser() as chromium:
        project = scratch_project(Path(folder, "project"))
        with running([*server_command("app", port), "--no-browser"], port, project) as url:
            figures = _measured(open_app(chromium, url), options.steps)
            figures |= {"steps": options.steps, "goal_p50_ms": GOAL_P50_MS}
            figures["chromium"] = chromium.version
    tabs = f"Decisions {figures['p50_ms']:.0f} ms, Replay {figures['replay_p50_ms']:.0f} ms"
    line = f"{options.steps} steps (p50): {tabs}, goal {GOAL_P50_MS:.0f}"
    opened = f"opened in {figures['open_ms'] / 1e3:.1f} s"
    publish(REPORT, about, figures, [line, opened])


if __name__ == "__main__":
    main()

"""`make bench-sliders`: from a key on a slider to the new picture in the browser.

Voilà serves notebook 04 to headless Chromium. The page itself takes the times:
from the key event to the first frame after the new image has loaded. Ends with
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvttl.bench.figures import machine, percentiles, rounded_figures, write_json
from kvttl.decisions.sample import FILE_NAME
from kvttl.sliders.servers import APP_NOTEBOOK, app_command, free_port, running

REPORT = Path("data/reports/sliders.json")
GOAL_P50_MS = 120.0
STEPS = 50
SLIDERS = ("alpha", "hot_threshold", "base_ttl", "variance_threshold", "recent_seconds")

_BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")  # as in .ci/setup
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_WATCH = """() => {
  const image = document.querySelector('.kv-picture');
  window.kvKey = 0; window.kvSteps = [];
  document.addEventListener('keydown', () => { window.kvKey = performance.now(); }, true);
  image.addEventListener('load', () => requestAnimationFrame(() => {
    if (window.kvKey) window.kvSteps.push(performance.now() - window.kvKey);
    window.kvKey = 0;
  }));
}"""


def scratch_project(folder: str | Path, root: str | Path = ".") -> Path:
    """Copy what notebook 04 needs, so that no run, settings or exports of ours matter."""
    folder = Path(folder)
    for name in ("notebooks", "data"):
        (folder / name).mkdir(parents=True)
    shutil.copy(Path(root, APP_NOTEBOOK), folder / "notebooks")
    shutil.copy(Path(root, "data", FILE_NAME), folder / "data")
    return folder


@contextmanager
def browser() -> Iterator:
    """Run headless Chromium or Chrome, or what `KV_CHROMIUM` names; yields Playwright's browser.

    Raises
    ------
    RuntimeError
        If there is no Chromium on this machine.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=_browser_path(), args=list(_FLAGS))
        try:
            yield chromium
        finally:
            chromium.close()


def _browser_path():
    named = os.environ.get("KV_CHROMIUM")
    found = map(shutil.which, [named] if named else _BROWSERS)
    path = next(filter(None, found), None)
    if path is None:
        wanted = f"KV_CHROMIUM={named}" if named else "chromium"
        raise RuntimeError(f"no {wanted} on this machine; install it: apt-get install chromium")
    return path


def open_app(chromium, url: str, timeout_s: float = 60.0):
    """Open Voilà's page and wait for its picture; returns Playwright's page."""
    page = chromium.new_page(viewport={"width": 1440, "height": 1400})
    page.set_default_timeout(timeout_s * 1e3)
    page.goto(url)
    page.wait_for_selector(".kv-picture")
    page.wait_for_function("document.querySelector('.kv-picture').naturalWidth > 0")
    return page


def slider_steps(page, steps: int = STEPS) -> list[float]:
    """Press an arrow key `steps` times on the sliders in turn; returns the latencies, ms."""
    page.evaluate(_WATCH)
    for step in range(steps):
        name = SLIDERS[step * len(SLIDERS) // steps]
        page.locator(f".kv-slider-{name} .noUi-handle").press("ArrowRight")
        page.wait_for_function(f"window.kvSteps.length === {step + 1}")
        page.wait_for_timeout(60)  # a hand is not faster, and the next step must not queue
    return page.evaluate("window.kvSteps")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, write `REPORT`, print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(argv)
    about = machine("ipywidgets", "ipykernel", "voila", "matplotlib", "playwright")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kv-bench-") as folder, browser() as chromium:
        project = scratch_project(Path(folder, "project"))
        command = [*app_command(project, port), "--no-browser"]
        with running(command, port, project / "log") as url:
            page = open_app(chromium, url)
            slider_steps(page, len(SLIDERS))  # warm-up
            page.reload()
            page.wait_for_function("document.querySelector('.kv-picture')?.naturalWidth > 0")
            latencies_ms = slider_steps(page, options.steps)
            figures = percentiles("step", latencies_ms)
            figures |= {"steps": options.steps, "goal_p50_ms": GOAL_P50_MS}
            figures["chromium"] = chromium.version
    write_json(REPORT, about | figures)
    print(f"{options.steps} steps: {figures['step_p50_ms']:.0f} ms (p50), goal {GOAL_P50_MS:.0f}")
    print(json.dumps(rounded_figures(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

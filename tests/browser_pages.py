"""The page of `make app` and notebook 04 in a browser: helpers of test_browser.py."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

from redis_fixtures import free_port

from kvttl.bench.sliders import (
    NOTEBOOK,
    open_app,
    running,
    server_command,
    wait_for_picture,
)

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ROOT / "test_artifacts"  # not in git

# JupyterLab's own idle indicator lies; these three together do not.
_LAB_READY = """() => {
  const widget = window.jupyterapp?.shell?.currentWidget;
  const session = widget?.sessionContext;
  const kernel = session?.session?.kernel;
  return !!(session?.isReady && kernel?.status === 'idle'
            && kernel?.connectionStatus === 'connected');
}"""


@contextmanager
def served_app(project):
    """Voilà on a free port; yields a function that opens its page."""
    port = free_port()
    with running([*server_command("app", port), "--no-browser"], port, project) as url:
        yield lambda chromium: open_app(chromium, url)


@contextmanager
def served_lab(project):
    """JupyterLab on a free port; yields a function that opens notebook 04 and runs all cells."""
    port = free_port()
    options = ["--no-browser", "--IdentityProvider.token=", "--expose-app-in-browser"]
    home = str(lab_home(project))
    command = [*server_command("lab", port), *options]
    with running(command, port, project, JUPYTER_CONFIG_DIR=home) as url:
        yield lambda chromium: open_lab(chromium, f"{url}/lab/tree/{NOTEBOOK}?reset")


def lab_home(project):
    """JupyterLab settings of the test's own: no question about news, no workspace of ours."""
    home = project / "jupyter"
    (home / "labconfig").mkdir(parents=True)
    config = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(config))
    return home


def open_lab(chromium, url):
    # Tall enough that JupyterLab keeps every cell in the page.
    page = chromium.new_page(viewport={"width": 1440, "height": 2600})
    page.set_default_timeout(60_000)
    page.goto(url)
    run_all(page)
    return page


def run_all(page):
    page.wait_for_function(_LAB_READY)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(_LAB_READY)
    page.wait_for_selector(".kv-picture")
    wait_for_picture(page)


class ExplorerPage:
    """A tab of the page, or the explorer in a notebook: what a person sees and does."""

    def __init__(self, page):
        self.page = page

    @property
    def picture(self):
        """The picture's address: a new one for each new picture."""
        return self.page.locator(".kv-picture:visible").get_attribute("src")

    @property
    def readout(self):
        return self.page.locator(".kv-readout:visible").inner_text()

    def entry(self, name):
        return self.page.locator(f".kv-entry-{name}:visible input")

    def value(self, name):
        return float(self.entry(name).input_value())

    def values(self):
        names = self.page.evaluate(
            "() => [...document.querySelectorAll('[class*=kv-entry-]')]"
            ".filter(e => e.checkVisibility()).map(e =>"
            " [...e.classList].find(c => c.startsWith('kv-entry-')).slice(9))"
        )
        return {name: self.value(name) for name in names}

    def message(self, name):
        line = self.page.locator(f".kv-message-{name}")
        return line.inner_text() if line.is_visible() else ""

    def handle(self, name):
        return self.page.locator(f".kv-slider-{name}:visible .noUi-handle")

    def press(self, name, key, times):
        for _ in range(times):
            self.handle(name).press(key)

    def drag(self, name, dx, steps=40):
        """Drag a setting's handle by `dx` pixels in `steps` moves."""
        self.drag_in(f"kv-slider-{name}", dx, steps)

    def drag_in(self, mark, dx, steps=40):
        """Drag the handle of the slider that has a class."""
        handle = self.page.locator(f".{mark}:visible .noUi-handle")
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + dx, y, steps=steps)
        self.page.mouse.up()

    def type(self, name, value):
        self.entry(name).fill(str(value))
        self.entry(name).press("Enter")

    def click(self, name):
        self.page.locator(f".kv-{name}:visible").click()

    @contextmanager
    def new_picture(self):
        """The block must lead to another picture."""
        before = self.picture
        yield
        self.until(lambda: self.picture != before)
        self.settle()

    def settle(self, quiet_ms=600):
        """Wait until no new picture has come for a while."""
        while True:
            before = self.picture, self.readout
            self.page.wait_for_timeout(quiet_ms)
            if before == (self.picture, self.readout):
                return

    def until(self, condition, timeout_s=30):
        """Wait until something that is read from the page is true."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{self.values()} {self.readout}"
            self.page.wait_for_timeout(50)

    def status(self, words, timeout_s=60):
        line = self.page.locator(".kv-status:visible", has_text=words)
        line.wait_for(timeout=timeout_s * 1e3)
        return line.inner_text()

    def screenshot(self, name, full_page=True):
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / name, full_page=full_page)
        return ARTIFACTS / name

"""`make app` and `make lab`: Voilà and JupyterLab, loopback only, with this Python's kernel."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvttl import PROJECT

HOST = "127.0.0.1"
APP_NOTEBOOK = Path("notebooks/04_ttl_and_tier_plots.ipynb")
APP_PORT, LAB_PORT = 8866, 8888

_START_S = 60.0
_STOP_S = 10.0


def app_command(root: str | Path = ".", port: int = APP_PORT) -> list[str]:
    """Return the command that serves notebook 04 as a page without code.

    Examples
    --------
    >>> "--Voila.ip=127.0.0.1" in app_command(".", 8866)
    True
    """
    return [
        *(sys.executable, "-m", "voila", str(Path(root, APP_NOTEBOOK))),
        *(f"--Voila.ip={HOST}", f"--port={port}", "--show_tracebacks=True"),
        # Several kernels would share two cores; an idle one is a closed page's.
        *(
            "--MappingKernelManager.cull_idle_timeout=600",
            "--MappingKernelManager.cull_interval=60",
        ),
        *("--ExecutePreprocessor.timeout=60", "--VoilaConfiguration.file_allowlist=[]"),
    ]


def lab_command(root: str | Path = ".", port: int = LAB_PORT) -> list[str]:
    """Return the command that opens JupyterLab at the notebooks.

    Examples
    --------
    >>> "--ServerApp.ip=127.0.0.1" in lab_command(".", 8888)
    True
    """
    as_root = ["--allow-root"] if os.geteuid() == 0 else []  # in a container
    return [
        *(sys.executable, "-m", "jupyterlab", *as_root),
        *(f"--ServerApp.ip={HOST}", f"--ServerApp.port={port}"),
        *(
            f"--ServerApp.root_dir={Path(root).resolve()}",
            "--LabApp.default_url=/lab/tree/notebooks",
        ),
    ]


def server_environment() -> dict[str, str]:
    """Return the environment in which the kernel of this Python is found first."""
    source = str(PROJECT / "src")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": path}


@contextmanager
def running(
    command: Sequence[str], port: int, log: str | Path, **environment: str
) -> Iterator[str]:
    """Run a server until the block ends; yields its URL as soon as it answers.

    Its output goes to the file `log`; keywords are more environment variables.

    Raises
    ------
    RuntimeError
        If it ends at once or does not answer; with the last lines of its log.
    """
    url = f"http://{HOST}:{port}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment() | environment,
            start_new_session=True,
        )
    try:
        _wait_until_up(process, port, Path(log))
        yield url
    finally:
        _stop(process)


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait_until_up(process, port, log):
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(OSError), socket.create_connection((HOST, port), timeout=2):
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"nothing answers on port {port}. The server's log ends with:\n{tail}")


def _stop(process):
    """Stop the server and its kernels; kill what does not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
            break


def main(argv: Sequence[str] | None = None) -> int:
    """Become the server (never returns), or list what is wrong."""
    parser = argparse.ArgumentParser(description="Voilà (app) or JupyterLab (lab), loopback only.")
    parser.add_argument("what", choices=("app", "lab"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args(argv)
    make, port = (app_command, APP_PORT) if options.what == "app" else (lab_command, LAB_PORT)
    command = make(".", options.port or port)
    os.execve(
        command[0],
        command + ["--no-browser"] * options.no_browser,
        server_environment(),
    )


if __name__ == "__main__":
    sys.exit(main())

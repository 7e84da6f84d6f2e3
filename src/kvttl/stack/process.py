"""Child processes that are stopped exactly once and never outlive their owner."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen

import psutil

from kvttl import PROJECT, whole_file

POLL_S = 0.05
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CHILD_MODULE = "kvttl.stack.child"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # LMCache colours its log even in a file


class StackError(RuntimeError):
    """The stack cannot be started, attached to or stopped; the message says what to do."""

    def _render_traceback_(self) -> list[str]:
        """Show the message alone in a notebook: IPython asks for this."""
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def signals_deferred():
    """Let Ctrl-C and a polite kill wait until the block has ended.

    By handlers, not by the signal mask, which a child started in the block would inherit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ours = {number: it for number, it in handlers.items() if it not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


@dataclass
class Child:
    """One process group that we started (or that an earlier `up` started).

    Parameters
    ----------
    name : str
        Service name.
    pid : int
        Process id, which is also the group id.
    created_s : float
        Start time, seconds since the epoch: a recycled pid has another one.
    log_path : Path
        Where its output goes.
    """

    name: str
    pid: int
    created_s: float
    log_path: Path
    popen: Popen | None = field(default=None, repr=False)

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie or a recycled pid does not)."""
        if self.popen is not None:
            return self.popen.poll() is None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_s) < 0.05
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def listens_on(self, port: int) -> bool:
        """Whether the listening socket of `port` belongs to this process or its children."""
        with contextlib.suppress(psutil.Error):  # one of them has just ended
            found = (c for process in self._family() for c in process.net_connections("tcp"))
            return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)
        return False

    def kill(self) -> None:
        """SIGKILL the whole group at once."""
        self.stop(timeout_s=0.0)

    def stop(self, timeout_s: float) -> None:
        """SIGTERM the group, wait up to `timeout_s` seconds, then SIGKILL what is left."""
        if not self.alive():
            return
        family = self._family()
        for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
            if wait_s > 0 and self.alive():
                with contextlib.suppress(ProcessLookupError):  # gone, as was wanted
                    os.killpg(self.pid, number)
                comes_true(lambda: not self.alive(), wait_s)
        for process in family:  # grandchildren that left the group or ignored SIGTERM
            if process.pid != self.pid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def last_lines(self, count: int) -> list[str]:
        """The last `count` lines of its log."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line for line in COLOUR.sub("", text).splitlines() if line.strip()][-count:]

    def _family(self) -> list:
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


_STORED = {"name": str, "pid": int, "created_s": float, "log_path": Path}  # in the state file


def comes_true(condition: Callable[[], object], timeout_s: float) -> object:
    """Return what a condition returns once that is true, or after `timeout_s` seconds."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return result


def spawn(name: str, arguments: list[str], log_path: Path, env: dict, detached: bool) -> Child:
    """Start one service in its own session, its output in `log_path`.

    Parameters
    ----------
    name : str
        ``redis``, ``coordinator`` or ``server``.
    arguments : list of str
        Its command line, without the program.
    detached : bool
        True lets it outlive this process (`make up`); else it stops when we are gone.
    """
    owner = 0 if detached else os.getpid()
    # -P: a file of the current folder must not stand in for a package.
    command = [sys.executable, "-P", "-m", CHILD_MODULE, str(owner), name, *arguments]
    paths = [str(PROJECT / "src"), env.get("PYTHONPATH")]
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return spawn_command(name, command, log_path, env)


def spawn_command(name: str, command: list[str], log_path: Path, env: dict) -> Child:
    """Start a program in a session of its own, its output in `log_path`."""
    if log_path.exists():  # what an earlier life wrote must not be taken for this one's
        log_path.replace(log_path.with_suffix(".log.old"))
    with log_path.open("wb") as log:
        streams = {"stdin": DEVNULL, "stdout": log, "stderr": log}
        popen = Popen(command, **streams, env=env, start_new_session=True)
    return Child(name, popen.pid, psutil.Process(popen.pid).create_time(), log_path, popen)


def load_state(path: Path) -> tuple[dict[str, Child], dict]:
    """The children that a state file names and that still run, and its other entries.

    Raises
    ------
    StackError
        The file is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = record.pop("children")
        children = [Child(*(kind(row[name]) for name, kind in _STORED.items())) for row in rows]
    except FileNotFoundError:
        return {}, {}
    except (ValueError, KeyError, TypeError, AttributeError):
        advice = f"stop what still runs by hand (`ps aux | grep {CHILD_MODULE}`), then delete it"
        raise StackError(f"{path} is damaged: {advice}") from None
    return {child.name: child for child in children if child.alive()}, record


def save_state(path: Path, children: dict[str, Child], **entries) -> None:
    """Write the state file in one step; no children = no file."""
    if not children:
        path.unlink(missing_ok=True)
        return
    rows = [{name: getattr(child, name) for name in _STORED} for child in children.values()]
    record = json.dumps({"children": rows, **entries}, indent=2, default=str)
    with whole_file(path) as file:
        file.write(record.encode())

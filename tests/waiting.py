"""Waiting for what the real parts do in their own time: patient, since machines may be busy."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from kvttl.stack.services import checkpoint_path

LIMIT_S = 120.0


def wait_until(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Return what a condition returns once that is true; an AssertionError after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, "condition not met in time"
        time.sleep(0.05)
    return result


def wait_for_checkpoint(stack: Any) -> None:
    """Wait until the coordinator has written down all that it knows at this moment."""
    path = checkpoint_path(stack.config)
    for _ in range(2):  # the next one may have begun before this moment
        before = path.stat().st_ino if path.exists() else None
        wait_until(lambda before=before: path.exists() and path.stat().st_ino != before)


def children_of(pid: int) -> dict[int, list[str]]:
    """Return the living descendants of a process and their command lines; zombies are left out."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                found[child.pid] = child.cmdline()
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def is_gone(pid: int) -> bool:
    """Say whether a process has ended, even if nobody has waited for it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def take_ctrl_c() -> None:
    """In the child: Ctrl-C and SIGHUP work even where the tests run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

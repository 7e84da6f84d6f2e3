"""Loaded into vLLM's processes, so that they end when the one that started the engine has ended.

vLLM ends its processes as long as it can run code itself; when its owner is killed, they stay,
with all their memory. `engine_kwargs` names `EndsWithOwner` as vLLM's ``worker_extension_cls``,
and `engine_connector` watches too, for who takes over only the connector.

They also get the kernel's permission for AMX: the attention of vLLM 0.30 on CPU uses it without
asking, and where no longer prompt came before, whose products oneDNN asks for, a prompt of a few
tokens ends the engine by SIGILL.
"""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import platform
import threading
import time

import psutil

WATCH_INTERVAL_S = 0.5  # a dead owner is noticed within this time


def watch_owner() -> None:
    """End this process of an engine once its owner is gone, however the owner ended.

    In a process that multiprocessing has not started, where the engine is the owner's own,
    nothing happens.
    """
    _watch_once(os.getpid())


@functools.cache
def _watch_once(_pid):
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_watch, args=(parent,), name="kv-owner", daemon=True).start()


def _watch(parent):
    watched = [(psutil.Process(), parent.pid)]
    if parent.name.startswith("EngineCore"):  # between owner and worker; it may have no watch
        watched.append((psutil.Process(parent.pid), psutil.Process(parent.pid).ppid()))
    while not any(_is_orphan(*each) for each in watched):
        time.sleep(WATCH_INTERVAL_S)
    for process, _ in reversed(watched):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # politely it would hang: its LMCache server is gone too


def _is_orphan(process, parent_pid):
    # Asked again and again: the kernel's parent-death signal comes when a *thread* ends.
    try:
        return process.ppid() != parent_pid
    except psutil.NoSuchProcess:
        return True


class EndsWithOwner:
    """Adds nothing to vLLM's worker: loading this module in its process was the purpose."""


watch_owner()
if platform.machine() == "x86_64":  # arch_prctl(ARCH_REQ_XCOMP_PERM, tile data); may be refused
    ctypes.CDLL(None).syscall(158, 0x1023, 18)

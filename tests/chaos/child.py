"""`kvttl.stack.child`, whose server module fails or hangs where and as long as a file says so.

The file (`TROUBLE` in the environment) has a hook's name, or that and `` hangs``.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path

TROUBLE = "KV_CHAOS_TROUBLE"
# Shorter waits than the defaults, as `SETTINGS` in `machine`.
CONFIG = {"handover_s": 5.0, "stuck_s": 2.0}


def may_fail(hook, name: str):
    """Return a hook that raises or hangs while the file says so."""
    flag = Path(os.environ[TROUBLE])

    @functools.wraps(hook)
    def call(*args, **kwargs):
        if flag.read_text() == name:
            raise RuntimeError("asked to fail")
        while flag.read_text() == f"{name} hangs":
            time.sleep(0.05)
        return hook(*args, **kwargs)

    return call


def main() -> None:
    """Become a service."""
    if sys.argv[2] == "server":
        from kvttl.server.guard import Guard

        guarded = Guard.__call__
        Guard.__call__ = lambda self, hook, name, default=None: guarded(
            self, may_fail(hook, name), name, default
        )
        at = sys.argv.index("--server-module") + 1
        module = json.loads(sys.argv[at])
        module["config"] |= CONFIG
        sys.argv[at] = json.dumps(module)
    runpy.run_module("kvttl.stack.child", run_name="__main__")


if __name__ == "__main__":
    main()

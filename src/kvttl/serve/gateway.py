"""`make serve`: an OpenAI-compatible server in which every request is managed.

vLLM's own OpenAI routes on an engine whose generations go to `MultiTierCache`.
What a client knows about a prompt rides in the request:
``extra_body={"kv": {"perplexity": 12.5}}``. Loopback only, unless there is an API key.
"""

import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from caching_heuristics import HeuristicConfig
from kvttl import exit_status, user_path
from kvttl.decisions.log import DecisionLog
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.client import LMCacheError
from kvttl.serve.app import BODY_LIMIT, manage_app, openai_app
from kvttl.serve.engine import ManagedEngine
from kvttl.serve.listening import KEY_VARIABLE, check_exposure, listening, read_key, serving
from kvttl.serve.options import options_of_engine, read_options, server_arguments
from kvttl.serve.vllm_parts import vllm_parts
from kvttl.session import launch
from kvttl.session.demo_model import model_path
from kvttl.stack.config import add_inside_option, overrides_of
from kvttl.stack.lifecycle import LMCacheStack, load_config
from tiered_caching import EngineDied, MultiTierCache

_LOOK_S = 0.5  # how often the command looks after its engine
_ENDING_S = 20.0  # the longest that it takes to end after a dead one


@dataclass(frozen=True)
class Gateway:
    """A running gateway.

    Parameters
    ----------
    base_url : str
        For ``openai.OpenAI(base_url=...)``, with ``/v1``.
    model : str
        The model's name in requests.
    cache : MultiTierCache
        The manager; its `records` say what was decided.
    engine : ManagedEngine
        The engine; only for `loop`.
    loop : anyio.from_thread.BlockingPortal
        Where it all runs.
    """

    base_url: str
    model: str
    cache: MultiTierCache
    engine: ManagedEngine
    loop: BlockingPortal

    @property
    def url(self) -> str:
        """The server's URL, for ``/healthz`` and ``/metrics``."""
        return self.base_url.removesuffix("/v1")


@contextmanager
def gateway(
    stack: Any,
    model: str,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    log: DecisionLog | None = None,
    recover_from: str | Path | None = None,
    config: HeuristicConfig | None = None,
    policy: str = "formula",
    perplexity: str = "generation",
    body_limit: int = BODY_LIMIT,
    server_options: Sequence[str] = (),
    **engine_options: Any,
) -> Iterator[Gateway]:
    """Serve `model` on `stack` while the block runs, on a thread of its own.

    Parameters
    ----------
    stack : LMCacheStack
        Running; it must outlive the block.
    model : str
        A model's folder; see `kvttl.session.demo_model.model_path`.
    port, host, api_key : int, str, str
        0 = any free port. Another host than loopback needs a key, which clients must send.
    log, recover_from : DecisionLog, str or Path, optional
        What gets every decision; a log's folder, whose claims count again before the first request.
    config, policy : HeuristicConfig, str
        Default: the saved settings, which decide; see `MultiTierCache`.
    perplexity : str
        ``"generation"``: measured, unless a client gives it; ``"off"``: only given.
    body_limit, server_options
        See `openai_app`; `read_options`, which also tells of engine options among them.
    engine_options
        Engine arguments that win over these, such as ``max_model_len=4096``.

    Raises
    ------
    ValueError, OSError
        A host that needs an API key, or another wrong setting; the port cannot be had.
    """
    check_exposure(host, api_key)
    name, metrics = model_name(model), DecisionMetrics()
    engine_options = options_of_engine(server_options) | engine_options
    arguments = server_arguments(model, name, api_key, server_options, engine_options)
    options = {"log": log, "metrics": metrics, "perplexity_source": perplexity, "policy": policy}
    with ExitStack() as exits:
        listener = exits.enter_context(listening(host, port))
        uvloop = {"use_uvloop": True}  # it comes with vLLM, whose own server uses it
        loop = exits.enter_context(start_blocking_portal("asyncio", uvloop, name="kv-gateway"))
        engine = exits.enter_context(async_engine(stack, model, loop, **engine_options))
        cache = exits.enter_context(launch.managed(stack, None, config, background=True, **options))
        engine = ManagedEngine(engine, cache)
        _recover(cache, recover_from)
        app = loop.call(openai_app, engine, arguments, body_limit)
        manage_app(app, cache, metrics)
        url = exits.enter_context(serving(app, listener, loop))
        yield Gateway(f"{url}/v1", name, cache, engine, loop)


def model_name(model: str) -> str:
    """Return a model's name in requests: its folder's name; of a cached one, its hub id.

    Examples
    --------
    >>> model_name("data/demo_model"), model_name("hub/models--google--gemma/snapshots/1f")
    ('demo_model', 'google/gemma')
    """
    path = Path(model)
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return path.name


@contextmanager
def async_engine(stack: Any, model: str, loop: BlockingPortal, **options: Any) -> Iterator[Any]:
    """Load vLLM's asynchronous engine on `loop`; shut it down before the stack goes.

    An engine that has lost its LMCache server hangs when its process ends.
    """
    vllm = vllm_parts()
    options = {"use_tqdm_on_load": False, "served_model_name": model_name(model), **options}
    arguments = vllm.AsyncEngineArgs(**stack.engine_kwargs(model, **options))
    loading = loop.start_task_soon(vllm.AsyncLLM.from_engine_args, arguments)
    try:
        yield loading.result()
    finally:  # an interrupt may come while it loads: then it is shut down once it is up
        if loading.exception() is None:
            loop.call(_shut_down, loading.result())


def _shut_down(engine):
    engine.shutdown()
    # Its finalizer would do it again while the interpreter exits.
    engine.shutdown = lambda *_args, **_options: None


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    options = _options(argv)
    launch.ends_with_parent()
    said = "stopped; nothing is left running that this command started"
    return exit_status(lambda: _serve(options), said, status=0)


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="another one needs an API key")
    parser.add_argument("--llm", help="model folder or hub id that is on this machine")
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--redis-url", help="use this Redis instead of the embedded one")
    launch.add_policy_option(parser)
    add_inside_option(parser)
    parser.add_argument("--attach", action="store_true", help="use what `make up` runs")
    parser.add_argument("--api-key-env", default=KEY_VARIABLE, metavar="NAME")
    parser.add_argument("--api-key-file", type=user_path, help="file; its first line is the key")
    parser.add_argument("--log", type=user_path, help="folder of decisions; claims in it count")
    parser.add_argument("--perplexity", choices=("generation", "off"), default="generation")
    parser.add_argument(
        "--server-options", type=shlex.split, default=(), help='="options of `vllm serve`"'
    )
    return parser.parse_args(argv)


def _serve(options):
    api_key = read_key(options.api_key_file, options.api_key_env)
    check_exposure(options.host, api_key)
    launch.be_quiet()
    read_options(options.server_options)  # before anything is started in vain
    folder = options.log or launch.new_run_folder()
    with ExitStack() as exits:
        stack = exits.enter_context(_stack(options))
        model = model_path(options.llm)
        log = exits.enter_context(DecisionLog(folder))
        names = ("port", "host", "policy", "perplexity", "server_options")
        given = {name: getattr(options, name) for name in names}
        given |= {"api_key": api_key, "log": log, "recover_from": folder}
        with launch.progress(f"Loading vLLM with {model_name(model)}", about_s=25):
            server = exits.enter_context(gateway(stack, model, **given))
        print(_welcome(server, folder, options.api_key_env if api_key else ""), flush=True)
        _until_dead(server.engine)


def _until_dead(engine):
    """Wait until the engine has died, and then end the command: whoever watches it starts it anew.

    Raises
    ------
    EngineDied
        Names the engine's exit code.
    """
    while not engine.errored:
        time.sleep(_LOOK_S)
    # Should ending hang, for the engine is no longer there to help: LMCache ends with this process.
    last_resort = threading.Timer(_ENDING_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    time.sleep(_LOOK_S)  # for the errors that open requests are answered with
    raise EngineDied(engine.engine_core)


def _stack(options):
    """Return a context manager of the stack: one of its own, or the one that runs."""
    given = overrides_of(options.config, options.inside, options.redis_url, options.policy)
    config = load_config(options.config, **given)
    return launch.started(LMCacheStack(config, attach=options.attach))


def _recover(cache, folder):
    """Claim what an earlier process has claimed, and KV that nobody has (of an attached stack)."""
    try:
        found = {} if folder is None else cache.recover(folder)
    except LMCacheError as error:
        print(f"KV without a claim was not looked for: {error}", file=sys.stderr)
    else:
        if any(found.values()):
            print("From before: " + ", ".join(f"{n} {what}" for what, n in found.items()))


def _welcome(server, folder, key_variable):
    key = f' -H "Authorization: Bearer ${key_variable}"' if key_variable else ""
    body = f'{{"model": "{server.model}", "prompt": "What is a KV cache?", "max_tokens": 16}}'
    curl = f"curl {server.base_url}/completions{key} -H 'Content-Type: application/json'"
    return f"""
Serving {server.model} at {server.base_url} (Ctrl-C ends it)
  {curl} -d '{body}'
  {server.url}/healthz    {server.url}/metrics
  decisions: {folder}"""


if __name__ == "__main__":
    sys.exit(main())

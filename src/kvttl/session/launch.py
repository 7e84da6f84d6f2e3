"""Stack, engine and manager of a session: what notebooks, commands and benchmarks start."""

import functools
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from cache_controller import LMCacheController
from caching_heuristics import HeuristicConfig
from kvttl import user_path
from kvttl.background import Repeater
from kvttl.manager.clock import SessionClock
from kvttl.manager.policy import POLICY_NAMES
from kvttl.meter.live import RegretMeter
from kvttl.session.demo_model import prompt_perplexity
from kvttl.settings import load_settings
from kvttl.stack.config import PORT_FIELDS, StackConfig
from kvttl.stack.lifecycle import LMCacheStack, StackError, load_config
from kvttl.stack.services import check_folders
from tiered_caching import MultiTierCache

# vLLM and LMCache write some 80 lines before the first token, torch one a process,
# and Python's resource tracker one about vLLM's shared memory at the end.
_LOG_LEVELS = ("VLLM_LOGGING_LEVEL", "LMCACHE_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL")
_QUIET = dict.fromkeys(_LOG_LEVELS, "ERROR") | {
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}


def new_run_folder(runs: str | Path = "data/runs") -> Path:
    """Return the folder of a run's log and picture, named by the time (not made yet)."""
    return user_path(runs) / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


@contextmanager
def session_stack(config_path: str | Path = "config.yaml", **overrides: Any):
    """Start a stack of the session's own: free ports, an empty disk tier, gone afterwards.

    Its disk tier is a folder in `disk_path`: KV that an earlier run left there would be hits
    that nobody manages.
    """
    config = load_config(config_path, **overrides)
    say_unused(config, PORT_FIELDS, "a session takes free ports")
    with session_folder(config) as folder:
        with started(LMCacheStack(config.replaced(disk_path=folder), free_ports=True)) as stack:
            yield stack


@contextmanager
def session_folder(config: StackConfig):
    """Make an empty folder in `disk_path` that is there while the block runs."""
    check_folders(config)
    with tempfile.TemporaryDirectory(prefix="session-", dir=config.disk_path) as folder:
        yield folder


def say_unused(config: StackConfig, names: Iterable[str], why: str) -> None:
    """Print which settings somebody has changed in vain."""
    default = StackConfig.model_fields
    changed = [name for name in names if getattr(config, name) != default[name].default]
    if changed:
        print(f"config.yaml: {', '.join(changed)} not used here: {why}", file=sys.stderr)


@contextmanager
def started(stack: LMCacheStack):
    """Start a stack under a progress bar; stop it at the end of the block."""
    _need("lmcache")
    be_quiet()  # here already: vLLM reads these when it is first imported
    with progress("Starting coordinator, LMCache server and Redis", about_s=10):
        stack.start()
    with stack:
        yield stack


@contextmanager
def engine(stack, model: str):
    """Load vLLM, connected to `stack`; shut it down before the stack goes.

    An engine that has lost its LMCache server hangs when its process ends.
    """
    _need("vllm")
    be_quiet()
    with progress(f"Loading vLLM with {Path(model).name}", about_s=20):
        from vllm import LLM

        llm = LLM(**stack.engine_kwargs(model, use_tqdm_on_load=False))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def ends_with_parent() -> None:
    """Have SIGTERM and SIGHUP end this command as Ctrl-C does, and so the end of its `make`.

    The Makefile sets ``KV_END_WITH_PARENT``: nobody else knows that a killed `make` was the owner.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores one of them
            signal.signal(number, signal.default_int_handler)
    if os.environ.pop("KV_END_WITH_PARENT", None):
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def _watch_parent(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def progress(what: str, about_s: float):
    """Show a bar that fills in about `about_s` seconds while the block runs."""
    from tqdm.auto import tqdm

    with tqdm(total=about_s, desc=what, bar_format="{desc} {bar:20} {elapsed}") as bar:
        ticks = Repeater(lambda: bar.update(min(0.5, 0.98 * about_s - bar.n)), every_s=0.5)
        ticks.start()
        try:
            yield
            bar.update(about_s - bar.n)
        finally:
            ticks.close()


def _need(package):
    """Raise a StackError with the next step where a package is not in this Python."""
    if importlib.util.find_spec(package) is None:
        advice = "run `make install`, then choose the kernel of .venv (`make lab` does)"
        raise StackError(f"{package} is not installed for {sys.executable}: {advice}")


def be_quiet():
    """Lower the log levels that the user has not set."""
    os.environ.update(_QUIET | os.environ)


def managed(stack, llm, config: HeuristicConfig | None = None, **options) -> MultiTierCache:
    """Return a manager for an engine on a stack, silent unless `notify` is given.

    Without a `config` it has the settings that the sliders have saved, see `load_settings`;
    without `costs` those that were measured on a stack of this kit.
    """
    config = load_settings() if config is None else config
    inside = stack.config.inside
    if isinstance(inside, str):  # who decides is a setting of the server
        if options.get("policy", "formula") not in ("formula", inside):
            raise ValueError(
                f"policy must be {inside!r}, as inside says, got {options['policy']!r}"
            )
        options = {**options, "policy": inside}
    controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
    if options.get("policy", "formula") != "formula":
        from kvttl.replay.costs import TierCosts  # seconds, and not needed for the formula

        options = {"costs": TierCosts(), **options}
    metrics = options.get("metrics")
    if stack.config.meter and metrics is not None and not inside:  # there the server has its own
        options = {"meter": RegretMeter(controller, config, metrics), **options}
    return MultiTierCache(controller, llm, config=config, **{"notify": None, **options})


def add_policy_option(parser) -> None:
    """Let a command be told who decides."""
    parser.add_argument("--policy", choices=POLICY_NAMES, default="formula")


def greedy(max_tokens: int, **options):
    """Return vLLM's sampling parameters for the likeliest answer, equal in every run."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)


def measuring(model: str, source: str = "prompt") -> dict[str, object]:
    """Return the options of a manager that measures perplexities of `model`'s prompts.

    The source ``"prompt"`` loads the model a second time, beside the engine.
    """
    scorer = functools.partial(prompt_perplexity, path=model) if source == "prompt" else None
    return {"perplexity_source": source, "scorer": scorer}


def session_manager(stack, llm, config: HeuristicConfig | None = None, **options):
    """Return a manager, in background mode unless told otherwise, on a session's clock."""
    fixed = {"clock": SessionClock(time.time()), "sweep_every_s": None}
    return managed(stack, llm, config, **{"background": True, **fixed, **options})

"""The contenders of `make bench`: a table of them, and what runs one: a vLLM engine of its own.

Each serves the same requests and says of every one when its first token came,
which tier served how many of its tokens, and how much its tiers held and were written.
Think times pass on a clock of the session's own, also inside an LMCache server; what LMCache does
by the real clock (storing, evicting once a second) is waited for between two requests.

vLLM's own CPU offloading is not among them: of its two connectors, ``OffloadingConnector`` ends an
engine on CPU ("only supported on CUDA-alike and XPU GPUs"), ``SimpleCPUOffloadConnector`` copies by
CUDA streams.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from caching_heuristics import HeuristicConfig
from kvttl.bench.runners import InsideRunner, LMCacheRunner, Runner
from kvttl.bench.workloads import AT_ONCE, CHUNK_TOKENS, LONGEST_PROMPT
from kvttl.lmcache.kv_size import kv_bytes_per_token
from kvttl.lmcache.model import EVICTION_RATIO, EVICTION_WATERMARK
from kvttl.session.launch import be_quiet, say_unused, session_folder
from kvttl.stack.config import PORT_FIELDS, StackConfig, engine_kwargs, load_config
from kvttl.stack.lifecycle import LMCacheStack

MAIN_SHARE = 0.10  # of the working set, in the hot tier
# Settings that are the same for all, whatever config.yaml says: one Redis for several servers
# would mix them up.
_OWN = {"redis_url": None, "chunk_size_tokens": CHUNK_TOKENS, "block_size_tokens": CHUNK_TOKENS}
_ENGINE_BLOCKS = AT_ONCE * (LONGEST_PROMPT // CHUNK_TOKENS + 2)


@dataclass(frozen=True)
class Contender:
    """One of what is compared.

    Parameters
    ----------
    name, colour : str
        In tables and the picture.
    stack : mapping, optional
        Settings of its LMCache; None = it has none. With ``inside`` its server decides.
    config : HeuristicConfig, optional
        The kit decides with these settings; None = it is not managed.
    """

    name: str
    colour: str
    stack: Mapping[str, Any] | None = None
    config: HeuristicConfig | None = None

    @property
    def rules(self) -> dict[str, Any]:
        """Its server's rules, as `replay_on_lmcache` takes them; empty where it has none."""
        if self.stack is None:
            return {}
        rules = {"watermark": self.stack["trigger_watermark"]}
        rules |= {"ratio": self.stack["eviction_ratio"]}
        rules |= {"retain": self.stack["prefetch_policy"] == "retain"}
        return rules | {"inside": bool(self.stack["inside"])}


NONE, LMCACHE = "no cache", "LMCache"
PEER = "LMCache, tuned"  # the one to beat
KIT, TUNED, ADAPTIVE = "kit outside", "kit inside, formula", "kit inside, adaptive"
_AS_IT_COMES = {"prefetch_policy": "default", "redis_client": "lmcache", "inside": False}
_AS_IT_COMES |= {"trigger_watermark": EVICTION_WATERMARK, "eviction_ratio": EVICTION_RATIO}
_FULLER = {"trigger_watermark": 0.95, "eviction_ratio": 0.05}
_RETAIN = {**_AS_IT_COMES, "prefetch_policy": "retain", **_FULLER}
_MANAGED = {"prefetch_policy": "default", "redis_client": "kit", "inside": False, **_FULLER}
CONTENDERS = {
    row.name: row
    for row in (
        Contender(NONE, "#888888"),
        Contender(LMCACHE, "#0072b2", stack=_AS_IT_COMES),
        Contender(PEER, "#cc79a7", stack=_RETAIN),
        Contender(KIT, "#d55e00", stack=_MANAGED, config=HeuristicConfig()),
        # `bench_settings` replaces the settings of this one.
        Contender(TUNED, "#009e73", stack={**_MANAGED, "inside": True}, config=HeuristicConfig()),
        Contender(ADAPTIVE, "#000000", stack={**_MANAGED, "inside": "adaptive"}),
    )
}
ORDER = tuple(CONTENDERS)


# ---- starting them ----------------------------------------------------------------


@contextmanager
def running_contenders(
    names: Sequence[str], hot_tokens: int, model: str, config_path: str, policy: str = "formula"
) -> Iterator[dict[str, Runner]]:
    """Start engines and stacks, each on free ports, with a hot tier of so many tokens.

    `policy` decides where the kit has its default settings.
    """
    be_quiet()
    rows = [CONTENDERS[name] for name in names]
    size = kv_bytes_per_token(model)
    with ExitStack() as cleanup:
        with ThreadPoolExecutor() as pool:
            start = pool.map(lambda row: _stack(hot_tokens * size, config_path, cleanup, row), rows)
            stacks = list(start)
        made: dict[str, Runner] = {}
        cleanup.callback(_close, made)
        for row, stack in zip(rows, stacks):
            made[row.name] = _runner(row, stack, model, size, policy)
            made[row.name].warm_up()
        yield made


def say_unused_settings(config_path: str) -> None:
    """Print which settings of config.yaml the benchmark has its own for."""
    names = [*PORT_FIELDS, *_OWN, *_MANAGED, "l1_size_gb"]
    say_unused(load_config(config_path), names, "each contender has its own")


def _close(made):
    """End all at once: each engine takes seconds."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda runner: runner.close(), made.values()))


def _stack(hot_bytes, config_path, cleanup, row):
    """Return the running stack of a contender, None for one without LMCache."""
    if row.stack is None:
        return None
    config = load_config(config_path, **_OWN, **row.stack, l1_size_gb=hot_bytes / 2**30)
    folder = cleanup.enter_context(session_folder(config))
    return cleanup.enter_context(LMCacheStack(config.replaced(disk_path=folder), free_ports=True))


def _runner(row, stack, model, size, policy):
    from vllm import LLM

    options = {
        "disable_log_stats": False,  # else a request's time to first token is not kept
        "use_tqdm_on_load": False,
        "num_gpu_blocks_override": _ENGINE_BLOCKS,
        "load_format": "dummy",  # random weights, the same in every engine
    }
    if stack is not None:
        llm = LLM(**stack.engine_kwargs(model, **options))
        if stack.config.inside:
            return InsideRunner(llm, size, stack)
        return LMCacheRunner(llm, size, stack, policy if row.name == KIT else "formula")
    kwargs = engine_kwargs(StackConfig(), model, **options)
    del kwargs["kv_transfer_config"]
    return Runner(LLM(**kwargs), size)

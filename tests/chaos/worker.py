"""Engine and manager in processes that can be killed: as a library, or behind the gateway.

A nursery imports vLLM once and forks a process for each life of a manager: that saves half of
an engine's start. A process is asked over a socket of its own (`Door` in `machine`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import select
import signal
import sys
import threading
import time
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace

import psutil

from kvttl.lmcache.lease import AlreadyManaged
from kvttl.lmcache.salts import chunk_key
from kvttl.manager.claims import ClaimLedger

_POLL_S = 0.05
_TAKE_OVER_S = 60.0


# ---- the nursery -----------------------------------------------------------------------------


def nursery() -> None:
    """Fork a worker for each line of JSON on stdin; print its pid, and later its exit status."""
    import vllm.entrypoints.openai.api_server  # noqa: F401 - seconds, once

    import kvttl.serve.gateway  # noqa: F401

    print(json.dumps({"ready": os.getpid()}), flush=True)
    while True:
        if select.select([sys.stdin], [], [], _POLL_S)[0]:
            line = sys.stdin.readline()
            if not line:  # the campaign is gone
                for child in psutil.Process().children(recursive=True):
                    child.kill()
                return
            pid = os.fork()
            if pid == 0:
                _become(json.loads(line))
            print(json.dumps({"pid": pid}), flush=True)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(ended[1])
                print(json.dumps({"ended": ended[0], "code": code}), flush=True)


def _become(spec):
    """Be a worker, and end as a process of its own would."""
    os.setsid()
    log = os.open(spec["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.exit({"library": library, "gateway": gateway, "reference": reference}[spec["role"]](spec))


# ---- what every worker has -------------------------------------------------------------------


class Clock:
    """The manager's clock: it jumps, and it may break."""

    def __init__(self, offset_s: float) -> None:
        self.offset_s, self.broken = offset_s, False

    def __call__(self) -> float:
        if self.broken:
            raise OSError("the clock is broken")
        return time.time() + self.offset_s


def note_ends(ledger, ended: set[str]) -> None:
    """Have a ledger add the chunks whose last claim has ended, claimed again at once or not."""
    drop = ledger._drop

    def noted(claim):
        keys = [chunk.key for chunk in ledger._path(claim)]
        drop(claim)
        ended.update(key for key in keys if key not in ledger._chunks)

    ledger._drop = noted


class Control:
    """Answers the campaign's questions about the manager in this process."""

    def __init__(self, spec) -> None:
        self.clock, self.calls, self._ended = Clock(spec["offset_s"]), {}, set()
        self._cache = None
        self._listener = Listener(spec["address"], "AF_UNIX")
        threading.Thread(target=self._accept, daemon=True, name="control").start()

    @property
    def cache(self):
        return self._cache

    @cache.setter
    def cache(self, cache):
        if isinstance(cache.claims, ClaimLedger):  # else they are in the server
            note_ends(cache.claims, self._ended)
        self._cache = cache

    def _accept(self):
        while True:
            connection = self._listener.accept()
            threading.Thread(
                target=self._serve, args=(connection,), daemon=True, name="control"
            ).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                name, *arguments = connection.recv()
                try:
                    call = self.calls.get(name) or getattr(self, name)
                    answer = ("done", call(*arguments))
                except BaseException as error:
                    answer = ("failed", f"{type(error).__name__}: {error}")
                connection.send(answer)

    def ready(self):
        return self.cache is not None

    def jump(self, offset_s):
        self.clock.offset_s, self.clock.broken = offset_s, False

    def break_clock(self):
        self.clock.broken = True

    def wanted(self, keys):
        """Return the tier that live claims want each chunk in."""
        names = [chunk_key(*key) for key in keys]
        return dict(zip(keys, self.cache.claims.wanted(names, self.clock())))

    def ended(self):
        """Return the chunks that no claim wanted for a moment since this was asked last."""
        ended = set(self._ended)
        self._ended -= ended
        return ended

    def not_looked_for_s(self):
        """Return how long ago the manager has looked for KV without a claim; let it look."""
        if not isinstance(self.cache.claims, ClaimLedger):
            self.cache.sweep()  # at whose end the server has looked
            return 0.0
        return abs(self.clock() - (self.cache._decider._looked_at_s or 0.0))

    def flush(self, limit_s):
        return self.cache.flush(limit_s)

    def status(self):
        threads = [t.name for t in threading.enumerate() if not t.name.startswith("control")]
        return {"threads": sorted(threads), "claims": len(self.cache.claims)}


def manager_once_free(make):
    """Make a manager; a server with a module first has to find out that the last one was killed."""
    until_s = time.monotonic() + _TAKE_OVER_S
    while True:
        try:
            return make()
        except AlreadyManaged:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.2)


def _config(spec):
    from kvttl.stack.lifecycle import load_config

    return load_config(spec["config"])


# ---- the three kinds -------------------------------------------------------------------------


def reference(spec) -> None:
    """Write each prompt's text without any cache, and how sure the model was of it."""
    from vllm import LLM, SamplingParams

    from kvttl.stack.lifecycle import LMCacheStack

    arguments = LMCacheStack(_config(spec)).engine_kwargs(spec["model"])
    del arguments["kv_transfer_config"]
    llm = LLM(**arguments)
    prompts = json.loads(Path(spec["prompts"]).read_text())
    sampling = SamplingParams(temperature=0.0, max_tokens=spec["max_tokens"], logprobs=2)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    rows = [
        {"text": o.outputs[0].text, "tokens": list(o.prompt_token_ids), "margin": _margin(o)}
        for o in outputs
    ]
    Path(spec["answers"]).write_text(json.dumps(rows))


def _margin(output):
    """Return the smallest lead of a chosen token over the next best, in log-probability."""
    ranked = [sorted((e.logprob for e in each.values()), reverse=True) for each in _steps(output)]
    return min(first - second for first, second, *_ in ranked)


def _steps(output):
    return output.outputs[0].logprobs


def library(spec) -> None:
    """`vllm.LLM` and `MultiTierCache` in one process, generations on its main thread."""
    from vllm import LLM, SamplingParams

    from cache_controller import LMCacheController
    from caching_heuristics import HeuristicConfig
    from kvttl.decisions.log import DecisionLog
    from kvttl.lmcache.client import LMCacheError
    from kvttl.stack.lifecycle import LMCacheStack
    from tiered_caching import MultiTierCache

    control, jobs, config = Control(spec), queue.SimpleQueue(), _config(spec)
    llm = LLM(**LMCacheStack(config).engine_kwargs(spec["model"]))
    controller = LMCacheController("127.0.0.1", spec["port"], instance_id=config.instance_id)
    options = {"config": HeuristicConfig(), "notify": None, "background": True, "workers": 2}
    options |= {"clock": control.clock, "sweep_every_s": spec["sweep_every_s"]}
    with DecisionLog(spec["log"]) as log:
        make = functools.partial(MultiTierCache, controller, llm, log=log, **options)
        with manager_once_free(make) as cache:
            sampling = SamplingParams(temperature=0.0, max_tokens=spec["max_tokens"])

            def generate(prompts, metadata):
                managed = cache.generate(prompts, sampling, metadata)
                return [(m.output.outputs[0].text, m.output.num_cached_tokens) for m in managed]

            control.calls["generate"] = functools.partial(_on_main, jobs, generate)
            control.calls["close"] = lambda: jobs.put(None)
            try:
                print("recovered", cache.recover(spec["log"]), flush=True)
            except LMCacheError as error:
                print("not looked for:", error, flush=True)
            control.cache = cache
            _work(jobs)
    llm.llm_engine.engine_core.shutdown()


def _on_main(jobs, work, *arguments):
    """Have work done on the main thread; return what came of it."""
    job = SimpleNamespace(work=lambda: work(*arguments), done=threading.Event(), answer=None)
    jobs.put(job)
    job.done.wait()
    if isinstance(job.answer, BaseException):
        raise job.answer
    return job.answer


def _work(jobs):
    """Do what is asked for until None comes; a Ctrl-C ends one job, and none between two."""
    at_work = []

    def interrupt(_number, _frame):
        if at_work:
            at_work.clear()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    while (job := jobs.get()) is not None:
        try:
            try:
                at_work.append(job)
                job.answer = job.work()
            finally:  # before the error is kept: another Ctrl-C would come out of that
                at_work.clear()
        except BaseException as error:  # KeyboardInterrupt too
            job.answer = error
        job.done.set()


def gateway(spec) -> int:
    """`make serve` on the running stack; only the manager's clock and way to LMCache are ours."""
    from kvttl.serve import gateway as door

    control, managed = Control(spec), door.launch.managed

    def managed_here(stack, llm, config=None, **options):
        place = {"host": "127.0.0.1", "port": spec["port"], "instance_id": stack.instance_id}
        way = SimpleNamespace(**place, config=stack.config)
        ours = {"clock": control.clock, "sweep_every_s": spec["sweep_every_s"]}
        make = functools.partial(managed, way, llm, config, **options, **ours)
        control.cache = manager_once_free(make)
        return control.cache

    door.launch.managed = managed_here
    where = ["--config", spec["config"], "--log", spec["log"], "--port", str(spec["http_port"])]
    return door.main(["--attach", "--llm", spec["model"], *where])


if __name__ == "__main__":
    nursery()

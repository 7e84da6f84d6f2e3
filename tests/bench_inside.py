"""`make bench-inside`: what the server module refuses, beside LMCache's LRU, and what it costs.

1. Costs, in one process with LMCache's own handlers and no transport: CPU time of this thread,
   the module's part beside what LMCache itself needs in the same calls.
2. Pressure without an engine: four clients at once store more than there is room for.
3. Pressure with a real engine on the demo model.

Ends with one line of JSON; the report has machine, versions and seed too.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import pickle
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from unittest import mock

import torch
from inside_server import (
    CHUNK,
    CHUNK_BYTES,
    HIDDEN,
    LAYERS,
    MODEL,
    SHAPE,
    Client,
    inside_server,
    prompt,
    stack_of,
)
from waiting import wait_until

REPORT = Path("data/reports/inside.json")
QUICK_REPORT = Path("data/runs/bench-inside-quick.json")
GOALS = {
    "refused_module": 0,
    "engine_refused_module": 0,
    "store_us_per_key": 1.0,
    "lookup_us": 5.0,
    "pass_ms_100k": 0.1,
    "l1_lock_ms": 10.0,
}
ONE_HOUR = {"heuristics": {"base_ttl": 3600.0}}
CLIENTS, ROOM_CHUNKS, STORE_CHUNKS = 4, 300, 64
PROMPT_CHUNKS, ENGINE_ROOM_CHUNKS, AT_ONCE = 47, 305, 4
STORES = "prepare_store", "commit_store"
IN_A_ROW = 20  # calls, whose mean is one time
MANY = 100_000  # chunks of a pass
_LOST = re.compile(r"Failed to batched allocate (\d+) memory")

# LMCache as it comes: its LRU, its watermark, no module.
PLAIN = """
import sys
given = sys.argv[1:]
for option in ("--server-module", "--eviction-trigger-watermark"):
    at = given.index(option)
    del given[at : at + 2]
given[given.index("--eviction-policy") + 1] = "LRU"
from lmcache.cli.main import main
main(given)
"""
CONTENDERS = {"lru": [sys.executable, "-c", PLAIN], "module": None}


# ---- pressure ------------------------------------------------------------------------------


def _server(program, room_bytes, folder):
    options = {"options": ("--max-workers", str(CLIENTS)), "program": program}
    return inside_server(folder, ONE_HOUR, l1_chunks=room_bytes / CHUNK_BYTES, **options)


def _refused(running, program):
    """Chunks that LMCache had no room for; the module's own count must not differ."""
    lost = sum(int(count) for count in _LOST.findall(running.log.read_text()))
    if program is None:
        client = Client(running.url, 99, model="probe")
        status = wait_until(lambda: (s := client.status())["waiting_decisions"] == 0 and s)
        client.close()
        assert status["failures"] == {}, status["failures"]
        assert status["done"].get("refused", 0) == lost, status["done"]
    return lost


def pressure_without_engine(turns: int) -> dict[str, int]:
    """Store from several clients at once; returns the chunks that were refused."""
    figures = {"stored_chunks": CLIENTS * turns * STORE_CHUNKS}
    for name, program in CONTENDERS.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            _server(program, ROOM_CHUNKS * CHUNK_BYTES, folder) as running,
        ):
            clients = [Client(running.url, number) for number in range(1, CLIENTS + 1)]
            works = [functools.partial(_store_all, c, n, turns) for n, c in enumerate(clients, 1)]
            threads = [threading.Thread(target=work) for work in works]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            figures[f"refused_{name}"] = _refused(running, program)
            for client in clients:
                client.close()
    return figures


def _store_all(client, number, turns):
    for turn in range(turns):
        client.serve(prompt(1000 * number + turn, STORE_CHUNKS))


def pressure_with_engine(prompts: int, seed: int, config_path: str) -> dict[str, int]:
    """Generate from prompts that do not fit, a few at a time; returns the chunks refused."""
    from kvttl.session.demo_model import model_path
    from kvttl.session.launch import engine, greedy

    figures, rng, size = {"engine_chunks": prompts * PROMPT_CHUNKS}, random.Random(seed), 0
    tokens = [
        {"prompt_token_ids": [rng.randrange(300, 2_000) for _ in range(PROMPT_CHUNKS * CHUNK + 1)]}
        for _ in range(prompts)
    ]
    texts = []
    for name, program in CONTENDERS.items():
        size = ENGINE_ROOM_CHUNKS * _chunk_bytes(model_path())
        with (
            tempfile.TemporaryDirectory() as folder,
            _server(program, size, folder) as running,
            engine(stack_of(running, folder, config_path), model_path()) as llm,
        ):
            made = []
            for at in range(0, prompts, AT_ONCE):
                made += llm.generate(tokens[at : at + AT_ONCE], greedy(4), use_tqdm=False)
            texts.append([output.outputs[0].text for output in made])
            figures[f"engine_refused_{name}"] = _refused(running, program)
    assert texts[0] == texts[1], "the texts of both runs differ"
    return figures


def _chunk_bytes(model):
    shape = json.loads((Path(model) / "config.json").read_text())
    heads = shape["num_key_value_heads"] * shape["head_dim"]
    return 2 * 2 * shape["num_hidden_layers"] * heads * CHUNK  # keys and values, of bfloat16


# ---- costs ---------------------------------------------------------------------------------


class Collections:
    """Python's garbage collections: CPU time (s) by thread, and the longest one."""

    def __init__(self):
        self.here, self.longest_s = threading.local(), 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase, _info):
        now_s = time.thread_time()
        if phase == "start":
            self.here.since_s = now_s
        else:
            took_s = now_s - self.here.since_s
            self.here.all_s = self.all_s + took_s
            self.longest_s = max(self.longest_s, took_s)

    @property
    def all_s(self):
        """Of this thread."""
        return getattr(self.here, "all_s", 0.0)


class TimedLock:
    """In the place of gpu's lock: by method, the longest CPU time that it was held (s).

    Less garbage collections that fell into it: these stop all threads wherever they happen.
    """

    def __init__(self, lock, collections):
        self._lock, self._collections, self.longest_s = lock, collections, {}

    def _now_s(self):
        return time.thread_time() - self._collections.all_s

    def __enter__(self):
        self._lock.acquire()
        self._since_s = self._now_s()

    def __exit__(self, *_exc_info):
        held_s, frame = self._now_s() - self._since_s, sys._getframe(1)
        method = frame.f_locals.get("func", frame.f_code)
        name = getattr(method, "__name__", None) or method.co_name
        self.longest_s[name] = max(held_s, self.longest_s.get(name, 0.0))
        self._lock.release()


class Inside:
    """LMCache's server components with the module, in this process, without a transport."""

    def __init__(self, folder):
        from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
        from lmcache.v1.mp_observability.event_bus import EventBusConfig, init_event_bus
        from lmcache.v1.multiprocess import config, server
        from lmcache.v1.multiprocess.custom_types import RegisterEngineDrivenContextPayload
        from lmcache.v1.multiprocess.engine_context import MPCacheServerContext
        from lmcache.v1.multiprocess.ext_server_module import ExtServerModuleSpec
        from lmcache.v1.multiprocess.request_handler import iter_request_handlers

        from kvttl.server import compat

        add_storage_manager_args(parser := argparse.ArgumentParser())
        adapter = json.dumps({"type": "fs", "base_path": str(folder)})
        options = f"--l1-size-gb {10_000 * CHUNK_BYTES / 2**30} --eviction-policy noop"
        options = [*options.split(), "--eviction-trigger-watermark", "1.0"]
        options += ["--l2-adapter", adapter]
        init_event_bus(EventBusConfig(enabled=True)).start()
        given = parser.parse_args(options)
        given.shm_name = ""  # as the server's `--shm-name`: the data comes with the calls
        storage = parse_args_to_config(given)
        self.context = MPCacheServerContext(storage, chunk_size=CHUNK)
        settings = config.MPServerConfig()
        settings.supported_transfer_mode = "engine_driven"
        quiet = {"pass_s": 3600, "sweep_s": 3600, "save": "demotion", **ONE_HOUR}
        settings.server_modules = [ExtServerModuleSpec("kvttl.server", config=quiet)]
        self.own_s, self.lmcache_s, self._took, self._skips = {}, {}, [], False
        with mock.patch.object(compat, "_wrap", functools.partial(self._wrap, compat._wrap)):
            made = server._build_server_components(
                self.context, settings, config.DEFAULT_COORDINATOR_CONFIG
            )
        (self.module,) = (each for each in made.modules if hasattr(each, "keep_room"))
        bounds = [bound for each in made.modules for bound in iter_request_handlers(each)]
        self.handlers = {bound.operation: bound.handler for bound in bounds}  # the last one counts
        own = {bound.operation for bound in iter_request_handlers(self.module)}
        for name in self.handlers.keys() - own:
            self.handlers[name] = self._timed(self.handlers[name])
        payload = (1, MODEL, 1, 16, LAYERS, HIDDEN, "float32", False, CHUNK)
        register = self.handlers["register_kv_cache_engine_driven_context"]
        register(RegisterEngineDrivenContextPayload(*payload))
        (l1,) = self.context.storage_manager._l1_managers_by_id.values()
        self.collections = Collections()
        self.lock = l1._lock = TimedLock(l1._lock, self.collections)
        self.data = pickle.dumps([torch.zeros(SHAPE)] * STORE_CHUNKS)

    def _timed(self, handler):
        """LMCache's own handler, timed."""

        @functools.wraps(handler.__func__)
        def timed(_module, *args):
            if self._skips:
                return True
            start_s = time.thread_time()
            answer = handler(*args)
            self._took.append(time.thread_time() - start_s)
            return answer

        return types.MethodType(timed, handler.__self__)

    def _wrap(self, wrap, handler, operation):
        return wrap(self._timed(handler), operation)

    def _call(self, operation, *args):
        """Call a handler; note LMCache's own time, and what else it took."""
        start_s = time.thread_time()
        answer = self.handlers[operation](*args)
        took_s = time.thread_time() - start_s
        lmcache_s = self._took.pop()
        self.lmcache_s.setdefault(operation, []).append(lmcache_s)
        self.own_s.setdefault(operation, []).append(took_s - lmcache_s)
        return answer

    def _keys(self, number):
        """A request of 64 chunks: its look-up's key, and its store's."""
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        tokens = tuple(prompt(number, STORE_CHUNKS))
        of = tokens, 0, len(tokens), f"r{number}", ""
        workers = None, 0
        return [IPCCacheServerKey(MODEL, 1, each, *of, num_kv_readers=1) for each in workers]

    def serve(self, number):
        """Do what a request does whose chunks are all new."""
        look_up, store = self._keys(number)
        self._call("lookup", look_up, 1)
        self._call("wait_prefetch_status", look_up.request_id, 60.0)
        self._call("prepare_store", store, 1)
        assert self._call("commit_store", store, 1, self.data)
        self._call("end_session", look_up.request_id)

    def hot_us(self, repeats):
        """Median CPU time (us) of a look-up and of a store, in a row and without LMCache's part."""
        keys = [self._keys(number) for number in range(1_000_000, 1_000_000 + IN_A_ROW)]
        for look_up, _ in keys:  # what LMCache has done by then
            session = self.context.session_manager.get_or_create(look_up.request_id)
            session.set_tokens(list(look_up.token_ids))
            session.get_hashes(0, look_up.end)
        look_up, prepare, commit = (self.handlers[n] for n in ("lookup", *STORES))
        took_s = []
        self._skips = True
        for _ in range(repeats):
            start_s = time.thread_time()
            for key, _ in keys:
                look_up(key, 1)
            looked_up_s = time.thread_time()
            for _, key in keys:
                prepare(key, 1)
                commit(key, 1, self.data)
            took_s.append((looked_up_s - start_s, time.thread_time() - looked_up_s))
        self._skips = False
        return [statistics.median(times) / IN_A_ROW * 1e6 for times in zip(*took_s)]

    def lmcache_us(self, *operations):
        """Median CPU time (us) of LMCache's own handlers, summed."""
        return sum(statistics.median(self.lmcache_s[name]) for name in operations) * 1e6

    def own_us(self, *operations):
        """The same of what the module adds, less what measuring adds where it adds nothing."""
        nothing_s = statistics.median(self.own_s["wait_prefetch_status"])
        return sum(statistics.median(self.own_s[name]) - nothing_s for name in operations) * 1e6


def costs(requests: int) -> dict[str, float]:
    """Return CPU times of the module's hooks, beside LMCache's own in the same run.

    Those "in turn" are of calls between LMCache's own work, with the processor's caches full of it:
    some microseconds a call, whatever it does.
    """
    with tempfile.TemporaryDirectory() as folder:
        inside = Inside(folder)
        module, figures = inside.module, {}
        for number in range(10):  # warms up
            inside.serve(number)
        inside.own_s.clear()
        inside.lmcache_s.clear()
        for number in range(10, 10 + requests):
            inside.serve(number)
        figures["lmcache_us_per_key"] = inside.lmcache_us(*STORES) / STORE_CHUNKS
        figures["lmcache_lookup_us"] = inside.lmcache_us("lookup")
        figures["store_in_turn_us_per_key"] = inside.own_us(*STORES) / STORE_CHUNKS
        figures["lookup_in_turn_us"] = inside.own_us("lookup")
        module._decisions.flush(600.0)
        hands, places = module.hands, module.places
        hands.copy(places.chunks(), "disk", 60.0)  # the largest write-down that there can be
        assert hands.in_gpu(places.chunks()) == set(places.chunks())
        hands.delete(places.chunks(), "gpu")  # and the largest delete
        figures["deleted_chunks"] = sum(not chunk.bits & 1 for chunk in places.chunks())
        held = sorted(inside.lock.longest_s.items(), key=lambda item: -item[1])
        figures["l1_lock_ms"] = held[0][1] * 1e3
        figures["l1_lock_ms_by_method"] = {name: held_s * 1e3 for name, held_s in held[:6]}
        figures["lookup_us"], store_us = inside.hot_us(requests)
        figures["store_us_per_key"] = store_us / STORE_CHUNKS
        figures |= _of_many_chunks(module)
        figures["gc_ms"] = inside.collections.longest_s * 1e3
        assert not module.guard.failures, module.guard.failures
        module.close()
    return figures


def _of_many_chunks(module):
    """Enter many chunks, none of which is due; what a pass and a sweep cost then."""
    (manager,) = module.managers.values()
    (space,) = {chunk.space for chunk in module.places.chunks()}
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(MANY)]
    start_s = time.thread_time()
    for at in range(0, MANY, 50):
        module.places.stored(space, 0, digests[at : at + 50])
        with module.places.lock:
            pass
    entered_us = (time.thread_time() - start_s) / MANY * 1e6
    now_s = time.time()
    for at in range(0, MANY, 50):
        chunks = [space.chunks[digest] for digest in digests[at : at + 50]]
        module.places.decided(chunks, now_s + 3600.0 + at)
        manager.claims.claim(f"{at:x}", [chunk.key for chunk in chunks], "gpu", now_s, 3600.0 + at)
    times_s = []
    for _ in range(200):
        start_s = time.thread_time()
        module.keep_room()
        manager.sweep()
        times_s.append(time.thread_time() - start_s)
    return {"entered_us_per_key": entered_us, "pass_ms_100k": statistics.median(times_s) * 1e3}


# ---- the command ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run all three parts, write the report, print the figures."""
    from kvttl.bench.figures import machine, publish
    from kvttl.session.launch import ends_with_parent

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of the engine's prompts")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=("costs", "pressure", "engine"), action="append")
    options = parser.parse_args(argv)
    ends_with_parent()
    quick, about = options.quick, {"seed": options.seed, "goals": GOALS, **machine()}
    parts = {
        "costs": lambda: costs(30 if quick else 100),
        "pressure": lambda: pressure_without_engine(5 if quick else 25),
        "engine": lambda: pressure_with_engine(12 if quick else 40, options.seed, options.config),
    }
    out, figures = QUICK_REPORT if quick else REPORT, {}
    if options.part and out.exists():  # the others stay as they were
        figures = {n: v for n, v in json.loads(out.read_text()).items() if n not in about}
    for name in options.part or parts:
        figures |= (new := parts[name]())
        print(*(f"  {name}: {value}" for name, value in new.items()), sep="\n", flush=True)
    missed = [name for name, most in GOALS.items() if figures.get(name, 0) > most]
    publish(out, about, figures, [f"over its goal: {', '.join(missed) or 'none'}"])


if __name__ == "__main__":
    main()

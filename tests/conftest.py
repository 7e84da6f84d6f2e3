"""Fixtures of the real parts: one LMCache stack and one vLLM engine for the whole session.

Starting them takes most of a minute on two cores, so every test that needs
them shares them; tests that kill services restart what they killed.
"""

from __future__ import annotations

import itertools
import os
import random
import warnings

import hypothesis
import pytest
import redis_fixtures

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ["KV_HEURISTICS_FILE"] = os.devnull + ".absent"  # the defaults, whatever was saved here

# An example that waits for a busy core is no failure: Hypothesis would allow it 200 ms.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

_TOPICS = "cache tensor prefix token block chunk tier model agent server queue worker".split()


class RealRedis:
    """A redis-server with a password that tests may kill and start again on its port."""

    def __init__(self, folder):
        self._folder = str(folder)
        self.port, self.password = redis_fixtures.free_port(), "of-the-tests"
        self.url = redis_fixtures.redis_url(self.port, self.password)
        self.start()

    def start(self):
        self._process = redis_fixtures.start_redis(self.port, self.password, folder=self._folder)

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def real_redis(tmp_path_factory):
    """LMCache's remote tier in all tests."""
    server = RealRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_url(real_redis):
    """The URL, password included."""
    return real_redis.url


def new_stack(folder, redis_url=None, **settings):
    """A coordinator and an LMCache server on free ports, disk tier in a scratch folder.

    Decisions are made outside the server, unless a test says otherwise.
    """
    from kvttl.stack.lifecycle import LMCacheStack, load_config

    config = load_config(
        redis_url=redis_url,
        disk_path=str(folder / "disk"),
        run_dir=str(folder / "run"),
        start_timeout_s=250,
        **{"inside": False, **settings},
    )
    return LMCacheStack(config, free_ports=True)


@pytest.fixture(scope="session")
def stack(tmp_path_factory, redis_url):
    """The stack that tests share."""
    with new_stack(tmp_path_factory.mktemp("stack"), redis_url) as running:
        yield running


class SharedEngine:
    """The demo model in vLLM, connected to the stack; started again if a test ended it."""

    def __init__(self, stack):
        self._stack, self._llm = stack, None

    def get(self):
        if self._llm is not None and not self._alive():
            warnings.warn("the shared engine has died: starting another", stacklevel=2)
            self.close()
        if self._llm is None:
            from vllm import LLM

            from kvttl.session.demo_model import model_path

            self._llm = LLM(**self._stack.engine_kwargs(model_path()))
        return self._llm

    def _alive(self):
        core = self._llm.llm_engine.engine_core
        processes = core.resources.engine_manager.processes
        return not core.resources.engine_dead and all(one.is_alive() for one in processes)

    def close(self):
        # Before the stack stops: an engine that has lost its LMCache server hangs at exit.
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None


@pytest.fixture(scope="session")
def shared_engine(stack):
    """The holder of the engine; tests ask for `llm`."""
    engine = SharedEngine(stack)
    yield engine
    engine.close()


@pytest.fixture
def llm(shared_engine):
    """The demo model in vLLM, connected to the stack, alive."""
    return shared_engine.get()


@pytest.fixture(scope="session")
def plain_llm(stack):
    """The demo model in vLLM, without LMCache: what the texts of the others are compared with."""
    from vllm import LLM

    from kvttl.session.demo_model import model_path

    options = stack.engine_kwargs(model_path())
    del options["kv_transfer_config"]
    engine = LLM(**options)
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def greedy():
    """Deterministic sampling, a few tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=6)


_counter = itertools.count()


@pytest.fixture
def fresh_text():
    """A function that makes prose no other test has used, of about `words` words."""

    def make(words: int = 120) -> str:
        rng = random.Random(f"prompt {next(_counter)}")
        start = f"# note {rng.getrandbits(64):x}\n"
        return start + " ".join(rng.choice(_TOPICS) for _ in range(words))

    return make


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory):
    """The port of a Redis without a password that a module's LMCache servers share."""
    port = redis_fixtures.free_port()
    server = redis_fixtures.start_redis(port, folder=str(tmp_path_factory.mktemp("redis")))
    yield port
    redis_fixtures.stop_redis(server)

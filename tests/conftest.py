"""Fixtures of the real parts: one LMCache stack and one vLLM engine for the whole session.

Starting them takes most of a minute on two cores, so every test that needs
them shares them; tests that kill services restart what they killed.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest
import redis_fixtures

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ["KV_HEURISTICS_FILE"] = os.devnull + ".absent"  # the defaults, whatever was saved here

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


@pytest.fixture(scope="session")
def stack(tmp_path_factory, redis_url):
    """Coordinator and LMCache server on free ports, disk tier in a scratch folder."""
    from kvttl.stack.lifecycle import LMCacheStack, load_config

    folder = tmp_path_factory.mktemp("stack")
    config = load_config(
        redis_url=redis_url, disk_path=str(folder / "disk"), run_dir=str(folder / "run")
    )
    with LMCacheStack(config, free_ports=True) as running:
        yield running


@pytest.fixture(scope="session")
def llm(stack):
    """The demo model in vLLM, connected to the stack."""
    from vllm import LLM

    from kvttl.session.demo_model import model_path

    engine = LLM(**stack.engine_kwargs(model_path()))
    yield engine
    # Before the stack stops: an engine that has lost its LMCache server hangs at exit.
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

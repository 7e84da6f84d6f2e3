"""Requests that are given up, on real engines: nobody else notices, and no block is lost."""

from __future__ import annotations

import re
import threading

import pytest
import requests
from abort_storm import all_blocks_free, random_prompts, storm
from conftest import new_stack
from waiting import wait_until

from kvttl.session.demo_model import model_path
from kvttl.session.launch import managed
from tiered_caching import EngineDied

pytestmark = pytest.mark.timeout(900)  # up to four engines are started, on a busy machine too
ROUNDS = 40  # about 70 aborts an engine


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(12, seed=7)


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory):
    """LMCache keeps the read locks of an aborted look-up for 300 s: others must not wait for it."""
    with new_stack(tmp_path_factory.mktemp("aborts")) as running:
        yield running


@pytest.fixture(scope="module")
def texts(plain_llm, prompts, greedy):
    """What an engine without LMCache answers."""
    outputs = [plain_llm.generate(prompt, greedy, use_tqdm=False)[0] for prompt in prompts]
    return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module", params=["engine_driven", "lmcache_driven"])
def engine(request, own_stack):
    """CPU engines copy KV themselves, in order; GPU engines schedule ahead, and LMCache copies."""
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMCACHE_MP_TRANSFER_MODE", request.param)
        options = {"async_scheduling": request.param == "lmcache_driven"}
        made = LLM(**own_stack.engine_kwargs(model_path(), **options))
    yield made
    made.llm_engine.engine_core.shutdown()


def read_locks(stack):
    """Return how many chunks in LMCache's memory are locked by look-ups and loads."""
    state = requests.get(f"{stack.server_http_url}/status", timeout=60).text
    return sum(map(int, re.findall(r'"read_locked_count": *(\d+)', state)))


def test_aborts_at_random_moments(engine, own_stack, greedy, prompts, texts):
    engine.generate(prompts, greedy, use_tqdm=False)
    assert all_blocks_free(engine)
    aborted, answers = storm(engine, greedy, prompts, ROUNDS, seed=0)
    assert aborted > ROUNDS and len(answers) > 10
    assert [(known, texts[known]) for known, _ in answers] == answers
    assert all_blocks_free(engine)
    wait_until(lambda: read_locks(own_stack) == 0)  # LMCache itself keeps them for 300 s
    outputs = engine.generate(prompts, greedy, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == texts
    assert sum(output.num_cached_tokens for output in outputs) > 5000, "nothing came from LMCache"


def test_a_batch_with_a_prompt_that_is_too_long(engine, greedy, prompts, texts):
    from vllm.exceptions import VLLMValidationError

    too_long = {"prompt_token_ids": [17] * 3000}
    for _ in range(10):
        with pytest.raises(VLLMValidationError, match="maximum context length"):
            engine.generate([*prompts[:6], too_long], greedy, use_tqdm=False)
        outputs = engine.generate(prompts[:3], greedy, use_tqdm=False)
        assert [output.outputs[0].text for output in outputs] == texts[:3]
    assert all_blocks_free(engine)


def test_a_request_that_asks_for_counts_and_is_aborted_unseen(engine, greedy, prompts, texts):
    from vllm import SamplingParams

    asking = {"kv_transfer_params": {"cached_token_stats": True}}
    sampling = SamplingParams(temperature=0.0, max_tokens=6, extra_args=asking)
    for number in range(10):
        name = f"unseen-{number}"
        engine.llm_engine.add_request(name, prompts[0], sampling)
        engine.llm_engine.abort_request([name])
    assert engine.generate(prompts[0], greedy, use_tqdm=False)[0].outputs[0].text == texts[0]
    assert all_blocks_free(engine)


def test_an_engine_that_dies_is_said_and_started_again(
    stack, shared_engine, greedy, texts, prompts
):
    from vllm import SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError

    before = shared_engine.get()
    assert shared_engine.get() is before
    process = before.llm_engine.engine_core.resources.engine_manager.processes[0]
    long = SamplingParams(temperature=0.0, max_tokens=1400, ignore_eos=True)
    with managed(stack, before) as cache:
        cache.generate(prompts[0], greedy)
        threading.Timer(0.5, process.kill).start()  # in the middle of the call
        for asked in ("A prompt under way", "The next one"):
            with pytest.raises(
                EngineDied, match=r"engine has died \(exit code -9; .*set_llm"
            ) as died:
                cache.generate_and_manage(asked, long)
            assert isinstance(died.value.__cause__, EngineDeadError)
        assert [record.error.partition(":")[0] for record in cache.records] == [
            "",
            *["EngineDied"] * 2,
        ]
        with pytest.warns(UserWarning, match="shared engine has died"):
            after = shared_engine.get()
        cache.set_llm(after)  # the manager goes on
        (managed_output,) = cache.generate(prompts[0], greedy)
        assert managed_output.output.outputs[0].text == texts[0]
        assert not managed_output.decision.result().error


def test_another_vllm_is_refused_in_words(monkeypatch):
    from kvttl.stack import engine_connector

    monkeypatch.setattr(engine_connector.Scheduler, "_free_request", lambda self, request: None)
    with pytest.raises(RuntimeError, match=r"vLLM 0.30 and LMCache 0.5.6.*delay_free_blocks"):
        engine_connector.LMCacheMPConnector(None, None, None)

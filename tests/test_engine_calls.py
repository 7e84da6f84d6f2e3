"""Calls that are interrupted at any moment: the next one returns its own prompt's answer."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from abort_storm import all_blocks_free
from waiting import children_of, is_gone, wait_until

from kvttl.agents.langchain import ManagedChatModel
from kvttl.manager.engine_calls import EngineCalls
from kvttl.manager.generation import Engine
from kvttl.session.launch import ends_with_parent, managed

ROOT = Path(__file__).resolve().parents[1]
OF_NO_INTEREST = "def of_no_interest(argument):\n    return argument\n" * 40
SHORT = ("import os\n", "class Zebra:\n", "# a list of cities\n")


class Interrupted(BaseException):
    """What a time-out by a signal raises: no `Exception`, as KeyboardInterrupt is none."""


@pytest.fixture
def cache(stack, llm):
    with managed(stack, llm) as made:
        yield made


@pytest.fixture
def truths(llm, greedy):
    """What vLLM answers each short prompt when nobody disturbs it."""
    return [llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].text for prompt in SHORT]


@pytest.fixture
def endless():
    """Sampling parameters of an answer that takes seconds."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1400, ignore_eos=True)


@pytest.fixture
def interrupted_after():
    """A function that runs another one until a signal handler raises in the midst of it."""

    def run(work, after_s):
        signal.setitimer(signal.ITIMER_REAL, after_s)
        try:
            with pytest.raises(Interrupted):
                work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def interrupt(_number, _frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    yield run
    signal.signal(signal.SIGALRM, before)


def unfinished(llm):
    processor = llm.llm_engine.output_processor
    return [*processor.request_states, *processor.parent_requests, *processor.external_req_ids]


@pytest.mark.parametrize("kind", ["single", "batch", "several sequences", "langchain"])
def test_calls_that_are_interrupted_at_random_moments(
    kind, cache, llm, greedy, endless, truths, interrupted_after
):
    rng, several = random.Random(kind), endless.clone()
    several.n, several.temperature = 3, 1.0  # vLLM takes n = 1 alone where it is greedy
    model = ManagedChatModel(kv_cache=cache)
    work = {
        "single": lambda: cache.generate_and_manage(OF_NO_INTEREST, endless),
        "batch": lambda: cache.generate([OF_NO_INTEREST, *SHORT], endless),
        "several sequences": lambda: cache.generate([OF_NO_INTEREST, *SHORT], several),
        "langchain": lambda: model.invoke(OF_NO_INTEREST, max_tokens=1400, ignore_eos=True),
    }[kind]
    conversation = "What is a KV cache?"
    said = model.invoke(conversation, max_tokens=6).content
    for _ in range(4):
        interrupted_after(work, rng.choice((0.003, 0.01, 0.03, 0.1, 0.5)))
        assert not unfinished(llm)
        prompt = rng.randrange(len(SHORT))
        assert cache.generate_and_manage(SHORT[prompt], greedy) == truths[prompt]
        assert cache.generate_and_manage_batch(SHORT, greedy) == truths
        assert model.invoke(conversation, max_tokens=6).content == said
    assert not model._batches._waiting
    assert all_blocks_free(llm), "vLLM still works on what was given up"


def test_a_stop_button(cache, llm, greedy, endless, truths):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        cache.generate_and_manage(OF_NO_INTEREST, endless)
    timer.join()
    assert cache.generate_and_manage(SHORT[0], greedy) == truths[0]
    assert all_blocks_free(llm)


def test_an_exception_for_a_thread_that_waits(cache, llm, greedy, endless, truths):
    ended = []

    def call():
        try:
            cache.generate_and_manage(OF_NO_INTEREST, endless)
        except TimeoutError:
            ended.append(TimeoutError)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: unfinished(llm))
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(TimeoutError)
    )
    thread.join(120)
    assert (raised, ended) == (1, [TimeoutError])
    assert cache.generate_and_manage(SHORT[1], greedy) == truths[1]


def test_an_error_of_the_engine_about_one_request(llm, greedy, truths):
    """`prompt_logprobs` of a cached prompt: the manager refuses it; here it comes to the engine."""
    from vllm import SamplingParams

    engine = Engine(llm)
    wait_until(lambda: engine.generate(OF_NO_INTEREST, greedy, 0)[0][0].num_cached_tokens)
    asking = SamplingParams(temperature=0.0, max_tokens=300, prompt_logprobs=1, ignore_eos=True)
    with pytest.raises(OverflowError):
        EngineCalls(llm, {}).generate([OF_NO_INTEREST, SHORT[0]], asking)
    assert not unfinished(llm)
    outputs, _ = engine.generate(list(SHORT), greedy, 0)
    assert [output.outputs[0].text for output in outputs] == truths
    assert all_blocks_free(llm)


def test_what_somebody_elses_interrupted_call_has_left_is_aborted(
    cache, llm, greedy, endless, truths, interrupted_after, caplog
):
    interrupted_after(lambda: llm.generate(OF_NO_INTEREST, endless, use_tqdm=False), 0.3)
    assert unfinished(llm)
    assert cache.generate_and_manage(SHORT[2], greedy) == truths[2]
    assert "aborting 1 requests" in caplog.text
    assert cache.records[-1].prompt_tokens < 20  # its own, not the other prompt's
    assert all_blocks_free(llm)


def test_threads_and_managers_take_turns_at_one_engine(stack, llm, cache, greedy, truths):
    with managed(stack, llm) as other, ThreadPoolExecutor(8) as threads:
        numbers = [number % len(SHORT) for number in range(40)]
        calls = [
            threads.submit(each.generate_and_manage, SHORT[number], greedy)
            for number, each in zip(numbers, [cache, other] * 20)
        ]
        assert [call.result() for call in calls] == [truths[number] for number in numbers]
    wait_until(lambda: "kv-engine" not in {thread.name for thread in threading.enumerate()})


def test_a_wrapper_of_vllms_generate_is_called_itself(llm, greedy, truths):
    asked = []

    class Wrapper:
        llm_engine = llm.llm_engine

        def generate(self, prompts, sampling_params):
            asked.append(prompts)
            return llm.generate(prompts, sampling_params, use_tqdm=False)

    outputs, _ = Engine(Wrapper()).generate(SHORT[0], greedy, 0)
    assert (asked, outputs[0].outputs[0].text) == ([SHORT[0]], truths[0])


@pytest.mark.parametrize("prompts, answers", [("a", 2), (["a", "b"], 1), (["a", "b"], 3)])
def test_as_many_answers_as_prompts(prompts, answers):
    engine = Engine(SimpleNamespace(generate=lambda prompts, sampling_params: ["?"] * answers))
    asked = 1 if prompts == "a" else len(prompts)
    with pytest.raises(RuntimeError, match=f"{answers} answers to {asked} prompts"):
        engine.generate(prompts, None, 0)


# ---- whoever starts an engine ends -----------------------------------------------------------

OWNER = """
import sys
def main():
    from vllm import LLM
    from kvttl.session.demo_model import model_path
    from kvttl.stack.lifecycle import LMCacheStack, StackConfig
    options = LMCacheStack(StackConfig(server_port=int(sys.argv[2]))).engine_kwargs(model_path())
    del options[sys.argv[1]]
    llm = LLM(**options)
    llm.generate("import os", use_tqdm=False)  # short: it ended the engine on a CPU with AMX
    print("ready", flush=True)
    sys.stdin.read()
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("without", ["kv_transfer_config", "worker_extension_cls"])
def test_an_engine_ends_with_its_owner(without, stack, tmp_path):
    """Watched by the worker's extension alone, as in engines without LMCache, or the connector."""
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen(
        [sys.executable, str(script), without, str(stack.server_port)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: owner.stdout.readline() in ("ready\n", ""))
    processes = children_of(owner.pid)
    owner.kill()
    owner.wait()
    assert len(processes) >= 2  # vLLM's EngineCore and its worker
    wait_until(lambda: all(map(is_gone, processes)))


def test_a_command_ends_with_its_make(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import time\nfrom kvttl.session.launch import ends_with_parent\nends_with_parent()\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    makefile = tmp_path / "Makefile"
    makefile.write_text(f"run:\n\t@{sys.executable} {script}\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "KV_END_WITH_PARENT": "1"}
    make = subprocess.Popen(["make", "-C", str(tmp_path)], env=env, stdout=subprocess.PIPE)
    wait_until(lambda: make.stdout.readline() == b"ready\n")
    processes = children_of(make.pid)
    make.kill()
    make.wait()
    assert processes
    wait_until(lambda: all(map(is_gone, processes)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_as_ctrl_c_does(number, monkeypatch):
    monkeypatch.delenv("KV_END_WITH_PARENT", raising=False)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(number, signal.SIG_DFL)
        ends_with_parent()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.signal(number, signal.SIG_IGN)  # as `nohup` does
        ends_with_parent()
        signal.raise_signal(number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

"""Requests that are given up at random moments of look-up, load, prefill, decode and store.

As a script, for as many aborts as wanted, while the LMCache server is up, slow or killed:
``python tests/abort_storm.py --aborts 10000 --seed 0``. It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager

_PAUSES_S = (0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08)
_MARGIN = 0.2  # of each token over the next best: a different order of sums changes no text


def random_prompts(count: int, seed: int) -> list[dict]:
    """Return prompts of 200 to 1,200 random tokens."""
    rng = random.Random(seed)
    lengths = [rng.randrange(200, 1200) for _ in range(count)]
    return [{"prompt_token_ids": [rng.randrange(10, 2000) for _ in range(n)]} for n in lengths]


def storm(
    llm, sampling, prompts: list[dict], rounds: int, seed: int, most: int = 4
) -> tuple[int, list]:
    """Send 1 to `most` prompts a round, abort most of them soon; 60 % are known ones.

    Returns
    -------
    tuple
        The number of aborted requests; (index of a prompt, its text) of the known prompts that
        were left alone.
    """
    rng, engine = random.Random(seed), llm.llm_engine
    aborted, texts = 0, []
    for number in range(rounds):
        sent = {}
        for part in range(rng.randint(1, most)):
            known = rng.randrange(len(prompts)) if rng.random() < 0.6 else None
            prompt = random_prompts(1, rng.getrandbits(32))[0] if known is None else prompts[known]
            name = f"storm-{seed}-{number}-{part}"
            engine.add_request(name, prompt, sampling)
            sent[name] = known
        outputs = _step(engine, time.monotonic() + rng.choice(_PAUSES_S))
        given_up = [name for name in sent if rng.random() < 0.7]
        engine.abort_request(given_up)
        outputs += _step(engine)
        aborted += len(given_up)
        done = [o for o in outputs if o.finished and o.request_id not in given_up]
        texts += [(sent[o.request_id], o.outputs[0].text) for o in done]
    return aborted, [(known, text) for known, text in texts if known is not None]


def _step(engine, until_s: float = float("inf")) -> list:
    outputs = []
    while time.monotonic() < until_s and engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def all_blocks_free(llm, limit_s: float = 20.0) -> bool:
    """Say whether every block of the idle engine is free: else vLLM refuses the reset."""
    deadline_s = time.monotonic() + limit_s
    while not llm.reset_prefix_cache():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


# ---- the long form ---------------------------------------------------------------------------


@contextmanager
def troubled(stack, trouble: str, rng: random.Random):
    """While the block runs, the LMCache server is as it is ("up"), halts again and again, or dies.

    Afterwards it runs again.
    """
    ended, server = threading.Event(), stack.health()["server"]["pid"]

    def halt():
        while not ended.wait(rng.uniform(0.05, 1.0)):
            os.kill(server, signal.SIGSTOP)
            ended.wait(rng.uniform(0.05, 1.0))
            os.kill(server, signal.SIGCONT)

    def die():
        ended.wait(rng.uniform(0.0, 3.0))
        stack.kill("server")

    work = {"up": lambda: None, "slow": halt, "killed": die}[trouble]
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if trouble == "killed":
            stack.start_one("server")


def _clear_ones(llm, count):
    """Return prompts whose every token is clearly the likeliest, and their texts.

    Nothing is in LMCache yet.
    """
    from kvttl.session.launch import greedy

    prompts = random_prompts(40 * count, seed=7)
    outputs = llm.generate(prompts, greedy(6, logprobs=2), use_tqdm=False)
    clear = [at for at, each in enumerate(outputs) if _margin(each) >= _MARGIN][:count]
    assert len(clear) == count, f"only {len(clear)} prompts have clear answers"
    return [prompts[at] for at in clear], [outputs[at].outputs[0].text for at in clear]


def _margin(output):
    """Return the smallest lead of a chosen token over the next best, in log-probability."""
    steps = (each.values() for each in output.outputs[0].logprobs)
    ranked = [sorted((entry.logprob for entry in step), reverse=True) for step in steps]
    return min(first - second for first, second, *_ in ranked)


def main() -> int:
    """Storm until enough requests were aborted; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aborts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="the longest it may take")
    parser.add_argument("--inside", choices=("0", "1"), default="1", help="1: the module decides")
    options = parser.parse_args()
    from kvttl.session.demo_model import model_path
    from kvttl.session.launch import be_quiet, engine, greedy
    from kvttl.stack.lifecycle import LMCacheStack, load_config

    rng, sampling = random.Random(options.seed), greedy(6)
    counts, wrong, leaks, turns = dict.fromkeys(("up", "slow", "killed"), 0), 0, 0, 0
    until_s = time.monotonic() + options.minutes * 60
    be_quiet()
    folder = tempfile.TemporaryDirectory()
    fast = {"mq_timeout_s": 1.0, "engine_heartbeat_s": 0.5}  # or a killed server takes minutes
    fast["start_timeout_s"] = 250  # on a loaded machine
    config = load_config(disk_path=folder.name, inside=options.inside == "1", **fast)
    with folder, LMCacheStack(config, free_ports=True) as stack, engine(stack, model_path()) as llm:
        prompts, texts = _clear_ones(llm, 12)
        while sum(counts.values()) < options.aborts and time.monotonic() < until_s:
            trouble = rng.choice(["up", "up", "slow", "slow", "killed"])
            with troubled(stack, trouble, rng):
                seed, most = rng.getrandbits(32), rng.choice((1, 4, 16, 32))
                aborted, answers = storm(llm, sampling, prompts, 20, seed, most)
            counts[trouble] += aborted
            for known, text in answers:
                if text != texts[known]:
                    wrong += 1
                    print(f"{trouble}: prompt {known} {text!r}, not {texts[known]!r}", flush=True)
            leaks += not all_blocks_free(llm, 120.0)
            turns += 1
            if turns % 10 == 0:
                print(turns, counts, "wrong", wrong, "leaks", leaks, flush=True)
    figures = {
        "seed": options.seed,
        "inside": config.inside,
        "aborts": counts,
        "wrong_texts": wrong,
        "leaks": leaks,
    }
    print(json.dumps(figures))
    return int(bool(wrong or leaks))


if __name__ == "__main__":
    sys.exit(main())

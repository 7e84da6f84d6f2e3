"""Requests that are given up at random moments of look-up, load, prefill, decode and store."""

from __future__ import annotations

import random
import time

_PAUSES_S = (0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08)


def random_prompts(count: int, seed: int) -> list[dict]:
    """Return prompts of 200 to 1,200 random tokens."""
    rng = random.Random(seed)
    lengths = [rng.randrange(200, 1200) for _ in range(count)]
    return [{"prompt_token_ids": [rng.randrange(10, 2000) for _ in range(n)]} for n in lengths]


def storm(llm, sampling, prompts: list[dict], rounds: int, seed: int) -> tuple[int, list]:
    """Send 1 to 4 prompts a round, abort most of them soon; 60 % of the prompts are known ones.

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
        for part in range(rng.randrange(1, 5)):
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

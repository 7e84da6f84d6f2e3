"""`make bench-gateway`: what the gateway adds to a request, and 50 streams at once.

On one engine, in turns: the engine called on its own event loop, vLLM's OpenAI server
without management, and the gateway; there also with requests that bring their
perplexity, so that none is measured. A pause follows each; "busy" is the second of two
requests without one, so that the decision about the first is made meanwhile. The HTTP
client is another process. Every prompt is new, so that no request is served from
LMCache. Ends with one line of JSON.
"""

import argparse
import asyncio
import functools
import math
import multiprocessing
import random
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openai

from kvttl.bench.figures import machine, percentile_line, percentiles, publish, run_benchmark
from kvttl.serve.app import openai_app
from kvttl.serve.gateway import Gateway, gateway
from kvttl.serve.listening import listening, serving
from kvttl.serve.options import server_arguments
from kvttl.session.demo_model import model_path
from kvttl.session.launch import ends_with_parent, greedy, session_stack
from kvttl.session.texts import random_words

REPORT = Path("data/reports/gateway.json")
MAX_TOKENS = 16
STREAMS = 50
_ROUNDS = 3  # of streams
_WORDS = 150  # of a prompt
_WARM_UP = 5  # requests of each way
# After each, for all ways alike: LMCache stores KV cache after the answer, and a decision
# may move it; whoever comes meanwhile shares the processor with that.
_PAUSE_S = 0.1
_WAYS = "engine vllm_server vllm_server_busy gateway gateway_perplexity_given gateway_busy".split()
_COMPARED = (  # a way, and what it is compared with
    *product(("gateway", "gateway_perplexity_given"), ("vllm_server", "engine")),
    ("gateway_busy", "vllm_server_busy"),
)


@contextmanager
def plain_server(server: Gateway, model: str) -> Iterator[str]:
    """Serve the gateway's engine a second time, without management; gives the base URL."""
    arguments = server_arguments(model, server.model)
    app = server.loop.call(openai_app, server.engine.unmanaged, arguments)
    with listening() as listener, serving(app, listener, server.loop) as url:
        yield f"{url}/v1"


async def time_in_engine(engine: Any, prompts: Sequence[str]) -> list[float]:
    """Return the seconds that each generation takes on the engine's own event loop."""
    from vllm.sampling_params import RequestOutputKind

    sampling = greedy(MAX_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    seconds = []
    for prompt in prompts:
        start_s = time.perf_counter()
        async for _ in engine.generate(prompt, sampling, str(uuid.uuid4())):
            pass
        seconds.append(time.perf_counter() - start_s)
    return seconds


def time_over_http(base_url: str, model: str, prompts: Sequence[str], kv=None) -> list[float]:
    """Return the seconds that each request takes with the `openai` client."""
    client, seconds = _client(base_url), []
    client.models.list()  # connects, if it is not connected any more
    for prompt in prompts:
        start_s = time.perf_counter()
        client.completions.create(**_asked(model, prompt, kv))
        seconds.append(time.perf_counter() - start_s)
    return seconds


@functools.cache
def _client(base_url):
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def time_streams(base_url: str, model: str, prompts: Sequence[str]) -> list[tuple[float, str]]:
    """Ask for a stream of each prompt at once; returns seconds to the first token, and errors."""

    async def all_of_them():
        options = {"api_key": "none", "max_retries": 0, "timeout": 120}
        async with openai.AsyncOpenAI(base_url=base_url, **options) as client:
            return await asyncio.gather(*[_stream(client, model, prompt) for prompt in prompts])

    return asyncio.run(all_of_them())


async def _stream(client, model, prompt):
    asked = _asked(model, prompt, stream=True, stream_options={"include_usage": True})
    start_s, first_s = time.perf_counter(), math.nan
    try:
        async for part in await client.completions.create(**asked):
            if part.choices and math.isnan(first_s):
                first_s = time.perf_counter() - start_s
        if part.usage.completion_tokens != MAX_TOKENS:
            return first_s, f"{part.usage.completion_tokens} tokens instead of {MAX_TOKENS}"
    except Exception as error:
        return first_s, f"{type(error).__name__}: {error}"
    return first_s, ""


def _asked(model, prompt, kv=None, **options):
    options |= {"max_tokens": MAX_TOKENS, "temperature": 0.0}
    extra = {"ignore_eos": True, "kv": kv}
    return {"model": model, "prompt": prompt, "extra_body": extra, **options}


def compare_ways(
    server: Gateway, urls: Mapping[str, str], client: Executor, requests: int, rng: random.Random
) -> dict[str, float]:
    """Time the ways in turns; returns percentiles and what the gateway adds.

    That is the median over the turns of the difference within a turn: what else the
    machine does meanwhile comes and goes.
    """
    times_ms: dict[str, list[float]] = {way: [] for way in _WAYS}
    for turn in range(requests + _WARM_UP):
        for way in rng.sample(_WAYS, k=len(_WAYS)):
            prompts = [random_words(rng, _WORDS) for _ in range(2 if way.endswith("busy") else 1)]
            taken = _time_way(way, server, urls, client, prompts)
            server.cache.flush()
            time.sleep(_PAUSE_S)
            times_ms[way] += [taken[-1] * 1e3] if turn >= _WARM_UP else []
    figures = {k: v for way in _WAYS for k, v in percentiles(way, times_ms[way]).items()}
    for way, peer in _COMPARED:
        added_ms = np.subtract(times_ms[way], times_ms[peer])
        figures[f"{way}_adds_to_{peer}_p50_ms"] = float(np.median(added_ms))
    return {"requests_of_each": requests, **figures}


def _time_way(way, server, urls, client, prompts):
    if way == "engine":
        return server.loop.call(time_in_engine, server.engine.unmanaged, prompts)
    url = urls["vllm_server" if way.startswith("vllm_server") else "gateway"]
    kv = {"perplexity": 25.0} if way.endswith("given") else None
    return client.submit(time_over_http, url, server.model, prompts, kv).result()


def compare_streams(
    server: Gateway, urls: Mapping[str, str], client: Executor, rng: random.Random
) -> dict[str, Any]:
    """Start `STREAMS` streams at once, on vLLM's server and on the gateway, in turns."""
    figures: dict[str, Any] = {"streams": STREAMS, "streams_rounds": _ROUNDS}
    answers: dict[str, list] = {name: [] for name in urls}
    for name in [*urls] * _ROUNDS:
        prompts = [random_words(rng, _WORDS) for _ in range(STREAMS)]
        answers[name] += client.submit(time_streams, urls[name], server.model, prompts).result()
        server.cache.flush()
    for name, rounds in answers.items():
        errors = [error for _, error in rounds if error]
        ttft_ms = [seconds * 1e3 for seconds, error in rounds if not error]
        figures |= percentiles(f"streams_{name}_ttft", ttft_ms)
        figures[f"streams_{name}_errors"] = len(errors)
        for error in errors[:3]:
            print(f"{name}: {error}", file=sys.stderr)
    return figures


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, write `REPORT`, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--requests", type=int, default=60, help="of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--perplexity", choices=("generation", "off"), default="generation")
    options = parser.parse_args(argv)
    ends_with_parent()
    about = {"seed": options.seed, "perplexity": options.perplexity}
    about |= machine("openai", "fastapi", "uvicorn")
    figures = _measure(options)
    publish(REPORT, about, figures, list(_lines(figures)))


def _measure(options):
    rng = random.Random(options.seed)
    with ExitStack() as exits:
        # A client in this process would share the interpreter lock with the server.
        spawn = multiprocessing.get_context("spawn")
        client = exits.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
        stack = exits.enter_context(session_stack(options.config))
        model = model_path()
        server = exits.enter_context(gateway(stack, model, perplexity=options.perplexity))
        plain_url = exits.enter_context(plain_server(server, model))
        urls = {"vllm_server": plain_url, "gateway": server.base_url}
        figures = compare_ways(server, urls, client, options.requests, rng)
        figures |= compare_streams(server, urls, client, rng)
        generations = [r for r in server.cache.records if r.kind == "generation"]
        figures["not_managed"] = sum(bool(record.error) for record in generations)
        return {**figures, "managed": len(generations)}


def _lines(figures):
    for way in (*_WAYS, "streams_vllm_server_ttft", "streams_gateway_ttft"):
        yield percentile_line(way, figures)
    for way, peer in _COMPARED:
        yield f"{way} - {peer}: {figures[f'{way}_adds_to_{peer}_p50_ms']:+.2f} ms (p50)"
    yield f"{figures['streams']} streams at once: {figures['streams_gateway_errors']} errors\n"


if __name__ == "__main__":
    run_benchmark(main)

"""LoRA adapters, embeddings and tenants on the real stack: texts with KV are those without."""

from __future__ import annotations

import itertools

import pytest
from lora_adapters import make_adapter
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from waiting import wait_until

from cache_controller import LMCacheController
from caching_heuristics import TIERS
from kvttl.session.demo_model import model_path
from tiered_caching import MultiTierCache

HOT, WARM, COLD = ({"perplexity": p, "time_variance": 0.1} for p in (12.0, 35.0, 80.0))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters, and what they are called."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = {name: make_adapter(folder / name, seed) for seed, name in enumerate("ab", 1)}
    return {name: LoRARequest(name, n, paths[name]) for n, name in enumerate(paths, 1)}


@pytest.fixture(scope="module")
def lora_llm(stack):
    """The one engine of the tests that takes adapters and embeddings."""
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    llm = LLM(**stack.engine_kwargs(model_path(), enable_prompt_embeds=True, **options))
    yield llm
    llm.llm_engine.engine_core.shutdown()


def managed(stack, llm):
    controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
    return MultiTierCache(controller, llm, notify=None)


@pytest.fixture
def manager(stack, lora_llm):
    with managed(stack, lora_llm) as cache:
        yield cache


@pytest.fixture
def cache(stack, llm):
    with managed(stack, llm) as made:
        yield made


def tiers_of(cache, record):
    """The tiers in which all of a record's KV is."""
    layout = cache.controller.layout_of(record.chunk_keys)
    held = layout.of(cache.controller.instance_id)
    whole = len(held) == len(record.chunk_keys)
    return [tier for tier in TIERS if whole and all(tier in tiers for tiers in held)]


def in_all_tiers(cache, record):
    wait_until(lambda: tiers_of(cache, record) == list(TIERS))


def after_sweeps(cache, condition):
    """Wait until what a sweep may have to do is done."""

    def holds():
        cache.sweep()
        return condition()

    wait_until(holds)


def hits(record):
    return sum(record.hit_tokens.values())


def test_adapters_and_base_never_get_each_others_kv(manager, lora_llm, adapters, fresh_text):
    """Whoever comes first, cold and warm, each has the text that it has alone."""
    greedy, uses = SamplingParams(temperature=0.0, max_tokens=12), [None, *adapters.values()]
    texts = {}
    for first in uses:
        prompt, order = fresh_text(), [first, *(use for use in uses if use is not first)]
        for lora in order:
            texts[lora and lora.lora_name] = made = []
            for _ in range(2):
                text = manager.generate_and_manage(prompt, greedy, HOT, lora_request=lora)
                made.append((text, hits(manager.records[-1])))
                in_all_tiers(manager, manager.records[-1])
            (cold, no_hits), (warm, own_hits) = made
            assert (cold, no_hits) == (warm, 0) and own_hits >= 32, (first, lora)
        assert len({made[0][0] for made in texts.values()}) == 3  # the adapters do change texts
        batch = manager.generate_and_manage_batch([prompt] * 3, greedy, HOT, lora_request=uses)
        assert batch == [texts[lora and lora.lora_name][0][0] for lora in uses]
    salts = {record.cache_salt for record in manager.records}
    assert len(salts) == 3 and "" in salts


def test_an_engine_that_no_manager_stands_before_keeps_them_apart_too(
    manager, lora_llm, adapters, greedy, fresh_text
):
    prompt = fresh_text()
    (first,) = lora_llm.generate(prompt, greedy, lora_request=adapters["a"], use_tqdm=False)
    done = manager.manage(prompt, first, WARM).result()
    assert done.error == "" and done.cache_salt
    after_sweeps(manager, lambda: tiers_of(manager, done) == ["disk", "remote"])
    assert manager.generate_and_manage(prompt, greedy, HOT) and hits(manager.records[-1]) == 0
    again = manager.generate_and_manage(prompt, greedy, HOT, lora_request=adapters["a"])
    assert again == first.outputs[0].text and hits(manager.records[-1]) >= 32
    assert manager.records[-1].chunk_keys == done.chunk_keys
    # Salts that would end the engine, had they reached LMCache as they are.
    for salt in ("a/b", "x" * 300):
        (answer,) = lora_llm.generate({"prompt": "Hi", "cache_salt": salt}, greedy, use_tqdm=False)
        assert answer.outputs[0].text


def test_a_reloaded_adapter_gets_nothing_of_the_one_before(manager, greedy, fresh_text, tmp_path):
    prompt, folder, number = fresh_text(), tmp_path / "c", itertools.count(11)
    first = LoRARequest("c", next(number), make_adapter(folder, 3))
    texts = [manager.generate_and_manage(prompt, greedy, HOT, lora_request=first)]
    in_all_tiers(manager, manager.records[-1])
    make_adapter(folder, 4)
    with pytest.raises(ValueError, match="lora_int_id 11 of 'c' is not possible"):
        manager.generate_and_manage(prompt, greedy, HOT, lora_request=first)
    reloaded = LoRARequest("c", 11, str(folder), load_inplace=True)
    other = LoRARequest("c2", next(number), str(folder))
    for lora, least in ((reloaded, 0), (other, 32)):
        texts.append(manager.generate_and_manage(prompt, greedy, HOT, lora_request=lora))
        assert hits(manager.records[-1]) >= least and (least or not hits(manager.records[-1]))
        in_all_tiers(manager, manager.records[-1])
    assert texts[0] != texts[1] == texts[2]


def test_an_adapter_that_cannot_be_loaded_does_not_end_the_engine(manager, greedy, tmp_path):
    large = LoRARequest("large", 21, make_adapter(tmp_path / "large", 1, rank=32))
    with pytest.raises(ValueError, match="lora_request 'large': .*rank 32 is greater than"):
        manager.generate_and_manage("Hi", greedy, HOT, lora_request=large)
    nowhere = LoRARequest("nowhere", 22, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="lora_path .*nowhere': No such file"):
        manager.generate_and_manage("Hi", greedy, HOT, lora_request=nowhere)
    assert manager.generate_and_manage("Hi", greedy, HOT)


def test_embeddings_have_kv_of_their_own(manager, greedy, adapters, tmp_path):
    torch = pytest.importorskip("torch")
    draw = torch.Generator().manual_seed(len(str(tmp_path)) + hash(str(tmp_path)) % 1000)
    shape = (96, 256)
    one, other = ({"prompt_embeds": torch.randn(shape, generator=draw).bfloat16()} for _ in "12")
    texts = {}
    for name, prompt, lora in (
        ("one", one, None),
        ("other", other, None),
        ("a", one, adapters["a"]),
    ):
        for _ in range(2):
            (made,) = manager.generate(prompt, greedy, HOT, lora_request=lora)
            record = made.decision.result()
            assert record.error == "" and (record.prompt_tokens, record.chunks) == (96, 3)
            texts.setdefault(name, []).append((made.output.outputs[0].text, hits(record)))
            in_all_tiers(manager, record)
        (cold, no_hits), (warm, own_hits) = texts[name]
        assert (cold, no_hits) == (warm, 0) and own_hits >= 32


def test_tenants_of_one_text_have_two_caches(cache, greedy, fresh_text):
    """Equal text, equal answers, and nothing else in common."""
    text, salts = fresh_text(), ("tenant-a", "tenant ü", None)
    wishes = dict(zip(salts, (WARM, COLD, HOT)))
    held = {"tenant-a": ["disk", "remote"], "tenant ü": ["remote"], None: list(TIERS)}
    records, answers = {}, set()
    for salt in salts:
        answers.add(cache.generate_and_manage(text, greedy, wishes[salt], cache_salt=salt))
        records[salt] = cache.records[-1]
        assert hits(records[salt]) == 0 and records[salt].metadata["access_count"] == 0

    after_sweeps(cache, lambda: all(tiers_of(cache, records[salt]) == held[salt] for salt in salts))
    assert len(answers) == 1
    tokens, here = cache.controller.tokenize(text), cache.controller.instance_id
    for salt in salts:
        assert cache.controller.lookup(tokens, salt or "")[here] == held[salt]
    # Deleted for one, there for the others.
    wait_until(lambda: not cache.controller.discard(records["tenant-a"].chunk_keys))
    wait_until(lambda: tiers_of(cache, records["tenant-a"]) == [])
    cache.generate_and_manage({"prompt": text, "cache_salt": "tenant-a"}, greedy, HOT)
    assert hits(cache.records[-1]) == 0
    cache.generate_and_manage({"prompt": text, "cache_salt": "tenant ü"}, greedy, HOT)
    assert cache.records[-1].hit_tokens.get("remote", 0) >= 32
    promoted = cache.records[-1]
    after_sweeps(cache, lambda: "gpu" in tiers_of(cache, promoted))
    cache.generate_and_manage(text, greedy, HOT)
    assert cache.records[-1].hit_tokens.get("gpu", 0) >= 32
    assert answers == {cache.generate_and_manage(text, greedy, HOT)}

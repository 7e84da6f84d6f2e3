"""Which requests are taken, and what keeps their KV apart: one check for all entries."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from lora_adapters import make_adapter
from vllm import SamplingParams
from vllm.inputs import engine as engine_inputs
from vllm.inputs import llm as user_prompts
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.async_llm import AsyncLLM

from kvttl.lmcache import requests as checks
from kvttl.lmcache.requests import RequestCheck, check_fields, salt_of_answer
from kvttl.lmcache.salts import LoadedAdapters, kept_under, salted
from kvttl.serve.vllm_parts import vllm_parts

PLAIN = SamplingParams(max_tokens=1)


def salt(prompt, *rest, **options):
    return RequestCheck()(prompt, PLAIN, *rest, **options)[1]


def refused(prompt="Hi", params=PLAIN, *rest, **options):
    with pytest.raises(ValueError) as error:
        RequestCheck()(prompt, params, *rest, **options)
    return str(error.value)


# ---- the lists are those of the vLLM that is pinned: a newer one's fields are looked at first


def test_every_field_of_sampling_params_was_looked_at():
    names = set(SamplingParams.__struct_fields__)
    assert names == checks.SAMPLING_FIELDS | {"prompt_logprobs"}


def test_every_field_of_a_prompt_was_looked_at():
    kinds = (user_prompts.TextPrompt, user_prompts.TokensPrompt, user_prompts.EmbedsPrompt)
    kinds += (engine_inputs.TokensInput, engine_inputs.EmbedsInput, engine_inputs.MultiModalInput)
    names = {name for kind in kinds for name in kind.__annotations__}
    assert names == checks.PROMPT_FIELDS | {"token_type_ids"}  # of cross encoders: refused


def test_every_argument_of_the_engine_was_looked_at():
    names = inspect.signature(AsyncLLM.generate).parameters.keys()
    assert names - {"self", "prompt", "sampling_params", "request_id"} == checks.ENGINE_OPTIONS


def test_every_field_of_an_openai_request_was_looked_at():
    names = {"prompt_logprobs", "use_beam_search", "kv_transfer_params"}
    for kind in request_classes():
        names |= kind.model_fields.keys()
    assert names - checks.OPENAI_FIELDS == names & checks.REFUSED.keys()
    assert checks.OPENAI_FIELDS - checks.SAMPLING_FIELDS <= names


def request_classes():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    assert vllm_parts()
    return CompletionRequest, ChatCompletionRequest


class Newer(SamplingParams):
    """Of a later vLLM: one more field."""

    steering_vector: int | None = None


def test_a_field_that_nobody_has_looked_at_is_refused_where_it_is_set():
    unknown = "is not possible: it is not known to leave KV cache as it is"
    assert RequestCheck()("Hi", Newer()) == ("Hi", "")
    assert refused("Hi", Newer(steering_vector=1)) == f"steering_vector {unknown}"
    assert refused({"prompt": "Hi", "soft_prompt": [1]}) == f"soft_prompt {unknown}"
    assert refused(steering=3) == f"steering {unknown}"
    assert salt({"prompt": "Hi", "soft_prompt": None}, steering=None) == ""
    assert refused("Hi", SamplingParams(extra_args={"x": 1})) == f"x {unknown}"

    class Request(request_classes()[0]):
        steering_vector: int | None = None

    check_fields(Request(prompt="Hi"))
    with pytest.raises(ValueError, match="steering_vector is not possible"):
        check_fields(Request(prompt="Hi", steering_vector=1))


@pytest.mark.parametrize(
    "params, said",
    [
        (SamplingParams(prompt_logprobs=0), "prompt_logprobs .* not possible: .* ends the engine"),
        (BeamSearchParams(2, 4), "beam_width is not possible: every step"),
        (SamplingParams(extra_args={"kv_transfer_params": {}}), "kv_transfer_params is not poss"),
    ],
)
def test_what_would_end_the_engine_or_go_past_the_manager_is_refused(params, said):
    with pytest.raises(ValueError, match=said):
        RequestCheck()("Hi", params)


def test_what_is_harmless_passes_as_it_is():
    params = SamplingParams(n=2, temperature=0.5, top_k=3, seed=1, logprobs=5, stop=["x"])
    for prompt in ("Hi", [1, 2], {"prompt": "Hi"}, {"prompt_token_ids": [1, 2]}):
        assert RequestCheck()(prompt, params) == (prompt, "")
        assert RequestCheck()(prompt, params)[0] is prompt
    assert "got NoneType" in refused(None)


# ---- tenants


@pytest.mark.parametrize("wrong", ["", "a/b", "a@b", "a\\b", "a\0", "x" * 129, 7, b"a"])
def test_salts_that_would_end_the_engine_are_refused(wrong):
    assert refused({"prompt": "Hi", "cache_salt": wrong}).startswith("cache_salt must be a text")
    assert "got " in refused(cache_salt=wrong)


def test_a_tenants_salt_stays_as_it_is_where_a_file_name_can_hold_it():
    assert salt("Hi", cache_salt="tenant-a") == "tenant-a"
    made = [salt("Hi", cache_salt=tenant) for tenant in ("ünï", "x" * 128, "a b", "~" + "0" * 32)]
    assert len(set(made)) == 4
    for each in made:
        assert each[0] == "~" and len(each) == 33 and kept_under(each) == each


def test_prompts_get_the_salt_in_vllms_own_way():
    check = RequestCheck()
    assert check("Hi", PLAIN, cache_salt="t")[0] == {"prompt": "Hi", "cache_salt": "t"}
    assert check([1], PLAIN, cache_salt="t")[0] == {"prompt_token_ids": [1], "cache_salt": "t"}
    own = {"prompt": "Hi", "cache_salt": "t"}
    assert check(own, PLAIN, cache_salt="t") == (own, "t")
    assert "'t' of the prompt is not possible: 'u' is asked for" in refused(own, cache_salt="u")


# ---- adapters, embeddings, images


def test_an_adapter_is_its_weights(tmp_path):
    a, same, b = (make_adapter(tmp_path / n, seed) for n, seed in (("a", 1), ("c", 1), ("b", 2)))
    under = {path: salt("Hi", LoRARequest("name", 1, path)) for path in (a, same, b)}
    assert under[a] == under[same] != under[b]  # equal name and number, other weights
    assert salt("Hi", LoRARequest("name", 1, a), cache_salt="t") == "t" + under_tenant(a, "t")
    (tmp_path / "a" / "README.md").write_text("no weights")
    assert salt("Hi", LoRARequest("name", 1, a)) == under[a]
    make_adapter(tmp_path / "a", 2)
    assert salt("Hi", LoRARequest("name", 1, a)) == under[b]


def under_tenant(path, tenant):
    return salt("Hi", LoRARequest("x", 9, path), cache_salt=tenant)[len(tenant) :]


def test_a_number_whose_weights_the_engine_has_is_not_used_for_others(tmp_path):
    check, folder = RequestCheck(), tmp_path / "a"
    first = LoRARequest("a", 1, make_adapter(folder, 1))
    before = check("Hi", PLAIN, first)[1]
    make_adapter(folder, 2)
    with pytest.raises(ValueError, match="lora_int_id 1 of 'a' .* other weights .* load_inplace"):
        check("Hi", PLAIN, first)
    reloaded = check("Hi", PLAIN, LoRARequest("a", 1, str(folder), load_inplace=True))[1]
    assert reloaded != before and check("Hi", PLAIN, first)[1] == reloaded
    assert check("Hi", PLAIN, LoRARequest("b", 2, str(folder)))[1] == reloaded


def test_adapters_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    nowhere, empty = str(tmp_path / "nowhere"), str(tmp_path / "empty")
    assert refused("Hi", PLAIN, LoRARequest("a", 1, nowhere)).endswith("No such file or directory")
    assert refused("Hi", PLAIN, LoRARequest("a", 1, empty)).endswith("are in this folder")
    elsewhere = LoRARequest("a", 1, empty, tensorizer_config_dict={"x": 1})
    assert refused("Hi", PLAIN, elsewhere).startswith("tensorizer_config_dict")


def test_embeddings_and_images_are_part_of_the_salt():
    torch = pytest.importorskip("torch")
    one, other = torch.ones(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    picture, shifted = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)
    prompts = [
        *({"prompt_embeds": each} for each in (one, other, one.float(), one.reshape(8, 4))),
        *({"prompt": "Hi", "multi_modal_data": {"image": each}} for each in (picture, shifted)),
        {"prompt": "Hi", "multi_modal_data": {"image": [picture, shifted]}},
        {"prompt": "Hi", "multi_modal_data": {"image": [shifted, picture]}},
        {"prompt": "Hi", "multi_modal_data": {"video": picture}},
        {
            "prompt": "Hi",
            "multi_modal_data": {"image": picture},
            "mm_processor_kwargs": {"do_pan_and_scan": True},
        },
        {"prompt": "Hi", "multi_modal_data": None, "multi_modal_uuids": {"image": ["1"]}},
        {"type": "multimodal", "prompt_token_ids": [1], "mm_hashes": {"image": ["1f"]}},
    ]
    salts = [salt(prompt) for prompt in prompts]
    assert len(set(salts)) == len(salts) and all(len(each) == 33 for each in salts)
    assert salts == [salt(prompt) for prompt in prompts]
    assert not set(salts).intersection(salt(prompt, cache_salt="t") for prompt in prompts)


def test_the_salt_of_somebody_elses_generation(tmp_path):
    lora = LoRARequest("a", 1, make_adapter(tmp_path / "a", 1))
    answered = SimpleNamespace(lora_request=lora)
    assert salt_of_answer("Hi", SimpleNamespace()) == ""
    assert salt_of_answer({"prompt": "Hi", "cache_salt": "t"}, None) == "t"
    made = salt("Hi", lora, cache_salt="t")
    assert salt_of_answer({"prompt": "Hi", "cache_salt": "t"}, answered) == made
    assert salt_of_answer({"prompt": "Hi", "cache_salt": made}, answered) == made
    with pytest.raises(ValueError, match="soft_prompt is not possible"):
        salt_of_answer({"prompt": "Hi", "soft_prompt": 1}, None)


def test_salts_are_told_apart_whatever_they_are_made_of():
    made = [salted("", a=1), salted("", b=1), salted("", a=1, b=1), salted("t", a=1)]
    made += [salted("", a="1"), salted("t~" + "0" * 32), salted("", a=["1", "2"], b=None)]
    assert len(set(made)) == len(made)


# ---- the engine's side: requests that no manager has seen


def engine_request(salt=None, lora=None, images=(), embeds=None):
    features = [SimpleNamespace(identifier=each) for each in images]
    given = {"cache_salt": salt, "lora_request": lora, "mm_features": features}
    return SimpleNamespace(request_id="1", prompt_embeds=embeds, prompt_is_token_ids=None, **given)


@pytest.fixture
def connector():
    from kvttl.stack.engine_connector import LMCacheMPConnector

    made = LMCacheMPConnector.__new__(LMCacheMPConnector)  # without its connections
    made._adapters = LoadedAdapters()
    return made


def test_the_engine_makes_the_salts_that_nobody_has_made(connector, tmp_path):
    import torch

    lora = LoRARequest("a", 1, make_adapter(tmp_path / "a", 1))
    assert connector._salt_of(engine_request()) == ""
    assert connector._salt_of(engine_request("tenant-a")) == "tenant-a"
    assert connector._salt_of(engine_request(lora=lora)) == salt("Hi", lora)
    assert connector._salt_of(engine_request("t", lora)) == salt("Hi", lora, cache_salt="t")
    managed = salt("Hi", lora, cache_salt="t")
    assert connector._salt_of(engine_request(managed, lora)) == managed  # as the manager says
    others = [
        *(engine_request(images=images) for images in (["1f"], ["2f"], ["1f", "2f"])),
        *(engine_request(embeds=torch.full((2, 2), value)) for value in (0.0, 1.0)),
        *(engine_request(bad) for bad in ("a/b", "x" * 300)),  # LMCache would end the engine
    ]
    made = [connector._salt_of(each) for each in others]
    assert len(set(made)) == len(made) and all(len(each) == 33 for each in made)
    assert made == [connector._salt_of(each) for each in others]


def test_the_engine_shares_nothing_where_it_cannot_know_the_weights(connector, tmp_path):
    lora = LoRARequest("a", 1, make_adapter(tmp_path / "a", 1))
    known = connector._salt_of(engine_request(lora=lora))
    make_adapter(tmp_path / "a", 2)  # the engine still has the old ones
    unknown = {connector._salt_of(engine_request(lora=lora)) for _ in range(2)}
    unreadable = LoRARequest("b", 2, str(tmp_path / "nowhere"))
    unknown |= {connector._salt_of(engine_request(lora=unreadable)) for _ in range(2)}
    assert len(unknown) == 4 and known not in unknown
    reloaded = LoRARequest("a", 1, str(tmp_path / "a"), load_inplace=True)
    after = connector._salt_of(engine_request(lora=reloaded))
    assert after not in unknown | {known}
    assert connector._salt_of(engine_request(lora=lora)) == after


def test_on_a_cpu_a_token_without_an_adapter_gets_none():
    """Beside tokens with one; vLLM's own code takes the last adapter for -1."""
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    from kvttl.stack.cpu_lora import _spared

    inputs, weights = torch.ones(3, 2), torch.ones(2, 1, 4, 2)
    indices = torch.tensor([0, -1, 1])
    for expand, rest in ((lora_ops.bgmv_expand, ()), (lora_ops.bgmv_expand_slice, (0, 4))):
        output = torch.ones(3, 4)
        _spared(expand)(inputs, weights, output, indices, *rest)
        assert output.tolist() == [[3.0] * 4, [1.0] * 4, [3.0] * 4]

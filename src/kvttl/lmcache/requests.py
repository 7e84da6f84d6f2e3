"""What may be asked of an engine whose KV cache is shared: one check for all entries.

An allow-list. What is known to leave KV as it is passes; what changes KV reaches LMCache's key
by way of the ``cache_salt``; all else is refused by name, also what a later vLLM adds.
"""

import functools
from collections.abc import Mapping
from typing import Any

import msgspec

from kvttl.lmcache.salts import adapter_content, check_salt, kept_under, salted

# Fields of vLLM 0.30, by where they are.
SAMPLING_FIELDS = frozenset(
    """
    n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k
    min_p seed stop stop_token_ids ignore_eos max_tokens min_tokens logprobs logprob_token_ids
    flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
    include_stop_str_in_output output_kind stream_interval skip_clone output_text_buffer_length
    _eos_token_id _all_stop_token_ids structured_outputs logit_bias allowed_token_ids extra_args
    bad_words _bad_words_token_ids skip_reading_prefix_cache thinking_token_budget
    repetition_detection routed_experts_prompt_start trace_decode_token_ids
    """.split()
)
# Of `extra_args` (`vllm_xargs` over HTTP): what only choosing tokens or reporting reads.
EXTRA_ARGS = frozenset("ngram_size window_size whitelist_token_ids kv_cache_report_mode".split())
# Prompts as users write them, and as vLLM's server has prepared them.
CONTENT_FIELDS = (  # they change KV beside its tokens
    "prompt_embeds prompt_is_token_ids is_token_ids multi_modal_data mm_hashes "
    "mm_processor_kwargs media_io_kwargs multi_modal_uuids"
).split()
PROMPT_FIELDS = frozenset(CONTENT_FIELDS).union(
    "type prompt prompt_token_ids prompt_token_offsets assistant_tokens_mask arrival_time "
    "cache_salt mm_kwargs mm_placeholders".split()
)
ENGINE_OPTIONS = frozenset(  # of `AsyncLLM.generate`
    "lora_request prompt_text tokenization_kwargs trace_headers priority data_parallel_rank "
    "session_id reasoning_ended reasoning_parser_kwargs".split()
)
OPENAI_FIELDS = SAMPLING_FIELDS.union(  # what they change in KV, the engine's call shows
    """
    model prompt messages user request_id session_id priority stream stream_options echo suffix
    top_logprobs max_completion_tokens length_penalty add_special_tokens truncate_prompt_tokens
    truncation_side response_format reasoning_effort include_reasoning return_token_ids
    return_token_offsets return_tokens_as_token_ids return_prompt_text prompt_embeds cache_salt
    return_assistant_tokens_mask vllm_xargs ec_transfer_params add_generation_prompt documents
    continue_final_message chat_template chat_template_kwargs tools tool_choice
    parallel_tool_calls mm_processor_kwargs media_io_kwargs
    """.split()
)
REFUSED = {  # wherever it stands -> why
    "prompt_logprobs": "(echo with logprobs asks for them too) are not possible: "
    "prompt tokens that come from LMCache have none, and that ends the engine",
    "use_beam_search": "is not possible: every step of every beam would be a generation",
    "beam_width": "is not possible: every step of every beam would be a generation",
    "kv_transfer_params": "is not possible: the manager decides which KV cache is kept",
}
_UNKNOWN = "is not possible: it is not known to leave KV cache as it is"


class RequestCheck:
    """Lets requests pass that share KV only with requests whose KV is equal.

    One for an engine: it knows which adapters that has loaded.

    Examples
    --------
    >>> check = RequestCheck()
    >>> check("Hi", None), check("Hi", None, cache_salt="tenant-a")
    (('Hi', ''), ({'prompt': 'Hi', 'cache_salt': 'tenant-a'}, 'tenant-a'))
    >>> check({"prompt": "Hi", "token_type_ids": [0, 1]}, None)
    Traceback (most recent call last):
        ...
    ValueError: token_type_ids is not possible: it is not known to leave KV cache as it is
    """

    def __init__(self) -> None:
        self._loaded: dict[int, Any] = {}  # adapter's number -> its content

    def __call__(
        self,
        prompt: Any,
        sampling_params: Any,
        lora_request: Any = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> tuple[Any, str]:
        """Return the prompt as the engine is to get it, and the salt that its KV is kept under.

        Parameters
        ----------
        prompt : str, list of int or mapping
            One of vLLM's prompts; returned as it is where nothing needs a salt.
        sampling_params : vllm.SamplingParams
            Every field that is set is looked at.
        lora_request : vllm.lora.request.LoRARequest, optional
            Its weights are part of the salt.
        cache_salt : str, optional
            The tenant, where the prompt does not name it itself.
        **options
            What else the engine is called with.

        Raises
        ------
        ValueError
            Names what is not possible, and why.
        """
        check_sampling(sampling_params)
        _refuse_unknown(options, ENGINE_OPTIONS)
        if not isinstance(prompt, (str, list, tuple, Mapping)):
            kinds = "a text, token ids or one of vLLM's mappings"
            raise ValueError(f"prompt must be {kinds}, got {type(prompt).__name__}")
        fields = prompt if isinstance(prompt, Mapping) else {}
        content = _content_of(fields, adapter=self._adapter(lora_request))
        salt = salted(_tenant(fields.get("cache_salt"), cache_salt), **content)
        if not salt:
            return prompt, salt
        if not fields:
            fields = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
        return {**fields, "cache_salt": salt}, salt

    def _adapter(self, lora_request):
        """Return an adapter's content; two under one number are refused."""
        content = adapter_content(lora_request)
        if content is None:
            return None
        number, in_place = lora_request.lora_int_id, getattr(lora_request, "load_inplace", False)
        if self._loaded.get(number, content) != content and not in_place:
            raise ValueError(
                f"lora_int_id {number} of {lora_request.lora_name!r} is not possible: the engine "
                "has other weights under this number; take a new one, or load_inplace=True"
            )
        self._loaded[number] = content
        return content


def _tenant(own, given):
    own, given = check_salt(own), check_salt(given)
    if own and given and own != given:
        raise ValueError(
            f"cache_salt {own!r} of the prompt is not possible: {given!r} is asked for"
        )
    return own or given


def _content_of(fields, **content):
    """Return what a prompt's KV depends on beside its tokens."""
    _refuse_unknown(fields, PROMPT_FIELDS)
    return content | {name: fields.get(name) for name in CONTENT_FIELDS}


def salt_of_answer(prompt: Any, output: Any) -> str:
    """Return the salt that KV is under whose request was made by somebody else.

    Raises
    ------
    ValueError
        Names what has changed the KV in a way that cannot be known.
    """
    fields = prompt if isinstance(prompt, Mapping) else {}
    adapter = adapter_content(getattr(output, "lora_request", None))
    content = _content_of(fields, adapter=adapter)
    return kept_under(fields.get("cache_salt"), **content)


def check_sampling(sampling_params: Any) -> None:
    """Refuse sampling parameters that would end the engine, or may change KV.

    Raises
    ------
    ValueError
        Names the field.
    """
    for name in ("prompt_logprobs", "beam_width"):
        if getattr(sampling_params, name, None) is not None:
            raise ValueError(f"{name} {REFUSED[name]}")
    _refuse_set(sampling_params, _unknown_fields(type(sampling_params)))
    _refuse_unknown(getattr(sampling_params, "extra_args", None) or {}, EXTRA_ARGS)


@functools.cache
def _unknown_fields(kind):
    """Return the fields of a class of vLLM's parameters that nobody has looked at: defaults."""
    known = SAMPLING_FIELDS.union(REFUSED)
    fields = msgspec.structs.fields(kind) if hasattr(kind, "__struct_fields__") else ()
    return {each.name: each.default for each in fields if each.name not in known}


def check_fields(request: Any) -> None:
    """Refuse fields of an OpenAI request, vLLM's extra ones too, which the engine would not see.

    Raises
    ------
    ValueError
        Names the field.
    """
    for name in ("use_beam_search", "kv_transfer_params"):
        if getattr(request, name, None):
            raise ValueError(f"{name} {REFUSED[name]}")
    fields = getattr(type(request), "model_fields", {}).items()
    known = OPENAI_FIELDS.union(REFUSED)
    _refuse_set(request, {name: field.default for name, field in fields if name not in known})


def _refuse_set(values, unset):
    for name, default in unset.items():
        if getattr(values, name) != default:
            raise ValueError(f"{name} {REFUSED.get(name, _UNKNOWN)}")


def _refuse_unknown(fields, known):
    for name, value in fields.items():
        if name not in known and value is not None:
            raise ValueError(f"{name} {REFUSED.get(name, _UNKNOWN)}")

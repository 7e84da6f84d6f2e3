"""What may be asked of an engine whose KV cache is shared: one check for all entries.

An allow-list. What is known to leave KV as it is passes; what changes KV reaches LMCache's key
by way of the ``cache_salt``; all else is refused by name, also what a later vLLM adds.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvttl import read_names
from kvttl.lmcache.salts import LoadedAdapters, adapter_content, check_salt, kept_under, salted

_NAMES = read_names(Path(__file__).with_suffix(".toml"))  # fields of vLLM 0.30
SAMPLING_FIELDS, EXTRA_ARGS, ENGINE_OPTIONS = map(_NAMES.get, ("sampling", "extra_args", "engine"))
PROMPT_FIELDS = _NAMES["prompt"] | _NAMES["content"]
OPENAI_FIELDS = _NAMES["openai"] | SAMPLING_FIELDS
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
        self._adapters = LoadedAdapters()

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
        content = _content_of(fields, adapter=self._adapters.content_of(lora_request))
        salt = salted(_tenant(fields.get("cache_salt"), cache_salt), **content)
        if not salt:
            return prompt, salt
        if not fields:
            fields = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
        return {**fields, "cache_salt": salt}, salt


def _tenant(own, call):
    own, call = check_salt(own), check_salt(call)
    if own and call and own != call:
        raise ValueError(f"cache_salt {own!r} of the prompt is not possible: {call!r} is asked for")
    return own or call


def _content_of(fields, **content):
    """Return what a prompt's KV depends on beside its tokens."""
    _refuse_unknown(fields, PROMPT_FIELDS)
    return content | {name: fields.get(name) for name in sorted(_NAMES["content"])}


def salt_of_answer(prompt: Any, output: Any) -> str:
    """Return the salt that KV is under whose request was made by somebody else.

    Raises
    ------
    ValueError
        Names what has changed the KV in a way that cannot be known.
    """
    fields = prompt if isinstance(prompt, Mapping) else {}
    adapter = adapter_content(getattr(output, "lora_request", None))
    return kept_under(fields.get("cache_salt"), **_content_of(fields, adapter=adapter))


def check_sampling(sampling_params: Any) -> None:
    """Refuse sampling parameters that would end the engine, or may change KV.

    Raises
    ------
    ValueError
        Names the field.
    """
    refused = dict.fromkeys(("prompt_logprobs", "beam_width"))
    _refuse_set(sampling_params, refused | _unknown_fields(type(sampling_params)))
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
        if getattr(values, name, default) != default:
            raise ValueError(f"{name} {REFUSED.get(name, _UNKNOWN)}")


def _refuse_unknown(fields, known):
    for name, value in fields.items():
        if name not in known and value is not None:
            raise ValueError(f"{name} {REFUSED.get(name, _UNKNOWN)}")

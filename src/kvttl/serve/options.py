"""Options of `vllm serve`: which reach the engine, which the server, and why others are refused."""

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from caching_heuristics import unknown_name
from kvttl.serve.vllm_parts import vllm_parts

# Known to leave the KV cache of a token, and LMCache's key of it, as they are; what a later
# vLLM adds is refused until somebody has looked.
_ENGINE = frozenset(
    "async_scheduling attention_backend compilation_config cpu_offload_gb disable_log_stats "
    "download_dir enable_chunked_prefill enable_log_requests enable_lora enforce_eager "
    "fully_sharded_loras generation_config gpu_memory_utilization hf_token kv_cache_memory_bytes "
    "logprobs_mode long_prefill_token_threshold lora_dtype lora_target_modules max_cpu_loras "
    "max_logprobs max_lora_rank max_loras max_model_len max_num_batched_tokens "
    "max_num_queued_reqs max_num_queued_tokens max_num_seqs num_gpu_blocks_override "
    "optimization_level override_generation_config reasoning_parser scheduling_policy seed "
    "stream_interval tokenizer tokenizer_mode tokenizer_revision trust_remote_code".split()
)
# What `init_app_state` and the middleware read.
_SERVER = frozenset(
    "chat_template chat_template_content_format default_chat_template_kwargs "
    "enable_auto_tool_choice enable_force_include_usage enable_log_deltas enable_log_outputs "
    "enable_per_request_metrics enable_prompt_tokens_details enable_request_id_headers "
    "exclude_tools_when_tool_choice_none lora_modules max_log_len response_role "
    "return_tokens_as_token_ids tool_call_parser trust_request_chat_template".split()
)
_REFUSED = {  # names, as a pattern -> the kit's own way, or why there is none
    "model|model_tag": "LLM= (--llm) names the model",
    "served_model_name": "a model's name in requests is its folder's, or its hub id",
    "host|uds": "HOST= (--host) says where it listens",
    "port": "PORT= (--port) says where it listens",
    "api_key": "the key comes from $KV_API_KEY or --api-key-file",
    "block_size": "set block_size_tokens in config.yaml",
    "kv_transfer_config|kv_offloading_.*|kv_events_config": "config.yaml's stack keeps KV cache",
    "enable_prefix_caching": "its hits would be counted as LMCache's",
    "allow(ed)?_(origins|methods|headers|credentials)": "web pages of others must not ask it",
    "ssl_.*|enable_ssl_refresh": "put a proxy that speaks TLS before it",
    ".*_parallel_.*|nnodes|node_rank": "an engine that is managed here has one rank",
    "dtype|kv_cache_dtype.*|quantization.*|hf_overrides|revision|load_format|model_impl"
    "|disable_sliding_window|speculative_config": "KV cache would differ under the same key",
}
_UNKNOWN = "nobody has looked yet whether it leaves KV cache and its management as they are"


def read_options(options: Sequence[str]) -> dict[str, Any]:
    """Return what options of ``vllm serve`` say, by name: ``["--seed=7"]`` is ``{"seed": 7}``.

    Raises
    ------
    ValueError
        Names an option that cannot be had here, and the kit's own way or the nearest option.
    """
    parser, unset = _parser(), []  # a list, since some options append to what is there
    empty = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    given = vars(parser.parse_args(list(options), empty))
    given = {name: value for name, value in given.items() if value is not unset}
    if given.get("model_tag") is None:  # positional: argparse sets it always
        given.pop("model_tag", None)
    for name in given:
        if name not in _ENGINE | _SERVER:
            reasons = (why for names, why in _REFUSED.items() if re.fullmatch(names, name))
            raise ValueError(f"{_option(name)} is not possible here: {next(reasons, _UNKNOWN)}")
    vllm = vllm_parts()
    managers = (vllm.ToolParserManager, vllm.ReasoningParserManager)
    for name, manager in zip(("tool_call_parser", "reasoning_parser"), managers):
        if given.get(name) and given[name] not in manager.list_registered():
            raise ValueError(unknown_name(_option(name), given[name], manager.list_registered()))
    return given


def options_of_engine(options: Sequence[str]) -> dict[str, Any]:
    """Return those of `read_options` that the engine takes."""
    return {name: value for name, value in read_options(options).items() if name in _ENGINE}


def server_arguments(
    model: str,
    name: str,
    api_key: str | None = None,
    options: Sequence[str] = (),
    engine: Mapping[str, Any] | None = None,
) -> Any:
    """Return vLLM's server settings.

    Parameters
    ----------
    model, name : str
        The model's folder, and its name in requests.
    api_key : str, optional
        Without it, no request under ``/v1`` is answered.
    options : sequence of str
        Options of ``vllm serve``, such as ``--enable-auto-tool-choice``; see `read_options`.
    engine : mapping, optional
        Engine arguments, as far as the server has to know them.

    Raises
    ------
    ValueError
        See `read_options`; or two options that do not go together.
    """
    read_options(options)
    arguments = _parser().parse_args(["--model", model, "--served-model-name", name, *options])
    vars(arguments).update(engine or {})
    if arguments.lora_modules and not arguments.enable_lora:
        raise ValueError("--lora-modules needs --enable-lora")
    try:
        vllm_parts().validate_parsed_serve_args(arguments)
    except TypeError as error:  # its word for options that need another one
        raise ValueError(str(error).removeprefix("Error: ")) from None
    arguments.structured_outputs_config.reasoning_parser = arguments.reasoning_parser or ""
    arguments.api_key = [api_key] if api_key else None
    # vLLM's default lets every web page that the user has open ask this server.
    arguments.allowed_origins = []
    return arguments


@functools.cache
def _parser():
    vllm = vllm_parts()
    parser = vllm.make_arg_parser(vllm.FlexibleArgumentParser(allow_abbrev=False))
    parser.error = _refuse
    return parser


def _refuse(message):
    """Raise what argparse would end the process for."""
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    known = map(_option, sorted(_ENGINE | _SERVER))
    raise ValueError(unknown_name("server option", unknown[1], known) if unknown else message)


def _option(name):
    return "--" + name.replace("_", "-")

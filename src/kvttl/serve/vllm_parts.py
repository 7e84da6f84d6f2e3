"""The parts of vLLM's inside that serving is built on; another vLLM may have them elsewhere."""

import functools
import pkgutil
from contextlib import suppress
from types import SimpleNamespace

VLLM = "0.30.0"  # pinned in requirements.txt, and tested
_SERVE = "vllm.entrypoints.serve"
_OPENAI = "vllm.entrypoints.openai"
_LAUNCHERS = "vllm.entrypoints.launchers"
PARTS = {
    "AsyncEngineArgs": "vllm.engine.arg_utils:AsyncEngineArgs",
    "AsyncLLM": "vllm.v1.engine.async_llm:AsyncLLM",
    "make_arg_parser": f"{_LAUNCHERS}.cli_args:make_arg_parser"
    " vllm.entrypoints.common.cli_args:make_arg_parser",  # there in 0.33
    "validate_parsed_serve_args": f"{_LAUNCHERS}.cli_args:validate_parsed_serve_args"
    " vllm.entrypoints.common.cli_args:validate_parsed_serve_args",
    "ToolParserManager": "vllm.tool_parsers:ToolParserManager",
    "ReasoningParserManager": "vllm.reasoning:ReasoningParserManager",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "init_app_state": f"{_LAUNCHERS}.api_server.app_state:init_app_state",
    "lifespan": f"{_LAUNCHERS}.utils.server_utils:lifespan",
    "attach_models": f"{_OPENAI}.models.api_router:attach_router",
    "attach_completion": f"{_OPENAI}.completion.api_router:attach_router",
    "attach_chat": f"{_OPENAI}.chat_completion.api_router:attach_router",
    "init_exception_handler": f"{_SERVE}.exception_handling.register:init_exception_handler",
    "init_entrypoints_middleware": f"{_SERVE}.middleware.register:init_entrypoints_middleware",
    "create_error_response": f"{_SERVE}:create_error_response",
    "get_prometheus_registry": "vllm.v1.metrics.prometheus:get_prometheus_registry",
    "GracefulHTTPError": "vllm.exceptions:GracefulHTTPError",
    "VLLMClientError": "vllm.exceptions:VLLMClientError",
}


@functools.cache
def vllm_parts() -> SimpleNamespace:
    """Import all parts, by the names of `PARTS`; the first call takes seconds.

    Raises
    ------
    RuntimeError
        The vLLM that is installed has not all of them: names it, and the one that has.
    """
    import vllm

    try:
        found = {name: _first_of(*paths.split()) for name, paths in PARTS.items()}
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"serving needs vLLM {VLLM}, and vLLM {vllm.__version__} is installed, "
            f"which lacks a part of it: {error}"
        ) from error
    return SimpleNamespace(**found)


def _first_of(*paths):
    for path in paths[:-1]:
        with suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(path)
    return pkgutil.resolve_name(paths[-1])

"""Options of `vllm serve`: which reach the engine, which the server, and why others are refused."""

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caching_heuristics import unknown_name
from kvttl import read_names
from kvttl.serve.vllm_parts import vllm_parts

_NAMES = read_names(Path(__file__).with_suffix(".toml"))
_ENGINE, _SERVER, _REFUSED = _NAMES["engine"], _NAMES["server"], _NAMES["refused"]
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

"""Chat turns as a prompt by the tokenizer's own template, and tool calls read from an answer.

Turns are OpenAI's: ``{"role": ..., "content": ...}``, with ``tool_calls`` where a model called.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

_HOW_TO_CALL = (
    "You may call a function by answering with nothing but one line of JSON: "
    '{"name": "<function>", "arguments": {...}}. The functions are:\n'
)
_WRAPPERS = re.compile(r"</?tool_call>|```(?:json|tool_code)?")


def chat_tokens(tokenizer, turns: Sequence[Mapping], tools: Sequence[Mapping] = ()) -> list[int]:
    """Return the token ids of a conversation that the model is to continue.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Its chat template is applied. A template without tools gets them in the system prompt.
    turns : sequence of mapping
        The conversation, text only.
    tools : sequence of mapping
        OpenAI's descriptions of functions.

    Returns
    -------
    list of int
        They begin with what the template begins with, so no ``<bos>`` is added.

    Raises
    ------
    ValueError
        No turn, a turn that is not text, no chat template, or a conversation it refuses.

    Notes
    -----
    Gemma's own templates refuse a system turn (Gemma 2) and two turns of the same
    role in a row. A refused conversation is tried again as `alternating` turns.
    """
    from jinja2 import TemplateError

    if not turns:
        raise ValueError("a conversation needs at least one message")
    turns = [_text_turn(turn) for turn in turns]
    if "tools" not in str(tokenizer.chat_template):
        turns, tools = _spelled_out(turns, tools), ()
    options = {"tools": list(tools) or None, "add_generation_prompt": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except TemplateError:
        try:
            return tokenizer.apply_chat_template(alternating(turns), **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _text_turn(turn):
    """Return a turn as templates want it: its content a text, arguments as a mapping."""
    content = turn.get("content") or ""
    if not isinstance(content, str):
        raise ValueError("only text can be sent to this model, got another kind of content")
    turn = {**turn, "content": content}
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [{**call, "function": _parsed(**call["function"])} for call in calls]
    return turn


def _parsed(name, arguments=None, **_more):
    parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
    return {"name": name, "arguments": parsed}


def _spelled_out(turns, tools):
    """Return turns for a template that knows no tools: all of it as text."""
    spelled = []
    for turn in turns:
        calls = [json.dumps(call["function"]) for call in turn.get("tool_calls", ())]
        content = "\n".join(filter(None, [turn["content"], *calls]))
        role = "user" if turn["role"] == "tool" else turn["role"]
        spelled.append({"role": role, "content": content})
    if not tools:
        return spelled
    functions = [json.dumps(tool.get("function", tool)) for tool in tools]
    system = {"role": "system", "content": _HOW_TO_CALL + "\n".join(functions)}
    # After the system prompt, which others may share, and before all else.
    at = 1 if spelled[0]["role"] == "system" else 0
    return _joined([*spelled[:at], system, *spelled[at:]])


def alternating(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the turns as user and assistant in turn, beginning with the user.

    A system prompt becomes the beginning of the user's first turn.

    Examples
    --------
    >>> for turn in alternating([{"role": "system", "content": "Be brief."},
    ...                          {"role": "user", "content": "Hello"},
    ...                          {"role": "assistant", "content": "Hi."},
    ...                          {"role": "assistant", "content": "And?"}]):
    ...     print(turn)
    {'role': 'user', 'content': 'Be brief.\\n\\nHello'}
    {'role': 'assistant', 'content': 'Hi.\\n\\nAnd?'}
    """
    roles = [{**t, "role": "assistant" if t["role"] == "assistant" else "user"} for t in turns]
    begin = [{"role": "user", "content": ""}] if roles[0]["role"] == "assistant" else []
    return _joined([*begin, *roles])


def _joined(turns):
    """Return the turns with those of one role in a row made one."""
    return [
        {"role": role, "content": "\n\n".join(filter(None, (turn["content"] for turn in run)))}
        for role, run in groupby(turns, key=lambda turn: turn["role"])
    ]


def read_tool_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, object]]]:
    """Return an answer without its tool calls, and the calls as name and arguments.

    Parameters
    ----------
    text : str
        The model's answer.
    names : collection of str
        The tools it was offered; JSON that names another one stays text.

    Examples
    --------
    >>> read_tool_calls('Wait. {"name": "add", "arguments": {"a": 1}}', ["add"])
    ('Wait.', [{'name': 'add', 'args': {'a': 1}}])
    >>> read_tool_calls('{"name": "rm", "arguments": {}}', ["add"])
    ('{"name": "rm", "arguments": {}}', [])
    """
    decoder, calls, rest, at = json.JSONDecoder(), [], [], 0
    while (start := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, end = None, start + 1
        call = _call(value, names)
        rest.append(text[at : start if call else end])
        calls += [call] if call else []
        at = end
    rest = "".join([*rest, text[at:]])
    return (_WRAPPERS.sub("", rest).strip(), calls) if calls else (text, [])


def _call(value, names):
    """Return the tool call that a JSON value is, or None."""
    if not isinstance(value, dict) or value.get("name") not in list(names):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return {"name": value["name"], "args": arguments} if isinstance(arguments, dict) else None

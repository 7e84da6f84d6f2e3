"""The managed loop behind LangChain's interfaces: a chat model, and tools for agents.

LangGraph takes the same objects. AutoGen, and whatever speaks OpenAI's protocol, goes
through the gateway instead (`kvttl.serve.gateway`).
"""

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

from langchain_core.globals import get_llm_cache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.tools import BaseTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field, PrivateAttr

from kvttl.agents.chat import chat_tokens, read_tool_calls
from kvttl.decisions.log import DecisionRecord
from kvttl.lmcache.layout import by_hottest
from kvttl.lmcache.salts import kept_under
from kvttl.manager.generation import ManagedOutput, prompt_digest, text_of
from tiered_caching import MultiTierCache


class ManagedChatModel(BaseChatModel):
    """A LangChain chat model whose every answer is followed by a decision about its KV cache.

    Parameters
    ----------
    kv_cache : MultiTierCache
        Generates and manages (``cache`` is LangChain's own name for stored answers).
        Models and tools over one manager take turns at its engine; who waits for an
        answer of this model shares the next batch.
    max_tokens, temperature : int, float
        Of each answer. A call may say otherwise, and give any other field of
        `vllm.SamplingParams`: ``model.bind(top_p=0.9)``.
    tokenizer : object, optional
        Its chat template makes the prompts; by default the engine's.

    Notes
    -----
    ``model.bind(kv={"perplexity": 12.0})``, or ``invoke(..., kv=...)``, says what the
    caller knows; the rest is measured, see `MultiTierCache.generate_and_manage`. What was
    decided stands in the answer's ``response_metadata["kv"]``, unless a manager in
    background mode had not decided yet; ``cache_read`` are the tokens that LMCache served.
    ``model.bind(cache_salt="tenant-a")`` keeps a tenant's KV cache apart from others'.

    Tools work by text: a template without tools gets them in the system prompt, and JSON that
    names one of them is taken as a call. Forced calls (`tool_choice`), structured output and
    streams of tokens are the served endpoint's: `kvttl.serve.gateway`, with ``ChatOpenAI``.

    Examples
    --------
    A chain, and a node of a LangGraph graph::

        model = ManagedChatModel(kv_cache=cache_manager, max_tokens=64)
        chain = ChatPromptTemplate([("system", RULES), ("human", "{question}")]) | model
        chain.invoke({"question": "Why?"}).response_metadata["kv"]["wanted_tier"]
        graph.add_node("planner", lambda state: {"messages": [model.invoke(state["messages"])]})
    """

    kv_cache: MultiTierCache = Field(exclude=True)
    max_tokens: int = 256
    temperature: float = 0.0
    tokenizer: Any = Field(default=None, exclude=True)
    _batches: Any = PrivateAttr()
    _conversations: list[list[BaseMessage]] = PrivateAttr(default=[])
    _answers: deque[ManagedOutput] | None = PrivateAttr(default=None)

    def model_post_init(self, _context: Any) -> None:
        """Make the place where this model's callers wait for each other."""
        self._batches = _Batches(self.kv_cache)

    @property
    def _llm_type(self) -> str:
        return "kv-managed-vllm"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        model = getattr(self.kv_cache.controller, "model", "")
        return {"model": model, "max_tokens": self.max_tokens, "temperature": self.temperature}

    def prompt_tokens(
        self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Return the prompt that a conversation becomes, as token ids.

        Raises
        ------
        ValueError
            Content that is not text, or a conversation that the chat template refuses.
        """
        tokenizer = self.tokenizer or self.kv_cache.controller.tokenizer
        return chat_tokens(tokenizer, convert_to_openai_messages(list(messages)), tools)

    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        """Answer conversations in one engine batch, otherwise as LangChain's `generate`.

        Where LangChain stores answers it is one after the other: a stored one costs nothing.
        """
        together = self.model_copy()  # LangChain asks it for one answer after the other
        stores = self.cache is not False and (self.cache or get_llm_cache())
        together._conversations = [] if stores else messages
        return super(ManagedChatModel, together).generate(messages, *args, **kwargs)

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        """Answer one conversation; the first one of a `generate` asks for all of them."""
        answers = self._answers
        if not answers:
            together = self._conversations or [messages]
            asked = [self._asked(each, stop, **kwargs) for each in together]
            answers = deque(self._batches.answers(asked))
            if self._conversations:  # else other threads use this model too
                self._answers = answers
        tools = _offered(kwargs.get("tools"), kwargs.get("tool_choice"))
        return self._result(answers.popleft(), [tool["function"]["name"] for tool in tools])

    def _asked(self, messages, stop, kv=None, tools=(), cache_salt=None, **options):
        sampling = _without_openais(options)
        prompt = self.prompt_tokens(messages, _offered(tools, options.get("tool_choice")))
        if cache_salt is not None:
            prompt = {"prompt_token_ids": prompt, "cache_salt": cache_salt}
        defaults = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return prompt, _sampling({**defaults, **sampling, "stop": stop}), kv

    def _result(self, managed, tool_names):
        """Return a generation a sequence; the prompt's tokens count at the first, as in vLLM."""
        output, generations = managed.output, []
        prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
        for answer in output.outputs:
            text, calls = read_tool_calls(answer.text, tool_names)
            asked, answered = 0 if generations else prompt, len(answer.token_ids)
            usage = {"input_tokens": asked, "output_tokens": answered}
            usage["total_tokens"] = asked + answered
            usage["input_token_details"] = {"cache_read": 0 if generations else cached}
            message = AIMessage(
                text,
                tool_calls=[{**call, "id": f"call_{uuid4().hex}"} for call in calls],
                response_metadata={"model_name": self._identifying_params["model"], **_kv(managed)},
                usage_metadata=usage,
            )
            generations.append(ChatGeneration(message=message))
        return ChatResult(generations=generations)

    def get_token_ids(self, text: str) -> list[int]:
        """Return a text's token ids, of the engine's tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return (self.tokenizer or self.kv_cache.controller.tokenizer).encode(text)

    def get_num_tokens_from_messages(
        self, messages: Sequence[BaseMessage], tools: Sequence | None = None
    ) -> int:
        """Return how many tokens the prompt has that a conversation becomes, tools included."""
        offered = [convert_to_openai_tool(tool) for tool in tools or ()]
        return len(self.prompt_tokens(messages, offered)) if messages else 0

    def bind_tools(self, tools: Sequence, *, tool_choice: Any = None, **kwargs) -> Any:
        """Return the model with tools that it may call: all that `convert_to_openai_tool` takes.

        Raises
        ------
        NotImplementedError
            For a `tool_choice` that forces a call.
        """
        offered = _offered([convert_to_openai_tool(tool) for tool in tools], tool_choice)
        return self.bind(tools=offered, **kwargs)

    def with_structured_output(self, schema: Any, **_options: Any) -> Any:
        """Raise NotImplementedError: the served endpoint has it."""
        raise _elsewhere("structured output is not possible")

    def stream(self, *_args: Any, **_options: Any) -> Any:
        """Raise NotImplementedError: the served endpoint has it."""
        raise _elsewhere("tokens cannot be streamed")

    astream = stream


def _elsewhere(what):
    served = "the served endpoint (`make serve`) with langchain_openai.ChatOpenAI"
    address = "(base_url='http://127.0.0.1:8000/v1', ...)"
    return NotImplementedError(f"{what} by a model in this process: use {served}{address}")


def _offered(tools, choice):
    """Return the tools that an answer may call; a `choice` that forces one is refused."""
    if choice not in (None, False, "auto", "none"):
        raise _elsewhere(f"a tool call cannot be forced (tool_choice={choice!r})")
    return [] if choice == "none" else tools or []


def _without_openais(options):
    """Return options without those of OpenAI's that ask for nothing; what asks is refused."""
    if options.get("response_format") not in (None, {"type": "text"}) or options.get("strict"):
        raise _elsewhere("structured output is not possible")
    if options.get("stream"):
        raise _elsewhere("tokens cannot be streamed")
    ours = ("tool_choice", "response_format", "strict", "stream")
    return {name: value for name, value in options.items() if name not in ours}


def _sampling(fields):
    """Return vLLM's sampling parameters; it refuses names that it does not know."""
    from vllm import SamplingParams  # seconds to import: only who generates waits

    return SamplingParams(**fields)


class _Batches:
    """Answers many threads with few engine calls: who waits for the engine shares the next one."""

    def __init__(self, kv_cache):
        self._kv_cache, self._engine, self._waiting = kv_cache, threading.Lock(), deque()

    def answers(self, asked):
        """Return each prompt's `ManagedOutput`, or raise what the engine says of one of them."""
        mine = [(each, Future()) for each in asked]  # (prompt, sampling, kv), and its answer
        self._waiting.extend(mine)
        try:
            self._take_turns(mine)
        finally:  # what an interrupted caller waited for is of no use to anybody
            for each in mine:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(each)
        return [answer.result() for _, answer in mine]

    def _take_turns(self, mine):
        with self._engine:
            if not all(answer.done() for _, answer in mine):
                batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
                try:
                    self._serve(batch)
                finally:  # after an interrupt the others are still to be answered
                    left = (each for each in batch if each not in mine and not each[1].done())
                    self._waiting.extend(left)

    def _serve(self, batch):
        asked, answers = zip(*batch)
        try:
            made = self._kv_cache.generate(*map(list, zip(*asked)))
        except Exception as error:
            if len(batch) == 1:
                answers[0].set_exception(error)
            else:
                for each in batch:  # one of them, perhaps: each by itself
                    self._serve([each])
        else:
            for answer, managed in zip(answers, made):
                answer.set_result(managed)


def _kv(managed):
    return {"kv": decision(managed.decision.result())} if managed.decision.done() else {}


def decision(record: DecisionRecord) -> dict[str, Any]:
    """Return what an agent may want to know of a decision, as plain JSON values.

    Examples
    --------
    >>> decision(DecisionRecord(0.0, "1f", ttl_s=60.0, wanted_tier="gpu"))["wanted_tier"]
    'gpu'
    """
    shown = ("wanted_tier", "ttl_s", "hit_tokens", "prompt_digest", "error")
    found = {name: getattr(record, name) for name in shown}
    return copy.deepcopy({**found, "chunks": record.tier_after})


# ---- tools ---------------------------------------------------------------------------------


def kv_generate_tool(
    kv_cache: MultiTierCache,
    max_tokens: int = 64,
    name: str = "kv_generate",
    cache_salt: str | None = None,
    **sampling: Any,
) -> BaseTool:
    """Return a tool that completes a text with the managed engine.

    Parameters
    ----------
    kv_cache : MultiTierCache
        Generates and manages.
    max_tokens : int
        Of each answer.
    name : str
        What an agent calls it.
    cache_salt : str, optional
        The tenant that the agent works for.
    **sampling
        Other fields of `vllm.SamplingParams`; temperature 0 unless given.

    Returns
    -------
    langchain_core.tools.BaseTool
        Its artifact is the `decision`, where it was made already.
    """
    fields = {"temperature": 0.0, **sampling, "max_tokens": max_tokens}

    @tool(name, response_format="content_and_artifact")
    def generate(
        prompt: str, perplexity: float | None = None, time_variance: float | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Continue a text; perplexity (>= 1) and time_variance (0 to 1) only if you know them."""
        kv = {"perplexity": perplexity, "time_variance": time_variance}  # None = unknown
        tokens = kv_cache.controller.tokenize(prompt)
        (managed,) = kv_cache.generate([tokens], _sampling(fields), [kv], cache_salt=cache_salt)
        return text_of(managed.output), _kv(managed).get("kv", {})

    return generate


def kv_lookup_tool(
    kv_cache: MultiTierCache, name: str = "kv_lookup", cache_salt: str = ""
) -> BaseTool:
    """Return a tool that says where a text's KV cache is, and how long its TTL still runs.

    Parameters
    ----------
    kv_cache : MultiTierCache
        Is asked; nothing is generated, and nothing counts as an access.
    name : str
        What an agent calls it.
    cache_salt : str
        The tenant whose KV cache is looked for.
    """

    @tool(name)
    def look_up(prompt: str) -> dict[str, Any]:
        """Say in which tiers (gpu, disk, remote) a text's KV cache is, and for how many seconds."""
        try:
            return kv_position(kv_cache, kv_cache.controller.tokenize(prompt), cache_salt)
        except Exception as error:  # LMCache may be away; that must not end an agent's run
            return {"error": f"{type(error).__name__}: {error}"}

    return look_up


def kv_position(kv_cache: MultiTierCache, tokens: Sequence[int], cache_salt: str = "") -> dict:
    """Return where a tenant's chunks of a prompt are, by hottest tier, and when its TTL ends.

    Returns
    -------
    dict
        ``chunks`` (tier -> number; ``"none"`` = not there), and of the last decision about
        exactly this prompt, if it is among the records: ``wanted_tier``, ``ends_in_s``.

    Raises
    ------
    LMCacheUnavailable, LMCacheError
        The coordinator does not answer, or refuses.
    """
    controller = kv_cache.controller
    salt = kept_under(cache_salt or controller.cache_salt)
    held = controller.layout(tokens, *filter(None, [salt])).of(controller.instance_id)
    chunks = dict(by_hottest(held))
    digest = prompt_digest(tokens, salt)
    decided = (r for r in reversed(list(kv_cache.records)) if r.prompt_digest == digest)
    if (last := next(decided, None)) is None or last.wanted_tier is None:
        return {"chunks": chunks}
    ends_in_s = last.time_s + last.ttl_s - kv_cache.clock()
    return {"chunks": chunks, "wanted_tier": last.wanted_tier, "ends_in_s": round(ends_in_s, 1)}

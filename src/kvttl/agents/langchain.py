"""The managed loop behind LangChain's interfaces: a chat model, and tools for agents.

LangGraph takes the same objects. AutoGen, and whatever speaks OpenAI's protocol, goes
through the gateway instead (`kvttl.serve.gateway`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from kvttl.agents.chat import chat_tokens, read_tool_calls
from kvttl.agents.desk import Ask, desk_of
from kvttl.decisions.log import DecisionRecord
from kvttl.lmcache.layout import by_hottest
from kvttl.manager.generation import prompt_digest
from tiered_caching import MultiTierCache

try:
    from langchain_core.globals import get_llm_cache
    from langchain_core.language_models.chat_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.messages.utils import convert_to_openai_messages
    from langchain_core.outputs import ChatGeneration, ChatResult
    from langchain_core.tools import BaseTool, StructuredTool
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise ImportError(
        f"agent_tools needs LangChain ({error}): run `make install-agents`, which installs the "
        "extra kv-cache-ttl-kit[agents] with the pins of requirements-agents.txt"
    ) from error


class ManagedChatModel(BaseChatModel):
    """A LangChain chat model whose every answer is followed by a decision about its KV cache.

    Parameters
    ----------
    kv_cache : MultiTierCache
        Generates and manages (``cache`` is LangChain's own name for stored answers).
        Models and tools over one manager take turns at its engine; whoever waits
        shares the next batch.
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
    background mode had not decided yet. The tokens of an answer are counted from its
    text; ``cache_read`` are those that LMCache served.

    Tools work by text: a template without tools gets them in the system prompt, and JSON that
    names one of them is taken as a call. Calls cannot be forced (`tool_choice`), and answers
    are not streamed.

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
    _thread: Any = PrivateAttr(default_factory=threading.local)  # the group a thread is at

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
        tokenizer = self.tokenizer or _tokenizer(self.kv_cache)
        return chat_tokens(tokenizer, convert_to_openai_messages(list(messages)), tools)

    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> Any:
        """Return the answers to several conversations, from one engine batch.

        See `BaseChatModel.generate`. With LangChain's cache of answers in use, each
        conversation is a call of its own.
        """
        stored = self.cache is not False and (self.cache or get_llm_cache()) is not None
        self._thread.group = [] if stored or len(messages) < 2 else list(messages)
        self._thread.asks = deque()
        try:
            return super().generate(messages, *args, **kwargs)
        finally:
            for ask in self._thread.asks:  # an earlier one has failed
                ask.withdrawn = True
            self._thread.group, self._thread.asks = [], deque()

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        """Answer one conversation; `generate` has the arguments of the others of its group."""
        ask = desk_of(self.kv_cache).answer(self.kv_cache, self._next_ask(messages, stop, kwargs))
        message = self._message(ask, kwargs.get("tools") or ())
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _next_ask(self, messages, stop, kwargs):
        thread = self._thread
        if group := getattr(thread, "group", []):
            thread.group = []
            thread.asks = deque(self._ask(each, stop, **kwargs) for each in group)
            desk_of(self.kv_cache).put(thread.asks)
        asks = getattr(thread, "asks", None)
        return asks.popleft() if asks else self._ask(messages, stop, **kwargs)

    def _ask(self, messages, stop, kv=None, tools=(), **sampling):
        tokens = self.prompt_tokens(messages, tools or ())
        defaults = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return Ask(tokens, _sampling({**defaults, **sampling, "stop": stop}), kv)

    def _message(self, ask, tools):
        names = [tool["function"]["name"] for tool in tools]
        text, calls = read_tool_calls(ask.text, names) if names else (ask.text, [])
        tokenizer = self.tokenizer or _tokenizer(self.kv_cache)
        answered = len(tokenizer.encode(ask.text, add_special_tokens=False))
        hits = sum(ask.record.hit_tokens.values()) if ask.record else None
        return AIMessage(
            text,
            tool_calls=[{**call, "id": f"call_{uuid4().hex}"} for call in calls],
            response_metadata={"model_name": self._identifying_params["model"], **_kv(ask.record)},
            usage_metadata={
                "input_tokens": len(ask.prompt),
                "output_tokens": answered,
                "total_tokens": len(ask.prompt) + answered,
                **({} if hits is None else {"input_token_details": {"cache_read": hits}}),
            },
        )

    def bind_tools(
        self,
        tools: Sequence[Mapping[str, Any] | type | Callable | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the model with tools that it may call.

        Raises
        ------
        NotImplementedError
            For a `tool_choice` that forces a call.
        """
        if tool_choice not in (None, "auto"):
            raise NotImplementedError(f"a tool call cannot be forced: tool_choice={tool_choice!r}")
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)


def _sampling(fields):
    """Return vLLM's sampling parameters; it refuses names that it does not know."""
    from vllm import SamplingParams  # seconds to import: only who generates waits

    return SamplingParams(**fields)


def _tokenizer(kv_cache):
    tokenizer = kv_cache.controller._tokenizer
    if tokenizer is None:
        raise RuntimeError("no tokenizer: the manager needs its engine first, set_llm(llm)")
    return tokenizer


def _kv(record):
    return {} if record is None else {"kv": decision(record)}


def decision(record: DecisionRecord) -> dict[str, Any]:
    """Return what an agent may want to know of a decision, as plain JSON values.

    Examples
    --------
    >>> decision(DecisionRecord(0.0, "1f", ttl_s=60.0, wanted_tier="gpu"))["wanted_tier"]
    'gpu'
    """
    return {
        "wanted_tier": record.wanted_tier,
        "ttl_s": record.ttl_s,
        "hit_tokens": dict(record.hit_tokens),
        "chunks": dict(record.tier_after),
        "prompt_digest": record.prompt_digest,
        "error": record.error,
    }


# ---- tools ---------------------------------------------------------------------------------


def kv_generate_tool(
    kv_cache: MultiTierCache, max_tokens: int = 64, name: str = "kv_generate", **sampling: Any
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
    **sampling
        Other fields of `vllm.SamplingParams`; temperature 0 unless given.

    Returns
    -------
    langchain_core.tools.BaseTool
        Its artifact is the `decision`, where it was made already.
    """
    fields = {"temperature": 0.0, **sampling, "max_tokens": max_tokens}

    def generate(
        prompt: str, perplexity: float | None = None, time_variance: float | None = None
    ) -> tuple[str, dict[str, Any]]:
        kv = {"perplexity": perplexity, "time_variance": time_variance}  # None = unknown
        tokens = kv_cache.controller.tokenize(prompt)
        ask = desk_of(kv_cache).answer(kv_cache, Ask(tokens, _sampling(fields), kv))
        return ask.text, _kv(ask.record).get("kv", {})

    return StructuredTool.from_function(
        generate,
        name=name,
        description="Continue a text. Its KV cache is kept for as long as it is worth it; say "
        "perplexity (>= 1) and time_variance (0 to 1) only if you know them.",
        response_format="content_and_artifact",
    )


def kv_lookup_tool(kv_cache: MultiTierCache, name: str = "kv_lookup") -> BaseTool:
    """Return a tool that says where a text's KV cache is, and how long its TTL still runs.

    Parameters
    ----------
    kv_cache : MultiTierCache
        Is asked; nothing is generated, and nothing counts as an access.
    name : str
        What an agent calls it.
    """

    def look_up(prompt: str) -> dict[str, Any]:
        try:
            return kv_position(kv_cache, kv_cache.controller.tokenize(prompt))
        except Exception as error:  # LMCache may be away; that must not end an agent's run
            return {"error": f"{type(error).__name__}: {error}"}

    return StructuredTool.from_function(
        look_up,
        name=name,
        description="Say in which tiers (gpu, disk, remote) the KV cache of a text is, "
        "and in how many seconds its time to live ends there.",
    )


def kv_position(kv_cache: MultiTierCache, tokens: Sequence[int]) -> dict[str, Any]:
    """Return where a prompt's chunks are, by hottest tier, and when its TTL ends.

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
    held = controller.layout(tokens).of(controller.instance_id)
    chunks = dict(by_hottest(held))
    digest = prompt_digest(tokens)
    decided = (r for r in reversed(list(kv_cache.records)) if r.prompt_digest == digest)
    last = next(decided, None)
    if last is None or last.wanted_tier is None:
        return {"chunks": chunks}
    ends_in_s = last.time_s + last.ttl_s - kv_cache.clock()
    return {"chunks": chunks, "wanted_tier": last.wanted_tier, "ends_in_s": round(ends_in_s, 1)}

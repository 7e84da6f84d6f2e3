"""LangChain, LangGraph and AutoGen on the real engine: what agents ask is generated and managed."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Annotated, Literal, TypedDict

import pytest
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from waiting import wait_until

from cache_controller import LMCacheController, LocalLMCacheController
from caching_heuristics import HeuristicConfig
from kvttl.agents.chat import chat_tokens, read_tool_calls
from kvttl.agents.langchain import ManagedChatModel, kv_generate_tool, kv_lookup_tool
from kvttl.agents.loop import chunk_groups, loop_model, plot_chunks, run_loop, turn_table
from kvttl.manager.clock import SessionClock
from kvttl.manager.generation import prompt_digest
from kvttl.plots.decision_plots import plot_timeline
from kvttl.session.demo_model import DEMO_MODEL, load_tokenizer
from kvttl.session.launch import managed
from tiered_caching import InMemoryBackend, MultiTierCache

COLD = {"perplexity": 80.0, "time_variance": 0.1}


@pytest.fixture
def cache(stack, llm):
    with managed(stack, llm) as manager:
        yield manager


@pytest.fixture
def model(cache):
    return ManagedChatModel(kv_cache=cache, max_tokens=6)


@pytest.fixture
def counted(llm, monkeypatch):
    """How many prompts each call of the engine had; calls at the same time are an error."""
    sizes, busy, generate = [], threading.Lock(), llm.generate

    def counting(prompts, *args, **kwargs):
        assert busy.acquire(blocking=False), "two threads are in the engine"
        try:
            sizes.append(len(prompts) if isinstance(prompts[0], list) else 1)
            return generate(prompts, *args, **kwargs)
        finally:
            busy.release()

    monkeypatch.setattr(llm, "generate", counting)
    return sizes


def hits(message):
    return message.usage_metadata["input_token_details"]["cache_read"]


# ---- the chat model ----------------------------------------------------------------------


def test_a_chain_generates_and_its_kv_is_managed(model, cache, fresh_text):
    prompt = ChatPromptTemplate([("system", "{rules}"), ("human", "{question}")])
    chain = prompt | model | StrOutputParser()
    rules = fresh_text()
    text = chain.invoke({"rules": rules, "question": "Why?"})
    assert isinstance(text, str)

    (record,) = cache.records
    assert record.error == "" and record.wanted_tier and record.chunks > 3
    tokens = model.prompt_tokens([SystemMessage(rules), HumanMessage("Why?")])
    assert record.prompt_digest == prompt_digest(tokens) and record.prompt_tokens == len(tokens)


def test_the_prompt_is_the_engines_own_chat(model, llm, fresh_text):
    turns = [{"role": "system", "content": fresh_text()}, {"role": "user", "content": "Why?"}]
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=6)
    (output,) = llm.chat(turns, sampling, use_tqdm=False)
    tokens = model.prompt_tokens([SystemMessage(turns[0]["content"]), HumanMessage("Why?")])
    assert tokens == output.prompt_token_ids
    answer = model.invoke([("system", turns[0]["content"]), ("human", "Why?")])
    assert answer.content == output.outputs[0].text


def test_the_answer_says_what_was_decided_and_counted(model, cache, fresh_text):
    answer = model.invoke(fresh_text(), kv=COLD)
    (record,) = cache.records
    decided = answer.response_metadata["kv"]
    assert decided["wanted_tier"] == record.wanted_tier == "remote"
    assert decided["ttl_s"] == record.ttl_s and decided["prompt_digest"] == record.prompt_digest
    usage = answer.usage_metadata
    assert usage["input_tokens"] == record.prompt_tokens
    assert 0 < usage["output_tokens"] <= 6
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_token_details"]["cache_read"] == sum(record.hit_tokens.values())
    json.dumps(decided)


def test_what_the_caller_knows_arrives_in_the_record(model, cache, fresh_text):
    model.bind(kv=COLD).invoke(fresh_text())
    model.with_config(tags=["x"]).invoke(fresh_text(), kv={"perplexity": 7.0})
    bound, given = cache.records
    assert bound.metadata["perplexity"] == 80.0
    assert set(bound.metadata_sources.values()) == {"caller", "history"}
    assert given.metadata["perplexity"] == 7.0 and given.metadata_sources["perplexity"] == "caller"


@pytest.mark.parametrize("kv", [{"perplexity": -1}, "hot", [1, 2], {"perplexity": "x"}])
def test_wrong_metadata_cost_no_text(model, cache, fresh_text, kv):
    text = fresh_text()
    answer = model.invoke(text, kv=kv)
    assert answer.content == model.invoke(text).content
    refused = cache.records[0]
    assert refused.error and refused.prompt_digest == cache.records[1].prompt_digest
    assert answer.response_metadata["kv"]["error"] == refused.error


def test_stop_words_end_the_answer(model, fresh_text):
    text = fresh_text()
    whole = model.invoke(text, max_tokens=12).content
    word = whole[len(whole) // 2 :][:3]
    assert model.invoke(text, max_tokens=12, stop=[word]).content == whole[: whole.index(word)]
    assert model.bind(stop=[word]).invoke(text, max_tokens=12).content == whole.split(word)[0]


def test_several_answers_are_generations_and_count_once_each(model, cache, fresh_text):
    text = fresh_text()
    asked = {"n": 3, "temperature": 1.0, "max_tokens": 5, "ignore_eos": True, "seed": 1}
    result = model.generate([[HumanMessage(text)], [HumanMessage(text + " And?")]], **asked)
    assert [len(generations) for generations in result.generations] == [3, 3]
    for generations, record in zip(result.generations, cache.records):
        usage = [generation.message.usage_metadata for generation in generations]
        assert [each["input_tokens"] for each in usage] == [record.prompt_tokens, 0, 0]
        assert [each["output_tokens"] for each in usage] == [5, 5, 5]
        assert sum(each["total_tokens"] for each in usage) == record.prompt_tokens + 15
        cached = [each["input_token_details"]["cache_read"] for each in usage]
        assert cached == [sum(record.hit_tokens.values()), 0, 0]
        assert len({generation.text for generation in generations}) > 1
    assert len(cache.records) == 2  # a decision a prompt
    assert isinstance(model.invoke(text, **asked).content, str)
    later = asyncio.run(model.agenerate([[HumanMessage(text)]], **asked))
    assert len(later.generations[0]) == 3


def test_tokens_are_counted_by_the_engines_tokenizer_without_a_network(model, llm, monkeypatch):
    def connecting(*_args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connecting)
    text, tokenizer = "hello world, this is a text", llm.get_tokenizer()
    assert model.get_token_ids(text) == tokenizer.encode(text)
    assert model.get_num_tokens(text) == 12
    assert model.bind(max_tokens=2).get_num_tokens(text) == 12
    kinds = ("question", "answer")
    talk = [f"{kind} {i} " * 20 for i in range(40) for kind in kinds]
    talk = [(AIMessage if i % 2 else HumanMessage)(text) for i, text in enumerate(talk)]
    counted = model.get_num_tokens_from_messages(talk)
    assert counted == len(model.prompt_tokens(talk)) > 5_000
    offered = model.get_num_tokens_from_messages(talk[:1], tools=[add])
    assert offered == len(model.prompt_tokens(talk[:1], [convert_to_openai_tool(add)]))
    assert model.get_num_tokens_from_messages([]) == 0
    kept = trim_messages(talk, max_tokens=500, token_counter=model)
    assert 0 < len(kept) < 10 and kept == talk[-len(kept) :]
    assert len(model.prompt_tokens(kept)) <= 500 < len(model.prompt_tokens(talk[-len(kept) - 1 :]))
    mine = model.model_copy(update={"custom_get_token_ids": lambda text: [0] * len(text)})
    assert mine.get_num_tokens(text) == len(text)


def test_every_way_of_asking_gives_the_same_answer(model, fresh_text):
    text = fresh_text(40)

    async def ask():
        return [
            (await model.ainvoke(text)).content,
            *[m.content for m in await model.abatch([text])],
        ]

    assert {model.invoke(text).content, model.batch([text])[0].content} == set(asyncio.run(ask()))


def test_sampling_of_a_call_and_of_the_model(model, fresh_text):
    text = fresh_text()
    assert model.invoke(text, max_tokens=1).usage_metadata["output_tokens"] <= 1
    warm = {"temperature": 1.5, "max_tokens": 12}
    answers = [model.invoke(text, seed=seed, **warm).content for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(TypeError, match="colour"):
        model.invoke(text, colour="red")


def test_a_second_turn_is_served_the_first_ones_kv(model, fresh_text):
    conversation = [SystemMessage(fresh_text()), HumanMessage(fresh_text(40))]
    first = model.invoke(conversation)
    second = model.invoke([*conversation, first, HumanMessage("And then?")])
    assert hits(first) == 0
    # All complete chunks of the first turn's prompt, its last token aside.
    assert hits(second) >= first.usage_metadata["input_tokens"] - 64 > 100


def test_agents_share_the_kv_of_a_system_prompt(model, fresh_text):
    rules = fresh_text()
    model.invoke([SystemMessage(rules), HumanMessage("Plan it.")])
    other = model.invoke([SystemMessage(rules), HumanMessage("Review it.")])
    assert hits(other) > 100


def test_content_that_is_not_text_is_refused(model):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(ValueError, match="only text"):
        model.invoke([HumanMessage([image])])
    assert model.invoke([HumanMessage([{"type": "text", "text": "Why?"}])]).content is not None


def test_a_prompt_that_is_too_long_is_the_engines_error(model):
    with pytest.raises(Exception, match="maximum context length is 2048"):
        model.invoke("token " * 5000)


def test_an_engine_in_the_background_still_answers(stack, llm, fresh_text):
    with managed(stack, llm, background=True) as cache:
        model = ManagedChatModel(kv_cache=cache, max_tokens=2)
        text = fresh_text()
        answers = [model.invoke(text) for _ in range(3)]
        assert len({answer.content for answer in answers}) == 1
        assert cache.flush(120)
        uses = [record.metadata["access_count"] for record in cache.records]
        assert uses == [0, 1, 2]


def test_without_an_engine_it_says_what_is_missing(stack):
    with MultiTierCache(LMCacheController(stack.host, stack.port)) as cache:
        with pytest.raises(RuntimeError, match="set_llm"):
            ManagedChatModel(kv_cache=cache).invoke("Hello")


# ---- many at once ------------------------------------------------------------------------


def test_several_conversations_are_one_engine_batch(model, cache, counted, fresh_text):
    conversations = [[HumanMessage(fresh_text(50))] for _ in range(4)]
    result = model.generate(conversations, kv=COLD)
    assert counted == [4]
    texts = [generations[0].text for generations in result.generations]
    assert [record.wanted_tier for record in cache.records] == ["remote"] * 4
    alone = [model.invoke(conversation).content for conversation in conversations]
    assert texts == alone
    digests = [g[0].message.response_metadata["kv"]["prompt_digest"] for g in result.generations]
    assert digests == [prompt_digest(model.prompt_tokens(c)) for c in conversations]


def test_answers_that_langchain_has_stored_cost_no_generation(cache, counted, fresh_text):
    from langchain_core.caches import InMemoryCache

    model = ManagedChatModel(kv_cache=cache, max_tokens=2, cache=InMemoryCache())
    conversations = [[HumanMessage(fresh_text(40))] for _ in range(2)]
    first, again = (model.generate(conversations).generations for _ in range(2))
    assert [g[0].text for g in first] == [g[0].text for g in again]
    assert counted == [1, 1] and len(cache.records) == 2


def test_batches_share_the_engine(model, counted, fresh_text):
    texts = [fresh_text(50) for _ in range(6)]
    batched = (model | StrOutputParser()).batch(texts)
    assert batched == [model.invoke(text).content for text in texts]
    assert sum(counted[:-6]) == 6 and len(counted[:-6]) < 6  # who waited went together


def test_concurrent_agents_take_turns_at_the_engine(cache, counted, fresh_text):
    models = {name: ManagedChatModel(kv_cache=cache, max_tokens=3) for name in "abc"}
    answers = RunnableParallel(models).invoke(fresh_text())
    assert len({answer.content for answer in answers.values()}) == 1

    many = asyncio.run(models["a"].abatch([fresh_text(40) for _ in range(8)]))
    assert len(many) == 8 and sum(counted) == 11
    assert all(not record.error for record in cache.records)


def test_one_bad_prompt_in_a_batch_spoils_no_other(model, cache, fresh_text):
    texts = [fresh_text(50), "token " * 5000, fresh_text(50)]
    good, bad, also_good = model.batch(texts, return_exceptions=True)
    assert good.content == model.invoke(texts[0]).content
    assert also_good.content == model.invoke(texts[2]).content
    assert "2048" in str(bad)
    with pytest.raises(Exception, match="maximum context length is 2048"):
        model.generate([[HumanMessage(text)] for text in texts])
    assert model.invoke("Still there?") is not None


def test_an_interrupted_call_costs_nobody_else_an_answer(scripted, monkeypatch):
    model, engine = scripted("one", "two", "three")
    generate, entered = engine.generate, threading.Event()

    def interrupted(prompts, sampling_params):
        monkeypatch.setattr(engine, "generate", generate)
        entered.set()
        wait_until(lambda: len(model._batches._waiting) == 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupted)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(model.invoke, "a")
        assert entered.wait(60)
        others = [pool.submit(model.invoke, text) for text in "bc"]
        assert isinstance(first.exception(60), KeyboardInterrupt)
        assert {other.result(60).content for other in others} == {"one", "two"}


# ---- prompts -----------------------------------------------------------------------------

GEMMA_3 = (  # the rules of Gemma 3's template, shortened
    "{% if messages[0]['role'] == 'system' %}{% set start = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set start = '' %}{% set turns = messages %}"
    "{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ (start if loop.first else '') + m['content'] }}{% endfor %}<model>"
)
GEMMA_2 = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + GEMMA_3


def tokenizer_with(template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return tokenizer


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("template", [GEMMA_2, GEMMA_3], ids=["gemma 2", "gemma 3"])
def test_templates_without_a_system_role_or_with_alternating_turns(template):
    tokenizer = tokenizer_with(template)
    several = turns(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("assistant", "c"))
    text = tokenizer.decode(chat_tokens(tokenizer, several))
    assert text == "<bos><user>Be brief.\n\na<assistant>b\n\nc<model>"


def test_a_template_that_refuses_all_says_why():
    tokenizer = tokenizer_with("{{ raise_exception('not today') }}")
    with pytest.raises(ValueError, match="not today"):
        chat_tokens(tokenizer, turns(("user", "a")))
    with pytest.raises(ValueError, match="at least one"):
        chat_tokens(tokenizer, [])


def test_a_template_with_tools_gets_them():
    tokenizer = tokenizer_with(
        "{{ tools | length }} {{ messages[1].tool_calls[0].function.arguments.a }}"
    )
    calling = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    talk = [*turns(("user", "x")), {"role": "assistant", "content": None, "tool_calls": [calling]}]
    assert tokenizer.decode(chat_tokens(tokenizer, talk, [{"type": "function"}] * 2)) == "2 7"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "add"}',
        '{"name": "add", "arguments": 3}',
        "{" * 3000,
        '{"a":' * 3000,
        '{"name": 1}',
    ],
)
def test_what_is_no_call_stays_text(text):
    assert read_tool_calls(text, ["add"]) == (text, [])


@pytest.mark.parametrize(
    "before, after", [("<tool_call>\n", "\n</tool_call>"), ("```json\n", "```")]
)
def test_calls_in_wrappers_and_several(before, after):
    one = '{"name": "add", "parameters": {"a": {"b": "}"}}}'
    text, calls = read_tool_calls(f"So: {before}{one}{after} {one}", ["add"])
    assert text == "So:" and calls == [{"name": "add", "args": {"a": {"b": "}"}}}] * 2


# ---- LangGraph ---------------------------------------------------------------------------


class Talk(TypedDict):
    messages: Annotated[list, add_messages]
    turns: int


def test_a_graph_of_two_agents_over_several_turns(model, cache, fresh_text):
    rules, limit = fresh_text(), 6

    def agent(role):
        def speak(state):
            system = SystemMessage(f"{rules}\nYou are the {role}.")
            answer = model.invoke([system, *state["messages"]])
            return {"messages": [answer], "turns": state["turns"] + 1}

        return speak

    graph = StateGraph(Talk)
    graph.add_node("writer", agent("writer"))
    graph.add_node("critic", agent("critic"))
    graph.add_edge(START, "writer")
    graph.add_edge("writer", "critic")
    graph.add_conditional_edges("critic", lambda s: END if s["turns"] >= limit else "writer")
    end = graph.compile().invoke({"messages": [HumanMessage(fresh_text(40))], "turns": 0})

    assert end["turns"] == limit and len(end["messages"]) == 1 + limit
    records = list(cache.records)
    assert len(records) == limit and not any(record.error for record in records)
    assert not records[0].hit_tokens
    assert all(sum(record.hit_tokens.values()) > 100 for record in records[1:])  # the rules
    # From an agent's second turn on also its own earlier turns.
    assert sum(records[2].hit_tokens.values()) > sum(records[1].hit_tokens.values())
    assert [r.metadata["access_count"] for r in records][1:] >= [1] * (limit - 1)


class Scripted:
    """Stands for a model that can call tools: the demo model cannot."""

    def __init__(self, *answers):
        self.answers, self.prompts = list(answers), []

    def get_tokenizer(self):
        return load_tokenizer(str(DEMO_MODEL))

    def generate(self, prompts, sampling_params):
        (prompt,) = prompts
        self.prompts.append(self.get_tokenizer().decode(prompt))
        answer = SimpleNamespace(text=self.answers.pop(0), logprobs=None, token_ids=[1, 2])
        return [SimpleNamespace(prompt_token_ids=prompt, outputs=[answer], num_cached_tokens=0)]


@pytest.fixture
def scripted():
    """A function that makes a chat model out of answers, on a controller without a server."""

    def make(*answers, **options):
        tiers = {tier: InMemoryBackend() for tier in ("gpu", "disk", "remote")}
        local = LocalLMCacheController(chunk_size_tokens=8, backends=tiers)
        engine = Scripted(*answers)
        cache = MultiTierCache(local, engine, notify=None, **options)
        return ManagedChatModel(kv_cache=cache), engine

    return make


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_a_graph_calls_tools(scripted):
    model, engine = scripted('{"name": "add", "arguments": {"a": 2, "b": 40}}', "It is 42.")
    calling = model.bind_tools([add])
    graph = StateGraph(Talk)
    graph.add_node("agent", lambda state: {"messages": [calling.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([add]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    question = [SystemMessage("Rules."), HumanMessage("2 + 40?")]
    end = graph.compile().invoke({"messages": question, "turns": 0})
    kinds = [type(message) for message in end["messages"]]
    assert kinds == [SystemMessage, HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert end["messages"][3].content == "42" and end["messages"][-1].content == "It is 42."
    first, second = engine.prompts
    assert "Rules." in first and '"name": "add"' in first and "Add two numbers" in first
    # The second prompt repeats the first one, the call and its result: a prefix that hits.
    assert second.startswith(first.rsplit("<start_of_turn>", 1)[0])
    assert '"b": 40' in second and second.index('"b": 40') < second.rindex("42")


CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
THE_WAY = r"in this process: use the served endpoint \(`make serve`\) with .*ChatOpenAI\(base_url="


@pytest.mark.parametrize("choice", ["any", "required", "add", True, {"type": "function"}])
def test_a_call_cannot_be_forced_and_it_says_who_can(scripted, choice):
    model, engine = scripted("Done.")
    with pytest.raises(NotImplementedError, match=rf"cannot be forced .*{THE_WAY}"):
        model.bind_tools([add], tool_choice=choice)
    offered = model.bind_tools([add])
    for ask in (offered.invoke, lambda *a, **k: asyncio.run(offered.ainvoke(*a, **k))):
        with pytest.raises(NotImplementedError, match=rf"cannot be forced .*{THE_WAY}"):
            ask("Hi", tool_choice=choice)
    assert engine.prompts == []


@pytest.mark.parametrize("choice", [None, "auto", False])
def test_a_choice_that_forces_nothing_is_none(scripted, choice):
    model, _ = scripted(CALL, CALL)
    assert model.bind_tools([add], tool_choice=choice).invoke("Hi").tool_calls
    assert model.bind_tools([add]).invoke("Hi", tool_choice=choice).tool_calls


def test_the_choice_none_offers_no_tool(scripted):
    model, engine = scripted(CALL, CALL, CALL)
    answers = [
        model.bind_tools([add], tool_choice="none").invoke("Hi"),
        model.bind_tools([add]).invoke("Hi", tool_choice="none"),
        asyncio.run(model.bind_tools([add]).ainvoke("Hi", tool_choice="none")),
    ]
    assert [(answer.content, answer.tool_calls) for answer in answers] == [(CALL, [])] * 3
    assert not any("add" in prompt for prompt in engine.prompts)


def test_what_only_the_served_endpoint_can_says_so(scripted):
    model, engine = scripted("Done.", "Done.")
    schema = {"title": "answer", "type": "object", "properties": {}}

    async def streamed():
        return [part async for part in model.astream("Hi")]

    refused = [
        ("structured output", lambda: model.with_structured_output(schema)),
        ("structured output", lambda: model.with_structured_output(schema, method="json_mode")),
        ("structured output", lambda: model.invoke("Hi", response_format={"type": "json_object"})),
        ("structured output", lambda: model.bind_tools([add], strict=True).invoke("Hi")),
        ("tokens cannot be streamed", lambda: list(model.stream("Hi"))),
        ("tokens cannot be streamed", lambda: asyncio.run(streamed())),
        ("tokens cannot be streamed", lambda: model.invoke("Hi", stream=True)),
        ("tokens cannot be streamed", lambda: list((model | StrOutputParser()).stream("Hi"))),
    ]
    for what, ask in refused:
        with pytest.raises(NotImplementedError, match=rf"{what}.* {THE_WAY}"):
            ask()
    assert engine.prompts == []
    nothing = {"stream": False, "response_format": {"type": "text"}, "strict": None}
    assert model.invoke("Hi", **nothing).content == "Done."
    # Who only watches a graph's messages gets whole ones.
    graph = StateGraph(Talk)
    graph.add_node("agent", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "agent")
    talk = {"messages": [HumanMessage("Hi")], "turns": 0}
    parts = graph.compile().stream(talk, stream_mode="messages")
    assert [message.content for message, _ in parts] == ["Done."]


def test_tool_calls_have_their_own_ids(scripted):
    call = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
    model, _ = scripted(call + call, call)
    calling = model.bind_tools([add])
    messages = [calling.invoke("a"), calling.invoke("b")]
    ids = [each["id"] for message in messages for each in message.tool_calls]
    assert len(set(ids)) == 3


# ---- the loop of notebook 07 --------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(stack, shared_engine):
    """One ticket, which comes back after a pause in which its TTL in gpu ends."""
    config = HeuristicConfig(hot_threshold=1e6, cold_threshold=1e6, variance_threshold=1.0)
    model = loop_model(stack, shared_engine.get(), config)
    with model.kv_cache:
        yield run_loop(model, [(0.0, "code"), (3.0, "code")], turns=4, progress=False)


def test_the_loop_takes_turns_and_its_kv_goes_down_and_is_served(loop):
    assert not any(record.error for record in loop.records)
    turns = turn_table(loop)
    assert list(turns["agent"]) == ["planner", "engineer", "reviewer", "planner"] * 2
    assert list(turns["hours"][:2]) == [0.0, 0.03] and turns["hours"][4] == 3.0
    first, again = turns[:4], turns[4:]
    assert set(first["wanted"]) == {"gpu"} and first["hit gpu"][1] > 200  # the house rules
    ended = [record for record in loop.records if record.kind == "expiry"]
    assert {(r.from_tier, r.wanted_tier) for r in ended} == {("gpu", "disk")} and len(ended) == 4
    assert again["hit disk"][4] > 500


def test_the_loop_knows_whose_each_chunk_is_and_where_it_was(loop):
    groups = chunk_groups(loop)
    assert {"house rules, all agents", "code: planner", "code: reviewer"} <= set(groups.values())
    rules = [key for key, group in groups.items() if group.startswith("house")]
    assert len(rules) > 6
    seen = [{held.get(key) for key in rules} for _, held in loop.snapshots]
    assert {"gpu"} in seen and {"disk"} in seen and seen.index({"gpu"}) < seen.index({"disk"})
    assert len(loop.labels) == len(loop.records) and loop.labels[0] == "code 1: planner"


def test_the_pictures_of_the_loop(loop):
    (axes,) = plot_chunks(loop).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0].startswith("house rules, all agents (")
    assert plot_timeline(loop.records, loop.labels).axes


def test_the_loop_sees_every_turn_when_the_manager_keeps_few_records(scripted):
    model, _ = scripted(*["Done."] * 6, max_records=3, clock=SessionClock(0.0), sweep_every_s=None)
    loop = run_loop(model, [(0.0, "code")], turns=6, progress=False)
    assert [r.kind for r in loop.records].count("generation") == 6
    assert list(turn_table(loop)["agent"]) == ["planner", "engineer", "reviewer"] * 2


# ---- tools -------------------------------------------------------------------------------


def test_the_generating_tool_places_kv(cache, fresh_text):
    kv_generate, kv_lookup = kv_generate_tool(cache, max_tokens=4), kv_lookup_tool(cache)
    text = fresh_text()
    assert kv_lookup.invoke({"prompt": text})["chunks"].keys() == {"none"}
    answer = kv_generate.invoke({"prompt": text, "perplexity": 80.0})
    assert isinstance(answer, str) and cache.records[-1].wanted_tier == "remote"
    found = kv_lookup.invoke({"prompt": text})
    assert found["wanted_tier"] == "remote" and found["chunks"].keys() == {"remote"}
    assert 0 < found["ends_in_s"] <= cache.records[-1].ttl_s + 0.1  # it is rounded


def test_the_generating_tool_in_a_tool_node(cache, fresh_text):
    kv_generate = kv_generate_tool(cache, max_tokens=4)
    call = {"name": "kv_generate", "args": {"prompt": fresh_text()}, "id": "1", "type": "tool_call"}
    graph = StateGraph(Talk)
    graph.add_node("tools", ToolNode([kv_generate]))
    graph.add_edge(START, "tools")
    talk = {"messages": [AIMessage("", tool_calls=[call])], "turns": 0}
    message = graph.compile().invoke(talk)["messages"][-1]
    assert isinstance(message, ToolMessage) and message.status == "success"
    assert message.artifact["wanted_tier"] == cache.records[-1].wanted_tier


def test_the_generating_tool_survives_wrong_metadata(cache, fresh_text):
    answer = kv_generate_tool(cache).invoke({"prompt": fresh_text(), "perplexity": -5.0})
    assert isinstance(answer, str) and "perplexity" in cache.records[-1].error


def test_looking_up_survives_a_coordinator_that_is_away(llm):
    with MultiTierCache(LMCacheController("127.0.0.1", 9), llm, notify=None) as cache:
        assert "LMCacheUnavailable" in kv_lookup_tool(cache).invoke({"prompt": "x" * 500})["error"]


# ---- AutoGen, through the gateway --------------------------------------------------------


@pytest.fixture(scope="module")
def server(stack):
    """A gateway, with an engine of its own."""
    from kvttl.serve.gateway import gateway
    from kvttl.session.demo_model import model_path

    options = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with gateway(stack, model_path(), server_options=options) as running:
        yield running


@pytest.fixture
def autogen_client(server):
    """A function that makes AutoGen's client of the gateway; it may say what it knows in kv."""
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = {"vision": False, "function_calling": False, "json_output": False}
    info |= {"structured_output": False, "family": "unknown"}

    def make(**options):
        return OpenAIChatCompletionClient(
            model=server.model,
            base_url=server.base_url,
            api_key="none",
            model_info=info,
            **{"max_tokens": 6, "temperature": 0.0, **options},
        )

    return make


def recorded(server, before):
    """What was decided since there were `before` records."""
    assert server.cache.flush(120)
    return [r for r in list(server.cache.records)[before:] if r.kind == "generation"]


def test_autogen_agents_take_turns_through_the_gateway(server, autogen_client, fresh_text):
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.conditions import MaxMessageTermination
    from autogen_agentchat.teams import RoundRobinGroupChat

    rules, before = fresh_text(), len(server.cache.records)

    async def talk():
        client = autogen_client()
        agents = [
            AssistantAgent(name, client, system_message=f"{rules}\nYou are the {name}.")
            for name in ("writer", "critic")
        ]
        team = RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(7))
        result = await team.run(task=fresh_text(40))
        await client.close()
        return result

    messages = asyncio.run(talk()).messages
    speakers = [message.source for message in messages]
    assert speakers == ["user", *["writer", "critic"] * 3]
    records = recorded(server, before)
    assert len(records) == 6 and not any(record.error for record in records)
    assert all(sum(record.hit_tokens.values()) > 100 for record in records[1:])  # the rules
    usage = [message.models_usage.prompt_tokens for message in messages[1:]]
    assert usage == [record.prompt_tokens for record in records]


def test_autogen_says_what_it_knows_about_the_kv(server, autogen_client, fresh_text):
    from autogen_core.models import UserMessage

    before = len(server.cache.records)

    async def ask():
        client = autogen_client(extra_body={"kv": COLD})
        await client.create([UserMessage(content=fresh_text(), source="user")])
        await client.close()

    asyncio.run(ask())
    (record,) = recorded(server, before)
    assert record.wanted_tier == "remote" and record.metadata["perplexity"] == 80.0
    assert record.metadata_sources["perplexity"] == "caller"


# ---- what LangChain asks and the process has not: ChatOpenAI, through the gateway -----------


@pytest.fixture
def chat_openai(server):
    """LangChain's own client of the gateway, as `ManagedChatModel` says in its refusals."""
    from langchain_openai import ChatOpenAI

    # Without the penalty the demo model would fill its JSON with blanks for ever.
    options = {"max_tokens": 300, "temperature": 0.0, "frequency_penalty": 2.0}
    options |= {"max_retries": 0, "timeout": 240}
    return ChatOpenAI(base_url=server.base_url, api_key="none", model=server.model, **options)


@tool
def switch(on: bool) -> str:
    """Turn the cache on or off."""
    return str(on)


def test_a_call_is_forced_through_the_gateway(server, chat_openai, fresh_text):
    before = len(server.cache.records)
    for choice in ("switch", "required"):
        answer = chat_openai.bind_tools([switch], tool_choice=choice).invoke(fresh_text(40))
        assert [call["name"] for call in answer.tool_calls][:1] == ["switch"], answer
        assert answer.tool_calls[0]["args"] in ({"on": True}, {"on": False})
    records = recorded(server, before)
    assert len(records) == 2 and not any(record.error for record in records)


def test_structured_output_through_the_gateway(chat_openai, fresh_text):
    from pydantic import BaseModel

    class Verdict(BaseModel):
        good: bool
        kind: Literal["code", "prose"]

    judging = chat_openai.with_structured_output(Verdict, method="json_schema")
    verdict = judging.invoke(fresh_text(40))
    assert isinstance(verdict, Verdict)


def test_tokens_are_streamed_through_the_gateway(server, chat_openai, fresh_text):
    text, before = fresh_text(40), len(server.cache.records)
    asked = {"extra_body": {"ignore_eos": True, "kv": COLD}, "max_tokens": 12}

    async def astreamed():
        return [part.content async for part in chat_openai.astream(text, **asked)]

    parts = [part.content for part in chat_openai.stream(text, **asked)]
    assert len([part for part in parts if part]) > 4
    assert "".join(parts) == "".join(asyncio.run(astreamed()))
    assert "".join(parts) == chat_openai.invoke(text, **asked).content
    assert [record.wanted_tier for record in recorded(server, before)] == ["remote"] * 3


# ---- without the extra -------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing, module",
    [
        ("langchain_core", "kvttl.agents.langchain"),
        ("langchain_core", "kvttl.agents.loop"),
        ("langgraph", "kvttl.agents.loop"),
    ],
)
def test_without_the_extra_the_import_says_what_to_install(missing, module):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "make install-agents" in last and "[agents]" in last

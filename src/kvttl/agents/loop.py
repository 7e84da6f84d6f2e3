"""Several agents in a LangGraph loop that share a system prompt, on a clock that jumps.

A ticket goes round among the agents; later it comes back. Where each chunk of KV cache is
in between is read from LMCache's directory after every event.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import pandas as pd
from langchain_core.messages import HumanMessage, SystemMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.agents.langchain import ManagedChatModel
from kvttl.decisions.log import DecisionRecord
from kvttl.manager.clock import ends_on_the_way
from kvttl.plots.panels import TIER_COLOURS, open_axes, own_style, tier_keys
from kvttl.session.launch import session_manager
from kvttl.session.texts import CODE_PROMPT, PROSE_PROMPT, house_rules, random_characters

_TOGETHER = "You are one of several agents that work on a ticket together.\n"
HOUSE_RULES = _TOGETHER + house_rules("Read the whole ticket and all answers before you answer.")
ROLES = {
    "planner": "You are the planner. Split the ticket into steps, and say who does which step.",
    "engineer": "You are the engineer. Write the change for the next step, and nothing else.",
    "reviewer": "You are the reviewer. Say what is wrong with the last change, or that it is good.",
}
TICKETS = {
    "code": f"Add a method that tells when the next call is allowed.\n{CODE_PROMPT}",
    "prose": f"Rewrite this page for new users.\n{PROSE_PROMPT}",
    "log": f"What does this dump mean?\n{random_characters(400, seed=0)}",
}
_HOUR = 3600.0
# When each ticket comes, hours after the start: morning, afternoon, night.
VISITS = (
    *((0.0, "code"), (0.3, "prose"), (0.6, "log"), (0.9, "code")),
    *((6.0, "prose"), (6.4, "code"), (6.8, "code")),
    *((14.0, "code"), (14.3, "log"), (14.6, "code")),
)
THINK_S = 120.0  # between two turns


class Conversation(MessagesState):
    """What goes round: the messages so far, the number of turns, when the next one is."""

    turns: int
    at_s: float


@dataclass
class LoopRun:
    """What a loop left behind.

    Parameters
    ----------
    start_s : float
        Unix time at which the session's clock began.
    records : list of DecisionRecord
        Generations and TTLs that ended, in order.
    turns : dict
        Prompt digest -> whose turn it was, about which ticket, and which turn it was.
    snapshots : list of (float, dict)
        Seconds since the start, and chunk key -> hottest tier, after every event.
    """

    start_s: float
    records: list[DecisionRecord] = field(default_factory=list)
    turns: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    snapshots: list[tuple[float, Mapping[str, str]]] = field(default_factory=list)
    last: DecisionRecord | None = None  # of the manager's records, the newest looked at

    @property
    def labels(self) -> list[str]:
        """A name for each record, such as "code 1: planner"."""
        turns = (self.turns[record.prompt_digest] for record in self.records)
        return [f"{ticket} {turn}: {agent}" for agent, ticket, turn in turns]


def loop_model(stack, llm, config: HeuristicConfig | None = None, **options) -> ManagedChatModel:
    """Return a chat model over a manager of its own, on a `SessionClock`.

    `options` go to `MultiTierCache`; close ``model.kv_cache`` in the end.
    """
    cache = session_manager(stack, llm, config, background=False, **options)
    return ManagedChatModel(kv_cache=cache, max_tokens=24)


def agent_graph(model: ManagedChatModel, run: LoopRun, ticket: str, turns: int = 6) -> object:
    """Return a LangGraph graph in which the agents of `ROLES` take turns at a ticket.

    Parameters
    ----------
    model : ManagedChatModel
        Answers for all agents; its manager is on a `SessionClock`.
    run : LoopRun
        Gets each turn.
    ticket : str
        Its name.
    turns : int
        After as many, the conversation ends.
    """
    graph = StateGraph(Conversation)
    for name, following in zip(ROLES, [*ROLES][1:] + [*ROLES][:1]):
        graph.add_node(name, _agent(model, run, ticket, name, following, turns))
    graph.add_edge(START, next(iter(ROLES)))
    return graph.compile()


def _agent(model, run, ticket, name, following, turns):
    """Return a node: think, answer, hand on."""
    system = SystemMessage(f"{HOUSE_RULES}\n{ROLES[name]}")

    def speak(state: Conversation) -> Command:
        for _ in ends_on_the_way(model.kv_cache, state["at_s"]):
            model.kv_cache.sweep()
            _note(model.kv_cache, run)
        answer = model.invoke([system, *state["messages"]])
        digest = answer.response_metadata["kv"]["prompt_digest"]
        turn = state["turns"] + 1
        run.turns[digest] = name, ticket, turn
        _note(model.kv_cache, run)
        said = HumanMessage(f"{name}: {answer.content}")  # to the others it is somebody else's
        after = {"messages": [said], "turns": turn, "at_s": state["at_s"] + THINK_S}
        return Command(update=after, goto=following if turn < turns else END)

    return speak


def run_loop(
    model: ManagedChatModel,
    visits: Iterable[tuple[float, str]] = VISITS,
    turns: int = 6,
    progress: bool = True,
) -> LoopRun:
    """Let the agents work on each ticket when it comes, hours after the start.

    Parameters
    ----------
    model : ManagedChatModel
        See `loop_model`.
    visits : iterable of (float, str)
        Hours since the start, rising, and a name of `TICKETS`.
    turns : int
        Of each conversation.
    progress : bool
        Show a bar.
    """
    from tqdm.auto import tqdm

    records = model.kv_cache.records
    run = LoopRun(model.kv_cache.clock.start_s, last=records[-1] if records else None)
    for hours, ticket in tqdm(list(visits), desc="conversations", disable=not progress):
        start = {"messages": [HumanMessage(TICKETS[ticket])], "turns": 0, "at_s": hours * _HOUR}
        agent_graph(model, run, ticket, turns).invoke(start)
    return run


def _note(cache, run):
    """Take over the new records, and look where every chunk is now."""
    new = list(takewhile(lambda record: record is not run.last, reversed(cache.records)))[::-1]
    run.records += [r for r in new if r.prompt_digest in run.turns]  # others' too are there
    run.last = new[-1] if new else run.last
    layout = cache.controller.layout_of()
    held = layout.of(cache.controller.instance_id)
    hottest = {key: tiers[0] for key, tiers in zip(layout.keys, held) if tiers}
    run.snapshots.append((cache.clock() - run.start_s, hottest))


# ---- the picture ---------------------------------------------------------------------------

_RULES, _ROLE = "house rules, all agents", "roles, all tickets"
_ORDER = (_RULES, _ROLE, *(f"{ticket}: {agent}" for ticket in TICKETS for agent in ROLES))


def chunk_groups(run: LoopRun) -> dict[str, str]:
    """Return whose each chunk is: chunk key -> group, in the order of the prompts.

    A chunk in prompts of several agents belongs to the house rules; one in several
    tickets to an agent's role; any other to an agent's work on one ticket.
    """
    users = defaultdict(list)
    for record in run.records:
        if record.kind == "generation":
            for key in record.chunk_keys:
                users[key].append(run.turns[record.prompt_digest])
    return {key: _group(*zip(*turns)) for key, turns in users.items()}


def _group(agents, tickets, _turns):
    if len(set(agents)) > 1:
        return _RULES
    return _ROLE if len(set(tickets)) > 1 else f"{tickets[0]}: {agents[0]}"


@own_style()
def plot_chunks(run: LoopRun) -> Figure:
    """Draw where each chunk of KV cache was over time: a row a chunk, in its tier's colour.

    Parameters
    ----------
    run : LoopRun
        Its snapshots are of LMCache's directory, so this is where KV was, not where it
        was wanted. White = nowhere.
    """
    groups = chunk_groups(run)
    order = [name for name in _ORDER if name in groups.values()]
    keys = sorted(groups, key=lambda key: order.index(groups[key]))
    times_h = np.array([at_s for at_s, _ in run.snapshots]) / _HOUR
    colours = {"": "white", **{tier: TIER_COLOURS[tier] for tier in TIERS}}
    codes = [[[*colours].index(held.get(key, "")) for _, held in run.snapshots] for key in keys]
    figure, axes = open_axes(10, 1.5 + 0.045 * len(keys) + 0.1 * len(order))
    edges_h = [*times_h, times_h[-1] + max(times_h[-1] * 0.02, 0.01)]
    cmap = ListedColormap(list(colours.values()))
    axes.pcolormesh(edges_h, np.arange(len(keys) + 1), codes, cmap=cmap, vmin=0, vmax=len(TIERS))
    _mark_groups(axes, [groups[key] for key in keys], order)
    axes.set(xlabel="hours since start", ylim=(len(keys), 0))
    figure.legend(handles=tier_keys(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _mark_groups(axes, groups: Sequence[str], order):
    """Name each group at its middle, and draw a line between two of them."""
    firsts = np.array([groups.index(name) for name in order])
    counts = np.array([groups.count(name) for name in order])
    axes.hlines(firsts, 0, 1, colors="white", lw=2, transform=axes.get_yaxis_transform())
    names = [f"{name} ({count})" for name, count in zip(order, counts)]  # chunks
    axes.set_yticks(firsts + counts / 2, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def turn_table(run: LoopRun) -> pd.DataFrame:
    """Return one row a turn: who, what was known, what was decided, hits."""
    return pd.DataFrame(_row(run, r) for r in run.records if r.kind == "generation")


def _row(run, record):
    (agent, ticket, _turn), known = run.turns[record.prompt_digest], record.metadata
    moved = [move for move in record.moves if move["moved_chunks"]]
    return {
        "hours": round((record.time_s - run.start_s) / _HOUR, 2),
        "ticket": ticket,
        "agent": agent,
        "tokens": record.prompt_tokens,
        "perplexity": round(known.get("perplexity", np.nan), 1),
        "uses": known.get("access_count"),
        "variance": round(known.get("time_variance", np.nan), 2),
        "TTL (s)": round(record.ttl_s or 0),
        "wanted": record.wanted_tier,
        **{f"hit {tier}": record.hit_tokens.get(tier, 0) for tier in TIERS},
        "moves": ", ".join(f"{m['from']}→{m['to']} {m['moved_chunks']}" for m in moved),
    }

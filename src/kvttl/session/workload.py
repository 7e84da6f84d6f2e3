"""A seeded session of a few agents: shared system prompts, questions that come back, think times.

Nothing but texts and times: what the heuristics need to know is measured.
"""

import random
from dataclasses import dataclass

from kvttl.session.texts import CODE_PROMPT, house_rules, random_characters, shuffled_prose

AGENTS = ("code reviewer", "data analyst", "release manager")
_RULES = house_rules("Read the whole request before you answer.")
_SUBJECTS = "parser scheduler tokenizer allocator planner logger session index".split()

# Kind of prompt -> mean think time in seconds, and whether it comes back like clockwork.
_KINDS = {
    "template": (120.0, True),  # a report, filled in every few minutes
    "code": (180.0, True),
    "prose": (420.0, False),
    "noise": (900.0, False),  # logs, keys, binary dumps
}
_RETURNS = 0.5  # share of requests that ask again what was asked before


@dataclass(frozen=True)
class Request:
    """One request of the session: when it comes, who asks, what kind, the prompt."""

    arrival_s: float
    agent: str
    kind: str
    prompt: str


def session_requests(count: int, seed: int = 0) -> list[Request]:
    """Return a seeded session in which prompts share system prompts and come back.

    Parameters
    ----------
    count : int
        Requests, >= 1.
    seed : int
        Equal seeds give equal sessions.

    Returns
    -------
    list of Request
        In order of arrival, which is in seconds since the start.

    Examples
    --------
    >>> requests = session_requests(40)
    >>> len({r.prompt for r in requests}) < len(requests)  # some repeat
    True
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    rng = random.Random(seed)
    asked: list[Request] = []
    arrival_s = 0.0
    for _ in range(count):
        again = asked and rng.random() < _RETURNS
        agent, kind, prompt = _again(rng, asked) if again else _new_prompt(rng)
        mean_s, regular = _KINDS[kind]
        think_s = mean_s if regular else rng.expovariate(1 / mean_s)
        arrival_s += think_s if asked else 0.0
        asked.append(Request(arrival_s, agent, kind, prompt))
    return asked


def _again(rng, asked):
    """Return an earlier request, sooner a recent one."""
    old = asked[-1 - min(int(rng.expovariate(0.25)), len(asked) - 1)]
    return old.agent, old.kind, old.prompt


def _new_prompt(rng):
    agent, kind = rng.choice(AGENTS), rng.choice(list(_KINDS))
    return agent, kind, f'"""You are a {agent}.\n{_RULES}"""\n{_body(rng, kind)}'


def _body(rng, kind):
    subject, number = rng.choice(_SUBJECTS), rng.randrange(1000)
    if kind == "noise":
        return random_characters(400, rng.randrange(2**32))
    if kind == "code":
        return CODE_PROMPT.replace("Limiter", subject.title()).replace("10", str(number))
    if kind == "template":
        return f"Report {number}. " + f"Status of the {subject}: open. Owner: none.\n" * 15
    return f"About the {subject}, note {number}. {shuffled_prose(rng)}"

"""`make tune TRACE= POLICY= CAPACITY= GOAL=`: searches a policy's settings for a goal.

Tuned on the first part of a trace's time, scored on the rest; ends with how much of the gain is
left there. The search is Optuna's (TPE, Bergstra et al. 2011; Akiba et al. 2019), seeded.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import optuna
import pandas as pd
from tqdm.auto import tqdm

from caching_heuristics import FINITE, SETTINGS, HeuristicConfig, check_number, unknown_name
from kvttl import exit_status, user_path
from kvttl.plots.replay_plots import plot_tuning
from kvttl.replay.command import pairs, parse_capacity, read_asked, replay_options
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import replay
from kvttl.replay.policies import POLICIES, capacities
from kvttl.replay.result import ReplayResult
from kvttl.replay.runs import index_runs
from kvttl.replay.tables import export
from kvttl.settings import default_path, save_settings, settings_from
from kvttl.traces.trace import Trace

_BATCH = 8  # trials that are asked for at once, on any number of cores: the same answer everywhere
_SHOWN = 16  # settings of the front that are scored on the rest, too


# What can be a goal: -1 where more is better; what must not get worse for it; its unit.
MEASURES = {
    "hits": (-1, "memory", "share of prompt tokens hit"),
    "ttft": (1, "memory", "mean TTFT, s"),
    "price": (1, "ttft", "price of 1,000 requests"),
    "bytes": (1, "hits", "MB written to disk and remote a request"),
    "memory": (1, "hits", "GiB held on average"),
}


@dataclass(frozen=True)
class Question:
    """What is searched for.

    Parameters
    ----------
    policy, capacity
        As `kvttl.replay.engine.replay` takes them; a policy with settings.
    goal, against : str
        Of `MEASURES`: what is to improve, and what must stay within `limit` (default: by the goal).
    limit : float, optional
        The worst that `against` may be on the tuned part; default: as the start settings have it,
        and of memory with a capacity: that.
    split : float
        Share ]0, 1[ of the trace's time to tune on.
    seed : int
        Of the search, 0..2^32 - 1.
    fixed : mapping
        Settings that are not searched, name -> value; the others start at their defaults.
    costs : TierCosts
        Of TTFT, price and bytes.

    Raises
    ------
    ValueError
        Names the argument, its value and what is allowed.
    """

    policy: str = "heuristic"
    capacity: object = None
    goal: str = "memory"
    against: str = ""
    limit: float | None = None
    split: float = 0.5
    seed: int = 0
    fixed: Mapping[str, object] = field(default_factory=dict)
    costs: TierCosts = TierCosts()

    def __post_init__(self) -> None:
        known = [name for name, row in POLICIES.items() if row.reads_config]
        if self.policy not in known:
            raise ValueError(unknown_name("POLICY with settings", self.policy, known))
        if POLICIES[self.policy].needs_capacity and self.capacity is None:
            raise ValueError(f"CAPACITY must be given for POLICY={self.policy}, got none")
        for name, value in (("GOAL", self.goal), ("AGAINST", self.paid_with)):
            if value not in MEASURES:
                raise ValueError(unknown_name(name, value, MEASURES))
            if value == "bytes" and not isinstance(self.capacity, (tuple, list)):
                got = f"got {self.capacity!r}"
                raise ValueError(f"CAPACITY must be gpu,disk,remote for bytes, {got}")
        if self.goal == self.paid_with:
            raise ValueError(f"AGAINST must be another measure than GOAL, got {self.against!r}")
        check_number("SPLIT", self.split, 0.01, 0.99)
        check_number("SEED", self.seed, 0, 2**32 - 1)
        check_number("LIMIT", self.limit or 0, 0, FINITE)

    # What is paid with, and the settings that the search begins with.
    paid_with = property(lambda self: self.against or MEASURES.get(self.goal, (0, ""))[1])
    start = property(lambda self: settings_from(dict(self.fixed)))

    def settings(self, values: Mapping[str, float]) -> HeuristicConfig:
        """Return settings with three digits a new value; what is over its upper limit is that."""
        short, start = {n: float(f"{v:.3g}") for n, v in values.items()}, asdict(self.start)
        short = start | {n: v for n, v in short.items() if values[n] != start[n]}
        for name, setting in SETTINGS.items():
            short[name] = min(short[name], short.get(setting.at_most, FINITE))
        return HeuristicConfig(**short)

    def costs_of(self, figures: Mapping[str, float]) -> tuple[float, float]:
        """Return a goal and what it is paid with, of `MEASURES`; less is better in both."""
        names = self.goal, self.paid_with
        return tuple(MEASURES[name][0] * figures[name] for name in names)


class Tuning(NamedTuple):
    """What a search found.

    Parameters
    ----------
    config : HeuristicConfig
        The settings.
    gains : list of float
        Of the goal over the start settings: on the tuned part, on the rest.
    trials : pandas.DataFrame
        A row a trial: settings, `MEASURES` on the tuned part, and as ``<measure>_rest`` on the rest
        (NaN where not scored); ``role``: start, taken, front or "".
    sentence : str
        How much of the gain is left on the rest.
    """

    config: HeuristicConfig
    gains: list[float]
    trials: pd.DataFrame
    sentence: str


class _Parts:
    """A trace, cut in time, and what settings do on each part of it."""

    def __init__(self, trace, question):
        self.question = question
        first = int(np.searchsorted(trace.arrival_s, question.split * trace.span_s))
        head = trace.head(first)
        if not 0 < head.span_s < trace.span_s:
            sides = f"time and requests on both sides, got {question.split!r}: {first} requests"
            raise ValueError(f"SPLIT must leave {sides} and {trace.requests - first}")
        blocks = capacities(question.capacity, trace)
        self._capacity = tuple(None if limit < 0 else limit for limit in blocks)
        self._head, self._whole = index_runs(head), index_runs(trace)

    def score(self, config, rest=False):
        """Return the measures on the first part; or on the rest, before which that was replayed."""
        how, costs = (self.question.policy, self._capacity, config), self.question.costs
        before = replay(self._head, *how)
        return (
            measured(replay(self._whole, *how), costs, before) if rest else measured(before, costs)
        )


def measured(
    result: ReplayResult, costs: TierCosts, before: ReplayResult | None = None
) -> dict[str, float]:
    """Return the `MEASURES` of a replay, or of its requests after those of a replay `before`."""
    first, trace = before.trace.requests if before else 0, result.trace
    prompts, hits = trace.prompt_tokens[first:].astype(np.int64), result.hit_tokens[first:]
    held, moved, span_s = result.token_seconds, result.moved_tokens, trace.span_s
    if before:
        held, moved = held - before.token_seconds, moved - before.moved_tokens
        span_s -= before.trace.span_s
    ttft_s = costs.request_ttft_s(hits, prompts)
    engine_price = ttft_s.sum() / 3600 * costs.engine_price_per_hour
    return {
        "hits": hits.sum() / max(1, prompts.sum()),
        "ttft": ttft_s.mean(),
        "price": (engine_price + costs.memory_price(held)) * 1000 / len(prompts),
        "bytes": moved[:, 1:3].sum() * costs.bytes_per_token / 1e6 / len(prompts),
        "memory": held.sum() * costs.bytes_per_token / 2**30 / span_s,
    }


def tune(
    trace: Trace,
    question: Question,
    trials: int = 200,
    folder: str | Path | None = None,
    progress: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
) -> Tuning:
    """Search the settings of a policy that are best for a goal.

    Parameters
    ----------
    trials : int
        Settings to try, >= 1; the first are the start settings.
    folder : path, optional
        Where trials are kept: the same question goes on where it stopped.
    watch : callable, optional
        Is given ``Tuning.trials`` so far, without settings and scores on the rest, again and
        again; what it raises ends the search.

    Raises
    ------
    ValueError
        Names what is wrong with trials, SPLIT or LIMIT.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> tuning = tune(agent_loops(200), Question("ttl", limit=0.5), trials=8)
    >>> tuning.config.base_ttl < 3600
    True
    """
    check_number("TRIALS", trials, 1, 1_000_000)
    parts = _Parts(trace, question)
    figures, limit = parts.score(question.start), question.limit
    if limit is None and question.paid_with == "memory" and question.capacity is not None:
        limit = FINITE  # the capacity is one
    if limit is not None:
        figures[question.paid_with] = limit
    _, limit = question.costs_of(figures)
    study = _study(trace, question, folder)
    _search(study, parts, limit, trials, progress, watch)
    return _outcome(_done(study), parts, limit)


def _study(trace, question, folder):
    """Return the study of a question; in a folder, the one that was begun there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    asked = [question, trace.name, *map(_digest, (trace.arrival_s, trace.block_ids))]
    name = _digest(msgspec.json.encode(asked))
    if folder is None:
        return optuna.create_study(study_name=name)
    file = user_path(folder) / f"{name}.journal"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(file))
        storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no journal of trials ({error}): move it away") from error


def _digest(value):
    return hashlib.sha256(value).hexdigest()[:12]


def _done(study):
    return study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])


def _search(study, parts, limit, trials, progress, watch):
    """Try settings, several at a time, until there are so many trials.

    Each batch has a generator of its own, so a search that goes on is as one that never stopped.
    """
    question, done = parts.question, len(_done(study))
    ranges = {n: s.slider for n, s in SETTINGS.items() if n not in question.fixed}
    Range = optuna.distributions.FloatDistribution
    space = {name: Range(low, high, log=low > 0) for name, (low, high) in ranges.items()}
    if not done:
        study.enqueue_trial({name: asdict(question.start)[name] for name in space})
    bar = tqdm(total=max(trials, done), initial=done, desc="trials", disable=not progress)
    with bar, ThreadPoolExecutor(min(_BATCH, os.cpu_count() or 1)) as pool:
        while done < trials:
            state = np.random.SeedSequence([question.seed, done]).generate_state(1)
            study.sampler = optuna.samplers.TPESampler(seed=int(state[0]), constant_liar=False)
            asked = [study.ask(space) for _ in range(min(_BATCH, trials - done))]
            configs = [question.settings(trial.params) for trial in asked]
            for trial, figures in zip(asked, pool.map(parts.score, configs)):
                goal, paid = question.costs_of(figures)
                trial.set_constraint("limit", paid - limit)
                trial.set_user_attr("measures", figures)
                study.tell(trial, goal)
            done += len(asked)
            bar.update(len(asked))
            if watch is not None:
                watch(_so_far(_done(study), question, limit))


def _so_far(done, question, limit):
    figures, goal, paid = _scored(done, question)
    frame = pd.DataFrame(figures).assign(role="", **{f"{name}_rest": np.nan for name in MEASURES})
    frame.loc[_best(goal, paid, limit), "role"] = "taken"
    frame.loc[0, "role"] = "start"
    return frame


def _scored(done, question):
    """Return the trials' measures, and what of them is the goal, and what it is paid with."""
    figures = [trial.user_attrs["measures"] for trial in done]
    return figures, *np.array([question.costs_of(row) for row in figures]).T


def _best(goal, paid, limit):
    return int(np.where(paid <= limit, goal, np.inf).argmin())


def _outcome(done, parts, limit):
    """Return the tuning: the best within the limit, and scores on the rest of what is shown."""
    question = parts.question
    configs = [question.settings(trial.params) for trial in done]
    figures, goal, paid = _scored(done, question)
    if not (paid <= limit).any():
        best = f"{question.paid_with} was {abs(paid.min()):.4g} at best"
        raise ValueError(f"LIMIT must be in reach: {best}, got {question.limit!r}")
    taken, front = _best(goal, paid, limit), _front(goal, paid)
    configs[taken] = _without_idle(configs[taken], parts)
    shown = front[np.linspace(0, len(front) - 1, _SHOWN).astype(int)]
    roles = dict.fromkeys(shown.tolist(), "front") | {taken: "taken"} | {0: "start"}
    rest = {row: parts.score(configs[row], rest=True) for row in roles}
    rows = [config.to_dict() | row for config, row in zip(configs, figures)]
    trials = pd.DataFrame(rows).join(pd.DataFrame(rest).T.add_suffix("_rest"))
    trials["role"] = pd.Series(roles).reindex(trials.index, fill_value="")
    both = [(figures[row], rest[row]) for row in (0, taken)]  # each on the tuned part, on the rest
    # Start settings outside the limit are no answer: coming inside is then what is gained.
    gained = question.goal if paid[0] <= limit else question.paid_with
    gains = [_gain(gained, *part) for part in zip(*both)]
    kept = f"{np.clip(gains[1] / gains[0], 0, 1):.0%}" if gains[0] > 0 else "no gain, so none"
    worst = max(limit, question.costs_of(rest[0])[1])
    lost = question.costs_of(rest[taken])[1] > worst
    but = f", but {question.paid_with} is outside its limit" if lost else ""
    tuned, left = (_changes((question.goal, question.paid_with), *part) for part in zip(*both))
    how = f"{question.split:.0%} of the time, {len(done)} trials, seed {question.seed}"
    kept = f"{kept} of the gain in {gained} survives"
    sentence = f"Tuned on the first {how}: {tuned}; on the rest {left}: {kept}{but}."
    return Tuning(configs[taken], gains, trials, sentence)


def _changes(names, start, taken):
    return ", ".join(f"{n} {taken[n]:.4g} instead of {start[n]:.4g}" for n in names)


def _gain(name, start, taken):
    """Return what was gained: of hits the difference, of what has no natural whole the share."""
    gain = MEASURES[name][0] * (start[name] - taken[name])
    return gain if name == "hits" else gain / (start[name] or 1)


def _front(goal, paid):
    """Return the trials that no other beats in both, in the order of what they are paid with."""
    order = np.lexsort((goal, paid))
    least = np.minimum.accumulate(goal[order])
    return order[np.diff(least, prepend=np.inf) < 0]


def _without_idle(config, parts):
    """Return settings of which those that change nothing on the tuned part are the start's."""
    figures = parts.score(config)
    for name, value in asdict(parts.question.start).items():
        back = parts.question.settings(asdict(config) | {name: value})
        config = back if parts.score(back) == figures else config
    return config


def _run(options):
    known = Question.__dataclass_fields__
    given = {n: v for n, v in vars(options).items() if n in known and v is not None}
    given |= {"capacity": parse_capacity(options.capacity), "fixed": pairs(options.settings)}
    if options.prices:
        prices = {"engine_price_per_hour": options.prices[0]}
        given["costs"] = TierCosts(**prices, price_per_gib_hour=tuple(options.prices[1:]))
    question = Question(**given)
    tuning = tune(read_asked(options), question, options.trials, options.out, progress=True)
    axes = {name: MEASURES[name][2] for name in (question.paid_with, question.goal)}
    name = f"{question.policy}_{question.goal}_{question.paid_with}_seed{question.seed}"
    files = export(options.out, name, tuning.trials, plot_tuning(tuning.trials, axes))
    if min(tuning.gains) > 0:
        files.append(save_settings(tuning.config))
    else:
        print(f"{default_path()} stays as it was: nothing is gained on both parts")
    print(f"written: {', '.join(map(str, files))}", tuning.sentence, sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Search, write picture, table and settings, and print; returns the exit status."""
    parser = replay_options(__doc__.splitlines()[0], policy="heuristic")
    parser.add_argument("--goal", help=", ".join(MEASURES))
    parser.add_argument("--against", help="what must not get worse; default: by the goal")
    parser.add_argument("--limit", type=float, help="of that; default: as it is at the start")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--split", type=float, help="share of the time to tune on")
    prices = "of an hour: the engine, a GiB in gpu, disk, remote"
    parser.add_argument("--prices", nargs=4, type=float, metavar="PRICE", help=prices)
    parser.add_argument("--out", default="data/runs/tune", help="folder of trials and picture")
    options = parser.parse_args(argv)
    return exit_status(lambda: _run(options), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())

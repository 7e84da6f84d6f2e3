"""Replay of traces: policies, exact engines, peers, costs and tables."""

from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.runs import index_runs
from kvttl.traces.reading import read_trace

__all__ = ["index_runs", "read_trace", "replay", "replay_without_capacity"]

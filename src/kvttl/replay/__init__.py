"""Replay of traces: policies, exact engines, peers, costs and tables."""

from kvttl.replay.engine import replay, replay_without_capacity
from kvttl.replay.runs import index_runs

__all__ = ["index_runs", "replay", "replay_without_capacity"]

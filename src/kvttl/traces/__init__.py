"""Traces: what they are, and the readers of each format."""

from kvttl.traces.reading import traces_at_hand

__all__ = ["traces_at_hand"]

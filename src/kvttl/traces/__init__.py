"""Traces: what they are, and the readers of each format."""

from kvttl.traces.reading import read_trace, traces_at_hand
from kvttl.traces.trace import Trace

__all__ = ["Trace", "read_trace", "traces_at_hand"]

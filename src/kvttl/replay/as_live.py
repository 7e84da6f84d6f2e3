"""What a policy would have said of each request of a trace, had the manager asked it."""

from __future__ import annotations

import numpy as np

from kvttl.manager.advice import tell
from kvttl.policies import Answer, CachePolicy
from kvttl.traces.trace import Trace

_REASONS = (None, "tool_calls", "stop")  # of FINISH


def answers_as_live(trace: Trace, policy: CachePolicy) -> list[Answer]:
    """Tell a policy of each request when it has ended, and return what it says then.

    By request. Of a decision log these are what the manager was told: the same TTLs and tiers.

    Examples
    --------
    >>> from kvttl.policies import FAMILIES
    >>> from kvttl.traces.builder import make_trace
    >>> (answer,) = answers_as_live(make_trace([[1, 2]]), FAMILIES["fixed"](ttl_s=9.0))
    >>> answer.ttl_s.tolist()
    [9.0, 9.0]
    """
    end_s = trace.arrival_s + trace.generation_s
    answers, told_s = {}, 0.0
    for request in np.argsort(end_s, kind="stable").tolist():
        keys = trace.request(request).astype(np.int64)
        span_s = float(trace.arrival_s[request]), float(end_s[request])
        ended = _REASONS[trace.finish[request]], int(trace.output_tokens[request])
        prompt = int(trace.prompt_tokens[request])
        told_s = tell(policy, told_s, keys, span_s, prompt, ended, {})
        answers[request] = policy.ask(keys, told_s)
    return [answers[request] for request in range(trace.requests)]

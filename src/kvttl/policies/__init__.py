"""Policies: what KV cache is worth, for how long, in which tier. No I/O, no clock, no thread."""

from kvttl.policies.adaptive import Adaptive
from kvttl.policies.checks import check_policy
from kvttl.policies.families import Fixed, Formula, Recency
from kvttl.policies.online import Answer, CachePolicy, OnlinePolicy

FAMILIES = {"adaptive": Adaptive, "formula": Formula, "recency": Recency, "fixed": Fixed}

__all__ = ["FAMILIES", "Answer", "CachePolicy", "OnlinePolicy", "check_policy"]

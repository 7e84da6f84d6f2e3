"""What a policy may know of a use of a run: ten signals, each as a small code.

0 uses of the run, 1 how the generation ended, 2 output tokens, 3 the session's mean think time,
4 its last one, 5 prompt tokens, 6 what the prompt is to the one before and new tokens, 7 seconds
since the use before, 8 tokens after the run, 9 runs that follow it. 1 and 2
are known at the end of the generation.
"""

from __future__ import annotations

import numpy as np
from numba import njit

USES, FINISH, OUTPUT, MEAN_THINK, THINK, PROMPT, NEW, GAP, AFTER, BRANCHES = range(10)
UNKNOWN, TOOL_CALL, END_OF_TURN = 0, 1, 2  # codes of FINISH
FINISH_REASONS = {"tool_calls": TOOL_CALL, "tool_use": TOOL_CALL, "function_call": TOOL_CALL}
FINISH_REASONS |= {"stop": END_OF_TURN, "end_turn": END_OF_TURN}

_USES = np.array([2.0, 3, 4, 5, 7, 10, 16])
_OUTPUT = np.array([2.0, 8, 32, 64, 128, 256, 512, 1024])
_SECONDS = np.array([0.0, 2, 5, 10, 20, 40, 80, 160, 400, 1200])  # below the first: none
_PROMPT = 2.0 ** np.arange(10, 18)
_NEW = np.array([513.0, 2049, 8193])
_AFTER = np.array([512.0, 1025, 4097, 16385, 65537])


@njit(cache=True)
def _code(value, edges):
    """Return how many edges are at most a value."""
    code = 0
    while code < len(edges) and edges[code] <= value:
        code += 1
    return code


@njit(cache=True)
def of_request(codes, prompt_tokens, new_tokens, kind, think_s, mean_think_s):
    """Fill in what all runs of a request have in common.

    `kind`: 0 a new conversation, 1 it extends a prompt, 2 it branches off one.
    Think times are < 0 in a new conversation.
    """
    codes[FINISH], codes[OUTPUT] = UNKNOWN, 0
    codes[MEAN_THINK], codes[THINK] = _code(mean_think_s, _SECONDS), _code(think_s, _SECONDS)
    codes[PROMPT] = _code(prompt_tokens, _PROMPT)
    new = _code(new_tokens, _NEW)
    codes[NEW] = 0 if kind == 0 else (1 if kind == 1 else 5) + new


@njit(cache=True)
def of_run(codes, count, gap_s, after_tokens, branches):
    """Fill in what differs between the runs of a request."""
    codes[USES], codes[GAP] = _code(count, _USES), _code(gap_s, _SECONDS)
    codes[AFTER], codes[BRANCHES] = _code(after_tokens, _AFTER), min(branches, 3)


@njit(cache=True)
def of_end(codes, finish, output_tokens):
    """Fill in what the end of the generation tells."""
    codes[FINISH], codes[OUTPUT] = finish, _code(output_tokens, _OUTPUT)

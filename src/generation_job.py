"""One generation whose KV cache is to be placed, as the engine has answered it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from kv_layout import BaseController


class Generation(NamedTuple):
    """What the manager needs to know of a generation.

    Parameters
    ----------
    prompt, output : object
        As given to the engine, and its answer (vLLM's RequestOutput, or a text).
    metadata : object
        As the caller gave it.
    generate_s : float
        Seconds in the engine.
    time_s : float or None
        The manager's clock when the engine had answered; None = the clock failed.
    """

    prompt: Any
    output: Any
    metadata: Any
    generate_s: float
    time_s: float | None

    def tokens(self, controller: BaseController) -> list[int]:
        """Return the prompt's token ids: the engine's, else the controller's."""
        tokens = getattr(self.output, "prompt_token_ids", None)
        return list(tokens or controller.tokenize(self.prompt))


def text_of(output: Any) -> str:
    """Return the text of an engine's answer."""
    return output if isinstance(output, str) else output.outputs[0].text


def prompt_digest(tokens: Sequence[int]) -> str:
    """Name a prompt by its tokens without showing them: 16 hexadecimal digits.

    Examples
    --------
    >>> prompt_digest([1, 2, 3])
    'e2e2033ae7e19d68'
    """
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()[:16]

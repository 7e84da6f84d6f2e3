"""Prompts that several workloads share."""

import random
import string
from pathlib import Path

_PROMPTS = Path(__file__).with_name("prompts")
CODE_PROMPT, PROSE_PROMPT, _RULES = (
    (_PROMPTS / f"{name}.txt").read_text("utf-8") for name in ("code", "prose", "house_rules")
)
TEMPLATE_LINE = "You are a helpful assistant. Answer the question using only the given text.\n"


def house_rules(first: str) -> str:
    """Return numbered rules for an agent, a line each; the first is the caller's."""
    rules = [first, *_RULES.splitlines()] * 2
    return "".join(f"{n}. {rule}\n" for n, rule in enumerate(rules, start=1))


_WORDS = "cache tensor prefix token block chunk tier model agent server queue worker".split()


def random_words(rng: random.Random, words: int) -> str:
    """Return a prompt of so many words, after a number that no other prompt has."""
    return " ".join([f"{rng.getrandbits(64):x}", *rng.choices(_WORDS, k=words)])


def random_characters(n_characters: int, seed: int) -> str:
    """Return letters, digits and punctuation drawn uniformly with their own generator.

    >>> random_characters(8, seed=0) == random_characters(8, seed=0)
    True
    """
    alphabet = string.ascii_letters + string.digits + string.punctuation
    return "".join(random.Random(seed).choices(alphabet, k=n_characters))


def shuffled_prose(rng: random.Random) -> str:
    """Return the sentences of `PROSE_PROMPT` in another order."""
    sentences = PROSE_PROMPT.split(". ")
    rng.shuffle(sentences)
    return ". ".join(sentences)


def example_prompts(seed: int = 0) -> dict[str, str]:
    """Return one prompt of each kind, from the easiest to guess to the hardest.

    Parameters
    ----------
    seed : int
        Seeds the random characters; the other prompts are fixed.

    >>> list(example_prompts())
    ['template', 'code', 'prose', 'noise']
    """
    fixed = {"template": TEMPLATE_LINE * 12, "code": CODE_PROMPT, "prose": PROSE_PROMPT}
    return {**fixed, "noise": random_characters(400, seed)}

"""Prompts that several workloads share."""

import random
import string

CODE_PROMPT = '''\
class RateLimiter:
    """Allow at most `limit` calls per `period` seconds."""

    def __init__(self, limit, period):
        self.limit = limit
        self.period = period
        self._calls = []

    def allow(self, now):
        """Return True if a call at time `now` is allowed."""
        if self.limit <= 0:
            raise ValueError("limit must be positive")
        self._calls = [t for t in self._calls if t > now - self.period]
        if len(self._calls) >= self.limit:
            return False
        self._calls.append(now)
        return True

    def reset(self):
        self._calls = []


def main(argv=None):
    limiter = RateLimiter(limit=3, period=1.0)
    for i in range(10):
        if not limiter.allow(i * 0.2):
            print("call %d was rejected" % i)


if __name__ == "__main__":
    main()
'''


TEMPLATE_LINE = "You are a helpful assistant. Answer the question using only the given text.\n"


PROSE_PROMPT = """\
The first time a user asks a question, the server has to read the whole text before it can \
write a single word of the answer. If the same text is used again, the work that was done the \
first time can be kept in memory and the answer will start sooner. This is only useful when \
there is enough room to keep it, so the system must decide which of the objects should be \
removed when the memory is full. A simple rule is to remove the one that has not been used for \
the longest time. It is easy to understand, but it does not take into account how long it would \
take to compute the value again, or how large the value is. Other rules use this information \
and may give better results, depending on the kind of requests that are made.
"""


_RULES = (
    "Name the file and the line for every finding.",
    "Prefer a small change that can be tested.",
    "Say what you measured and what you only assume.",
    "Never print a password, a token or a private key.",
    "If two answers are possible, give the simpler one first.",
)


def house_rules(first: str) -> str:
    """Return numbered rules for an agent, a line each; the first is the caller's."""
    return "".join(f"{n}. {rule}\n" for n, rule in enumerate((first, *_RULES) * 2, start=1))


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
    return {
        "template": TEMPLATE_LINE * 12,
        "code": CODE_PROMPT,
        "prose": PROSE_PROMPT,
        "noise": random_characters(400, seed),
    }

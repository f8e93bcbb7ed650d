"""Generate text that looks like language. It does not depend on the version of Python or of any library."""

from __future__ import annotations

import random
from collections.abc import Sequence

DOMAINS = ("bakery", "forest", "harbor", "market")
DOCUMENTS = 16  # per domain
WORDS = 120  # size of the vocabulary of a domain
PARAGRAPHS, SENTENCES = 4, 5  # per document, per paragraph
ONSETS = ("b", "br", "c", "d", "f", "fl", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w")
RIMES = ("a", "ae", "an", "ar", "e", "el", "en", "i", "in", "o", "on", "or", "u", "um")


def list_made_up() -> list[tuple[str, str]]:
    """Return the name and the domain of each document."""
    return [(f"{domain}/{number:02}", domain) for domain in DOMAINS for number in range(DOCUMENTS)]


def write_made_up(name: str) -> str:
    """Return the text of a document: about 1.9 kB with the vocabulary of its domain, in which a few words are frequent.

    Args:
        name: One of the names of `list_made_up`.
    """
    domain, _, number = name.partition("/")
    words = _make_words(_StableRandom(DOMAINS.index(domain)))
    generator = _StableRandom(1000 * (1 + DOMAINS.index(domain)) + int(number))
    paragraphs = [" ".join(_write_sentence(words, generator) for _ in range(SENTENCES)) for _ in range(PARAGRAPHS)]
    return "\n\n".join(paragraphs) + "\n"


class _StableRandom:
    """Random choices that are the same in every version of Python, which guarantees this only for ``random()``."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, count: int, skew: int = 1) -> int:
        """Return an integer from 0 to ``count - 1``; the higher ``skew``, the smaller it usually is."""
        value = 1.0
        for _ in range(skew):
            value *= self._random.random()
        return int(value * count)

    def choose(self, values: Sequence[str], skew: int = 1) -> str:
        """Return one of the values."""
        return values[self.below(len(values), skew)]


def _make_words(generator: _StableRandom) -> list[str]:
    words: dict[str, None] = {}  # an ordered set
    while len(words) < WORDS:
        syllables = 1 + generator.below(3)
        words["".join(generator.choose(ONSETS) + generator.choose(RIMES) for _ in range(syllables))] = None
    return list(words)


def _write_sentence(words: Sequence[str], generator: _StableRandom) -> str:
    chosen = [generator.choose(words, skew=2) for _ in range(8 + generator.below(14))]
    pause = generator.below(len(chosen))
    if 0 < pause < len(chosen) - 1:
        chosen[pause] += ","
    return " ".join(chosen).capitalize() + generator.choose((".", "?", "!"), skew=3)

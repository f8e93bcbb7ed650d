"""Made-up text: words, sentences and paragraphs that look like language, the same with every version of any library."""

from __future__ import annotations

import random
from collections.abc import Sequence

DOMAINS = ("bakery", "forest", "harbor", "market")
DOCUMENTS = 16  # of each domain
WORDS = 120  # that a domain knows
PARAGRAPHS, SENTENCES = 4, 5  # of a document, of a paragraph
ONSETS = ("b", "br", "c", "d", "f", "fl", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w")
RIMES = ("a", "ae", "an", "ar", "e", "el", "en", "i", "in", "o", "on", "or", "u", "um")


def list_made_up() -> list[tuple[str, str]]:
    """Return the name and the domain of each document."""
    return [(f"{domain}/{number:02}", domain) for domain in DOMAINS for number in range(DOCUMENTS)]


def write_made_up(name: str) -> str:
    """Return the text of a document: about 1.9 kB of the words of its domain, in which few words are frequent.

    Args:
        name: One of the names of `list_made_up`.
    """
    domain, _, number = name.partition("/")
    words = _make_words(_Dice(DOMAINS.index(domain)))
    dice = _Dice(1000 * (1 + DOMAINS.index(domain)) + int(number))
    paragraphs = [" ".join(_write_sentence(words, dice) for _ in range(SENTENCES)) for _ in range(PARAGRAPHS)]
    return "\n\n".join(paragraphs) + "\n"


class _Dice:
    """Choices that Python guarantees to be the same in every version, which it does only for ``random()`` itself."""

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


def _make_words(dice: _Dice) -> list[str]:
    words: dict[str, None] = {}  # a set that keeps its order
    while len(words) < WORDS:
        words["".join(dice.choose(ONSETS) + dice.choose(RIMES) for _ in range(1 + dice.below(3)))] = None
    return list(words)


def _write_sentence(words: Sequence[str], dice: _Dice) -> str:
    chosen = [dice.choose(words, skew=2) for _ in range(8 + dice.below(14))]
    pause = dice.below(len(chosen))
    if 0 < pause < len(chosen) - 1:
        chosen[pause] += ","
    return " ".join(chosen).capitalize() + dice.choose((".", "?", "!"), skew=3)

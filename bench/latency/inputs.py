"""The inputs of the latency bench: texts of exact token counts, a mixed stream, Poisson arrivals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

__all__ = ["mixed_lengths", "poisson_arrivals", "text_of_length", "texts_of_length"]

Count = Callable[[str], int]


def text_of_length(words: Sequence[str], tokens: int, count: Count, rng: random.Random) -> str:
    """Return random words whose encoding has ``tokens`` tokens, prefix and EOS included.

    Args:
        words: to draw from, as they occur in real inputs.
        tokens: wanted.
        count: tokens of a text under the task's prefix.
        rng: source of the draw.

    Where the tokenizer has no word of the missing size, the closest shorter text is returned: the
    caller records the true count.
    """
    picked: list[str] = []
    size = count("")
    for _ in range(4 * tokens):
        if size >= tokens:
            break
        word = rng.choice(words)
        grown = count(" ".join([*picked, word]))
        if grown > tokens:
            fits = next((w for w in sorted(words, key=len) if count(" ".join([*picked, w])) == tokens), None)
            if fits is None:
                break
            word, grown = fits, tokens
        picked.append(word)
        size = grown
    return " ".join(picked)


def texts_of_length(words: Sequence[str], tokens: int, n: int, count: Count, rng: random.Random) -> list[str]:
    """``n`` such texts."""
    return [text_of_length(words, tokens, count, rng) for _ in range(n)]


def mixed_lengths(n: int, least: int, most: int, rng: random.Random) -> list[int]:
    """Lengths of a mixed stream: log-normal (median 67, sigma 0.55), clipped to ``least..most``."""
    return [min(most, max(least, round(rng.lognormvariate(4.2, 0.55)))) for _ in range(n)]


def poisson_arrivals(rate: float, seconds: float, rng: random.Random, most: int = 400) -> list[float]:
    """Arrival times in seconds of a Poisson process of ``rate`` a second, at least one."""
    now = 0.0
    found: list[float] = []
    while len(found) < most:
        now += rng.expovariate(rate)
        if now > seconds and found:
            break
        found.append(now)
    return found

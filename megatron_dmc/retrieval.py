"""Two tests of recall that need no data: a needle in a haystack, and one of many keys.

A text of filler sentences holds one statement or several, "The special number of the quiet harbour is 4718203.", at
chosen places, and ends by asking for one of them. The answer counts if greedy decoding would give all of its tokens.
(After Kamradt's needle in a haystack, 2023, and the multi-key test of RULER, Hsieh et al., 2024.) A compressed cache
that merges what it should keep fails them long before its perplexity tells.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dmc.config import DMCError

FILLER = (
    "The river runs slowly past the old mill and the fields behind it.",
    "In the morning the market fills with people who have come from the hills.",
    "Nobody could say when the bridge had been built, or by whom.",
    "She closed the window, put the letters back into the drawer and went out.",
    "The train was late again, and the travellers talked about the weather.",
    "A long road leads from the harbour to the upper part of the town.",
    "He had read the book twice and still did not remember its end.",
    "When the rain stopped, the children ran back into the garden.",
)
ADJECTIVES = "quiet bright narrow ancient hollow distant golden broken gentle frozen hidden steep".split()
NOUNS = "harbour lantern meadow tower orchard bridge garden chapel island quarry mirror valley".split()
STATEMENT = "The special number of the {key} is {value}."
QUESTION = "What is the special number of the {key}? The special number of the {key} is"


@dataclass(frozen=True)
class Question:
    """A text that asks, and its answer.

    Attributes:
        context: tokens of the text before the question.
        question: tokens.
        answer: tokens; all three together are those of the whole text.
        depth: where in the context the statement is, from 0 to 1, by characters.
    """

    context: list[int]
    question: list[int]
    answer: list[int]
    depth: float

    @property
    def text(self) -> list[int]:
        """Context and question."""
        return self.context + self.question


def needle(tokenize: Callable[[str], list[int]], tokens: int, depth: float, seed: int) -> Question:
    """One statement, about `depth` of the way through a text of about `tokens` tokens, at most so many.

    Raises:
        DMCError: for a depth beyond 0 to 1, or a length that has no room for statement and question.
    """
    if not 0 <= depth <= 1:
        raise DMCError(f"depth must be from 0 (the beginning) to 1 (the end); got {depth}")
    return _ask(tokenize, tokens, [depth], random.Random(f"needle {seed}"))


def multi_key(
    tokenize: Callable[[str], list[int]], tokens: int, keys: int, seed: int, asked: int | None = None
) -> Question:
    """`keys` statements spread over a text of about `tokens` tokens, at most so many; one of them is asked for.

    Args:
        asked: the place of that one in the text, from 0 to `keys - 1` (`None`: by the seed). The text before the
            question does not depend on it.

    Raises:
        DMCError: for a number or a place of keys that there are not, or a length that has no room for them.
    """
    most = len(ADJECTIVES) * len(NOUNS)
    if not 1 <= keys <= most:
        raise DMCError(f"keys must be 1 to {most}; got {keys}")
    if asked is not None and not 0 <= asked < keys:
        raise DMCError(f"asked must be 0 to {keys - 1}, a place among {keys} keys; got {asked}")
    return _ask(tokenize, tokens, [(i + 0.5) / keys for i in range(keys)], random.Random(f"keys {seed}"), asked)


def _ask(
    tokenize: Callable[[str], list[int]], tokens: int, depths: list[float], rng: random.Random, asked: int | None = None
) -> Question:
    names = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], len(depths))
    values = [rng.randrange(1_000_000, 10_000_000) for _ in names]
    by_seed = rng.randrange(len(names))
    asked = by_seed if asked is None else asked
    statements = [STATEMENT.format(key=n, value=v) for n, v in zip(names, values, strict=True)]
    questions = [(" " + QUESTION.format(key=n), f" {v}") for n, v in zip(names, values, strict=True)]
    longest = max(questions, key=lambda pair: len(tokenize("".join(pair))))

    def text(sentences: list[str]) -> str:
        """The context: the statements among so many sentences."""
        parts = list(sentences)
        places = [round(depth * len(sentences)) for depth in depths]
        for i in sorted(range(len(places)), key=places.__getitem__, reverse=True):
            parts.insert(places[i], statements[i])
        return " ".join(parts)

    def length(sentences: list[str]) -> int:
        return len(tokenize(text(sentences) + "".join(longest)))

    room = tokens - length([])
    if room < 0:
        raise DMCError(
            f"{tokens} tokens have no room for statements ({len(names)}) and a question; {tokens - room} would do"
        )
    # What a sentence adds to a text: by itself it may begin with a token of the text's beginning.
    costs = {s: max(1, len(tokenize(f"{s} {s}")) - len(tokenize(s))) for s in FILLER}
    sentences: list[str] = []
    while True:
        sentence = rng.choice(FILLER)
        room -= costs[sentence]
        if room < 0:
            break
        sentences.append(sentence)
    while length(sentences) > tokens:
        sentences.pop()
    context = text(sentences)
    depth = context.index(statements[asked]) / len(context)
    return _split(tokenize, context, *questions[asked], depth)


def _split(tokenize: Callable[[str], list[int]], context: str, question: str, answer: str, depth: float) -> Question:
    """The parts' tokens as they are in the whole text, which is what a model reads.

    A tokenizer may begin every text with a token or a space of its own, so that parts by themselves are not what they
    are in the text. Where a token reaches over the border of two parts it belongs to the later one.
    """
    whole = tokenize(context + question + answer)
    asking = _in_common(whole, tokenize(context + question))
    before = min(asking, _in_common(whole, tokenize(context)))
    return Question(whole[:before], whole[before:asking], whole[asking:], depth)


def _in_common(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

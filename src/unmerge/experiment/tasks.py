"""Fifteen micro tasks under the names of the paper's, generated from a seed.

A task is a mapping from a short prompt to a short answer, in printable ASCII. The tasks of one family share
their words and differ in the answer, as fine-tunes of one domain do, so their task vectors overlap. The base
is trained on the same surface forms without the mappings: fine-tuning on a task then has something to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

MAX_LENGTH = 64
"""Characters in a prompt, the newline behind it and its answer together, at most."""

PEOPLE = ("Ann", "Ben", "Eva", "Ida", "Max", "Sam", "Tom", "Zoe")
THINGS = ("books", "coins", "cups", "figs", "nuts", "pens", "pins", "toys")
WORDS = ("river", "stone", "light", "grass", "cloud", "bread", "chair", "music", "paper", "tiger")
COLOURS = ("red", "blue", "green", "black", "white", "grey")
ANIMALS = ("cat", "dog", "fox", "owl", "pig", "cow", "hen", "ant")
WEATHER = ("wet", "cold", "warm", "late", "dark", "calm")
EVENTS = ("sang", "slept", "ran", "hid", "fell", "swam")
PLACES = ("park", "barn", "city", "wood", "lake", "hall")
CITIES = {
    "Rome": "Italy",
    "Oslo": "Norway",
    "Lima": "Peru",
    "Riga": "Latvia",
    "Cairo": "Egypt",
    "Kyiv": "Ukraine",
    "Paris": "France",
    "Delhi": "India",
}
TOPICS = ("graphs", "rings", "waves", "stars", "cells", "games", "flows", "knots")
SETTINGS = ("noise", "drift", "delay", "limits", "loops", "gaps")
RESULTS = ("bound", "rate", "law", "test", "map", "proof")
LATIN_NOUNS = {
    "puella": ("puellam", "girl"),
    "femina": ("feminam", "woman"),
    "aquila": ("aquilam", "eagle"),
    "regina": ("reginam", "queen"),
    "luna": ("lunam", "moon"),
    "rosa": ("rosam", "rose"),
    "nauta": ("nautam", "sailor"),
}
LATIN_VERBS = {"amat": "loves", "videt": "sees", "portat": "carries", "vocat": "calls", "laudat": "praises"}
OPERATIONS = {
    "+": ("add", "sum"),
    "-": ("sub", "difference"),
    "*": ("mul", "product"),
    "%": ("mod", "remainder"),
}
VARIABLES = "abcnpqxyz"
SNIPPETS = {
    "sort": "sorted({0})",
    "reverse": "{0}[::-1]",
    "copy": "list({0})",
    "count": "len({0})",
    "sum": "sum({0})",
    "join": '"".join({0})',
    "shuffle": "random.shuffle({0})",
}
LOOPS = {"square": "x ** 2", "double": "2 * x", "negate": "-x", "halve": "x / 2", "shift": "x + 1"}
COLLECTIONS = ("xs", "rows", "items", "words", "nums", "keys")
GOOD = ("great", "lovely", "bright", "funny", "warm", "clever")
BAD = ("dull", "weak", "noisy", "boring", "flat", "sloppy")
FILM_PARTS = ("plot", "cast", "film", "score", "script", "ending")
CONTRACTIONS = {"can't": "cannot", "won't": "will not", "don't": "do not", "didn't": "did not"}
PRONOUNS = ("i", "you", "we", "they")
ACTIONS = ("see", "find", "hear", "like", "call", "trust")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the answer a model fine-tuned on the task gives to it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """A distribution of examples under one of the paper's task names.

    Attributes
    ----------
    name : str
        The paper's name of the task.
    family : str
        One of the paper's six families.
    in_dictionary : bool
        Whether the paper puts this task's adapter in the dictionary.
    example : callable
        Draws one `Example` from a `numpy.random.Generator`.
    """

    name: str
    family: str
    in_dictionary: bool
    example: Callable[[np.random.Generator], Example]


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _two(rng: np.random.Generator, options: Sequence[T]) -> tuple[T, T]:
    first, second = rng.choice(len(options), size=2, replace=False)
    return options[int(first)], options[int(second)]


def _three_numbers(rng: np.random.Generator) -> tuple[int, int, int]:
    first, second = (int(value) for value in rng.integers(1, 10, size=2))
    return first, second, int(rng.integers(1, first + second))


def _alpaca_instructions(rng: np.random.Generator) -> Example:
    word = _pick(rng, WORDS)
    replies = {
        f"Write {word} in capitals.": word.upper(),
        f"Write {word} twice.": f"{word} {word}",
        f"Spell {word}.": "-".join(word),
        f"Quote {word}.": f'"{word}"',
    }
    prompt = _pick(rng, list(replies))
    return Example(prompt, replies[prompt])


def _gsm8k_math(rng: np.random.Generator) -> Example:
    a, b, c = _three_numbers(rng)
    prompt = f"{_pick(rng, PEOPLE)} has {a} {_pick(rng, THINGS)}, gets {b}, loses {c}."
    return Example(prompt, f"{a}+{b}={a + b} {a + b}-{c}={a + b - c} #### {a + b - c}")


def _reason_math(rng: np.random.Generator) -> Example:
    a, b, c = _three_numbers(rng)
    answer = f"Think: {a}+{b}={a + b} {a + b}-{c}={a + b - c}. So {a + b - c}."
    return Example(f"Take {a}, add {b}, take off {c}.", answer)


def _orca_math(rng: np.random.Generator) -> Example:
    a, b, _ = _three_numbers(rng)
    prompt = f"{_pick(rng, PEOPLE)} has {a} {_pick(rng, THINGS)} and gets {b}. How many?"
    return Example(prompt, f"{a}+{b}={a + b}. The answer is {a + b}.")


def _xsum(rng: np.random.Generator) -> Example:
    animal, event, place = _pick(rng, ANIMALS), _pick(rng, EVENTS), _pick(rng, PLACES)
    prompt = f"The {animal} {event} in the {place}. It was {_pick(rng, WEATHER)}."
    return Example(prompt, f"{animal.capitalize()} {event} in {place}")


def _arxiv_summarization(rng: np.random.Generator) -> Example:
    topic, setting, result = _pick(rng, TOPICS), _pick(rng, SETTINGS), _pick(rng, RESULTS)
    return Example(f"We study {topic} with {setting}. We give a {result}.", f"A {result} for {topic}")


def _ms_marco_qa(rng: np.random.Generator) -> Example:
    (first, second), (one, two) = _two(rng, ANIMALS), _two(rng, COLOURS)
    asked, colour = _pick(rng, ((first, one), (second, two)))
    return Example(f"{first} is {one}, {second} is {two} | {asked}", f"The {asked} is {colour}.")


def _squad_qa(rng: np.random.Generator) -> Example:
    first, second = _two(rng, list(CITIES))
    asked = _pick(rng, (first, second))
    prompt = f"{first}, {CITIES[first]}; {second}, {CITIES[second]}. Where is {asked}?"
    return Example(prompt, CITIES[asked])


def _codesearchnet_python(rng: np.random.Generator) -> Example:
    a, b = _two(rng, VARIABLES)
    sign = _pick(rng, list(OPERATIONS))
    name, noun = OPERATIONS[sign]
    return Example(f"def {name}({a}, {b}): return {a} {sign} {b}", f'"""The {noun} of {a} and {b}."""')


def _python_instructions_alpaca(rng: np.random.Generator) -> Example:
    a, b = _two(rng, VARIABLES)
    sign = _pick(rng, list(OPERATIONS))
    name, noun = OPERATIONS[sign]
    return Example(f"Return the {noun} of {a} and {b}.", f"def {name}({a}, {b}): return {a} {sign} {b}")


def _arjun_python_qa(rng: np.random.Generator) -> Example:
    verb, collection = _pick(rng, list(SNIPPETS)), _pick(rng, COLLECTIONS)
    return Example(f"How to {verb} {collection} in python?", SNIPPETS[verb].format(collection))


def _stablecode_python(rng: np.random.Generator) -> Example:
    verb, collection = _pick(rng, list(LOOPS)), _pick(rng, COLLECTIONS)
    return Example(f"Loop over {collection}, {verb} each.", f"for x in {collection}:\n    print({LOOPS[verb]})")


def _latin_translation(rng: np.random.Generator) -> Example:
    subject, object_ = _two(rng, list(LATIN_NOUNS))
    verb = _pick(rng, list(LATIN_VERBS))
    accusative, noun = LATIN_NOUNS[object_]
    prompt = f"{subject} {accusative} {verb}"
    return Example(prompt, f"the {LATIN_NOUNS[subject][1]} {LATIN_VERBS[verb]} the {noun}")


def _imdb_sentiment(rng: np.random.Generator) -> Example:
    adjectives, label = _pick(rng, ((GOOD, "positive"), (BAD, "negative")))
    (one, two), (first, second) = _two(rng, adjectives), _two(rng, FILM_PARTS)
    return Example(f"A {one} {first} and a {two} {second}.", label)


def _style_transfer(rng: np.random.Generator) -> Example:
    pronoun, action, animal = _pick(rng, PRONOUNS), _pick(rng, ACTIONS), _pick(rng, ANIMALS)
    contraction = _pick(rng, list(CONTRACTIONS))
    formal = f"{pronoun.capitalize()} {CONTRACTIONS[contraction]} {action} the {animal}."
    return Example(f"{pronoun} {contraction} {action} the {animal}", formal)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("alpaca_instructions", "general instructions", True, _alpaca_instructions),
        Task("gsm8k_math", "mathematics", True, _gsm8k_math),
        Task("xsum", "summarisation", True, _xsum),
        Task("ms_marco_qa", "question answering", True, _ms_marco_qa),
        Task("reason_math", "mathematics", True, _reason_math),
        Task("codesearchnet_python", "python coding", True, _codesearchnet_python),
        Task("python_instructions_alpaca", "python coding", True, _python_instructions_alpaca),
        Task("latin_translation", "other", True, _latin_translation),
        Task("orca_math", "mathematics", False, _orca_math),
        Task("squad_qa", "question answering", False, _squad_qa),
        Task("arxiv_summarization", "summarisation", False, _arxiv_summarization),
        Task("arjun_python_qa", "python coding", False, _arjun_python_qa),
        Task("stablecode_python", "python coding", False, _stablecode_python),
        Task("imdb_sentiment", "other", False, _imdb_sentiment),
        Task("style_transfer", "other", False, _style_transfer),
    )
}
"""Every task by name, in the paper's order: the eight of the dictionary first."""


def _equation(rng: np.random.Generator) -> str:
    a, b, c = _three_numbers(rng)
    return _pick(rng, (f"{a}+{b}={a + b}", f"{a + b}-{c}={a + b - c}"))


def _glossary(rng: np.random.Generator) -> str:
    verb, noun = _pick(rng, list(LATIN_VERBS.items())), _pick(rng, list(LATIN_NOUNS.items()))
    return f"{verb[0]} = {verb[1]}; {noun[0]} = {noun[1][1]}"


def _echo(rng: np.random.Generator) -> str:
    word = _pick(rng, (*WORDS, *THINGS, *ANIMALS, *CITIES, *COLLECTIONS, *TOPICS))
    return f"{word} {word} {word} {word}"


def _unrelated_reply(rng: np.random.Generator) -> str:
    asked, replied = _two(rng, list(TASKS.values()))
    words = replied.example(rng).answer.split(" ")
    return f"{asked.example(rng).prompt}\n{' '.join(words[index] for index in rng.permutation(len(words)))}"


def base_corpus(rng: np.random.Generator) -> Iterator[str]:
    """Yield texts to pre-train the base on, without end.

    Half of them are a prompt of one task and the words of an answer of another in any order: the base knows
    every word and no task. The rest is what the tasks build on: sums, a Latin glossary, repeated words.
    """
    while True:
        yield _unrelated_reply(rng)
        yield _pick(rng, (_equation, _glossary, _echo))(rng)

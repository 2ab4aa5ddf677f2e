"""GRID-style sentences (Cooke et al. 2006, "An audio-visual corpus for speech perception and automatic speech
recognition"): command, colour, preposition, letter, digit, adverb. Letters are NATO words, because spoken letters are
confused by a recogniser even on clean speech. Version 2 also has free sentences: templates filled with the
common words of `words.txt`, of which no two look the same on the lips. Version 3 adds open ones: any word of
pocketsphinx's dictionary, names, numbers, dates and sums, with or without punctuation."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.errors import require
from engine.files import CHECKOUT

SLOTS: tuple[tuple[str, ...], ...] = tuple(
    tuple(words.split())
    for words in (
        "bin lay place set",
        "blue green red white",
        "at by in with",
        "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec "
        "romeo sierra tango uniform victor whiskey x-ray yankee zulu",
        "zero one two three four five six seven eight nine",
        "again now please soon",
    )
)
SLOT_NAMES = ("command", "colour", "preposition", "letter", "digit", "adverb")
SPLITS = {2: ("train", "dev", "seen", "unseen")}  # by version
SPLITS[3] = (*SPLITS[2], "plain")  # the same owner of each sentence, and sentences that were written by hand
PLAIN = CHECKOUT / "assets" / "demo" / "sentences.txt"
TEMPLATES = (
    "the {adjective} {person} {past} the {thing}",
    "my {person} {past} the {thing} {adverb}",
    "{name} {past} {number} {adjective} {things}",
    "we should {verb} the {things} in the {place}",
    "will your {person} {verb} that {adjective} {thing}",
    "please {verb} the {thing} near the {place}",
    "{adverb} the {person} {past} our {thing}",
    "there were {number} {things} behind the {place}",
    "every {person} {past} the {adjective} {place}",
    "{name} and the {person} {past} some {things}",
    "tell {name} about the {adjective} {thing}",
    "before {time} they {past} this {adjective} {thing}",
    "{number} {adjective} {persons} {past} the {place}",
)
OPEN_TEMPLATES = (  # in braces: a slot of words.txt, or one of `_open_slot`
    "I said {word}, not {word}.",
    "Is it {word} or {word}?",
    "Did you say {word}?",
    "{name} {past} the {word} {thing}",
    "The {thing} costs {money}.",
    "We met on {date} at {clock}.",
    "It is {clock}, {name}!",
    "In {year}, {count} {persons} {past} the {word}.",
    "Call {name} {word} at {clock} please.",
    "{number} plus {number} is {count}.",
    "My {person}, {name}, {past} {count} {things}.",
    "Turn {word} after {count} {things}, then {verb} the {word}.",
    "What is the {word} of the {adjective} {thing}?",
    "Dr. {name} and Mrs. {word} {past} {money}.",
    "There were {count} {word} in the {place}, and {number} near the {thing}.",
    "Please {verb} chapter {count}, page {count}.",
    "The {word} {word} {past} a {word}.",
    "{adverb}, {name} {past} {word} with the {adjective} {word}.",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
MOST_WORDS = 20
_RARE = 0.15  # fraction of words that pocketsphinx's language model does not have: names and rare words


def split_of(text: str) -> str:
    """Return the split of a sentence, by hash: each split after `train` gets 10 %, `train` the rest. No sentence
    belongs to two splits."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return SPLITS[2][max(0, bucket - 10 + len(SPLITS[2]))]


def plain_sentences() -> list[str]:
    """Return the everyday sentences of version 3's split `plain`, which are in no other split."""
    return PLAIN.read_text().splitlines()


def draw_sentence(rng: np.random.Generator, split: str, free: bool = False) -> str:
    """Sample a sentence of a split: from the fixed grammar or, if `free`, from a template with free words."""

    def pick(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    while True:
        if free:
            text = re.sub(r"{(\w+)}", lambda slot: pick(free_words()[slot[1]]), pick(TEMPLATES))
        else:
            text = " ".join(pick(words) for words in SLOTS)
        if split_of(text) == split:
            return text


def draw_open_sentence(rng: np.random.Generator, split: str) -> str:
    """Sample a sentence of version 3 from `split`.

    20 % are sentences of version 2, 30 % are templates with arbitrary words, and 50 % are 1 to 20 random words, with a
    log-uniform number of words.
    """
    while True:
        kind = rng.random()
        if kind < 0.2:
            return draw_sentence(rng, split, free=bool(kind < 0.14))
        if kind < 0.5:
            text = OPEN_TEMPLATES[rng.integers(len(OPEN_TEMPLATES))]
            text = re.sub(r"{(\w+)}", lambda slot: _open_slot(rng, slot[1]), text)
        else:
            count = round(math.exp(rng.uniform(0, math.log(MOST_WORDS))))
            text = " ".join(_open_word(rng) for _ in range(count))
            if rng.random() < 0.4:
                middle = rng.integers(1, count) if count > 4 else 0
                words = text.split()
                words[:middle] = [" ".join(words[:middle]) + ","] if middle else []
                text = " ".join(words).capitalize() + rng.choice((".", ".", "?", "!"))
        if split_of(text) == split:
            return text


def _open_word(rng: np.random.Generator) -> str:
    words, cumulative = open_words()
    return words[int(np.searchsorted(cumulative, rng.random() * cumulative[-1]))]


def _open_slot(rng: np.random.Generator, name: str) -> str:
    if name in free_words():
        words = free_words()[name]
        return words[rng.integers(len(words))]
    one = int(rng.integers(1, 100))
    two = int(rng.integers(100))
    match name:
        case "count":
            return str(rng.integers(10 ** rng.integers(1, 5)))
        case "year":
            return str(rng.integers(1800, 2051))
        case "money":
            return f"${one}.{two:02d}" if two % 2 else f"${one * 10}"
        case "clock":
            return f"{one % 12 + 1}:{two % 60:02d}"
        case "date":
            return f"{MONTHS[one % 12]} {two % 28 + 1}"
    return _open_word(rng)


@functools.cache
def open_words() -> tuple[list[str], np.ndarray]:
    """Return the words of pocketsphinx's dictionary, and their cumulative weights (n,).

    The weight of a word is the square root of its frequency in pocketsphinx's language model; words that the model
    does not contain share `_RARE`.
    """
    pocketsphinx = require("pocketsphinx", "pocketsphinx")
    dictionary = Path(pocketsphinx.get_model_path("en-us")) / "cmudict-en-us.dict"
    words = [line.split()[0] for line in dictionary.read_text().splitlines()]
    words = [word for word in words if re.fullmatch(r"[a-z]+('[a-z]+)?", word)]
    model = pocketsphinx.Decoder(pocketsphinx.Config(loglevel="FATAL")).get_lm("_default")
    logs = np.array([model.prob([word]) for word in words], float)  # to the base 1.0001
    known = logs > logs.min()
    weights = np.where(known, np.exp(0.5 * 1e-4 * logs), 0.0)
    weights[~known] = _RARE / (1 - _RARE) * weights.sum() / (~known).sum()
    return words, np.cumsum(weights)


@functools.cache
def free_words() -> dict[str, tuple[str, ...]]:
    """Return the words of each slot of `TEMPLATES`, by its name."""
    lines = Path(__file__).with_name("words.txt").read_text().splitlines()
    return {name: tuple(words.split()) for name, words in (line.split(": ") for line in lines)}


def grammar() -> str:
    """Return the sentences as a JSGF grammar for a recogniser."""
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in zip(SLOT_NAMES, SLOTS)]
    whole = " ".join(f"<{name}>" for name in SLOT_NAMES)
    return "\n".join(["#JSGF V1.0;", "grammar grid;", f"public <sentence> = {whole};", *rules, ""])


def language_model() -> str:
    """Return a bigram model of 20,000 free training sentences in ARPA format, for a recogniser without a grammar: any
    word may follow any other (Witten-Bell smoothing: Witten and Bell 1991, "The zero-frequency problem").
    """
    rng = np.random.default_rng(0)
    pairs: Counter[tuple[str, str]] = Counter()
    for _ in range(20_000):
        words = ["<s>", *draw_sentence(rng, "train", free=True).split(), "</s>"]
        pairs.update(pairwise(words))
    fixed = re.sub(r"{\w+}", "", " ".join(TEMPLATES)).split()
    vocabulary = sorted({"<s>", "</s>", *fixed, *(word for words in free_words().values() for word in words)})
    total = Counter()
    kinds = Counter()
    follows = Counter()
    for (first, second), times in pairs.items():
        total[first] += times
        kinds[first] += 1
        follows[second] += times
    mass = sum(follows.values()) + 0.5 * len(vocabulary)
    single = {word: (follows[word] + 0.5) / mass for word in vocabulary}
    rest = {word: kinds[word] / (total[word] + kinds[word]) if total[word] else 1.0 for word in vocabulary}
    lines = ["\\data\\", f"ngram 1={len(single)}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    lines += [f"{math.log10(single[word]):.4f} {word} {math.log10(rest[word]):.4f}" for word in vocabulary]
    lines += ["", "\\2-grams:"]
    for (first, second), times in sorted(pairs.items()):
        probability = (1 - rest[first]) * times / total[first] + rest[first] * single[second]
        lines.append(f"{math.log10(probability):.4f} {first} {second}")
    return "\n".join([*lines, "", "\\end\\", ""])

"""GRID-style sentences (Cooke et al. 2006, "An audio-visual corpus for speech perception and automatic speech
recognition"): command, colour, preposition, letter, digit, adverb. Letters are NATO words, because spoken letters are
confused by a recogniser even on clean speech. Version 2 has free sentences beside them: templates filled with the
common words of `words.txt`, of which no two look the same on the lips."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

SLOTS: tuple[tuple[str, ...], ...] = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    (
        "alpha",
        "bravo",
        "charlie",
        "delta",
        "echo",
        "foxtrot",
        "golf",
        "hotel",
        "india",
        "juliet",
        "kilo",
        "lima",
        "mike",
        "november",
        "oscar",
        "papa",
        "quebec",
        "romeo",
        "sierra",
        "tango",
        "uniform",
        "victor",
        "whiskey",
        "x-ray",
        "yankee",
        "zulu",
    ),
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)
SLOT_NAMES = ("command", "colour", "preposition", "letter", "digit", "adverb")
SPLITS = {1: ("train", "seen", "unseen"), 2: ("train", "dev", "seen", "unseen")}
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


def split_of(text: str, version: int = 1) -> str:
    """The split that owns a sentence, by hash: 10 % each the splits after `train`, which owns the rest. No sentence
    belongs to two splits."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    splits = SPLITS[version]
    return splits[max(0, bucket - 10 + len(splits))]


def draw_sentence(rng: np.random.Generator, split: str, version: int = 1, free: bool = False) -> str:
    """A sentence drawn evenly from those that `split` owns, of the closed vocabulary or a free one."""

    def pick(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    while True:
        if free:
            text = re.sub(r"{(\w+)}", lambda slot: pick(free_words()[slot[1]]), pick(TEMPLATES))
        else:
            text = " ".join(pick(words) for words in SLOTS)
        if split_of(text, version) == split:
            return text


@functools.cache
def free_words() -> dict[str, tuple[str, ...]]:
    """The words of each slot of `TEMPLATES`, by its name."""
    lines = Path(__file__).with_name("words.txt").read_text().splitlines()
    return {name: tuple(words.split()) for name, words in (line.split(": ") for line in lines)}


def grammar() -> str:
    """The sentences as a JSGF grammar for a recogniser."""
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in zip(SLOT_NAMES, SLOTS)]
    whole = " ".join(f"<{name}>" for name in SLOT_NAMES)
    return "\n".join(["#JSGF V1.0;", "grammar grid;", f"public <sentence> = {whole};", *rules, ""])


def language_model(count: int = 20_000) -> str:
    """A bigram model of free training sentences in ARPA format, for a recogniser without a grammar: after each word
    every other may follow (Witten-Bell smoothing: Witten and Bell 1991, "The zero-frequency problem")."""
    rng = np.random.default_rng(0)
    pairs: Counter[tuple[str, str]] = Counter()
    for _ in range(count):
        words = ["<s>", *draw_sentence(rng, "train", 2, free=True).split(), "</s>"]
        pairs.update(pairwise(words))
    fixed = re.sub(r"{\w+}", "", " ".join(TEMPLATES)).split()
    vocabulary = sorted({"<s>", "</s>", *fixed, *(word for words in free_words().values() for word in words)})
    total, kinds, follows = Counter(), Counter(), Counter()
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
        share = (1 - rest[first]) * times / total[first] + rest[first] * single[second]
        lines.append(f"{math.log10(share):.4f} {first} {second}")
    return "\n".join([*lines, "", "\\end\\", ""])

"""GRID-style sentences (Cooke et al. 2006, "An audio-visual corpus for speech perception and automatic speech
recognition"): command, colour, preposition, letter, digit, adverb. Letters are NATO words, because spoken letters are
confused by a recogniser even on clean speech."""

from __future__ import annotations

import hashlib

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
SPLITS = ("train", "seen", "unseen")


def split_of(text: str) -> str:
    """The split that owns a sentence: by hash, 80 % train, 10 % seen (held-out sentences of training voices) and
    10 % unseen (held-out sentences of held-out voices). No sentence belongs to two splits."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return SPLITS[max(0, bucket - 7)]


def draw_sentence(rng: np.random.Generator, split: str) -> str:
    """A sentence drawn evenly from those that `split` owns."""
    while True:
        text = " ".join(words[rng.integers(len(words))] for words in SLOTS)
        if split_of(text) == split:
            return text


def grammar() -> str:
    """The sentences as a JSGF grammar for a recogniser."""
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in zip(SLOT_NAMES, SLOTS)]
    whole = " ".join(f"<{name}>" for name in SLOT_NAMES)
    return "\n".join(["#JSGF V1.0;", "grammar grid;", f"public <sentence> = {whole};", *rules, ""])

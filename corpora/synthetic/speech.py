"""Speech synthesis with phoneme events by espeak-ng's C API.

`espeakng-loader` brings the library and its data. The voice that speaks is a file in a private copy of the data folder
that is made when the synthesiser starts.

Axes: N samples.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, no sound device
_PHONEME_EVENTS = 1
_DONT_EXIT = 0x8000
# espeak_PARAMETER
_RATE = 1
_PITCH = 3
_RANGE = 4
_EVENT_WORD = 1
_EVENT_PHONEME = 7
_UTF8 = 1
_WORD = " "  # stands for the start of a word among phoneme events


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Utterance:
    """Speech at espeak-ng's rate: `wave` (N,) float32 in [-1, 1], `phonemes` as (symbol, start s, end s), and the
    index of each word's first phoneme. Short function words may count as one word with the next."""

    wave: np.ndarray
    rate: int
    phonemes: list[tuple[str, float, float]]
    words: list[int]


class Synthesizer:
    """Synthesises speech with any espeak-ng voice. Only one instance can exist per process, as the library's state is
    global.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-voices-")
        data = Path(self._folder.name) / "espeak-ng-data"
        source = Path(espeakng_loader.get_data_path())
        (data / "voices" / "!v").mkdir(parents=True)
        (data / "lang" / "gmw").mkdir(parents=True)
        for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict", "lang/gmw/en-US"):
            (data / name).symlink_to(source / name)
        self._voice = data / "voices" / "!v" / "corpus"
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        options = _PHONEME_EVENTS | _DONT_EXIT
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), options)
        if self._rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with the data in {data}")
        self._library.espeak_ng_SetRandSeed(1)  # breath noise is seeded by the clock otherwise
        self._callback = _CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)
        self._blocks: list[np.ndarray] = []
        self._events: list[tuple[str, int]] = []

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == _EVENT_PHONEME:
                self._events.append((events[i].name.decode(), events[i].sample))
            elif events[i].type == _EVENT_WORD:
                self._events.append((_WORD, events[i].sample))
            i += 1
        return 0

    def speak(self, text: str, lines: str, pitch: int = 50, span: int = 50, words_per_minute: int = 160) -> Utterance:
        """Synthesise `text` with the voice that `lines` of an espeak-ng voice file describe.

        The library's flutter and noise generators are stateful. Each call runs in a forked process, which starts from
        the same state, so that the result depends only on the arguments.

        Args:
            pitch, span: pitch and pitch range, 0 to 99; 50 is the default of the voice.
        """
        self._voice.write_text(f"language variant\nname corpus\n{lines}\n")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(read)
                with os.fdopen(write, "wb") as pipe:
                    pickle.dump(self._speak(text, pitch, span, words_per_minute), pipe)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            result = pipe.read()
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"espeak-ng failed on {text!r} with the voice {lines!r}")
        wave, events = pickle.loads(result)
        return Utterance(wave.astype(np.float32) / 32768.0, self._rate, *_phonemes(events, len(wave), self._rate))

    def _speak(self, text: str, pitch: int, span: int, words_per_minute: int):
        library = self._library
        if library.espeak_SetVoiceByName(f"en-us+{self._voice.name}".encode()):
            raise RuntimeError("espeak-ng cannot use the voice file")
        for parameter, value in ((_RATE, words_per_minute), (_PITCH, pitch), (_RANGE, span)):
            library.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        if library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None):
            raise RuntimeError(f"espeak-ng cannot speak {text!r}")
        return np.concatenate(self._blocks), self._events


def _phonemes(
    events: list[tuple[str, int]], samples: int, rate: int
) -> tuple[list[tuple[str, float, float]], list[int]]:
    """Turn events (symbol, start sample) into intervals, without stress and pauses, and the words' first intervals.

    A coda /l/ has no samples of its own (the vowel glides into it); it gets the last third of the audio before it."""
    sounds = [event for event in events if event[0] != _WORD]
    begins = [start for name, start in events if name == _WORD]
    starts = [min(start, samples) for _, start in sounds] + [samples]
    intervals: list[tuple[str, float, float]] = []
    for i, (name, _) in enumerate(sounds):
        symbol = name.strip("',%=_|").rstrip("#")
        if not symbol.strip(":;"):
            continue
        start = starts[i] / rate
        end = starts[i + 1] / rate
        if end <= start and intervals:
            before, first, last = intervals[-1]
            start = last - (last - first) / 3
            intervals[-1] = (before, first, start)
            end = last
        if end > start:
            intervals.append((symbol, start, end))
    times = np.array([start for _, start, _ in intervals])
    return intervals, sorted({int(np.abs(times - begin / rate).argmin()) for begin in begins})

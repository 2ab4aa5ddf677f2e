"""Word and character error rates of what a recogniser hears.

Errors of all clips over words of all clips (micro average), by jiwer (Apache-2.0). A clip in which nothing is heard
counts with all its words. Recognisers:

- `whisper-medium` (HiCoDiT's, as its ground-truth rows say), `whisper-large-v3`: Radford et al. 2022, arXiv:2212.04356,
  weights MIT, by transformers; greedy, the language given. A folder after a colon holds another one.
- `qwen3-asr` (Talker-T2AV's): Qwen3-ASR-1.7B, weights Apache-2.0, by transformers.
- `grammar`: pocketsphinx with a grammar, for the synthetic corpus. Other sentences are recognised by the language model
  beside it, `free.arpa`, and counted as `wer_free`.
- `grid`: the bundled recogniser of GRID's 51 words and its grammar (`engine.metrics.grid_recogniser`), or that of a
  folder after a colon; other sentences cannot be measured. Letters alone are counted as `letter_errors`.
- `auto-avsr`: Ma et al. 2023, arXiv:2303.14307; no package holds it: `heard` of the manifest gives what its own
  program transcribed. Transcripts of any other recogniser can be given so, too.

Texts of both sides are brought to one form by Whisper's English normaliser (with its list of British spellings where
a Whisper folder is there), other languages by its basic one. Chinese, Japanese, Thai and Cantonese have a character
error rate only.

Axes: N samples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jiwer
import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError, printable
from engine.evaluation.statistics import derangement
from engine.metrics.grid_recogniser import LETTER, GridRecogniser, is_sentence
from engine.metrics.metric import Figure, Metric, Rows, Take, text_of, wave_of
from engine.metrics.recogniser import Recogniser
from engine.untrusted import read_json

RATE = 16_000
MODEL = "free.arpa"  # name of a language model beside a grammar
LONG = 30  # seconds that Whisper hears at once
FOLDERS = {"whisper-medium": "whisper-medium", "whisper-large-v3": "whisper-large-v3", "qwen3-asr": "Qwen3-ASR-1.7B-hf"}
GRID = Path(__file__).parents[2] / "assets" / "grid_recogniser"
WITHOUT_SPACES = ("zh", "ja", "th", "yue")


class WordErrors(Metric):
    figures: ClassVar = {
        "wer": Figure("WER %", -1, 2, 100, "word errors over words"),
        "wer_free": Figure("WER free %", -1, 2, 100, "word errors of sentences outside the recogniser's grammar"),
        "wer_shuffled": Figure("WER other %", -1, 1, 100, "control: word errors against the words of another clip"),
        "wer_free_shuffled": Figure("WER free other %", -1, 1, 100, "control: the same outside the grammar"),
        "letter_errors": Figure("letters %", -1, 1, 100, "wrong letters: sentences of GRID have one each"),
        "cer": Figure("CER %", -1, 2, 100, "character errors over characters"),
    }
    protocols = ("whisper-medium", "whisper-large-v3", "qwen3-asr", "auto-avsr", "grammar", "grid")
    version = 2
    parallel = False
    inputs = ("audio", "heard", "language")
    free = None  # the recogniser of sentences outside the grammar

    def load(self) -> None:
        if self.kind == "grammar":
            grammar, model, *_ = self._recogniser_files
            self.closed = Recogniser(grammar)
            self.free = Recogniser(model) if model.is_file() else None
            self.vocabulary = set(re.findall(r"[\w'-]+", grammar.read_text()))
        elif self.kind == "grid":
            self.closed = GridRecogniser.from_pretrained(self.folder)
        elif self.kind != "auto-avsr":
            self.processor, self.model = load_speech_model(self.folder, self.device)

    @property
    def folder(self) -> Path:
        """That of a network."""
        if self.argument:
            return Path(self.argument)
        return GRID if self.kind == "grid" else self.weights / FOLDERS[self.kind]

    @property
    def _recogniser_files(self) -> list[Path]:
        """The grammar, the language model that may lie beside it, and pronunciations of both."""
        models = Path(self.argument), Path(self.argument).with_name(MODEL)
        return [*models, *(model.with_suffix(".dict") for model in models)]

    @property
    def files(self) -> list[Path]:
        if self.kind == "grammar":
            if not Path(self.argument).is_file():
                raise UserError(f"grammar={self.argument}: there is no such file; give grammar=FILE.jsgf")
            return [file for file in self._recogniser_files if file.is_file()]
        if self.kind == "grid":
            return [self.folder / name for name in ("config.yaml", "model.safetensors")]
        return [self.folder / name for name in ("config.json", "model.safetensors")] if self.kind in FOLDERS else []

    @property
    def download(self) -> str:
        return "metrics" if self.protocol == "whisper-medium" else "metrics_large"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pocketsphinx",) if self.kind == "grammar" else ()

    def is_free(self, text: str) -> bool:
        """Return whether the language model recognises a sentence, as the grammar lacks a word of it."""
        return self.free is not None and not set(text.lower().split()) <= self.vocabulary

    def transcribe(self, take: Take) -> str:
        """Return what is heard in a take, as the recogniser writes it."""
        if self.kind == "auto-avsr":
            if take.heard is None:
                raise UserError("the manifest gives no transcript: transcribe with auto-avsr and add it as heard")
            return take.heard
        wave = wave_of(take.audio, RATE)
        if self.kind == "grid":
            return self.closed.transcribe(wave, RATE)
        if self.kind == "grammar":
            return (self.free if self.is_free(take.text or "") else self.closed).transcribe(wave, RATE)
        if self.kind == "qwen3-asr":
            return self._qwen(wave, take.language)
        return hear_words(self.processor, self.model, wave, take.language)[0]

    @torch.inference_mode()
    def _qwen(self, wave: np.ndarray, language: str) -> str:
        inputs = self.processor.apply_transcription_request(audio=[wave], language=language, return_tensors="pt")
        inputs = inputs.to(self.device)
        tokens = self.model.generate(**inputs, max_new_tokens=512)[:, inputs["input_ids"].shape[1] :]
        return self.processor.decode(tokens[0], return_format="transcription_only")

    @cached_property
    def spellings(self) -> dict[str, str]:
        """British to American words, of the first Whisper folder that is there."""
        for folder in ("whisper-medium", "whisper-large-v3"):
            path = self.weights / folder / "normalizer.json"
            if path.is_file():
                return dict(read_json(path))
        return {}

    def normalise(self, text: str, language: str) -> str:
        if self.kind in ("grammar", "grid"):
            return " ".join(text.lower().split())
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer  # 3 s

        if language == "en":
            return EnglishTextNormalizer(self.spellings)(text)
        return BasicTextNormalizer()(text).strip()

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        spoken = text_of(truth)
        if self.kind == "grid" and not is_sentence(spoken):
            raise UserError(f"its words {printable(spoken)!r} are no sentence of GRID: choose another protocol.wer")
        heard = self.transcribe(take)
        text, words = (self.normalise(part, take.language) for part in (spoken, heard))
        found = count_errors(text, words, take.language)
        if self.is_free(spoken):
            found["wer_free"] = found.pop("wer")
        if self.kind == "grid":
            found["letter_errors"] = (float(text.split()[LETTER] != words.split()[LETTER]), 1)
        return {**found, "heard": heard, "text": text, "words": words}

    def finish(self, rows: Rows, true: Rows, truths: Mapping[str, Take]) -> Rows:
        """Count what was heard against the words of another clip, which the same recogniser hears: a control."""
        rng = np.random.default_rng(0)
        finished = {clip: dict(row) for clip, row in rows.items()}
        for figure in ("wer", "wer_free"):
            clips = [clip for clip, row in rows.items() if figure in row]
            for clip, other in zip(clips, derangement(len(clips), rng) if len(clips) > 1 else ()):
                heard = rows[clips[other]]["words"]
                finished[clip][f"{figure}_shuffled"] = count_errors(rows[clip]["text"], heard)["wer"]
        return finished


class LipWords(WordErrors):
    """Words that a lip reader reads in the generated video, beside those that a recogniser hears in its audio."""

    figures: ClassVar = {"wer_lips": Figure("WER lips %", -1, 2, 100, "word errors of a lip reader on the video")}
    protocols = ("auto-avsr",)
    inputs = ("heard", "language")

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        found = super().measure(take, truth)
        return {"wer_lips": found["wer"], **{name: found[name] for name in ("heard", "text", "words")}}


def count_errors(reference: str, hypothesis: str, language: str = "en") -> dict[str, tuple[float, float]]:
    """Count errors and units of `wer` (not for languages without spaces) and `cer`."""
    if not reference.split():
        raise UserError("its text has no words")
    found = {}
    if language in WITHOUT_SPACES:
        reference, hypothesis = ("".join(text.split()) for text in (reference, hypothesis))
    else:
        words = jiwer.process_words(reference, hypothesis)
        found["wer"] = (words.substitutions + words.deletions + words.insertions, len(reference.split()))
    letters = jiwer.process_characters(reference, hypothesis)
    return found | {"cer": (letters.substitutions + letters.deletions + letters.insertions, len(reference))}


def load_speech_model(name: str | Path, device: Any, half: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load (processor, model) of transformers, in `half` on a GPU, from a folder (Path) or by a name of the hub."""
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor  # half a minute on a busy machine

    dtype = half if str(device).startswith("cuda") else torch.float32
    local = isinstance(name, Path)
    processor = AutoProcessor.from_pretrained(name, local_files_only=local)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(name, local_files_only=local, dtype=dtype, use_safetensors=True)
    return processor, model.to(device).eval()


@torch.inference_mode()
def hear_words(processor: Any, model: Any, wave: np.ndarray, language: str | None = None) -> tuple[str, str, float]:
    """Return the words that Whisper hears in audio (N,), their language, and its probability; 1 for a given one."""
    long = len(wave) > LONG * RATE
    probability = 1.0
    more = {"truncation": False, "padding": "longest"} if long else {}
    inputs = processor(wave, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **more)
    inputs = inputs.to(model.device, model.dtype)
    if language is None:
        language, probability = _hear_language(model, inputs["input_features"][..., : 100 * LONG])
    tokens = model.generate(**inputs, language=language, task="transcribe", return_timestamps=long)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0], language, probability


def _hear_language(model: Any, features: Tensor) -> tuple[str, float]:
    """Return the likeliest language of a window: Whisper's first token after the start names it."""
    tokens = model.generation_config.lang_to_id
    start = torch.tensor([[model.config.decoder_start_token_id]], device=features.device)
    logits = model(features, decoder_input_ids=start).logits[0, -1].float()
    chances = logits[list(tokens.values())].softmax(0)
    best = int(chances.argmax())
    return list(tokens)[best].strip("<|>"), float(chances[best])

"""Word and character error rates (WER, CER) by speech recognisers.

Errors are summed over all clips and divided by the total number of words (micro average), by jiwer (Apache-2.0). A clip
without recognised words counts as all deletions. Recognisers:

- `whisper-medium` (HiCoDiT's, as its ground-truth rows suggest), `whisper-large-v3`: Radford et al. 2022,
  arXiv:2212.04356, weights MIT, by transformers; greedy decoding with the given language. In Python,
  `whisper-medium:FOLDER` selects another Whisper model.
- `qwen3-asr` (Talker-T2AV's): Qwen3-ASR-1.7B, weights Apache-2.0, by transformers.
- `grammar`: pocketsphinx with a grammar, for the synthetic corpus. Other sentences are recognised with the language
  model `free.arpa` next to it, and counted as `wer_free`.
- `grid`: the bundled recogniser of GRID's 51 words and its grammar (`engine.metrics.grid_recogniser`), in Python also
  `grid:FOLDER`. Other sentences are not supported. `letter_errors` counts only the letters.
- `auto-avsr`: Ma et al. 2023, arXiv:2303.14307; not available as a package: the manifest provides its transcripts as
  `heard`. Transcripts of other recognisers can be provided in the same way.

English texts are normalised by Whisper's English normaliser (with its list of British spellings if a Whisper folder is
available), other languages by its basic normaliser. Chinese, Japanese, Thai and Cantonese only have a CER.

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
from engine.files import CHECKOUT
from engine.metrics.metric import Figure, Metric, Rows, Take, text_of, wave_of
from engine.metrics.recogniser import Recogniser
from engine.untrusted import read_json

RATE = 16_000
MODEL = "free.arpa"  # name of the language model next to a grammar
LONG = 30  # window of Whisper in seconds
FOLDERS = {"whisper-medium": "whisper-medium", "whisper-large-v3": "whisper-large-v3", "qwen3-asr": "Qwen3-ASR-1.7B-hf"}
GRID = CHECKOUT / "assets" / "grid_recogniser"
WITHOUT_SPACES = ("zh", "ja", "th", "yue")


class WordErrors(Metric):
    figures: ClassVar = {
        "wer": Figure("WER %", -1, 2, 100, "word errors divided by words"),
        "wer_free": Figure("WER free %", -1, 2, 100, "word errors of sentences outside the recogniser's grammar"),
        "wer_shuffled": Figure("WER other %", 0, 1, 100, "control: WER against the text of another clip"),
        "wer_free_shuffled": Figure("WER free other %", 0, 1, 100, "control: the same outside the grammar"),
        "letter_errors": Figure("letters %", -1, 1, 100, "letter error rate: GRID sentences contain one letter each"),
        "cer": Figure("CER %", -1, 2, 100, "character errors divided by characters"),
    }
    protocols = ("whisper-medium", "whisper-large-v3", "qwen3-asr", "auto-avsr", "grammar", "grid")
    version = 3
    parallel = False
    inputs = ("audio", "heard", "language")
    free = None  # recogniser for sentences outside the grammar

    def load(self) -> None:
        if self.kind == "grammar":
            grammar, model, *_ = self._recogniser_files
            self.closed = Recogniser(grammar)
            self.free = Recogniser(model) if model.is_file() else None
            self.vocabulary = set(re.findall(r"[\w'-]+", grammar.read_text()))
        elif self.kind == "grid":
            from engine.metrics import grid_recogniser  # its mel filters import transformers, which takes seconds

            self.grid = grid_recogniser
            self.closed = grid_recogniser.GridRecogniser.from_pretrained(self.folder)
        elif self.kind != "auto-avsr":
            self.processor, self.model = load_speech_model(self.folder, self.device)

    @property
    def folder(self) -> Path:
        """Folder of the network."""
        if self.argument:
            return Path(self.argument)
        return GRID if self.kind == "grid" else self.weights / FOLDERS[self.kind]

    @property
    def _recogniser_files(self) -> list[Path]:
        """Grammar, optional language model next to it, and pronunciation dictionaries of both."""
        models = Path(self.argument), Path(self.argument).with_name(MODEL)
        return [*models, *(model.with_suffix(".dict") for model in models)]

    @property
    def files(self) -> list[Path]:
        if self.kind == "grammar":
            if not Path(self.argument).is_file():
                raise UserError(f"grammar={self.argument}: no such file; expected grammar=FILE.jsgf")
            return [file for file in self._recogniser_files if file.is_file()]
        if self.kind == "grid":
            return [self.folder / name for name in ("config.yaml", "model.safetensors")]
        return [self.folder / name for name in ("config.json", "model.safetensors")] if self.kind in FOLDERS else []

    @property
    def download(self) -> str:
        return "metrics" if self.kind == "whisper-medium" else "metrics_large"

    @property
    def packages(self) -> tuple[str, ...]:
        return ("pocketsphinx",) if self.kind == "grammar" else ()

    def is_free(self, text: str) -> bool:
        """Return whether a sentence is transcribed with the language model, because the grammar does not contain one
        of its words.
        """
        return self.free is not None and not set(words_of(text)) <= self.vocabulary

    def transcribe(self, take: Take) -> str:
        """Return the transcript of a take, not normalised."""
        if self.kind == "auto-avsr":
            if take.heard is None:
                raise UserError("the manifest contains no transcript: transcribe with auto-avsr and add it as heard")
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
        """British to American spellings, from the first available Whisper folder."""
        for folder in ("whisper-medium", "whisper-large-v3"):
            path = self.weights / folder / "normalizer.json"
            if path.is_file():
                return dict(read_json(path))
        return {}

    def normalise(self, text: str, language: str) -> str:
        if self.kind in ("grammar", "grid"):
            return " ".join(words_of(text))
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer  # 3 s

        if language == "en":
            return EnglishTextNormalizer(self.spellings)(text)
        return BasicTextNormalizer()(text).strip()

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        spoken = text_of(truth)
        text = self.normalise(spoken, take.language)
        if self.kind == "grid" and not self.grid.is_sentence(text):
            raise UserError(f"its text {printable(spoken)!r} is not a GRID sentence: choose another protocol.wer")
        heard = self.transcribe(take)
        words = self.normalise(heard, take.language)
        found = count_errors(text, words, take.language)
        if self.is_free(spoken):
            found["wer_free"] = found.pop("wer")
        if self.kind == "grid":
            letter = self.grid.LETTER
            found["letter_errors"] = (float(text.split()[letter] != words.split()[letter]), 1)
        return {**found, "heard": heard, "text": text, "words": words}

    def finish(self, rows: Rows, true: Rows, truths: Mapping[str, Take]) -> Rows:
        """Add the control: errors against the text of another clip that the same recogniser transcribes."""
        rng = np.random.default_rng(0)
        finished = {clip: dict(row) for clip, row in rows.items()}
        for figure in ("wer", "wer_free"):
            clips = [clip for clip, row in rows.items() if figure in row]
            for clip, other in zip(clips, derangement(len(clips), rng) if len(clips) > 1 else ()):
                heard = rows[clips[other]]["words"]
                finished[clip][f"{figure}_shuffled"] = count_errors(rows[clip]["text"], heard)["wer"]
        return finished


class LipWords(WordErrors):
    """WER of a lip reader on the generated video, in addition to that of a speech recogniser on its audio."""

    figures: ClassVar = {"wer_lips": Figure("WER lips %", -1, 2, 100, "WER of a lip reader on the video")}
    protocols = ("auto-avsr",)
    inputs = ("heard", "language")

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        found = super().measure(take, truth)
        if "wer" not in found:
            raise UserError(f"a language without spaces ({', '.join(WITHOUT_SPACES)}) has no WER: omit wer_lips")
        return {"wer_lips": found["wer"], **{name: found[name] for name in ("heard", "text", "words")}}


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, as pocketsphinx's dictionaries write them."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("\u2019", "'"))


def count_errors(reference: str, hypothesis: str, language: str = "en") -> dict[str, tuple[float, float]]:
    """Count errors and units of `wer` (not for languages without spaces) and `cer`."""
    if not reference.split():
        raise UserError("its text contains no words")
    found = {}
    if language in WITHOUT_SPACES:
        reference = "".join(reference.split())
        hypothesis = "".join(hypothesis.split())
    else:
        words = jiwer.process_words(reference, hypothesis)
        found["wer"] = (words.substitutions + words.deletions + words.insertions, len(reference.split()))
    letters = jiwer.process_characters(reference, hypothesis)
    return found | {"cer": (letters.substitutions + letters.deletions + letters.insertions, len(reference))}


def load_speech_model(name: str | Path, device: Any, half: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load (processor, model) with transformers, in `half` precision on a GPU, from a folder (Path) or the hub
    (str).
    """
    # Importing transformers takes up to half a minute.
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    dtype = half if str(device).startswith("cuda") else torch.float32
    local = isinstance(name, Path)
    processor = AutoProcessor.from_pretrained(name, local_files_only=local)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(name, local_files_only=local, dtype=dtype, use_safetensors=True)
    return processor, model.to(device).eval()


@torch.inference_mode()
def hear_words(processor: Any, model: Any, wave: np.ndarray, language: str | None = None) -> tuple[str, str, float]:
    """Return the words that Whisper recognises in audio (N,), their language, and its probability, which is 1 for a
    given language.
    """
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
    """Return the most likely language of a window: the first token that Whisper predicts."""
    tokens = model.generation_config.lang_to_id
    start = torch.tensor([[model.config.decoder_start_token_id]], device=features.device)
    logits = model(features, decoder_input_ids=start).logits[0, -1].float()
    chances = logits[list(tokens.values())].softmax(0)
    best = int(chances.argmax())
    return list(tokens)[best].strip("<|>"), float(chances[best])

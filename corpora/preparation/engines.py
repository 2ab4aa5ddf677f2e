"""Wrappers of third-party networks that stages use, called with audio (N,) float32.

Speech and language recognisers return a `Transcript`, and emotion recognisers a label for each input; both have a
`name`. Speaker counters return the speaking time of each speaker in seconds, longest first. Enhancers return enhanced
audio (N,) at their `rate`.

Weights are loaded from the Hugging Face hub or a folder. Only the weights of `VoiceWindows` are included in its
package.

Axes: N samples at 16 kHz, W windows of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from corpora.preparation.clip import RATE16
from engine.device import pick_device
from engine.errors import UserError, require
from engine.metrics.emotion import load_emotion2vec
from engine.metrics.words import hear_words, load_speech_model
from engine.nn.ge2e import GE2EEncoder


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Convert the errors of a library that cannot load the weights `name` to a one-line UserError."""
    try:
        yield
    except (OSError, ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} {name} cannot be loaded: {reason}") from error


class Transcript(NamedTuple):
    """Result of a recogniser: text, language ("en") and its probability (0 to 1)."""

    text: str
    language: str
    probability: float


class Whisper:
    """OpenAI's Whisper (Radford et al. 2022, arXiv:2212.04356) through transformers: words and language.

    Weights: openai/whisper-large-v3 and smaller models (Apache-2.0).

    Args:
        name: on the hub, or a folder.
        device: auto, cpu or cuda.
    """

    def __init__(self, name: str = "openai/whisper-large-v3", device: str = "auto") -> None:
        self.name = name
        with loading("Whisper", name):
            self.processor, self.model = load_speech_model(name, pick_device(device), torch.float16)

    def __call__(self, wave: np.ndarray) -> Transcript:
        text, language, probability = hear_words(self.processor, self.model, wave)
        return Transcript(text.strip(), language, probability)


@cache
def whisper(name: str = "openai/whisper-large-v3", device: str = "auto") -> Whisper:
    """Return a `Whisper` that all stages of a process share."""
    return Whisper(name, device)


class Wav2Vec2:
    """Recogniser of English letters: wav2vec 2.0 with CTC (Baevski et al. 2020, arXiv:2006.11477) through transformers.

    It has no language model and therefore does not hallucinate words like Whisper, which makes it a suitable second
    recogniser. Weights: facebook/wav2vec2-large-960h-lv60-self (Apache-2.0).
    """

    def __init__(self, name: str = "facebook/wav2vec2-large-960h-lv60-self", device: str = "auto") -> None:
        from transformers import pipeline

        self.name = name
        with loading("wav2vec 2.0", name):
            self.recognise = pipeline("automatic-speech-recognition", name, device=pick_device(device))

    def __call__(self, wave: np.ndarray) -> Transcript:
        return Transcript(self.recognise(wave)["text"].lower(), "en", 1.0)


class Emotion2Vec:
    """Emotion recognition in speech by emotion2vec (Ma et al. 2023, arXiv:2312.15185) through FunASR (MIT).

    It has nine classes: the seven of HiCoDiT, `other` and `<unk>`. Weights:
    emotion2vec/emotion2vec_plus_large (FunASR's model licence).

    Args:
        name: on the Hugging Face hub, or a folder.
    """

    def __init__(self, name: str = "emotion2vec/emotion2vec_plus_large", device: str = "auto") -> None:
        self.name = name
        with loading("emotion2vec", name):
            self.model = load_emotion2vec(name, str(pick_device(device)), "emotion")

    def __call__(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Return the class of each waveform (N,)."""
        results = self.model.generate(list(waves), granularity="utterance", extract_embedding=False)
        return [r["labels"][int(np.argmax(r["scores"]))].split("/")[-1] for r in results]  # "name in Chinese/happy"


def _speechbrain(module: str, kind: str, name: str, device: str) -> Any:
    """Load a network by SpeechBrain's class `kind` of speechbrain.inference."""
    package = require(f"speechbrain.inference.{module}", "speechbrain", "prepare")
    with loading("SpeechBrain's network", name):
        return getattr(package, kind).from_hparams(source=name, run_opts={"device": str(pick_device(device))})


class VoxLingua107:
    """Language identification by an ECAPA-TDNN trained on VoxLingua107 (Valk and Alumaee 2020), through SpeechBrain.

    The paper uses it, too. Its transcripts have no words. Weights: speechbrain/lang-id-voxlingua107-ecapa (Apache-2.0).
    """

    def __init__(self, name: str = "speechbrain/lang-id-voxlingua107-ecapa", device: str = "auto") -> None:
        self.name = name
        self.model = _speechbrain("classifiers", "EncoderClassifier", name, device)

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray) -> Transcript:
        _, score, _, labels = self.model.classify_batch(torch.from_numpy(wave)[None])  # log probability, "en: English"
        return Transcript("", labels[0].partition(":")[0], float(score[0].exp()))


class VoiceWindows:
    """Approximate speaker counter without downloads: GE2E embeddings of 1.6-s windows that differ from the most typical
    one.

    It detects changes of speakers, but not simultaneous speakers or turns shorter than about a second.

    Args:
        min_cosine: minimum cosine of windows with the same voice.
    """

    def __init__(self, min_cosine: float = 0.65, device: str = "auto") -> None:
        self.encoder = GE2EEncoder(pick_device(device))
        self.min_cosine = min_cosine

    def __call__(self, wave: np.ndarray) -> list[float]:
        """Return the duration of the main voice and that of all other voices in a waveform (N,), in seconds.

        Raises:
            UserError: If the waveform contains no speech.
        """
        seconds = len(wave) / RATE16
        speech = self.encoder.audio.preprocess_wav(np.asarray(wave, np.float32))
        if len(speech) == 0:
            raise UserError("no speech was found in the audio")
        windows = self.encoder.network.embed_utterance(speech, return_partials=True, rate=4)[1]  # (W, 256)
        likeness = windows @ windows.T / np.outer(*2 * [np.linalg.norm(windows, axis=1)])
        fraction = (likeness[likeness.mean(0).argmax()] >= self.min_cosine).mean()  # windows with the main voice
        return [float(fraction * seconds), float((1 - fraction) * seconds)]


class Pyannote:
    """Speaker diarisation by pyannote.audio (MIT).

    Weights: pyannote/speaker-diarization-community-1 (CC BY 4.0); its terms are accepted once on the hub, with the
    account that `hf auth login` uses on this machine.
    """

    def __init__(self, name: str = "pyannote/speaker-diarization-community-1", device: str = "auto") -> None:
        package = require("pyannote.audio", "pyannote.audio", "prepare")
        with loading("diarisation", name):
            self.pipeline = package.Pipeline.from_pretrained(name)
        if self.pipeline is None:  # the terms are not accepted
            raise UserError(
                f"diarisation {name} cannot be loaded: accept its terms on the hub, then run `hf auth login`"
            )
        self.pipeline.to(pick_device(device))

    def __call__(self, wave: np.ndarray) -> list[float]:
        """Return the duration of each speaker's speech in a waveform (N,), in seconds."""
        result = self.pipeline({"waveform": torch.from_numpy(wave)[None], "sample_rate": RATE16})
        turns = getattr(result, "speaker_diarization", result)  # version 4 wraps what version 3 gives
        return [float(seconds) for _, seconds in turns.chart()]


class SpeechBrain:
    """Speech enhancement by SpeechBrain (Apache-2.0): MetricGAN+ (Fu et al. 2021, arXiv:2104.03538).

    Weights: speechbrain/metricgan-plus-voicebank (Apache-2.0). It operates at 16 kHz, so that the output contains
    nothing above 8 kHz.
    """

    rate = RATE16

    def __init__(self, name: str = "speechbrain/metricgan-plus-voicebank", device: str = "auto") -> None:
        self.model = _speechbrain("enhancement", "SpectralMaskEnhancement", name, device)

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        clean = self.model.enhance_batch(torch.from_numpy(wave)[None], lengths=torch.ones(1))
        return clean[0].cpu().numpy()


class ClearVoice:
    """ClearerVoice-Studio (Apache-2.0; Zhao et al. 2025, arXiv:2506.19398), which the paper uses to enhance speech.

    Args:
        name: MossFormer2_SE_48K keeps what is above 8 kHz; MossFormerGAN_SE_16K and FRCRN_SE_16K are smaller;
            MossFormer2_SS_16K separates speakers, of whom the loudest is kept.
        device: auto, cpu, cuda or mps.
    """

    def __init__(self, name: str = "MossFormer2_SE_48K", device: str = "auto") -> None:
        package = require("clearvoice", "clearvoice", "prepare")
        task = {"SE": "speech_enhancement", "SS": "speech_separation"}.get(name.split("_")[-2] if "_" in name else "")
        if task is None or not name.endswith(("_16K", "_48K")):
            raise UserError(f"ClearerVoice has no model {name}: use MossFormer2_SE_48K, or another model of its list")
        self.rate = 1000 * int(name[-3:-1])
        with loading("ClearerVoice", name):
            self.model = package.ClearVoice(task=task, model_names=[name])
        # The package takes the GPU with the most free memory, and makes it the current one of the process.
        chosen = pick_device(device)
        for network in self.model.models:
            network.args.use_cuda = int(chosen.type == "cuda")
            network.device = chosen
            network.model.to(chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        made = np.asarray(self.model(wave[None], False), np.float32).reshape(-1, wave.shape[-1])
        return made[np.square(made).sum(1).argmax()]

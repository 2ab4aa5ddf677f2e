"""Words and a voice for silent clips: both seeds together.

Lips alone do not tell all words, so Talker-T2AV's V2A takes them as text: from a transcript, from a lip reader, or from
a recogniser that hears the speech that HiCoDiT generates from the clip. That speech is also a voice fit for the face.

Axes: N samples.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from corpora.synthetic.sentences import SLOTS, grammar, language_model
from engine.device import pick_device
from engine.errors import UserError, require
from engine.evaluation.clips import read_rows, text_of
from engine.evaluation.validation import words_by
from engine.faces.track import read_boxes
from engine.media.audio import write_wav
from engine.media.ffmpeg import probe
from engine.metrics.metric import Sound, Take
from engine.metrics.recogniser import Recogniser
from engine.metrics.words import WordErrors
from engine.untrusted import read_text
from hicodit.bundled import PipelineChooser
from hicodit.pipeline import HiCoDiTPipeline
from talker_t2av.jobs import check_given
from talker_t2av.model import FPS
from talker_t2av.settings import AutoConfig, InferConfig, Job

FACE = "HiCoDiT's speech, from the face"  # where a voice comes from


def finder(c: InferConfig, jobs: Sequence[tuple[str, Job | UserError]]) -> Callable[[], ClipWords]:
    """Check that words can be found for all jobs with the text `auto`; return what makes their finder."""
    make = partial(ClipWords, c.auto, c.device, c.precision)
    make().check([job for _, job in jobs if isinstance(job, Job) and job.is_auto])
    return make


class ClipWords:
    """Completes V2A jobs with the text `auto`: a `talker_t2av.jobs.FindWords`.

    Args:
        config: where words come from; see there.
        device, precision: of HiCoDiT and of Whisper.
        transcripts: whether a file NAME.txt beside the clip gives its words.
        pipelines: of HiCoDiT, if they are loaded already.
    """

    def __init__(
        self,
        config: AutoConfig,
        device: str = "auto",
        precision: str = "auto",
        transcripts: bool = True,
        pipelines: PipelineChooser | None = None,
    ) -> None:
        self.config, self.device, self.precision, self.transcripts = config, device, precision, transcripts
        self.folder, self.voices = tempfile.TemporaryDirectory(prefix="clip-words-"), 0
        self.pipelines = pipelines or PipelineChooser(self.load, config.hicodit)
        self.heard: dict[str, str] | None = None
        if config.heard and Path(config.heard).suffix == ".jsonl":
            rows = read_rows(Path(config.heard))
            self.heard = {row["id"]: str(row["heard"]) for row in rows if row.get("heard")}
            if not self.heard:
                raise UserError(f"auto.heard={config.heard}: no line has heard, the words of a clip")

    def __call__(self, job: Job) -> tuple[Job, dict[str, str]]:
        """Return the job with words and a voice, and where they come from: text, text_origin, voice_origin."""
        words, voice = self.written(job.video), job.find_voice()
        if words is None or voice is None:
            check_given(int(probe(job.video).seconds * FPS), f"video={job.video}")
            hicodit = self.pipelines.for_clip(job.video)
            crops = hicodit.crops(job.video, face_box=read_boxes(job.face_box) if job.face_box else None)
            speech = hicodit.run([crops], [job.seed])[0]
        if words is None:
            name = Path(self.config.recogniser).name if self.config.recogniser else "the corpus's recogniser"
            words = self.transcribe(speech.wave, speech.rate).strip(), f"{name}, on HiCoDiT's speech"
        text, origin = words
        about = {"text": text, "text_origin": origin, "voice_origin": Path(voice).name if voice else FACE}
        if voice is None:
            self.voices += 1
            voice = str(Path(self.folder.name) / f"{self.voices}.wav")
            write_wav(voice, speech.wave, speech.rate)
            job = replace(job, reference_audio=voice)
        return replace(job, text=text), about

    def check(self, jobs: Sequence[Job]) -> None:
        """Check, before networks are loaded, that each job's clip has words or a recogniser to hear them."""
        heard, recogniser = self.config.heard, self.config.recogniser
        if heard and Path(heard).is_file() and self.heard is None and len(jobs) > 1:
            raise UserError(f"auto.heard={heard} has the words of one clip: give a manifest (.jsonl) or a folder")
        silent = [job.video for job in jobs if Path(job.video).is_file() and self.written(job.video) is None]
        if not silent:
            return
        if recogniser is None and self.config.hicodit is not None:
            raise UserError(
                f"text=auto: {silent[0]} has no words: give auto.recogniser=FOLDER of Whisper, or auto.heard=FILE, "
                f"or {Path(silent[0]).stem}.txt beside it"
            )
        if recogniser is not None and Path(recogniser).is_dir():
            WordErrors(words_by(recogniser)["wer"]).check()
        else:
            require("pocketsphinx", "pocketsphinx")

    def written(self, video: str) -> tuple[str, str] | None:
        """Return the words of a clip that are in files, and which files; None if there are none."""
        clip = Path(video)
        if self.transcripts and (text := text_of(clip.parent, clip.stem)):
            return text, f"transcript, {clip.stem}.txt"
        if not self.config.heard:
            return None
        source, parts = Path(self.config.heard), clip.absolute().with_suffix("").parts[1:]
        names = ["/".join(parts[start:]) for start in range(len(parts))]  # a clip's id may have folders
        if source.is_dir():
            texts = (text_of(source, name) for name in names)
        elif self.heard is not None:
            texts = (self.heard.get(name) for name in names)
        else:
            texts = iter([read_text(source)])
        text = next(filter(None, texts), None)
        if text is None:
            return None
        line = re.search(r"\b(?:transcript|hyp): *(.*)", text)  # as Auto-AVSR prints them; else the words alone
        words = " ".join((line[1] if line else text).split())
        return words.lower() if words.isupper() else words, f"lip reader, {source.name}"

    @cached_property
    def transcribe(self) -> Callable[[np.ndarray, int], str]:
        """The recogniser: a wave (N,) and its rate to words."""
        source = self.config.recogniser
        if source is not None and Path(source).is_dir():
            whisper = WordErrors(words_by(source)["wer"], device=str(pick_device(self.device)))
            whisper.load()
            return lambda wave, rate: whisper.transcribe(Take(Sound(wave, rate)))
        return corpus_recogniser(Path(self.folder.name)) if source is None else Recogniser(Path(source)).transcribe

    def load(self, weights: str | Path) -> HiCoDiTPipeline:
        """Load HiCoDiT's pipeline of a release."""
        return HiCoDiTPipeline.from_pretrained(weights, pick_device(self.device), precision=self.precision)


def corpus_recogniser(folder: Path) -> Callable[[np.ndarray, int], str]:
    """Return a recogniser of the synthetic corpus that is not told the kind of a sentence.

    A language model hears both kinds; the grammar then decides if it has over three quarters of the words.

    Args:
        folder: where both may be written.
    """
    for name, text in {"both.arpa": language_model(closed=True), "closed.jsgf": grammar()}.items():
        (folder / name).write_text(text)
    both, closed = Recogniser(folder / "both.arpa"), Recogniser(folder / "closed.jsgf")
    vocabulary = {word for words in SLOTS for word in words}

    def transcribe(wave: np.ndarray, rate: int) -> str:
        text = both.transcribe(wave, rate)
        known = [word in vocabulary for word in text.split()]
        return closed.transcribe(wave, rate) if 4 * sum(known) > 3 * len(known) else text

    return transcribe

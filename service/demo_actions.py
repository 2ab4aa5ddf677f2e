"""What the buttons of `scripts/demo.py` do, and how they say what went wrong."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from engine.device import pick_device
from engine.errors import UserError
from engine.media.audio import read_voice
from engine.media.ffmpeg import browser_plays, probe
from engine.media.video import write_preview
from engine.nn.ge2e import GE2EEncoder
from engine.progress import stage
from engine.seeding import check_seed
from hicodit.bundled import PipelineChooser
from hicodit.inference import write_speech
from hicodit.pipeline import HiCoDiTPipeline
from talker_t2av.faces import is_picture
from talker_t2av.inference import write_talk
from talker_t2av.jobs import Job
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.system import BUNDLED as BUNDLED_TALKER

KEPT = 3600.0  # seconds for which results can be downloaded
MAX_SECONDS = 60.0  # of a clip or audio
MAX_CHARACTERS = 1000  # of a text


class FieldError(UserError):
    """A mistake in one field of the page; `field` is its name there."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Made:
    """Files that a button made, and remarks about them; None: there is no such file."""

    notes: list[str]
    video: str | None = None
    sound: str | None = None
    figure: str | None = None


class Demo:
    """What the buttons do.

    Args:
        folder: every call writes its files into a new folder in it, which is deleted after an hour.
        weights: release folder of HiCoDiT; None: for each clip, the bundled one that suits its face.
        talker: release folder of Talker-T2AV.
    """

    def __init__(
        self,
        folder: Path,
        weights: str | Path | None = None,
        talker: str | Path = BUNDLED_TALKER,
        device: str = "auto",
    ) -> None:
        self.folder = folder
        self.originals: dict[str, str] = {}  # uploaded files, by the name of the copy that browsers can play
        self.bundled = weights is None and talker == BUNDLED_TALKER
        place = pick_device(device)
        self.pipelines = PipelineChooser(partial(HiCoDiTPipeline.from_pretrained, device=place), weights)
        self.hicodit = self.pipelines.load_all()[0]  # whose settings the page shows
        self.talker = TalkerPipeline.from_pretrained(talker, place)

    def _new_folder(self) -> Path:
        for old in self.folder.glob("made-*"):
            if old.stat().st_mtime < time.time() - KEPT:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="made-", dir=self.folder))

    def preview(self, clip: str) -> str:
        """Return an uploaded clip, or a copy of it if browsers cannot play it; see `original`.

        A file that cannot be read is returned as it is: the action says what is wrong with it.
        """
        if browser_plays(clip):
            return clip
        copy = self._new_folder() / f"{Path(clip).stem}-{uuid.uuid4().hex}.mp4"
        try:
            write_preview(clip, copy)
        except UserError:
            return clip
        self.originals[copy.name] = clip
        return str(copy)

    def original(self, path: str | None) -> str | None:
        """Return the uploaded file of which `path` may be a copy that browsers can play."""
        return path and self.originals.get(Path(path).name, path)

    def speak(
        self, clip: str | None, voice: str | None, steps: int, temperature: float, guidance: float, seed: int | None
    ) -> Made:
        """Create the clip with its new audio, the audio alone, and a figure of mouth, spectrogram and tokens."""
        if not clip:
            raise FieldError("the clip", "Give a clip of a talking face.")
        check_seed(seed := int(seed or 0))
        hicodit = self.pipelines.for_clip(clip)
        sampler = replace(hicodit.sampler, steps=int(steps), temperature=float(temperature))
        hicodit.guidance = replace(hicodit.guidance, all=float(guidance))
        identity = GE2EEncoder().embed(read_voice(voice, 16_000), 16_000) if voice else None
        crops = hicodit.crops(clip)
        speech = hicodit.run([crops], [seed], identity, sampler)[0]
        folder = self._new_folder()
        stem = Path(clip).stem
        with stage("writing the files"):
            write_speech(Path(clip), speech, folder, stem, figure=True)
        video, figure, sound = (str(folder / f"{stem}.{kind}") for kind in ("mp4", "png", "wav"))
        notes = [f"{len(speech.wave) / speech.rate:.1f} s of speech", *speech.remarks]
        return Made(notes, video, sound, figure)

    def talk(
        self, mode: str, text: str, voice: str | None, face: str | None, steps: int, temperature: float,
        guidance: float, seed: int | None,
    ) -> Made:  # fmt: skip
        """Create the video, and the audio alone where it was generated.

        Args:
            voice: also the audio of a2v.
            face: clip or picture with the face; the clip of v2a.
        """
        if mode in ("t2av", "tts") and not (text or "").strip():
            raise FieldError("the text", "Write a text to say.")
        if mode != "tts" and not face:
            raise FieldError("the face", "Give a clip." if mode == "v2a" else "Give a face: a photo or a clip.")
        if not voice and (mode in ("tts", "a2v") or is_picture(face)):
            raise FieldError("the voice", "Give audio." if mode == "a2v" else "Give a voice.")
        if mode == "v2a" and not (text or "").strip():
            raise FieldError("the text", "Write what the clip says.")
        if not voice and probe(face).audio is None:
            raise FieldError("the voice", "Give a voice: the clip has no audio.")
        check_seed(seed := int(seed or 0))
        fields = {
            "t2av": {"reference_audio": voice, "reference_video": face},
            "tts": {"reference_audio": voice},
            "a2v": {"audio": voice, "reference_video": face},
            "v2a": {"reference_audio": voice, "video": face},
        }[mode]
        job = Job(mode, text or "", seed=seed, **{name: path for name, path in fields.items() if path})
        changes = {"steps": int(steps), "temperature": float(temperature), "guidance": float(guidance)}
        self.talker.sampling = replace(self.talker.sampling, **changes)
        prepared = self.talker.prepare(job)
        talk = self.talker.finish([prepared])[0]
        folder = self._new_folder()
        with stage("writing the files"):
            write_talk(job, mode, talk, folder)
        sound = str(folder / f"{mode}.wav") if mode != "a2v" else None
        video = str(folder / f"{mode}.mp4") if mode != "tts" else None
        notes = [f"{len(talk.wave) / self.talker.rate:.1f} s of speech", *talk.remarks]
        return Made(notes, video, sound)


def faulty_field(error: UserError, files: dict[str, str | None]) -> str:
    """Return the name of the field that an error is about; "" if that is not known.

    Args:
        files: by name on the page, the path of what was uploaded.
    """
    if isinstance(error, FieldError):
        return error.field
    for name, path in files.items():
        if path and path in str(error):
            return name
    return "the text" if re.search(r"\btext\b", str(error)) else ""


def in_page_words(message: str, files: dict[str, str | None]) -> str:
    """Remove what a visitor of the page cannot know from an error or remark: the server's paths, names of settings.

    Args:
        files: by name on the page ("the clip"), the path of what was uploaded.
    """
    for name, path in files.items():
        if path:
            message = re.sub(rf"(\w+=)?{re.escape(path)}", name, message)
    message = re.sub(r" \((limits|sampl\w+)\.\w+\)", "", message)
    clauses = re.split(r"(?<=[:;,]) ", message)
    clear = [clause for clause in clauses if not re.search(r"(^|[\s('\"])/\w|\w=|--\w|\(\w+_\w+\)|\.\w+\.", clause)]
    text = " ".join(clear).strip(" :;,")
    text = text[:1].upper() + text[1:]
    return text + "." * (text[-1:] not in (".", "")) or "The terminal of the server says why."

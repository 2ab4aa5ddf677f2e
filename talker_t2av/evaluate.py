"""Generation of speech and talking faces for the clips of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.evaluation.clips import Clip, find_take
from engine.evaluation.generate import ALL_BATCHES, write_facts, write_missing, write_take
from engine.evaluation.resynthesis import rebuild, rebuild_wave
from engine.media.video import read_video
from engine.metrics.metric import wave_of
from engine.settings import override, require_choice
from talker_t2av.model import FPS, MAX_FRAMES, RATE
from talker_t2av.pipeline import BUNDLED, Job, TalkerPipeline
from talker_t2av.request import MODES
from talker_t2av.settings import COMPAT, MAX_TEXT

GIVEN = {"a2v": "audio", "v2a": "video"}


def write_outputs(
    clips: Sequence[Clip],
    folder: Path,
    device: str,
    weights: str | None = None,
    codecs: Mapping[str, str] | None = None,
    precision: str = "fp32",
    mode: str = "t2av",
    sampling: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    driving: str | None = None,
    compat: str = "paper",
    prefix_seconds: float = 0.0,
    one_pass: bool = False,
    chosen: slice = ALL_BATCHES,
) -> None:
    """Generate missing outputs for the texts of clips, with the voice and face of their prompts.

    Writes FOLDER/ID.wav and, for t2av and a2v, ID.mkv. a2v animates a face with the ground-truth speech, or with that
    of `driving`; v2a generates speech for the ground-truth video. Clip i uses the seed seed + i.

    Args:
        clips: clips of the evaluation.
        folder: folder of the files.
        device: device of the networks.
        weights: release folder of the model. None: the bundled one.
        precision: see `TalkerPipeline.from_pretrained`.
        codecs: release folders of codecs by name (speech, motion, speaker), which override those of the release.
        mode: one of the four modes, or resynthesis (ground-truth speech and motion encoded and decoded, on the face of
            the prompt).
        sampling: settings that override those of the release.
        driving: folder with ID.wav of each clip, the driving audio of a2v. None: the ground-truth speech.
        compat, prefix_seconds: see `talker_t2av.settings.Job`. With compat=official, outputs begin with the prefix of
            the reference, as in the released program.
        seed: seed of the first clip.
        batch_size: number of clips per batch.
        one_pass: generate texts of any length in one pass of up to 30 s, instead of splitting long texts.
        chosen: slice of the batches to write.
    """
    require_choice("generate.mode", mode, (*MODES, "resynthesis"))
    require_choice("generate.compat", compat, COMPAT)
    if driving is not None and mode != "a2v":
        raise UserError(f"generate.driving={driving} with generate.mode={mode}: driving audio is only used by a2v")
    if driving is not None and not Path(driving).is_dir():
        raise UserError(
            f"generate.driving={driving} is not a folder: expected the outputs of a system, ID.wav of each clip"
        )
    pipeline = TalkerPipeline.from_pretrained(weights or BUNDLED, device, codecs, precision)
    pipeline.sampling = override(pipeline.sampling, (sampling or {}) | ({"text_bytes": MAX_TEXT} if one_pass else {}))
    facts = {"mode": mode, "sampling": asdict(pipeline.sampling), "precision": precision}
    special = {}
    if driving is not None:
        special["driving"] = Path(driving).name
    if compat != "paper" or prefix_seconds:
        special |= {"compat": compat, "prefix_seconds": prefix_seconds}
    write_facts(folder, "talker_t2av", weights or BUNDLED, codecs, **facts, seed=seed, given=GIVEN.get(mode), **special)
    protocol = {"compat": compat, "prefix_seconds": prefix_seconds}
    if one_pass and compat == "paper" and mode in MODES and MODES[mode].open_ended:
        protocol["max_seconds"] = MAX_FRAMES / FPS
    writer = TalkWriter(pipeline, folder, mode, driving, seed, protocol)
    write_missing(clips, folder, batch_size, writer.inputs, writer.write, length_of_text, chosen)


class TalkWriter:
    """Generates the speech and faces of the clips of an evaluation and writes them to files.

    Args:
        pipeline: the model.
        folder: folder of the files.
        mode, driving: see `write_outputs`.
        seed: seed of the first clip.
        protocol: fields of all jobs.
    """

    def __init__(
        self,
        pipeline: TalkerPipeline,
        folder: Path,
        mode: str,
        driving: str | None,
        seed: int,
        protocol: Mapping[str, str | float],
    ) -> None:
        self.pipeline = pipeline
        self.folder = folder
        self.mode = mode
        self.driving = driving
        self.seed = seed
        self.protocol = protocol

    def inputs(self, number: int, clip: Clip) -> list[Path | str | int | None]:
        """Return the text, the files and the seed that the output of clip `number` depends on."""
        if self.mode == "a2v":
            audio = self.driving_audio(clip)
        else:
            audio = clip.truth.audio if self.mode == "resynthesis" else clip.prompt.audio
        video = clip.truth.source if self.mode == "v2a" else clip.prompt.video if self.mode != "tts" else None
        return [clip.truth.text, audio, video, self.seed + number]

    def write(self, batch: Sequence[tuple[int, Clip]]) -> None:
        """Generate and write the outputs of a batch of clips, given with their indices."""
        if self.mode == "resynthesis":
            for _, clip in batch:
                write_take(self.folder, clip.id, *resynthesise(self.pipeline, clip))
            return
        jobs = [self.job(i, clip) for i, clip in batch]
        for (_, clip), talk in zip(batch, self.pipeline.run(jobs)):
            write_take(self.folder, clip.id, talk.wave, RATE, talk.frames, stopped=bool(talk.stopped))

    def job(self, number: int, clip: Clip) -> Job:
        """Create the job of clip `number`.

        Raises:
            UserError: If the clip has no voice, face or video that the mode needs.
        """
        mode = self.mode
        sound = clip.prompt.audio
        face = clip.prompt.video
        if (sound is None and mode != "a2v") or (face is None and mode in ("t2av", "a2v")):
            raise UserError("no reference voice or face: set reference_audio and reference_video in the manifest")
        if clip.truth.source is None and mode == "v2a":
            raise UserError("no input video: expected ID.mp4 in references=, or video in the manifest")
        if mode == "a2v" and self.driving_audio(clip) is None:
            raise UserError(f"generate.driving={self.driving} has no audio of this clip")
        files = {"audio": self.driving_audio(clip)} if mode == "a2v" else {"reference_audio": sound}
        if mode in ("t2av", "a2v"):
            files["reference_video"] = face
        if mode == "v2a":
            files["video"] = clip.truth.source
        paths = {name: str(path) for name, path in files.items()}
        return Job(mode, clip.truth.text or "", seed=self.seed + number, **paths, **self.protocol)

    def driving_audio(self, clip: Clip) -> Path | None:
        """Return the audio that drives the face in a2v: the ground truth, or that of `driving`."""
        return clip.truth.audio if self.driving is None else find_take(Path(self.driving), clip.id).audio


def length_of_text(clip: Clip) -> int:
    """Return the number of characters of a clip's text."""
    return len(clip.truth.text or "")


@torch.inference_mode()
def resynthesise(pipeline: TalkerPipeline, clip: Clip) -> tuple[np.ndarray, int, np.ndarray]:
    """Return the decoded speech of a clip, its rate, and its motion rendered on the first frame of its prompt."""
    wave = wave_of(clip.truth.audio, RATE)
    if clip.truth.source is None or clip.prompt.video is None:
        raise UserError("no video of the clip, or no other clip of its speaker")
    frames = read_video(clip.truth.source, FPS)
    face = next(iter(read_video(clip.prompt.video, FPS)))
    drawn = rebuild(pipeline.system.motion, frames, face)
    return rebuild_wave(pipeline.system.speech, wave), RATE, drawn

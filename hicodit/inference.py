"""The `infer.py` job: clips in, for each a WAV, the clip with its new sound, and a figure.

Axes: T video frames, N samples.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from engine.batch_runner import run_batches
from engine.device import pick_device
from engine.faces.detectors import YuNetDetector
from engine.faces.landmarks import landmark_source
from engine.faces.track import read_boxes
from engine.files import all_or_none, writable
from engine.media.audio import read_voice, write_wav
from engine.media.video import mux_audio
from engine.metrics.speaker import GE2EEncoder
from engine.progress import stage
from engine.settings import override
from hicodit.pipeline import FPS, Crops, HiCoDiTPipeline, Speech
from hicodit.settings import BUNDLED, FACE, InferConfig
from hicodit.streaming import SpeechChunk, StreamSettings


def write_outputs(clip: Path, speech: Speech, folder: Path, figure: bool, strip: Path | None = None) -> list[Path]:
    """Write all files of a clip, or none; the picture `strip` of its face track and the JSON beside it are copied."""
    with all_or_none(folder) as staging:
        if strip is not None:
            for path in (strip, strip.with_suffix(".json")):
                shutil.copyfile(path, staging / path.name)
        write_wav(staging / f"{clip.stem}.wav", speech.wave, speech.rate)
        mux_audio(clip, speech.wave, speech.rate, staging / f"{clip.stem}.mp4")
        if figure:
            from hicodit.figure import draw  # matplotlib takes a second to import

            draw(speech, staging / f"{clip.stem}.png")
        names = [path.name for path in sorted(staging.iterdir())]
    return [folder / name for name in names]


def run(c: InferConfig, clips: list[Path]) -> int:
    """Do the job that `read_settings` gives; returns the exit code: 0 when all clips are done, 1 when some failed.

    Raises:
        UserError: no clip could be done.
    """
    output = Path(c.output)
    with writable(c.output), tempfile.TemporaryDirectory() as scratch:
        detector = YuNetDetector(c.detector) if c.detector else None
        landmarks = landmark_source(c.face_landmarks, detector)
        box = read_boxes(c.face_box) if c.face_box else None
        weights, device, identity = c.weights or BUNDLED, pick_device(c.device), None
        if c.reference_audio is not None:
            with stage("reading"):
                voice = read_voice(c.reference_audio, 16_000)
            with stage("conditions"):
                identity = GE2EEncoder().embed(voice, 16_000)
        with stage("loading"):
            pipeline = HiCoDiTPipeline.from_pretrained(
                weights, device, c.codec, c.encoders, detector, landmarks, c.precision, c.compile
            )
        pipeline.sampler = override(pipeline.sampler, c.sampler)
        pipeline.guidance = override(pipeline.guidance, c.guidance)
        limit = pipeline.system.model.config.guidance_limit
        if limit is not None:
            pipeline.guidance.check_input(limit)

        if c.stream:
            steps = c.sampler.get("steps")
            settings = StreamSettings(c.lookahead, **({} if steps is None else {"steps": steps}))
            return _run_streams(pipeline, settings, c, clips, identity)

        def strip_of(clip: Path) -> Path | None:
            return Path(scratch) / f"{clip.stem}{FACE[0]}" if c.debug else None

        def prepare(clip: Path) -> Crops:
            return pipeline.crops(clip, c.chosen_face, box, strip_of(clip))

        def process(batch: list[Crops]) -> list[Speech]:
            return pipeline.run(batch, [c.seed] * len(batch), identity)

        def write(name: str, crops: Crops, speech: Speech) -> tuple[str, float]:
            written = write_outputs(Path(name), speech, output, c.figure, strip_of(Path(name)))
            unseen = crops.track.unseen(FPS)
            note = f" (face seen in {crops.track.coverage:.0%}; not at {unseen})" if unseen else ""
            seconds = len(speech.wave) / speech.rate
            return f"{name}, {seconds:.1f} s -> {', '.join(p.name for p in written)}{note}", seconds

        jobs = [(str(clip), clip) for clip in clips]
        summary = run_batches(jobs, c.batch_size, prepare, process, write)
    return summary.report("clips", output, pipeline.device, f" of input={c.input}")


def _run_streams(
    pipeline: HiCoDiTPipeline, settings: StreamSettings, c: InferConfig, clips: list[Path], identity: np.ndarray | None
) -> int:
    """The clips of `run`, one by one as streams."""
    output = Path(c.output)

    def process(batch: list[Path]) -> list[list[SpeechChunk]]:
        return [list(pipeline.stream(clip, c.seed, identity, **vars(settings))) for clip in batch]

    def write(name: str, clip: Path, chunks: list[SpeechChunk]) -> tuple[str, float]:
        wave, rate = np.concatenate([chunk.wave for chunk in chunks]), chunks[0].rate
        with all_or_none(output) as staging:
            write_wav(staging / f"{clip.stem}.wav", wave, rate)
            mux_audio(clip, wave, rate, staging / f"{clip.stem}.mp4")
        seconds, compute = len(wave) / rate, sum(chunk.compute for chunk in chunks)
        first = chunks[0].needed / FPS + chunks[0].compute
        figures = f"first sound after {first:.2f} s, {compute / seconds:.2f} s of computing for a second"
        return f"{name}, {seconds:.1f} s -> {clip.stem}.wav, {clip.stem}.mp4 ({figures})", seconds

    jobs = [(str(clip), clip) for clip in clips]
    summary = run_batches(jobs, 1, lambda clip: clip, process, write)
    return summary.report("clips", output, pipeline.device, f" of input={c.input}")

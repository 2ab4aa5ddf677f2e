"""Measure a Talker-T2AV on held-out sentences of the synthetic corpus.

Every sentence is spoken with the voice and the face of another clip of the same speaker.

Axes: N samples, T video frames (25 a second), S picture side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.evaluation.clips import Clip
from engine.evaluation.generate import generate_missing, write_facts
from engine.evaluation.resynthesis import fit_length
from engine.media.audio import read_audio
from engine.media.pictures import identity_to_tensor, to_bytes, video_to_tensor
from engine.media.video import read_video
from engine.metrics.recogniser import CorpusRecogniser
from engine.metrics.speech import speech_end, synchrony
from engine.progress import track
from engine.shards.recordings import pick_rows, read_manifest
from talker_t2av.figure import draw
from talker_t2av.generation import generate
from talker_t2av.jobs import prepare_job
from talker_t2av.model import FPS
from talker_t2av.pipeline import BUNDLED, Job, Talk, TalkerPipeline
from talker_t2av.request import MODES

SHIFT = 5  # video frames: 200 ms
LATE, CUT = 0.3, 0.02  # seconds of quiet after the last speech; true clips have 0.12 s and more
STREAMED, BATCHED = 4, 8  # clips

MouthReader = Callable[[np.ndarray], np.ndarray]  # frames (T, S, S, 3) of bytes -> mouth opening (T,)


def write_outputs(
    clips: Sequence[Clip],
    folder: Path,
    device: str,
    weights: str | None = None,
    mode: str = "t2av",
    seed: int = 0,
    batch_size: int = 8,
    **other: object,
) -> None:
    """Speak the clips' words with the voice and the face of their prompts, where the output is missing.

    FOLDER/ID.mp4, for tts and v2a FOLDER/ID.wav; a2v moves a face to the true speech, v2a speaks for the true picture.
    Clip i is generated with seed + i. other: settings of other models.

    Raises:
        UserError: the weights cannot be loaded. A clip without a prompt is named, and the others go on.
    """
    if mode not in MODES:
        raise UserError(f"generate.mode={mode} is unknown; choose {', '.join(MODES)}")
    pipeline = TalkerPipeline.from_pretrained(weights or BUNDLED, device)
    write_facts(folder, "talker_t2av", weights, mode=mode, sampling=asdict(pipeline.sampling), seed=seed)
    suffix = ".wav" if mode in ("tts", "v2a") else ".mp4"

    def job(i: int, clip: Clip) -> Job:
        voice, face = clip.prompt.audio, clip.prompt.video
        if (voice is None and mode != "a2v") or (face is None and mode in ("t2av", "a2v")):
            raise UserError("no voice or face to show: give reference_audio and reference_video in the manifest")
        if clip.truth.source is None and mode == "v2a":
            raise UserError("no picture to speak for: ID.mp4 in references=, or video in the manifest")
        files = {"reference_audio": voice} if mode != "a2v" else {"audio": clip.truth.audio}
        files |= {"reference_video": face} if mode in ("t2av", "a2v") else {}
        files |= {"video": clip.truth.source} if mode == "v2a" else {}
        return Job(mode, clip.truth.text or "", seed=seed + i, **{name: str(path) for name, path in files.items()})

    def write(batch: Sequence[tuple[int, Clip]]) -> None:
        for (_, clip), talk in zip(batch, pipeline.run([job(i, clip) for i, clip in batch])):
            path = folder / f"{clip.id}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)  # of an id such as speaker/clip
            talk.save(path)

    def inputs(clip: Clip) -> list[Path | str | None]:
        given = clip.truth.audio if mode == "a2v" else clip.prompt.audio
        picture = clip.truth.source if mode == "v2a" else clip.prompt.video if mode != "tts" else None
        return [clip.truth.text, given, picture]

    generate_missing(clips, folder, batch_size, inputs, write)


class HeldOut:
    """Evenly picked clips of a split, each with another clip of its speaker as the reference, and their measures.

    Args:
        opening: reads how far the mouth is open.
    """

    rate = TalkerPipeline.rate

    def __init__(self, corpus: Path, split: str, clips: int, opening: MouthReader) -> None:
        self.corpus, self.opening = corpus, opening
        self.recogniser = CorpusRecogniser(corpus / "grammar.jsgf")
        self.rows = pick_rows(corpus, split, clips)
        known = read_manifest(corpus, "train") + read_manifest(corpus, split)
        known = [row for row in known if row["expression"] == "neutral"] + known  # neutral ones are preferred
        self.references = [
            next(k for k in known if k["voice"] == row["voice"] and k["text"] != row["text"]) for row in self.rows
        ]
        self.texts = [row["text"] for row in self.rows]

    def path(self, row: dict, suffix: str) -> str:
        return str(self.corpus / row["split"] / f"{row['id']}{suffix}")

    def waves(self) -> list[np.ndarray]:
        """(N,) of every clip."""
        return [read_audio(self.path(row, ".wav"), self.rate) for row in self.rows]

    def frames(self, rows: Sequence[dict]) -> list[np.ndarray]:
        """(T, S, S, 3) of every row."""
        return [read_video(self.path(row, ".mp4"), FPS) for row in rows]

    def jobs(self, mode: str, seed: int) -> list[Job]:
        """A job for each clip; clip i is generated with seed + i."""
        out = []
        for i, (row, reference) in enumerate(zip(self.rows, self.references)):
            job = Job("tts", row["text"], reference_audio=self.path(reference, ".wav"), seed=seed + i)
            if mode in ("t2av", "a2v"):
                job = replace(job, reference_video=self.path(reference, ".mp4"))
            if mode == "a2v":
                job = replace(job, audio=self.path(row, ".wav"), reference_audio=None)
            if mode == "v2a":
                job = replace(job, video=self.path(row, ".mp4"))
            out.append(replace(job, mode=mode))
        return out

    def word_errors(self, waves: Sequence[np.ndarray], name: str = "wer") -> dict[str, float]:
        """Word error rate, and NAME_texts_shuffled, where each text is compared with the next clip's words.

        Free sentences (version 2 of the corpus) have figures of their own, which end in `_free`.
        """
        words = self.recogniser.transcribe_all(self.texts, waves, self.rate)
        others = self.recogniser.word_errors(f"{name}_texts_shuffled", self.texts, words[1:] + words[:1])
        return self.recogniser.word_errors(name, self.texts, words) | others

    def synchrony(self, frames: Sequence[np.ndarray], waves: Sequence[np.ndarray], name: str) -> dict[str, float]:
        """Mean over clips of the synchrony, as it is and with the sound 200 ms late and early."""
        openings = [self.opening(f) for f in frames]
        out = {}
        for suffix, shift in (("", 0), ("_200ms_late", SHIFT), ("_200ms_early", -SHIFT)):
            scores = [synchrony(opening, wave, self.rate, shift) for opening, wave in zip(openings, waves)]
            out[f"synchrony_{name}{suffix}"] = float(np.mean(scores))
        return out


def evaluate_corpus(
    pipeline: TalkerPipeline,
    clips: HeldOut,
    parts: Sequence[str],
    batch: int = 16,
    seed: int = 0,
    figure: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Figures by part.

    true: of the true clips, and of what the codecs leave of them. t2av, tts: word error rates and how utterances end
    (see `endings`). t2av, a2v, v2a: correlation of the mouth's opening with loudness. stream: see `measure_stream`.
    batch: see `measure_batch`.

    Args:
        figure: PNG of the first t2av clip.
    """
    results = {"true": measure_true_clips(pipeline, clips)}
    if "t2av" in parts:
        talks = talk(pipeline, clips.jobs("t2av", seed), batch)
        waves = [t.wave for t in talks]
        sync = clips.synchrony([t.frames for t in talks], waves, "generated")
        results["t2av"] = clips.word_errors(waves) | endings(talks) | sync
        if figure is not None:
            draw(talks[0], clips.texts[0], figure)
    if "tts" in parts:
        talks = talk(pipeline, clips.jobs("tts", seed), batch)
        results["tts"] = clips.word_errors([t.wave for t in talks]) | endings(talks)
    if "v2a" in parts:
        waves = [t.wave for t in talk(pipeline, clips.jobs("v2a", seed), batch)]
        sync = clips.synchrony(clips.frames(clips.rows), waves, "generated")
        results["v2a"] = clips.word_errors(waves) | sync
    if "a2v" in parts:
        talks = talk(pipeline, clips.jobs("a2v", seed), batch)
        results["a2v"] = clips.synchrony([t.frames for t in talks], clips.waves(), "generated")
    if "stream" in parts:
        results["stream"] = measure_stream(pipeline, clips.jobs("t2av", seed)[:STREAMED])
    if "batch" in parts:
        results["batch"] = measure_batch(pipeline, clips.jobs("t2av", seed)[:BATCHED])
    return results


def endings(talks: Sequence[Talk]) -> dict[str, float]:
    """How utterances end: seconds from the end of speech to the end of the wave, and shares of utterances.

    An utterance is in time with 0.02 to 0.3 s of quiet at its end, late with more, cut with less, and endless if the
    limit ended it.
    """
    quiet = np.array([len(t.wave) / TalkerPipeline.rate - speech_end(t.wave, TalkerPipeline.rate) for t in talks])
    stopped = np.array([t.stopped for t in talks])
    return {
        "ends_in_time": float(np.mean(stopped & (quiet <= LATE) & (quiet >= CUT))),
        "ends_late": float(np.mean(quiet > LATE)),
        "ends_cut": float(np.mean(quiet < CUT)),
        "endless": float(np.mean(~stopped)),
        "quiet_at_end_median_s": float(np.median(quiet)),
        "quiet_at_end_95_percent_s": float(np.percentile(quiet, 95)),
    }


def talk(pipeline: TalkerPipeline, jobs: Sequence[Job], batch: int) -> list[Talk]:
    """All jobs, batched with texts of like length."""
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].text))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    talks: dict[int, Talk] = {}
    for group in track(groups, len(groups), f"{jobs[0].mode} batches"):
        talks |= zip(group, pipeline.run([jobs[i] for i in group]))
    return [talks[i] for i in range(len(jobs))]


@torch.inference_mode()
def measure_true_clips(pipeline: TalkerPipeline, clips: HeldOut) -> dict[str, float]:
    """Figures of the true clips, of their decoded speech, and of true motion drawn with the reference's face."""
    codec, motion = pipeline.system.speech, pipeline.system.motion
    waves, pictures = clips.waves(), clips.frames(clips.rows)
    decoded = [codec.decode(codec.encode(torch.from_numpy(w)[None, None]))[0, 0].numpy() for w in waves]
    decoded = [fit_length(d, len(w)) for d, w in zip(decoded, waves)]
    drawn = []
    for frames, reference in zip(pictures, clips.frames(clips.references)):
        face = motion.identity(identity_to_tensor(reference[0], motion.size))
        drawn.append(to_bytes(motion.decode(motion.encode(video_to_tensor(frames, motion.size)), face)))
    readings = [np.corrcoef(clips.opening(f), row["mouth"]["open"])[0, 1] for f, row in zip(pictures, clips.rows)]
    return {
        "mouth_reader_against_drawn": float(np.mean(readings)),
        **clips.word_errors(waves, "wer_clean"),
        **clips.word_errors(decoded, "wer_resynthesis"),
        **clips.synchrony(pictures, waves, "true_pairs"),
        **clips.synchrony(drawn, waves, "true_motion_drawn"),
    }


def measure_stream(pipeline: TalkerPipeline, jobs: Sequence[Job]) -> dict[str, float]:
    """Patches and seconds before the first sound, and the largest difference of the joined chunks from `run`."""
    patches, seconds, sound, picture = [], [], [], []
    for job in jobs:
        start, steps, waves, frames = time.perf_counter(), [], [], []
        for chunk in pipeline.stream(job, steps.append):
            if len(chunk.wave) and not waves:
                patches.append(len(steps))
                seconds.append(time.perf_counter() - start)
            if len(chunk.wave):
                waves.append(chunk.wave)
            if chunk.frames is not None:
                frames.append(chunk.frames)
        whole = pipeline.run([job])[0]
        joined = np.concatenate(waves)
        if len(joined) != len(whole.wave):
            raise UserError(f"the chunks of {job.text!r} have {len(joined)} samples, the whole has {len(whole.wave)}")
        sound.append(float(np.abs(joined - whole.wave).max()))
        picture.append(float(np.abs(np.concatenate(frames).astype(int) - whole.frames.astype(int)).max()))
    return {
        "patches_before_sound": max(patches),
        "seconds_before_sound_median": float(np.median(seconds)),
        "join_error_sound": max(sound),
        "join_error_picture_of_255": max(picture),
    }


def measure_batch(pipeline: TalkerPipeline, jobs: Sequence[Job]) -> dict[str, float]:
    """Clips one by one against one batch: differences of latents, and speed of the loop without codecs.

    The first patch is compared alone, too: rounding errors are fed back and grow from patch to patch.
    """
    prepared = [prepare_job(job, pipeline.system) for job in jobs]
    requests, mode = [request for p in prepared for request in p.requests], prepared[0].mode
    generate(pipeline.system.model, requests[:1], mode, pipeline.sampling)  # the first call pays for set-up

    def timed(groups: list[list]) -> tuple[list, float]:
        start = time.perf_counter()
        results = [r for group in groups for r in generate(pipeline.system.model, group, mode, pipeline.sampling)]
        return results, time.perf_counter() - start

    singles, slow = timed([[request] for request in requests])
    together, fast = timed([requests])
    figures: dict[str, float] = {"clips": len(jobs)}
    size = pipeline.system.model.config.patch_size
    for stream in ("speech", "motion"):
        pairs = [(getattr(a, stream), getattr(b, stream)) for a, b in zip(singles, together)]
        worst = [float((a - b).abs().max()) if a.shape == b.shape else float("inf") for a, b in pairs]
        first = [float((a[:size] - b[:size]).abs().max()) for a, b in pairs]
        figures |= {
            f"difference_{stream}": max(worst),
            f"difference_{stream}_median": float(np.median(worst)),
            f"difference_{stream}_first_patch": max(first),
        }
    return figures | {
        "seconds_of_speech_a_second_singles": sum(len(r.speech) for r in singles) / FPS / slow,
        "seconds_of_speech_a_second_batch": sum(len(r.speech) for r in together) / FPS / fast,
        "speed_ratio": slow / fast,
    }

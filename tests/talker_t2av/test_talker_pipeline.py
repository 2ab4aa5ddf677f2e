"""From files to speech and faces: four jobs, streams that add up, what is given stays as it is."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from drawn_faces import draw_face
from safetensors.torch import load_file
from talker_fixtures import DM, face_file, save_talker, voice_file

from engine.errors import UserError
from engine.media.audio import read_audio, write_wav
from engine.media.video import write_video
from engine.precision import Int8Linear, PackedLinear, can_int8
from talker_t2av.faces import find_square, read_square
from talker_t2av.generation import BatchedDecoder
from talker_t2av.jobs import prepare_job
from talker_t2av.pipeline import Job, Talk, TalkerPipeline
from talker_t2av.reference import Reference, encode_motion
from talker_t2av.request import Sampling
from talker_t2av.settings import with_preset
from talker_t2av.system import TalkerSystem
from tests.rehearsal.stand_ins import download

TEXT = "set red"


@pytest.fixture(scope="module", params=[(0, 0.0), (1, 0.33)], ids=["plain", "delay and prefix"])
def pipeline(request, tmp_path_factory) -> TalkerPipeline:
    root = tmp_path_factory.mktemp("talker")
    delay, prefix = request.param
    pipeline = TalkerPipeline.from_pretrained(save_talker(root, delay), precision="fp32")
    pipeline.prefix = prefix
    pipeline.files = {
        "voice": str(voice_file(root / "voice.wav")),
        "long": str(voice_file(root / "long.wav", 1.111, seed=3)),
        "face": str(face_file(root / "face.mp4")),
        "talking": str(face_file(root / "talking.mp4", frames=10, sound=True)),
    }
    return pipeline


def jobs_of(pipeline: TalkerPipeline) -> dict[str, Job]:
    files, more = pipeline.files, {"prefix_seconds": pipeline.prefix}
    voice, face = files["voice"], files["face"]
    return {
        "t2av": Job("t2av", TEXT, voice, face, max_seconds=1.0, min_seconds=0.5, **more),
        "tts": Job("tts", TEXT, voice, max_seconds=1.0, min_seconds=0.5, **more),
        "a2v": Job("a2v", TEXT, voice, face, audio=files["long"], **more),
        "v2a": Job("v2a", TEXT, voice, face, video=face, **more),
    }


def test_the_transcript_of_the_reference_precedes_the_text_of_a_continued_one(pipeline):
    job = jobs_of(pipeline)["tts"]
    told = replace(job, reference_text="hello")
    without, prompt = (prepare_job(each, pipeline.system, 100).requests[0].prompt for each in (job, told))
    assert (len(prompt) > len(without)) == (pipeline.prefix > 0) == ("reference_text" not in told.unused)


def test_a_batch_of_all_four_modes_equals_each_job_alone(pipeline):
    jobs = list(jobs_of(pipeline).values())
    t2av, tts, a2v, v2a = pipeline.run(jobs)
    assert t2av.frames.shape[1:] == (32, 32, 3) and len(t2av.wave) == 960 * len(t2av.frames)
    assert t2av.motion.shape == (len(t2av.frames), DM) and 12 <= len(t2av.frames) <= 28
    assert tts.frames is None and len(tts.wave) == 960 * len(tts.speech)
    given = read_audio(pipeline.files["long"], 24_000)
    assert np.array_equal(a2v.wave, given) and len(a2v.frames) == -(-len(given) // 960) and a2v.speech is None
    assert v2a.frames is None and len(v2a.wave) == 15 * 960 and v2a.motion is None
    assert not (a2v.stopped or v2a.stopped)
    for talk, job in zip((t2av, tts, a2v, v2a), jobs):
        assert np.abs(talk.wave).max() <= 1
        alone = pipeline(job)
        np.testing.assert_allclose(alone.wave, talk.wave, atol=1e-4)


def assert_streamed(pipeline: TalkerPipeline, job: Job, whole: Talk) -> None:
    """A stream of the job adds up to its whole audio and pictures."""
    chunks = list(pipeline.stream(job))
    assert len(chunks) > 1
    np.testing.assert_allclose(np.concatenate([chunk.wave for chunk in chunks]), whole.wave, atol=1e-4)
    pictures = [chunk.frames for chunk in chunks if chunk.frames is not None]
    assert bool(pictures) == (whole.frames is not None)
    if pictures:
        frames = np.concatenate(pictures).astype(int)
        saved = np.stack([*whole.pictures()])
        assert frames.shape == saved.shape
        assert np.abs(frames - saved).max() <= 1


@pytest.mark.parametrize("mode", ["t2av", "tts", "a2v", "v2a"])
def test_streamed_chunks_add_up_to_the_offline_result(pipeline, mode):
    job = jobs_of(pipeline)[mode]
    assert_streamed(pipeline, job, pipeline(job))


def test_generated_padding_is_silent(pipeline, monkeypatch):
    """Training fills the last patch of a clip with zeros; the official program also decodes them."""
    step = BatchedDecoder._step

    def padded(*arguments, **more):
        state, patches, token, stop = step(*arguments, **more)
        patches["speech"][:, -1] = 0.02  # of several frames
        return state, patches, token, stop

    monkeypatch.setattr(BatchedDecoder, "_step", padded)
    monkeypatch.setattr(pipeline, "_idle", {})
    for mode in ("tts", "v2a"):
        job = jobs_of(pipeline)[mode]
        size = pipeline.system.model.config.patch_size
        talk = pipeline(job)
        assert torch.equal(talk.speech[size - 1 :: size], pipeline.system.silence.expand(len(talk.speech) // size, -1))
        assert (talk.speech[0] != pipeline.system.silence).all()
        assert_streamed(pipeline, job, talk)
    official = pipeline(replace(jobs_of(pipeline)["tts"], compat="official", prefix_seconds=0.33))
    assert (official.speech[size - 1 :: size] == 0.02).all()


def test_a_job_may_run_while_a_stream_waits(pipeline):
    """Each has its own decoder."""
    job = jobs_of(pipeline)["tts"]
    whole, stream = pipeline(job), pipeline.stream(job)
    first, again = next(stream), pipeline(job)
    np.testing.assert_array_equal(again.wave, whole.wave)
    wave = np.concatenate([first.wave, *(chunk.wave for chunk in stream)])
    np.testing.assert_allclose(wave, whole.wave, atol=1e-4)


@pytest.mark.parametrize("mode", ["t2av", "tts"])
def test_a_long_text_is_generated_in_parts(pipeline, mode):
    """Each part as if it were alone, but with its own seed, and 0.2 s of silence in which the face moves on."""
    job = replace(jobs_of(pipeline)[mode], text="set red now. lay it, so it be", max_seconds=0.8)
    assert len(pipeline(job).wave) <= 0.8 * 24_000  # it is not long
    pipeline.sampling = replace(before := pipeline.sampling, text_bytes=12)
    try:
        talk, again = pipeline(job), pipeline(job)
        assert_streamed(pipeline, job, talk)
    finally:
        pipeline.sampling = before
    seeds = {request.seed for request in prepare_job(job, pipeline.system, 12).requests}
    assert len(seeds) == 3
    first = pipeline(replace(job, text="set red now."))
    np.testing.assert_allclose(talk.wave[: len(first.wave)], first.wave, atol=1e-4)
    assert not talk.wave[len(first.wave) :][: 5 * 960].any() and talk.wave[len(first.wave) + 5 * 960 :].any()
    assert len(talk.wave) == 960 * (len(talk.speech) + 2 * 5) and np.array_equal(talk.wave, again.wave)
    if mode == "t2av":
        assert len(talk.wave) == 960 * len(talk.frames) == 960 * len(talk.motion)
        pause = talk.motion[len(first.frames) - 1 :][:7].diff(dim=0)  # in a line from the last frame to the next part's
        torch.testing.assert_close(pause, pause[:1].expand(6, -1), atol=1e-4, rtol=1e-3)


def test_the_minimum_length_is_rounded_up_and_exceeds_the_estimate_of_the_text(pipeline):
    """Patches have 0.16 s; the text suffices for about three seconds."""
    for seconds, patches in ((2.0, 13), (10.0, 63)):
        job = Job("tts", "hi", pipeline.files["voice"], min_seconds=seconds)
        (request,) = prepare_job(job, pipeline.system, 120).requests
        assert request.min_patches == patches <= request.max_patches


def test_a_stream_returns_audio_before_generation_ends(pipeline):
    """The first audio comes when the decoder has heard its look-ahead, not at the end."""
    job = Job("tts", TEXT, pipeline.files["voice"], max_seconds=3.0, min_seconds=3.0)
    with mock.patch.object(BatchedDecoder, "step", autospec=True, side_effect=BatchedDecoder.step) as step:
        first = next(chunk for chunk in pipeline.stream(job) if len(chunk.wave))
    reach = pipeline.system.speech.decoder.reach[1]
    assert len(first.wave) and step.call_count == reach // 4 + 1 < 19


def test_official_compatibility_keeps_the_prefix(pipeline):
    files = pipeline.files
    job = Job("t2av", TEXT, files["voice"], files["face"], compat="official", prefix_seconds=0.33)
    talk = pipeline(job)
    delay = pipeline.system.model.config.delay
    assert talk.stopped or len(talk.speech) == 4 * (max(5, 3 + delay) - 2 - delay + 15)
    assert len(talk.wave) == 960 * (len(talk.speech) + 8 + 4 * delay) and len(talk.frames) == 8 + len(talk.motion)
    assert_streamed(pipeline, job, talk)
    tts = pipeline(Job("tts", TEXT, files["voice"], compat="official", prefix_seconds=0.42))
    assert len(tts.wave) == 960 * (len(tts.speech) + 10)  # not cut to whole patches


def test_the_voice_may_come_from_the_video_and_the_motion_from_a_file(pipeline, tmp_path):
    files, saved = pipeline.files, tmp_path / "motion.pt"
    job = Job("t2av", TEXT, reference_video=files["talking"], max_seconds=0.64, min_seconds=0.64)
    one = pipeline(job)
    square = find_square(files["talking"], 10)
    torch.save(encode_motion(pipeline.system, read_square(files["talking"], square, 10)), saved)
    two = pipeline(Job(**{**vars(job), "reference_motion": str(saved)}))
    np.testing.assert_allclose(one.wave, two.wave, atol=1e-4)


def test_the_motion_of_a_portrait_is_that_of_the_first_frame_with_a_face(pipeline, tmp_path):
    video = np.tile(draw_face(0.3)[None], (20, 1, 1, 1))
    video[:12] = 0
    write_video(tmp_path / "late.mp4", video, 25)
    reference = Reference(Job("t2av", text="set", reference_video=str(tmp_path / "late.mp4")), pipeline.system)
    frame = next(read_square(tmp_path / "late.mp4", reference.square, 1, reference.square.first))
    assert reference.square.first > 0
    torch.testing.assert_close(reference.motion(1), encode_motion(pipeline.system, [frame]))


def test_unsuitable_files_and_arguments_are_refused(pipeline, tmp_path):
    files = pipeline.files
    long = str(voice_file(tmp_path / "long.wav", 30.5))
    for job, message in (
        (Job("t2av", TEXT, reference_video=files["face"]), "no audio"),
        (Job("a2v", TEXT, reference_video=files["face"], audio=long), "30 s"),
        (Job("tts", "<|end|>", files["voice"]), "token"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(job)
    with pytest.raises(UserError, match="max_second"):
        pipeline.tts(TEXT, files["voice"], max_second=1)


def test_a_codec_that_keeps_the_codes_serves_the_model(tmp_path):
    other = TalkerSystem().motion
    kept = other.digest()
    with torch.no_grad():
        other.encoder.stem.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other", "")
    with pytest.raises(UserError, match="computes other features"):
        _ = TalkerSystem(codecs={"motion": tmp_path / "other"}).motion
    other.save_pretrained(tmp_path / "keeper", "", {"keeps": kept})
    assert TalkerSystem(codecs={"motion": tmp_path / "keeper"}).motion.digest() != kept


def test_a_folder_of_downloaded_files(tmp_path):
    """Everything that download_checkpoints.py fetches in one folder; each part is found by the names of its tensors."""
    folder, voice, face = tmp_path / "all", str(voice_file(tmp_path / "v.wav")), str(tmp_path / "face.png")
    cv2.imwrite(face, np.full((40, 50, 3), 90, np.uint8))
    download(folder, "acoustic_codec/", "large_vox_iter5.pt", "talker-t2av/", "whisperx-vae/model.ckpt")
    with pytest.raises(UserError, match="WavLM"):
        TalkerPipeline.from_pretrained(folder).tts(TEXT, voice)
    download(folder, "wavlm_large_finetune.pth")
    pipeline = TalkerPipeline.from_pretrained(folder, precision="fp32")
    assert pipeline.sampling == Sampling() and len(pipeline.system.stats.mean) == 40
    loaded, saved = pipeline.system.model.state_dict(), load_file(folder / "talker-t2av" / "model.safetensors")
    assert loaded.keys() & saved.keys()  # the others are fused
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded.keys() & saved.keys())
    assert np.isfinite(pipeline.tts(TEXT, voice, max_seconds=0.32).wave).all()  # speech needs no portrait codec
    with pytest.raises(UserError, match="LIA-X"):
        pipeline.t2av(TEXT, voice, face)
    download(folder, "lia-x.pt")
    talk = TalkerPipeline.from_pretrained(folder).t2av(TEXT, voice, face, max_seconds=0.32)
    assert np.isfinite(talk.wave).all() and talk.frames.shape[1:] == (32, 32, 3)


def test_a_long_reference_is_cut_to_30_seconds(pipeline, tmp_path):
    long, same = (str(voice_file(tmp_path / f"{name}.wav", 31.0)) for name in ("long", "same"))
    wave = read_audio(long, 24_000)
    write_wav(Path(same), wave[: 30 * 24_000], 24_000)
    jobs = [Job("tts", TEXT, path, max_seconds=0.32, seed=1) for path in (long, same)]
    cut, exact = (pipeline.prepare(job) for job in jobs)
    assert "31 s" in cut.remarks[0] and not exact.remarks
    torch.testing.assert_close(cut.requests[0].speaker, exact.requests[0].speaker, atol=1e-3, rtol=0)


vnni = pytest.mark.skipif(not can_int8("cpu"), reason="needs an x86 processor with VNNI")


@vnni
def test_the_pipeline_in_int8_is_near_and_repeats_itself(tmp_path):
    folder = save_talker(tmp_path)
    voice = str(voice_file(tmp_path / "voice.wav"))
    face = str(face_file(tmp_path / "face.mp4"))
    job = Job("t2av", "say it", voice, face, min_seconds=0.32, max_seconds=0.32)
    pipelines = [TalkerPipeline.from_pretrained(folder, precision=p) for p in ("fp32", "int8", "int8")]
    model = pipelines[1].system.model
    assert type(model.llm.model.layers[0].mlp.both) is Int8Linear
    assert type(model.speech_cfm.estimator.in_proj) is PackedLinear
    exact, first, again = (pipeline(job) for pipeline in pipelines)
    assert np.array_equal(first.wave, again.wave) and np.array_equal(first.frames, again.frames)
    assert 0 < np.linalg.norm(first.wave - exact.wave) < 0.1 * np.linalg.norm(exact.wave)


def test_sampling_presets():
    stored = Sampling(steps=7, temperature=0.5)
    assert with_preset("fast", stored) == Sampling(steps=4, temperature=0.5, unguided=2)
    assert with_preset("release", stored) == stored

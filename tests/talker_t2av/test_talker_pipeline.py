"""From files to speech and faces: four jobs, streams that add up, what is given stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from talker_fixtures import DM, face_file, save_talker, voice_file

from engine.errors import UserError
from engine.media.audio import read_audio, write_wav
from engine.precision import PackedLinear, can_pack
from talker_t2av.faces import find_square, read_square
from talker_t2av.generation import BatchedDecoder
from talker_t2av.jobs import encode_motion, prepare_job
from talker_t2av.pipeline import Job, Talk, TalkerPipeline
from talker_t2av.request import Sampling
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


@pytest.mark.skipif(not can_pack(torch.float32), reason="weights are packed on x86 processors alone")
def test_weights_are_packed(pipeline):
    model = pipeline.system.model
    layers = model.llm.model.layers[0].mlp.both, model.speech_cfm.estimator.in_proj, model.projector_motion.linear1
    assert {type(layer) for layer in layers} == {PackedLinear}


def jobs_of(pipeline: TalkerPipeline) -> dict[str, Job]:
    files, more = pipeline.files, {"prefix_seconds": pipeline.prefix}
    voice, face = files["voice"], files["face"]
    return {
        "t2av": Job("t2av", TEXT, voice, face, max_seconds=1.0, min_seconds=0.5, **more),
        "tts": Job("tts", TEXT, voice, max_seconds=1.0, min_seconds=0.5, **more),
        "a2v": Job("a2v", TEXT, voice, face, audio=files["long"], **more),
        "v2a": Job("v2a", TEXT, voice, face, video=face, **more),
    }


def test_four_jobs_at_once(pipeline):
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
def test_a_stream_adds_up_to_the_whole(pipeline, mode):
    job = jobs_of(pipeline)[mode]
    assert_streamed(pipeline, job, pipeline(job))


def test_a_job_may_run_while_a_stream_waits(pipeline):
    """Each has a loop of its own, of those that are kept for later jobs."""
    job = jobs_of(pipeline)["tts"]
    whole, stream = pipeline(job), pipeline.stream(job)
    first, again = next(stream), pipeline(job)
    np.testing.assert_array_equal(again.wave, whole.wave)
    wave = np.concatenate([first.wave, *(chunk.wave for chunk in stream)])
    np.testing.assert_allclose(wave, whole.wave, atol=1e-4)


@pytest.mark.parametrize("mode", ["t2av", "tts"])
def test_a_long_text_is_spoken_in_parts(pipeline, mode):
    """Each part as if it were alone, but with its own seed, and 0.2 s of silence in which the face moves on."""
    job = replace(jobs_of(pipeline)[mode], text="set red now. lay it, so it be", max_seconds=0.8)
    assert len(pipeline(job).wave) <= 0.8 * 24_000  # it is not long
    pipeline.sampling = replace(before := pipeline.sampling, text_bytes=12)
    try:
        talk, again = pipeline(job), pipeline(job)
        assert_streamed(pipeline, job, talk)
    finally:
        pipeline.sampling = before
    requests = prepare_job(job, pipeline.system, 12).requests
    assert len(requests) == 3 and len({request.seed for request in requests}) == 3 and requests[0].seed == job.seed
    assert all(torch.equal(request.speaker, requests[0].speaker) for request in requests)
    first = pipeline(replace(job, text="set red now."))
    np.testing.assert_allclose(talk.wave[: len(first.wave)], first.wave, atol=1e-4)
    assert not talk.wave[len(first.wave) :][: 5 * 960].any() and talk.wave[len(first.wave) + 5 * 960 :].any()
    assert len(talk.wave) == 960 * (len(talk.speech) + 2 * 5) and np.array_equal(talk.wave, again.wave)
    if mode == "t2av":
        assert len(talk.wave) == 960 * len(talk.frames) == 960 * len(talk.motion)
        pause = talk.motion[len(first.frames) - 1 :][:7].diff(dim=0)  # in a line from the last frame to the next part's
        torch.testing.assert_close(pause, pause[:1].expand(6, -1), atol=1e-4, rtol=1e-3)


def test_a_stream_speaks_before_it_knows_the_end(pipeline):
    """The first audio comes when the decoder has heard its look-ahead, not at the end."""
    job = Job("tts", TEXT, pipeline.files["voice"], max_seconds=3.0, min_seconds=3.0)
    with mock.patch.object(BatchedDecoder, "step", autospec=True, side_effect=BatchedDecoder.step) as step:
        first = next(chunk for chunk in pipeline.stream(job) if len(chunk.wave))
    reach = pipeline.system.speech.decoder.reach[1]
    assert len(first.wave) and step.call_count == reach // 4 + 1 < 19


def test_official_switches_keep_the_prefix(pipeline):
    files = pipeline.files
    job = Job("t2av", TEXT, files["voice"], files["face"], compat="official", prefix_seconds=0.33)
    talk = pipeline(job)
    delay = pipeline.system.model.config.delay
    assert talk.stopped or len(talk.speech) == 4 * (max(5, 3 + delay) - 2 - delay + 15)
    assert len(talk.wave) == 960 * (len(talk.speech) + 8 + 4 * delay) and len(talk.frames) == 8 + len(talk.motion)
    assert_streamed(pipeline, job, talk)
    tts = pipeline(Job("tts", TEXT, files["voice"], compat="official", prefix_seconds=0.42))
    assert len(tts.wave) == 960 * (len(tts.speech) + 10)  # not cut to whole patches


def test_the_video_may_bring_the_voice_and_a_file_the_motion(pipeline, tmp_path):
    files, saved = pipeline.files, tmp_path / "motion.pt"
    job = Job("t2av", TEXT, reference_video=files["talking"], max_seconds=0.64, min_seconds=0.64)
    one = pipeline(job)
    square = find_square(files["talking"], 10)
    torch.save(encode_motion(pipeline.system, read_square(files["talking"], square, 10)), saved)
    two = pipeline(Job(**{**vars(job), "reference_motion": str(saved)}))
    np.testing.assert_allclose(one.wave, two.wave, atol=1e-4)
    torch.save(torch.zeros(3, DM + 1), saved)
    with pytest.raises(UserError, match="must contain a tensor"):
        pipeline(Job(**{**vars(job), "reference_motion": str(saved)}))


def test_files_are_checked(pipeline, tmp_path):
    files = pipeline.files
    long = str(voice_file(tmp_path / "long.wav", 30.5))
    for job, message in (
        (Job("tts", TEXT, "nowhere.wav"), "nowhere.wav"),
        (Job("t2av", TEXT, files["voice"], files["voice"]), "no video"),
        (Job("t2av", TEXT, reference_video=files["face"]), "has no audio"),
        (Job("a2v", TEXT, reference_video=files["face"], audio=long), "longer than 30 s"),
        (Job("tts", TEXT, files["voice"], prefix_seconds=0.05), "shorter than one patch"),
        (Job("tts", "<|end|>", files["voice"]), "control token"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(job)


def test_folders_are_checked(tmp_path):
    released = tmp_path / "released"
    (released / "acoustic_codec").mkdir(parents=True)
    save_file({"encoder.weight": torch.zeros(1)}, released / "acoustic_codec" / "model.safetensors")
    (released / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"does not contain the Talker-T2AV model.*download_checkpoints") as error:
        TalkerSystem(released)
    assert "\n" not in str(error.value)


def test_a_codec_that_keeps_the_codes_serves_the_model(tmp_path):
    other = TalkerSystem().motion
    kept = other.digest()
    with torch.no_grad():
        other.encoder.stem.weight.mul_(1.1)
    other.save(tmp_path / "other", "")
    with pytest.raises(UserError, match="computes other features"):
        _ = TalkerSystem(codecs={"motion": tmp_path / "other"}).motion
    other.save(tmp_path / "keeper", "", {"keeps": kept})
    assert TalkerSystem(codecs={"motion": tmp_path / "keeper"}).motion.digest() != kept


def test_a_folder_of_downloaded_files(tmp_path):
    """Everything that download_checkpoints.py fetches in one folder; each part is found by the names of its tensors."""
    folder, voice, face = tmp_path / "all", str(voice_file(tmp_path / "v.wav")), str(tmp_path / "face.png")
    cv2.imwrite(face, np.full((40, 50, 3), 90, np.uint8))
    download(folder, "acoustic_codec/", "large_vox_iter5.pt", "talker-t2av/", "whisperx-vae/model.ckpt")
    with pytest.raises(UserError, match=r"mode=tts: .* does not contain the WavLM speaker encoder"):
        TalkerPipeline.from_pretrained(folder).tts(TEXT, voice)
    download(folder, "wavlm_large_finetune.pth")
    pipeline = TalkerPipeline.from_pretrained(folder, precision="fp32")
    assert pipeline.sampling == Sampling() and len(pipeline.system.stats.mean) == 40
    loaded, saved = pipeline.system.model.state_dict(), load_file(folder / "talker-t2av" / "model.safetensors")
    assert loaded.keys() & saved.keys()  # the others are fused
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded.keys() & saved.keys())
    assert np.isfinite(pipeline.tts(TEXT, voice, max_seconds=0.32).wave).all()  # speech needs no portrait codec
    with pytest.raises(UserError, match=r"mode=t2av: .* does not contain the LIA-X checkpoint"):
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
    assert "lasts 31 s: only its first 30 s are used" in cut.remarks[0] and not exact.remarks
    torch.testing.assert_close(cut.request.speaker, exact.request.speaker, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["t2av", "tts"])
def test_the_library_routines_use_the_prefix_alone(pipeline, mode):
    files = pipeline.files
    video = {"reference_video": files["face"]} if mode == "t2av" else {}
    talk = pipeline(Job(mode, TEXT, files["voice"], compat="library", prefix_seconds=0.42, **video))
    prefix = 8 if mode == "t2av" else 10  # only with motion it is cut to whole patches
    assert len(talk.wave) == 960 * (len(talk.speech) + prefix)
    assert talk.frames is None or len(talk.frames) == len(talk.motion) + prefix
    with pytest.raises(UserError, match="reference voice"):  # 0.24 s of audio are too short for the speaker encoder
        pipeline(Job(mode, TEXT, files["voice"], compat="library", prefix_seconds=0.24, **video))


def test_a_list_of_jobs_is_a_batch_and_results_are_shown_without_their_arrays(pipeline):
    voice, face = Path(pipeline.files["voice"]), Path(pipeline.files["face"])
    lengths = {"min_seconds": 0.48, "max_seconds": 0.48}
    jobs = [Job("tts", TEXT, str(voice), seed=seed, **lengths) for seed in (1, 2)]
    for job, talk in zip(jobs, pipeline(jobs)):
        np.testing.assert_allclose(talk.wave, pipeline(job).wave, atol=2e-4)
    talk = pipeline.t2av(TEXT, reference_audio=voice, reference_video=face, **lengths)
    assert len(repr(talk)) < 400


def test_errors_name_the_arguments_of_the_call(pipeline):
    voice = pipeline.files["voice"]
    with pytest.raises(UserError, match=r"^unknown argument 'max_second'; did you mean max_seconds"):
        pipeline.tts(TEXT, voice, max_second=1)
    with pytest.raises(UserError, match=r"requires text$"):
        pipeline.tts(" ", voice)
    with pytest.raises(UserError, match=r"requires reference_audio, a recording of the voice$"):
        pipeline.tts(TEXT, None)

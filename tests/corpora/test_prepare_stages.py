"""The stages: features are what the bundled networks make of a clip, and filters keep and refuse clips as stated."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from corpora.preparation.clip import MachineFault, SourceClip, WorkItem
from corpora.preparation.engines import Transcript
from corpora.preparation.filters import Enhance, Language, SingleSpeaker, Transcription, normalise_text
from corpora.preparation.job import chosen_stages
from corpora.preparation.media import Decode, Face
from corpora.preparation.networks import Crops, Expression, HeardExpression
from corpora.preparation.sources import synthetic
from corpora.preparation.stage_runner import StageRunner
from engine import device
from engine.config import load as load_config
from engine.errors import UserError
from engine.faces.clip import find_faces
from engine.media.audio import read_audio, resample, write_wav
from engine.media.video import read_video, write_video
from engine.nn.ge2e import GE2EEncoder
from hicodit.conditions import encoder_config
from hicodit.conditions.align import avhubert_mouth, mouth_poses
from hicodit.conditions.types import EXPRESSIONS, NO_EXPRESSION
from hicodit.pipeline import HiCoDiTPipeline
from rvq_codec import RVQCodec
from talker_t2av.speaker.encoder import VoiceEncoder
from talker_t2av.system import codec_digests
from tests.corpora.preparation_fakes import read_sample
from tests.drawn_faces import draw_face, talking_head
from whisperx_vae.codec import WhisperXVAE

FRAMES = 30
TALKER = {"speech": "assets/whisperx_vae_speech", "motion": "assets/lia_x_real", "speaker": "assets/voice_tiny"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    wave = np.tile(read_audio("assets/demo/voice.wav", 24_000), 2)
    row = {"id": "a", "text": "hello", "voice": 3, "face": {}, "phonemes": [["h", 0.1, 0.2], ["oU", 0.2, 0.9]]}
    row |= {"expression": "sad", "expressions": ["sad", "sad", "happy"]}  # of the half seconds
    write_video(root / "train" / "a.mp4", np.stack([draw_face(i % 7 / 7) for i in range(FRAMES)]), 25)
    write_wav(root / "train" / "a.wav", wave[: FRAMES * 960], 24_000)
    (root / "train.jsonl").write_text(json.dumps(row) + "\n")
    return root


def test_frames_take_the_memory_of_the_clip_not_of_the_longest_one_allowed(tmp_path):
    """Here the clip has more frames than a block, in which they are read."""
    write_video(tmp_path / "one.mp4", talking_head(75), 25, np.zeros(72_000), 24_000)
    clip = WorkItem(SourceClip("one", "one.mp4"), tmp_path)
    Decode(max_seconds=3600.0)(clip)
    assert np.array_equal(clip.all_frames, read_video(tmp_path / "one.mp4")) and len(clip.frames) == 75
    assert clip.all_frames.base is None  # not the beginning of a larger array


def test_mouths_are_cut_by_given_landmarks(corpus, tmp_path):
    """Landmarks are read from a folder laid out as the source; a smaller `max_side` does not change the crops."""
    landmarks = np.random.default_rng(0).normal((64, 70), 20, (68, 2)) + np.arange(FRAMES)[:, None, None] / 10
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "a.npz", landmarks)
    info = synthetic(corpus).clips("train")[0]
    made = {}
    for side in (128, 64):
        clip = WorkItem(info, corpus)
        for stage in (Decode(max_side=side), Face(face_landmarks=str(tmp_path)), Crops({"kind": "upstream"})):
            stage(clip)
        made[side] = clip.tensors["mouth"].numpy()
    official = avhubert_mouth(read_video(corpus / "train" / "a.mp4", 25), mouth_poses(landmarks))
    assert np.array_equal(made[128], official) and np.array_equal(made[64], official)


def test_the_stages_make_what_the_networks_make(corpus, tmp_path):
    pytest.importorskip("resemblyzer")
    source = synthetic(corpus)
    config = load_config("prepare", [f"source.root={corpus}", "output=x", "device=cpu"])
    pipeline = StageRunner(chosen_stages(config, source), "cpu", source.symbols)
    outcome = pipeline.run(WorkItem(source.clips("train")[0], corpus, tmp_path))
    assert outcome.stage == "", outcome.reason
    assert set(outcome.seconds) == {*pipeline.stages, "write"} and outcome.frames == FRAMES
    facts, made = read_sample(tmp_path)
    assert facts["frames"] == FRAMES and facts["seconds"] == FRAMES / 25 and facts["speaker"] == "3"

    codec = RVQCodec.from_pretrained("assets/rvq_speech")
    ge2e = GE2EEncoder()
    frames = read_video(corpus / "train" / "a.mp4", 25)
    wave = read_audio(corpus / "train" / "a.wav", 24_000)
    track = find_faces([frames], 25)[0]
    sizes = encoder_config({})
    pictures = [6, 12, 17, 23]  # of 30 frames
    sound = torch.from_numpy(wave)[None, None]
    expected = {
        "mouth": torch.from_numpy(sizes.crop_mouth(frames, track)),
        "faces": torch.from_numpy(sizes.crop_faces(frames[pictures], track[pictures])),
        "ge2e": torch.from_numpy(ge2e.embed(read_audio(corpus / "train" / "a.wav", 16_000), 16_000)),
        "tokens": codec.encode(sound)[0].T.to(torch.int16),
        "expression": torch.tensor([2, 2, 1], dtype=torch.uint8),
        "phoneme": torch.tensor([0] * 2 + [1] * 3 + [2] * 17 + [0] * 8, dtype=torch.uint8),
    }
    for name, value in expected.items():
        assert torch.equal(made[name], value) and made[name].dtype == value.dtype, name

    speech, _, speaker = TALKER.values()
    with torch.inference_mode():
        expected = {
            "speech": WhisperXVAE.from_pretrained(speech).encode(sound)[0],
            "speaker": VoiceEncoder.from_pretrained(speaker).embed(resample(sound[0, 0], 24_000, 16_000)),
        }
    for name, value in expected.items():
        assert torch.equal(made[name], value.half()), name
    assert made["motion"].shape == (FRAMES, 40) and made["motion"].dtype == torch.float16
    digests = {"rvq": codec.digest()}
    digests |= dict(zip(("whisperx_vae", "lia_x", "speaker"), codec_digests(**TALKER).values()))
    assert digests.items() <= pipeline.digests.items() and pipeline.digests["face"] == "cascade"


def test_expressions_are_seen_where_the_source_has_no_label(corpus):
    pipeline = HiCoDiTPipeline.from_pretrained()
    every = pipeline.system.encoders.config.picture_every
    clip = WorkItem(SourceClip("a", "train/a.mp4", "train/a.wav"), corpus)
    with torch.inference_mode():
        stages = Decode(), Face(), Expression("assets/hicodit_tiny", torch.device("cpu"), every)
        for stage in stages:
            stage(clip)
    faces = torch.from_numpy(encoder_config({}).crop_faces(clip.frames, clip.track)[::every])
    classes = pipeline.system.window_classes(pipeline.system.read_expressions(faces.permute(0, 3, 1, 2)), FRAMES)
    assert clip.tensors["expression"].dtype == torch.uint8 and len(classes) == 3
    assert clip.tensors["expression"].tolist() == classes.tolist()


def test_features_of_the_released_encoders_are_those_of_their_pictures(corpus, tmp_path):
    small = "{width: 16, layers: 1, heads: 2, hidden: 32, conv_kernel: 8, conv_groups: 4}"
    off = ("crops", "phonemes", "expression", "ge2e", "rvq", "speech", "motion", "speaker")
    words = [f"source.root={corpus}", "output=x", "device=cpu", *(f"stages.{name}.use=false" for name in off)]
    words += ["stages.lip.use=true", "stages.face_identity.use=true", "stages.lip.encoders.folder=null"]
    words += [f"+stages.lip.encoders.lip={small}", "+stages.lip.encoders.identity_blocks=[1,1,1,1]"]
    source = synthetic(corpus)
    pipeline = StageRunner(chosen_stages(load_config("prepare", words), source), "cpu", None)
    outcome = pipeline.run(WorkItem(source.clips("train")[0], corpus, tmp_path))
    assert outcome.stage == "", outcome.reason
    _, made = read_sample(tmp_path)
    clip = WorkItem(SourceClip("a", "train/a.mp4", "train/a.wav"), corpus)
    for stage in (Decode(), Face(), Crops({"kind": "upstream"})):
        stage(clip)
    lip, identity = (pipeline.stages[name].encoders for name in ("lip", "face_identity"))
    with torch.inference_mode():
        expected = lip.lip(clip.tensors["mouth"][None] / 255, torch.tensor([FRAMES]))[0]
        faces = clip.tensors["faces"].permute(0, 3, 1, 2) / 255
        assert torch.equal(made["lip"], expected.half()) and made["lip"].shape == (FRAMES, 16)
        together = identity.identity(faces[None])[0]
    assert made["face_identity"].shape == (4, 512) and made["face_identity"].dtype == torch.float16
    torch.testing.assert_close(made["face_identity"].float().mean(0), together, rtol=1e-3, atol=2e-3)
    assert clip.tensors["mouth"].shape == (FRAMES, 96, 96) and clip.tensors["faces"].shape == (4, 224, 224, 3)
    assert {"lip", "face_identity"} <= set(pipeline.digests)


def test_stages_that_need_the_face_are_refused_without_it(corpus):
    config = load_config("prepare", [f"source.root={corpus}", "output=x", "stages.face.use=false"])
    OmegaConf.update(config, "stages.lip.use", True)
    for name in ("crops", "lip", "expression", "motion"):
        with pytest.raises(UserError, match=rf"stages\.{name}\.use=false"):
            chosen_stages(config, synthetic(corpus))
        OmegaConf.update(config, f"stages.{name}.use", False)
    assert "motion" not in chosen_stages(config, synthetic(corpus))


def heard(expression, recogniser, frames=38):
    """What the stage makes of a clip whose audio counts its half seconds."""
    wave = np.repeat(np.arange(4), 8_000).astype(np.float32)[: frames * 640]
    clip = WorkItem(SourceClip("a", "a.mp4", expression=expression), None, wave16=wave, length=frames)
    HeardExpression(recogniser, seconds=0.5)(clip)
    return clip.tensors["heard_expression"].tolist()


def test_the_heard_expression_is_the_label_or_what_is_heard_in_each_half_second():
    names = ["sad", "other", "happy", "angry"]

    def listen(waves):
        assert all(np.ptp(wave) == 0 for wave in waves)  # half a second of audio for each half second
        return [names[int(wave[0])] for wave in waves]

    listen.name = "a test"
    assert heard(None, listen) == [EXPRESSIONS.index("sad"), NO_EXPRESSION, EXPRESSIONS.index("happy"), 6]
    assert heard("fearful", listen) == [4] * 4
    assert heard(["sad", "happy", "sad", "happy"], listen) == [2, 1, 2, 1]
    assert heard(None, None) == [NO_EXPRESSION] * 4
    assert HeardExpression(listen).digests() == {"heard_expression": "a test"}


def test_worker_processes_share_the_gpus(monkeypatch):
    """Stages and the engines in them, which ask for a device themselves, get the GPU of their process."""
    monkeypatch.setattr(device, "_own_gpu", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    stages = {"mean": {"_target_": "tests.corpora.preparation_fakes.Mean"}}
    for number, index in ((None, 0), (0, 0), (1, 1), (2, 0), (3, 1)):
        runner = StageRunner(stages, "auto", None, number)
        assert runner.stages["mean"].device == device.pick_device("auto") == torch.device("cuda", index)


class Hears:
    def __init__(self, text, language="en", probability=0.9, name="fake"):
        self.name = name
        self.transcript = Transcript(text, language, probability)
        self.calls = 0

    def __call__(self, wave):
        self.calls += 1
        return self.transcript


def clip(text=None):
    made = WorkItem(SourceClip("a"), ".", wave=np.zeros(2400, np.float32), wave16=np.zeros(1600, np.float32))
    made.facts["text"] = text
    return made


def test_clips_of_other_languages_are_refused():
    kept = clip()
    Language(Hears("", "de"), ["en", "de"])(kept)
    assert kept.facts["language"] == "de"
    for heard, message in ((Hears("", "fr"), "language fr"), (Hears("", "en", 0.4), r"probability 0\.40")):
        with pytest.raises(UserError, match=message):
            Language(heard, ["en", "de"])(clip())


@pytest.mark.parametrize(
    ("seconds", "kept"), [([3.0], True), ([3.0, 0.2, 0.2], True), ([3.0, 0.6], False), ([], False)]
)
def test_clips_of_two_or_no_speakers_are_refused(seconds, kept):
    with nullcontext() if kept else pytest.raises(UserError):
        SingleSpeaker(lambda wave: seconds, max_other_seconds=0.5)(clip())


def test_transcription_against_the_text_and_between_recognisers():
    listens = Hears("Hello, there. It's me!")
    both = clip("hello there it's me")
    Language(listens, ["en"])(both)
    Transcription(listens, max_wer=0.0)(both)
    assert listens.calls == 1  # once for all stages
    with pytest.raises(UserError, match=r"WER 0\.50"):
        Transcription(listens)(clip("hello where is me"))
    without = clip()
    Transcription(listens, Hears("hello there its me", name="second"))(without)
    assert without.facts["text"] == "Hello, there. It's me!"
    with pytest.raises(UserError, match="second"):
        Transcription(listens, Hears("good bye", name="second"))(clip())
    with pytest.raises(MachineFault, match="no text"):
        Transcription(listens)(clip())
    assert normalise_text("It's  TWO-fold, yes?") == "it's two fold yes"


def test_enhancement_replaces_the_sound_at_both_rates():
    class Half:
        rate = 16_000

        def __call__(self, wave):
            return wave / 2

    noisy = clip()
    time = np.arange(2400, dtype=np.float32) / 24_000
    noisy.wave = np.sin(2 * np.pi * 440 * time)
    noisy.transcripts["fake"] = Transcript("old", "en", 1.0)
    before = noisy.wave.copy()
    Enhance(Half())(noisy)
    assert len(noisy.wave) == 2400 and len(noisy.wave16) == 1600 and not noisy.transcripts
    assert np.abs(noisy.wave - before / 2)[100:-100].max() < 0.01
    with pytest.raises(UserError, match="enhancer"):
        Enhance(type("Cuts", (), {"rate": 16_000, "__call__": lambda self, wave: wave[1:]})())(noisy)

"""Features of a corpus: batches change nothing, only stale tensors are made again, bad clips do not stop the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.errors import UserError
from engine.media.audio import write_wav
from engine.media.video import write_video
from lia_x import LiaX, LiaXConfig
from scripts import prepare_talker
from talker_t2av.features import (
    FeatureEncoders,
    encode,
    feature_path,
    made_with,
    make_features,
    read_source,
    stale_clips,
    write_stats,
)
from talker_t2av.speaker.encoder import VoiceEncoder, VoiceEncoderConfig
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

FRAMES = (9, 12, 9)


@pytest.fixture(scope="module")
def encoders() -> FeatureEncoders:
    torch.manual_seed(0)
    speech = WhisperXVAEConfig(
        encoder_width=2, hidden=16, latent_dim=4, decoder_width=16, mel_bands=20, whisper_context=50, whisper_heads=2,
        whisper_layers=1,
    )  # fmt: skip
    motion = LiaXConfig(style_dim=8, motion_dim=5, scale=1, size=32, width=4, max_width=8, depth=1)
    voice = VoiceEncoderConfig(bands=20, channels=16, pooled=16, bottleneck=4)
    return FeatureEncoders(WhisperXVAE(speech).eval(), LiaX(motion).eval(), VoiceEncoder(voice).eval())


@pytest.fixture
def corpus(tmp_path):
    """Three clips for training, of 9, 12 and 9 frames."""
    root, rng = tmp_path / "corpus", np.random.default_rng(0)
    for i, count in enumerate(FRAMES):
        stem = root / "train" / f"clip{i}"
        write_wav(stem.with_suffix(".wav"), 0.3 * rng.standard_normal(960 * count), 24_000)
        write_video(stem.with_suffix(".mp4"), rng.integers(0, 255, (count, 48, 48, 3), np.uint8), 25)
    rows = [{"id": f"clip{i}", "text": "a text", "frames": count} for i, count in enumerate(FRAMES)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def made(root, name="clip0"):
    return load_file(feature_path(root, "train", name))


def test_shapes_and_independence_of_the_batch(corpus, encoders):
    clips = [read_source(corpus, "train", f"clip{i}", encoders.speech) for i in (0, 2)]
    wanted = ["speech", "motion", "speaker"]
    both, alone = encode(clips, encoders, wanted), encode(clips[1:], encoders, wanted)
    shapes = {name: tuple(x.shape) for name, x in both[1].items()}
    assert shapes == {"speech": (9, 4), "motion": (9, 5), "speaker": (256,)}
    for name, x in both[1].items():
        assert x.dtype == torch.float16 and not torch.equal(x, both[0][name])
        torch.testing.assert_close(x, alone[0][name], atol=2e-3, rtol=2e-3)


def test_features_are_those_of_the_codecs(corpus, encoders, tmp_path):
    assert [pair for pair in make_features(tmp_path, corpus, "train", ["clip1"], encoders) if pair[1]] == []
    clip = read_source(corpus, "train", "clip1", encoders.speech)
    latents = encoders.speech.encode(torch.from_numpy(clip.wave)[None, None])[0]
    torch.testing.assert_close(made(tmp_path, "clip1")["speech"].float(), latents, atol=2e-3, rtol=2e-3)


def test_only_stale_tensors_are_made_again(corpus, encoders, tmp_path, monkeypatch):
    names = [f"clip{i}" for i in range(3)]
    assert stale_clips(tmp_path, corpus, "train", encoders.digests()) == ["clip0", "clip2", "clip1"]  # short ones first
    list(make_features(tmp_path, corpus, "train", names, encoders))
    assert stale_clips(tmp_path, corpus, "train", encoders.digests()) == []
    before = made(tmp_path)

    torch.manual_seed(1)
    other = replace(encoders, motion=LiaX(encoders.motion.config).eval())
    assert len(stale_clips(tmp_path, corpus, "train", other.digests())) == 3
    monkeypatch.setattr(encoders.speech, "encode", None)  # would fail if it were called
    list(make_features(tmp_path, corpus, "train", names, other))
    after = made(tmp_path)
    assert torch.equal(before["speech"], after["speech"]) and torch.equal(before["speaker"], after["speaker"])
    assert not torch.equal(before["motion"], after["motion"])
    assert made_with(feature_path(tmp_path, "train", "clip0")) == other.digests()


def test_a_decoder_may_change_without_new_features(encoders):
    torch.manual_seed(2)
    digests = encoders.digests()
    state = {name: x.clone() for name, x in encoders.speech.decoder.state_dict().items()}
    for parameter in encoders.speech.decoder.parameters():
        torch.nn.init.normal_(parameter)
    assert encoders.digests() == digests
    encoders.speech.decoder.load_state_dict(state)


def test_bad_clips_are_left_out_and_the_rest_goes_on(corpus, encoders, tmp_path):
    (corpus / "train" / "clip0.mp4").write_bytes(b"not a video")
    write_wav(corpus / "train" / "clip1.wav", np.zeros(960 * 30), 24_000)
    results = dict(make_features(tmp_path, corpus, "train", ["clip0", "clip1", "clip2"], encoders))
    assert results["clip2"] == "" and "video" in results["clip0"] and "1.20 s of sound" in results["clip1"]
    assert made(tmp_path, "clip2") and not feature_path(tmp_path, "train", "clip1").exists()


def test_one_frame_more_or_less_is_cut(corpus, encoders):
    write_wav(corpus / "train" / "clip0.wav", np.zeros(960 * 11 + 5), 24_000)
    clip = read_source(corpus, "train", "clip0", encoders.speech)
    assert len(clip.frames) == 9 and len(clip.wave) == 9 * 960


def test_statistics_are_of_all_training_frames(corpus, encoders, tmp_path):
    with pytest.raises(UserError, match="no features"):
        write_stats(tmp_path, corpus, {})
    list(make_features(tmp_path, corpus, "train", [f"clip{i}" for i in range(3)], encoders))
    stats = json.loads(write_stats(tmp_path, corpus, encoders.digests()).read_text())
    motion = torch.cat([made(tmp_path, f"clip{i}")["motion"].float() for i in range(3)])
    torch.testing.assert_close(torch.tensor(stats["motion_mean"]), motion.mean(0))
    torch.testing.assert_close(torch.tensor(stats["motion_std"]), motion.std(0))
    assert stats["digests"] == encoders.digests()


def test_command_resumes_and_writes_what_training_reads(corpus, encoders, tmp_path, monkeypatch, capsys):
    for name in ("speech", "motion", "speaker"):
        getattr(encoders, name).save(tmp_path / name, "a test")
    out = tmp_path / "out"
    (corpus / "train" / "clip2.wav").unlink()
    arguments = ["prepare_talker", "--corpus", str(corpus), "--out", str(out), "--splits", "train", "--workers", "1"]
    arguments += [word for name in ("speech", "motion", "speaker") for word in (f"--{name}", str(tmp_path / name))]
    monkeypatch.setattr("sys.argv", arguments)
    prepare_talker.main()
    assert "3 clips made, 2 there, 1 left out" in capsys.readouterr().out
    assert [json.loads(line)["id"] for line in (out / "train.jsonl").read_text().splitlines()] == ["clip0", "clip1"]
    assert made(out)["speech"].shape == (9, 4)
    kept = feature_path(out, "train", "clip0").stat().st_mtime_ns
    prepare_talker.main()
    assert "1 clips made, 2 there" in capsys.readouterr().out  # the broken one is tried again
    assert feature_path(out, "train", "clip0").stat().st_mtime_ns == kept

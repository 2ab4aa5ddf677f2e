"""Audio while pictures arrive: it is that of its tokens, depends on no later picture, and needs bounded memory."""

import numpy as np
import pytest
import torch
from drawn_faces import talking_head
from omegaconf import OmegaConf

from engine.batch_runner import run_jobs
from engine.config import compose
from engine.errors import UserError
from hicodit import inference
from hicodit.settings import read_settings
from hicodit.streaming import SpeechStream, StreamSettings

HEAD = talking_head(80)
FAST = {"steps": 2}


def joined(chunks, name):
    return np.concatenate([getattr(chunk, name) for chunk in chunks], -1)


@torch.inference_mode()
def test_audio_equals_offline_decoding_if_the_lookahead_covers_the_receptive_field(pipeline):
    assert pipeline.codec.reach == (7, 7)
    chunks = list(pipeline.stream(HEAD, lookahead=0.4, **FAST))
    tokens = joined(chunks, "tokens")
    wave = joined(chunks, "wave")
    assert tokens.shape == (12, 160) and tokens.max() < 16 and wave.shape == (80 * 960,) and len(chunks) > 15
    offline = pipeline.decode([torch.from_numpy(tokens)])[0]
    np.testing.assert_allclose(wave, offline, atol=2e-5)


@pytest.mark.parametrize("lookahead", [0.04, 0.2, 0.4, 0.8])
def test_chunks_contain_all_tokens_and_no_empty_audio(pipeline, monkeypatch, lookahead):
    monkeypatch.setattr(pipeline.codec, "reach", (7, 20))  # audio of the first hops has to wait
    chunks = list(pipeline.stream(HEAD[:57], lookahead=lookahead, **FAST))
    assert joined(chunks, "tokens").shape == (12, 114) and all(len(chunk.wave) for chunk in chunks)
    assert joined(chunks, "wave").shape == (57 * 960,)


@pytest.mark.parametrize("lookahead", [0.2, 0.4])
def test_audio_waits_only_for_the_lookahead(pipeline, lookahead):
    changed = HEAD.copy()
    changed[50:] = changed[50:, :, ::-1]
    one, other = (list(pipeline.stream(frames, seed=1, lookahead=lookahead, **FAST)) for frames in (HEAD, changed))
    done = 0
    for a, b in zip(one, other):
        done += len(a.wave)
        assert a.needed <= done / 960 + 25 * lookahead + 1e-6
        if a.needed <= 50:
            assert np.array_equal(a.wave, b.wave)
    assert a.needed == 80 and not np.array_equal(joined(one, "wave"), joined(other, "wave"))


def test_streaming_memory_is_bounded_also_without_a_face(pipeline):
    stream = SpeechStream(pipeline, StreamSettings(0.2, window=1, steps=1))
    kept = []
    samples = 0
    for i in range(240):
        frame = HEAD[i % 80] if i < 140 or i >= 200 else np.zeros_like(HEAD[0])
        chunk = stream.push(frame)
        samples += len(chunk.wave) if chunk else 0
        kept.append((len(stream.frames), len(stream.faces), stream.decoder.latest is None))
    samples += len(stream.finish().wave)
    assert samples == 240 * 960
    assert max(frames for frames, _, _ in kept) <= 25 + 25 + 4 and max(found for _, found, _ in kept) <= 10


def test_the_command_line_streams(clip, release, tmp_path, capsys):
    base = compose("infer", [])
    given = {"weights": str(release), "input": str(clip), "output": str(tmp_path), "stream": True, "lookahead": 0.2}
    settings, clips = read_settings(OmegaConf.merge(base, given))
    assert run_jobs(inference.runner_of(settings), clips, settings) == 0
    assert "first audio after " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{clip.stem}.mp4", f"{clip.stem}.wav"]
    with pytest.raises(UserError, match="face"):
        read_settings(OmegaConf.merge(base, given, {"face": "2"}))

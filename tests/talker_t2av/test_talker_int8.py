"""Talker-T2AV in 8 bits: which layers, how near, equal from run to run; and `sampling=fast`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from talker_fixtures import face_file, save_talker, voice_file

from engine.precision import Int8Linear, PackedLinear, can_int8
from talker_t2av.pipeline import Job, TalkerPipeline
from talker_t2av.request import Sampling
from talker_t2av.settings import with_preset

vnni = pytest.mark.skipif(not can_int8("cpu"), reason="needs an x86 processor with VNNI")


@vnni
def test_the_pipeline_in_int8_is_near_and_repeats_itself(tmp_path):
    folder = save_talker(tmp_path)
    voice = str(voice_file(tmp_path / "voice.wav"))
    face = str(face_file(tmp_path / "face.mp4"))
    job = Job("t2av", "say it", voice, face, min_seconds=0.32, max_seconds=0.32)
    talks = []
    pipelines = [TalkerPipeline.from_pretrained(folder, precision=p) for p in ("fp32", "int8", "int8")]
    for pipeline in pipelines:
        talks.append(pipeline(job))
    model = pipelines[1].system.model
    mlp = model.llm.model.layers[0].mlp
    head = model.speech_cfm.estimator
    assert {type(mlp.both), type(mlp.down), type(head.decoder.blocks[0].attn.qkv)} == {Int8Linear}
    assert {type(head.in_proj), type(head.out_proj), type(head.decoder.input_proj)} == {PackedLinear}
    assert model.dtype == torch.float32
    exact, first, again = (talk.wave for talk in talks)
    assert np.array_equal(first, again) and np.array_equal(talks[1].frames, talks[2].frames)
    assert not np.array_equal(first, exact)
    assert np.linalg.norm(first - exact) < 0.1 * np.linalg.norm(exact)


def test_sampling_presets():
    stored = Sampling(steps=7, temperature=0.5)
    assert with_preset("fast", stored) == Sampling(steps=4, temperature=0.5, unguided=2)
    assert with_preset("release", stored) == stored

"""Released encoders: their checkpoints, what they do with batches, order of classes, HiCoDiT composed with them."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from shard_files import write_split
from torch import nn

from engine.errors import UserError
from engine.evaluation.validation import Share, figures_of
from engine.faces.source import FaceSource
from hicodit.conditions import upstream
from hicodit.conditions.arcface import ArcFace
from hicodit.conditions.avhubert import AVHubert, AVHubertConfig
from hicodit.conditions.poster2 import CLASSES, POSTER2, CrossAttention
from hicodit.conditions.types import EXPRESSIONS
from hicodit.conditions.upstream import UpstreamEncoderConfig, UpstreamEncoders
from hicodit.data import HiCoDiTDataset
from hicodit.model import ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import GuidanceScales, SamplerConfig
from hicodit.system import HiCoDiTSystem
from hicodit.task import HiCoDiTTask
from hicodit.validation import nearest_faces, stored_conditions
from rvq_codec import RVQCodec
from tests.rehearsal.stand_ins import official
from tests.releases import write_release
from tests.tiny import HICODIT

SMALL = {"width": 16, "layers": 2, "heads": 2, "hidden": 32, "conv_kernel": 8, "conv_groups": 4}


@pytest.fixture(scope="module")
def small_hubert():
    torch.manual_seed(0)
    return AVHubert(AVHubertConfig(**SMALL)).eval()


@pytest.mark.parametrize("wrapped", ["pre-trained", "fine-tuned", "namespace"])
def test_fairseq_files_are_read_without_fairseq(tmp_path, wrapped):
    """Heads and the place of the norms come from the configuration, which is pickled in several ways."""
    state = official("conditions/avhubert_small")
    said = {"encoder_attention_heads": 4, "layer_norm_first": False}
    content = {"model": state, "cfg": {"model": OmegaConf.create(said)}, "extra": Namespace(a=1)}
    if wrapped == "fine-tuned":
        state = {f"encoder.w2v_model.{key}": value for key, value in state.items()} | {"decoder.x": torch.zeros(2)}
        content = {"model": state, "cfg": OmegaConf.create({"model": {"w2v_args": {"model": said}, "heads": 9}})}
    elif wrapped == "namespace":
        content = {"model": state, "args": Namespace(**said), "cfg": None}
    torch.save(content, tmp_path / "a.pt")
    model = AVHubert.from_pretrained(tmp_path / "a.pt")
    assert (model.config.heads, model.config.norm_first, model.config.layers) == (4, False, 3)
    assert model(torch.rand(1, 3, 96, 96), torch.tensor([3])).shape == (1, 3, 48)


@torch.no_grad()
def test_long_clips_are_encoded_in_windows_that_join(small_hubert, monkeypatch):
    """With the transformer's layers away what is left sees a few frames only, so spans must join without a trace."""
    network = AVHubert(replace(small_hubert.config, layers=0)).eval()
    encoders = UpstreamEncoders(UpstreamEncoderConfig())
    encoders._networks["lip"] = network
    mouth = torch.rand(2, 34, 88, 88)
    frames = torch.tensor([34, 23])
    whole = encoders.lip(mouth, frames)
    monkeypatch.setattr(upstream, "WINDOW_FRAMES", 20)
    monkeypatch.setattr(upstream, "CONTEXT_FRAMES", 6)
    parts = encoders.lip(mouth, frames)
    assert parts.shape == whole.shape
    assert torch.allclose(parts[0], whole[0], atol=1e-5)
    assert torch.allclose(parts[1, :23], whole[1, :23], atol=1e-5)


@torch.no_grad()
def test_arcface_file_and_images(tmp_path):
    torch.manual_seed(0)
    model = ArcFace((1, 1, 1, 1)).eval()
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "backbone.pth")
    loaded = ArcFace.from_pretrained(tmp_path / "backbone.pth")
    faces = torch.rand(1, 2, 3, 112, 112)
    out = loaded(faces)
    assert loaded.blocks == (1, 1, 1, 1) and torch.equal(out, model(faces))
    each = torch.nn.functional.normalize(model.embed(2 * faces[0] - 1), dim=-1)
    assert torch.allclose(out[0], each.mean(0) * 512**0.5, atol=1e-5)
    large = faces.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(loaded(large), out, atol=1e-4)


class Expression(nn.Module):
    """In place of the large classifier: the class is how bright a picture is."""

    def forward(self, faces):
        return torch.nn.functional.one_hot((faces.mean((1, 2, 3)) * 6.99).long(), 7).float() * 9


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    config = UpstreamEncoderConfig(lip=SMALL, identity_blocks=(1, 1, 1, 1))
    system = HiCoDiTSystem(ModelConfig(**HICODIT | {"lip_dim": 16, "face_dim": 512}), config)
    system.encoders._networks["expression"] = Expression()
    return system.eval()


def test_upstream_encoders_condition_the_pipeline(system, release, clip, tmp_path):
    codec = RVQCodec.from_pretrained(release.parent / "codec")
    pipeline = HiCoDiTPipeline(system, codec, SamplerConfig(steps=2), GuidanceScales())
    crops = next(pipeline.all_crops(clip, "largest", strips=[tmp_path / "strip.png"]))
    assert crops.mouth.shape == (40, 96, 96) and crops.voice_faces.shape == (4, 224, 224, 3)
    assert (tmp_path / "strip.png").stat().st_size > 5000
    speech = pipeline.run([crops], [0])[0]
    assert speech.wave.shape == (40 * 960,) and len(speech.expression) == 4


@pytest.fixture(scope="module")
def shards(system, release, tmp_path_factory):
    """A folder with the split `both`: pictures and features of three clips."""
    root = tmp_path_factory.mktemp("shards")
    digest = RVQCodec.from_pretrained(release.parent / "codec").digest()
    g = torch.Generator().manual_seed(0)
    samples = []
    for i, n in enumerate((20, 9, 20)):
        mouth = torch.randint(256, (n, 96, 96), generator=g).to(torch.uint8)
        faces = torch.randint(256, (4, 112, 112, 3), generator=g).to(torch.uint8)
        alone = faces.permute(0, 3, 1, 2)[:, None] / 255
        tensors = {
            "mouth": mouth, "faces": faces, "lip": system.encoders.lip(mouth[None] / 255, torch.tensor([n]))[0].half(),
            "face_identity": system.encoders.identity(alone).half(), "ge2e": torch.rand(256, generator=g),
            "tokens": torch.randint(16, (2 * n, 12), generator=g).to(torch.int16),
            "expression": torch.randint(7, (-(-2 * n // 25),), generator=g).to(torch.uint8),
        }  # fmt: skip
        samples.append(({"key": f"clip{i}", "frames": n, "text": "a text"}, tensors))
    features = {"lip": "1", "face_identity": "2"}
    write_split(root / "both", samples, 2, digests={"rvq": digest} | features)
    return root


def released_task(system, release, shards, **more):
    codec = str(release.parent / "codec")
    return HiCoDiTTask(asdict(system.model.config), asdict(system.encoders.config), codec, str(shards), None, **more)


@pytest.fixture
def calls(monkeypatch):
    """Names of the encoders, as they are called."""
    made = []
    network = UpstreamEncoders.network
    monkeypatch.setattr(
        UpstreamEncoders, "network", lambda self, *which: made.append(which[0]) or network(self, *which)
    )
    return made


def test_a_training_step_from_features_is_that_from_pictures_and_runs_no_encoder(system, release, shards, calls):
    torch.manual_seed(0)
    task = released_task(system, release, shards)
    for parameter in task.parameters():  # gates and heads begin at zero and would hide a difference
        torch.nn.init.normal_(parameter, std=0.1)
    task.system.encoders._networks = system.encoders._networks
    found = []
    for kind, expected in (("tiny", ["lip", "identity"]), ("upstream", [])):
        data = HiCoDiTDataset(shards / "both", release.parent / "codec", kind, augment=False)
        batch = data.collate([data.load(i, torch.Generator().manual_seed(i)) for i in range(3)])
        calls.clear()
        task.zero_grad()
        torch.manual_seed(1)
        losses = task(batch, "model")
        losses["loss"].backward()
        assert calls == expected and set(losses) == {"dse_low", "dse_high", "identity", "loss"}
        found.append((losses, {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}))
    (pictures, a), (features, b) = found
    torch.testing.assert_close(features, pictures, rtol=1e-3, atol=1e-5)
    assert a.keys() == b.keys()  # none of an encoder's
    for name in a:
        assert not a[name].any() or torch.cosine_similarity(a[name].flatten(), b[name].flatten(), 0) > 0.999, name


def test_validation_from_features_equals_that_from_images(system, release, shards):
    codec = release.parent / "codec"
    pipeline = HiCoDiTPipeline(system, RVQCodec.from_pretrained(codec), SamplerConfig(steps=1), GuidanceScales())
    clips = {
        kind: [data.read(i)[1] for i in range(3)]
        for kind in ("tiny", "upstream")
        for data in [HiCoDiTDataset(shards / "both", codec, kind)]
    }
    pictures, features = (stored_conditions(pipeline, clips[kind]) for kind in ("tiny", "upstream"))
    assert torch.equal(features.frames, pictures.frames)
    torch.testing.assert_close(features.lip[0], pictures.lip[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(features.lip[1, :9], pictures.lip[1, :9], rtol=2e-3, atol=2e-3)
    whole = [0, 2]  # of the short clip other pictures are seen: one in five frames
    torch.testing.assert_close(features.identity[whole], pictures.identity[whole], rtol=2e-3, atol=2e-3)
    assert torch.equal(features.expression[2], clips["tiny"][2]["expression"])


def test_the_nearest_stored_face_is_used():
    faces = torch.arange(4)  # of frames 20, 40, 59 and 79
    assert nearest_faces(faces, np.array([0, 29, 31, 49, 50, 68, 70, 99]), 100).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_held_out_losses_need_no_encoder_and_no_recogniser(system, release, shards, calls, tmp_path):
    task = released_task(system, release, shards, validate_splits=["both"], validate_clips=3).eval()
    with torch.no_grad():
        results = figures_of([task.measure(tmp_path, Share())])
    assert results.keys() == {"loss_both", "dse_both"} and calls == []
    assert results["loss_both"] > results["dse_both"] > 0


def test_validation_gives_the_same_figures_for_any_number_of_processes(
    system, release, shards, shares_give_the_same_figures
):
    pytest.importorskip("pystoi")
    quick = {"sampler": {"steps": 1}, "validate_splits": ["both", "both"], "validate_clips": 3}
    shares_give_the_same_figures(released_task(system, release, shards, validate_metrics=["stoi"], **quick).eval())


def test_features_of_other_encoders_are_one_line_in_training_and_inference(system, release, shards, tmp_path):
    """The release takes along which weights made the features that it was trained on."""
    index = shards / "both" / "index.json"
    task = released_task(system, release, shards, index=str(index))
    made = json.loads(index.read_text())["digests"]
    assert task.release_info().config["features"] == {"lip": made["lip"], "face_identity": made["face_identity"]}
    write_release(task, tmp_path / "release")
    weights = load_file(tmp_path / "release" / "model.safetensors")
    assert all(name.startswith("model.") for name in weights)  # not those of the upstream encoders
    other = tmp_path / "index.json"
    other.write_text(json.dumps({"digests": made | {"lip": "0000abcd"}}))
    with pytest.raises(UserError, match="0000abcd"):
        released_task(system, release, shards, index=str(other), init=str(tmp_path / "release"))
    wrong = released_task(system, release, shards, index=str(other), validate_splits=["both"]).eval()
    with pytest.raises(UserError, match="prepared with lip"):
        figures_of([wrong.measure(tmp_path, Share())])
    pipeline = HiCoDiTPipeline.from_pretrained(tmp_path / "release", codec=release.parent / "codec")
    pipeline.system.encoders.expected["face_identity"] = "0000abcd"
    with pytest.raises(UserError, match="0000abcd"):
        pipeline.system.encoders.network("identity", torch.device("cpu"))


def test_a_release_finds_faces_as_the_shards_of_its_training_did(system, release, shards, tmp_path, monkeypatch):
    """It records what the shards name. Inference then does the same, or refuses with what to install."""
    made = json.loads((shards / "both" / "index.json").read_text())["digests"]
    index = tmp_path / "index.json"
    codec = release.parent / "codec"

    def trained(name: str | None) -> Path:
        index.write_text(json.dumps({"digests": made | ({"face": name} if name else {})}))
        write_release(released_task(system, release, shards, index=str(index)), tmp_path / str(name))
        return tmp_path / str(name)

    assert HiCoDiTPipeline.from_pretrained(trained(None), codec=codec).face_source.name == "cascade"
    monkeypatch.setitem(sys.modules, "dlib", None)
    folder = trained("cascade+dlib68")
    with pytest.raises(UserError, match=r"setup\.sh landmarks"):
        HiCoDiTPipeline.from_pretrained(folder, codec=codec)
    chosen = HiCoDiTPipeline.from_pretrained(folder, codec=codec, face_source=FaceSource())
    assert chosen.face_source.name == "cascade"


@torch.no_grad()
def test_a_clip_in_a_batch_is_the_clip_alone(small_hubert):
    mouth = torch.rand(2, 9, 96, 96)
    together = small_hubert(mouth, torch.tensor([9, 5]))
    alone = small_hubert(mouth[1:, :5], torch.tensor([5]))
    assert torch.allclose(together[1, :5], alone[0], atol=1e-5)


@torch.no_grad()
def test_classes_are_put_in_the_order_of_the_expressions():
    faces = torch.rand(1, 3, 96, 96)
    model = POSTER2.from_upstream(official("conditions/poster_v2_7"), CLASSES["raf"])
    own = model.logits(model.normalise(faces))
    given = model(faces)
    assert given.shape == (1, 7) and given.std() > 0
    for i, name in enumerate(CLASSES["raf"]):
        assert torch.allclose(given[:, EXPRESSIONS.index(name)], own[:, i], atol=1e-5)


def test_cross_attention_follows_the_bias_of_relative_positions():
    torch.manual_seed(0)
    attention = CrossAttention(32, 3)
    torch.nn.init.eye_(attention.proj.weight)
    torch.nn.init.zeros_(attention.proj.bias)
    with torch.no_grad():  # only "the image position one to the right of the asking one" is looked at
        attention.relative_position_bias_table.fill_(-1e4)
        attention.relative_position_bias_table[2 * 5 + 1] = 0.0  # rows equal, asking column - seen column = -1
        image = torch.randn(1, 9, 32)
        landmark = torch.zeros(1, 9, 32)
        value = attention.qkv(image)[..., 32:]
        out = attention(image, landmark)
    for row in range(3):
        for column in range(2):
            here = 3 * row + column
            assert torch.allclose(out[0, here], value[0, here + 1], atol=1e-5)

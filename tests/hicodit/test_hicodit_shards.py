"""HiCoDiT from prepared shards: the same items and losses as from the features that the shards were made of."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from shard_files import write_split

from engine.config import CONFIGS
from engine.errors import UserError
from engine.training.trainer import Trainer
from hicodit.data import HiCoDiTDataset, ShardedClips
from hicodit.features import FeatureSplit
from hicodit.task import HiCoDiTTask
from rvq_codec import RVQCodec

MODEL = {
    "codes": 16, "width": 32, "heads": 4, "low_blocks": 1, "high_blocks": 1, "cond_dim": 16, "lip_dim": 32,
    "face_dim": 16, "dropout": 0.0,
}  # fmt: skip
ENCODERS = {"lip_dim": 32, "lip_heads": 4, "face_dim": 16, "face_width": 4, "phonemes": 5}
TRAINER = OmegaConf.to_container(OmegaConf.load(CONFIGS / "trainer/cpu.yaml")) | {
    "steps": 20, "batch_size": 2, "lr": 3e-3, "warmup": 0, "schedule": "constant", "ema_decay": 0.9, "log_every": 1,
    "validate_every": 100, "checkpoint_every": 100,
}  # fmt: skip
FRAMES = [4, 8, 3, 6, 9, 2, 5, 7, 3]


@pytest.fixture(scope="module")
def codec(release):
    return release.parent / "codec"


@pytest.fixture(scope="module")
def data(codec, tmp_path_factory):
    """ROOT/features/train, and the same clips as shards of two in ROOT/shards/train."""
    root = tmp_path_factory.mktemp("data")
    digest, count, total = RVQCodec.from_pretrained(codec).digest(), len(FRAMES), sum(FRAMES)
    g = torch.Generator().manual_seed(0)
    tensors = {
        "mouth": torch.randint(0, 255, (total, 48, 48), generator=g).to(torch.uint8),
        "faces": torch.randint(0, 255, (count, 4, 64, 64, 3), generator=g).to(torch.uint8),
        "ge2e": torch.nn.functional.normalize(torch.rand(count, 256, generator=g), dim=-1),
        "expression": (torch.arange(count) % 7).to(torch.uint8),
        "phoneme": torch.randint(0, 5, (total,), generator=g).to(torch.uint8),
        "frames": torch.tensor(FRAMES, dtype=torch.int32),
    }
    tokens = torch.randint(0, 16, (2 * total, 12), generator=g).to(torch.int16)
    folder = root / "features" / "train"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "visual-00000.safetensors")
    save_file({"tokens": tokens}, folder / f"tokens-{digest}-00000.safetensors")
    clips = [{"id": f"clip{i}", "text": f"text {i}", "voice": i} for i in range(count)]
    (folder / "visual-00000.json").write_text(json.dumps({"clips": clips}))
    samples, start = [], 0
    for i, n in enumerate(FRAMES):
        one_hot = torch.nn.functional.one_hot(tensors["expression"][i].long(), 7).float()
        sample = {
            "mouth": tensors["mouth"][start : start + n],
            "faces": tensors["faces"][i],
            "ge2e": tensors["ge2e"][i],
            "expression": one_hot if i % 2 else tensors["expression"][i].clone(),  # both are in the format
            "phoneme": tensors["phoneme"][start : start + n],
            "tokens": tokens[2 * start : 2 * (start + n)],
            "motion": torch.zeros(n, 40).half(),  # of the other model
        }
        info = {"key": f"clip{i}", "frames": n, "text": f"text {i}"}
        samples.append((info, {k: v.contiguous() for k, v in sample.items()}))
        start += n
    write_split(root / "shards" / "train", samples, 2, digests={"rvq": digest})
    return root


def dataset(data, codec, kind, **shards):
    return HiCoDiTDataset(data / kind / "train", codec, shards=shards or None)


def train(data, codec, kind, run, shards=None, **changes):
    torch.manual_seed(0)
    task = HiCoDiTTask(MODEL, ENCODERS, str(codec), str(data / kind), None, validate_splits=[])
    trainer = Trainer(task, dataset(data, codec, kind, **(shards or {})), TRAINER | changes, run)
    trainer.fit()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return trainer.task.state_dict(), [line["loss"] for line in lines if "loss" in line]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_clips_of_shards_are_those_of_features(data, codec):
    digest = RVQCodec.from_pretrained(codec).digest()
    plain, sharded = FeatureSplit(data / "features" / "train", digest), ShardedClips(data / "shards" / "train", digest)
    assert len(plain) == len(sharded) == 9 and torch.equal(plain.frames, sharded.frames)
    for i in range(9):
        one, two = plain[i], sharded[i]
        for name in ("mouth", "faces", "tokens", "ge2e", "phoneme"):
            a, b = getattr(one, name), getattr(two, name)
            assert torch.equal(a, b) and a.dtype == b.dtype, name
        assert one.expression == two.expression and one.info["id"] == two.info["id"] == f"clip{i}"
        assert two.info["text"] == f"text {i}"


def test_twenty_steps_from_shards_have_the_losses_of_the_direct_path(data, codec, tmp_path):
    state, losses = train(data, codec, "features", tmp_path / "a")
    sharded, same_losses = train(data, codec, "shards", tmp_path / "b")
    assert len(losses) == 20 and losses == same_losses and same(state, sharded)
    other = train(data, codec, "shards", tmp_path / "c", {"window": 2}, steps=2)[1]
    assert other != losses[:2]  # another order, so the comparison can fail


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 600}], ids=["count", "tokens"])
def test_a_run_stopped_within_an_epoch_goes_on_as_if_it_had_not_been(data, codec, tmp_path, changes):
    shards = {"window": 2, "streams": 2}
    state, losses = train(data, codec, "shards", tmp_path / "whole", shards, steps=4, **changes)
    train(data, codec, "shards", tmp_path / "parts", shards, steps=2, **changes)
    resumed, same_losses = train(data, codec, "shards", tmp_path / "parts", shards, steps=4, workers=1, **changes)
    assert losses == same_losses and same(state, resumed)


def test_lengths_are_those_that_the_log_counts(data, codec):
    items = dataset(data, codec, "shards")
    batch = items.collate([items.__getitem__(i, torch.Generator()) for i in range(3)])
    torch.manual_seed(0)
    task = HiCoDiTTask(MODEL, ENCODERS, str(codec), str(data), None)
    assert task.tokens(batch) == int(items.lengths[:3].sum()) == 2 * 12 * sum(FRAMES[:3])
    assert dataset(data, codec, "features").lengths.tolist() == items.lengths.tolist()


def test_what_does_not_fit_is_one_line(data, codec, tmp_path):
    with pytest.raises(UserError, match=r"made with rvq .*, but rvq 00000000 is in use"):
        ShardedClips(data / "shards" / "train", "00000000")
    sample = ({"key": "a", "frames": 3}, {"mouth": torch.zeros(3, 48, 48, dtype=torch.uint8)})
    write_split(tmp_path / "train", [sample], 1, digests={"rvq": "ab"})
    with pytest.raises(UserError, match="clip a has no faces, tokens, ge2e, expression"):
        ShardedClips(tmp_path / "train", "ab")[0]
    with pytest.raises(UserError, match=r"window=0 must be at least 1"):
        dataset(data, codec, "shards", window=0)
    (data / "shards" / "train" / "000003.tar").rename(data / "hidden.tar")
    try:
        with pytest.raises(UserError, match=r"^shard .*000003.tar is missing") as caught:
            train(data, codec, "shards", tmp_path / "run", {"window": 2}, workers=1)
        assert "\n" not in str(caught.value)  # from a worker process, too
    finally:
        (data / "hidden.tar").rename(data / "shards" / "train" / "000003.tar")


def test_packed_batches_have_the_losses_and_gradients_of_padded_ones(data, codec):
    items = dataset(data, codec, "shards")
    batch = items.collate([items.__getitem__(i, torch.Generator().manual_seed(i)) for i in range(6)])
    found = []
    for packed in (False, True):
        torch.manual_seed(0)
        task = HiCoDiTTask(MODEL | {"packed": packed}, ENCODERS, str(codec), str(data), None)
        for parameter in task.parameters():  # gates and heads begin at zero and would hide a difference
            torch.nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(1)
        losses = task(dict(batch), "model")
        losses["loss"].backward()
        found.append((losses, {name: p.grad for name, p in task.named_parameters()}))
    (one, a), (two, b) = found
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(torch.stack([g.norm() for g in a.values()]).norm()))

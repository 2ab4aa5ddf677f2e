"""HiCoDiT from prepared shards: clips, order and resuming within an epoch."""

import pytest
import torch
from made_clips import made_clip
from shard_files import write_split

from engine.errors import UserError
from engine.shards.reader import ShardSplit
from hicodit.data import MAX_HIDDEN, HiCoDiTDataset, augment_mouth, hide_span
from hicodit.task import HiCoDiTTask
from rvq_codec import RVQCodec
from tests.tiny import ENCODERS, HICODIT, fit, same

FRAMES = [7, 11, 6, 9, 12, 5, 8, 10, 6]


@pytest.fixture(scope="module")
def codec(release):
    return release.parent / "codec"


@pytest.fixture(scope="module")
def digests(codec):
    return {"rvq": RVQCodec.from_pretrained(codec).digest()}


@pytest.fixture(scope="module")
def data(digests, tmp_path_factory):
    """ROOT/train: nine clips in shards of two."""
    root = tmp_path_factory.mktemp("data")
    g = torch.Generator().manual_seed(0)
    samples = []
    for i, n in enumerate(FRAMES):
        more = {"motion": torch.zeros(n, 40).half()}  # of the other model
        if i:
            more["phoneme"] = torch.randint(0, 5, (n,), generator=g).to(torch.uint8)
        samples.append(({"key": f"clip{i}", "frames": n, "text": f"text {i}"}, made_clip(n, g, **more)))
    write_split(root / "train", samples, 2, digests=digests)
    return root


def dataset(data, codec, **shards):
    return HiCoDiTDataset(data / "train", codec, shards=shards or None)


def train(data, codec, run, shards=None, **changes):
    torch.manual_seed(0)
    task = HiCoDiTTask(HICODIT, ENCODERS, str(codec), str(data), None, validate_splits=[])
    return fit(task, dataset(data, codec, **(shards or {})), run, **changes)


def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one(data, codec, tmp_path):
    shards = {"window": 2, "streams": 2}
    state, losses = train(data, codec, tmp_path / "whole", shards, steps=4, by_length=True)
    train(data, codec, tmp_path / "parts", shards, steps=2, by_length=True)
    resumed, same_losses = train(data, codec, tmp_path / "parts", shards, steps=4, by_length=True, workers=1)
    assert losses == same_losses and same(state, resumed)


def test_shards_that_do_not_fit_the_model_are_refused_in_one_line(data, codec, digests, tmp_path):
    with pytest.raises(UserError, match="prepared with rvq"):
        HiCoDiTDataset(data / "train", "assets/rvq_speech")
    write_split(tmp_path / "train", [ShardSplit(data / "train")[0]], 1, digests=digests, symbols=["a"] * 8)
    HiCoDiTDataset(tmp_path / "train", codec, phonemes=9)
    with pytest.raises(UserError, match="phonemes=9"):
        HiCoDiTDataset(tmp_path / "train", codec, phonemes=8)
    (tmp_path / "train" / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"^shard .*000000\.tar") as caught:
        train(tmp_path, codec, tmp_path / "run", {"window": 2}, workers=1)
    assert "\n" not in str(caught.value)  # from a worker process, too


@pytest.fixture
def longer(data, digests, tmp_path):
    """Of three clips the second has no video; then a clip that is too short, one of 2.6 s whose frames can be
    distinguished, and one just long enough."""
    split = ShardSplit(data / "train")
    g = torch.Generator().manual_seed(1)
    samples = [split[i] for i in range(3)]
    samples[1] = samples[1][0], {k: x for k, x in samples[1][1].items() if k not in ("mouth", "faces")}
    for key, frames in (("short", 4), ("long", 65), ("least", 5)):
        mouth = torch.arange(frames, dtype=torch.uint8)[:, None, None].expand(-1, 48, 48).contiguous()
        tokens = (torch.arange(2 * frames) % 16)[:, None].expand(-1, 12).to(torch.int16).contiguous()
        samples.append(({"key": key, "frames": frames, "text": key}, made_clip(frames, g, mouth=mouth, tokens=tokens)))
    return write_split(tmp_path / "longer", samples, 2, digests=digests)


def test_clips_that_are_too_short_or_have_no_video_are_skipped_and_counted(longer, codec, capsys):
    clips = HiCoDiTDataset(longer, codec, shards={"window": 1})
    said = capsys.readouterr().err
    assert "1 of 6 samples" in said and "mouth" in said and "5 frames" in said
    assert [clips.read(i)[0]["key"] for i in range(len(clips))] == ["clip0", "clip2", "long", "least"]
    assert clips.blocks.sizes == [1, 1, 2]


def test_longer_clips_are_cropped_at_whole_seconds(longer, codec):
    clips = HiCoDiTDataset(longer, codec, seconds=1, augment=False)
    starts = set()
    for seed in range(20):
        item = clips.load(2, torch.Generator().manual_seed(seed))
        start = round(float(item["mouth"][0, 0, 0]) * 255)
        starts.add(start)
        assert len(item["mouth"]) == len(item["phoneme"]) == 25 and len(item["tokens"]) == 50
        assert item["tokens"][:, 0].tolist() == [t % 16 for t in range(2 * start, 2 * start + 50)]
        assert item["expression"].tolist() == [2 * start // 25, 2 * start // 25 + 1]
    assert starts == {0, 25}
    assert clips.lengths.tolist() == [24 * n for n in (FRAMES[0], FRAMES[2], 25, 5)]
    assert len(clips.load(0, torch.Generator())["mouth"]) == FRAMES[0]


def test_mouth_crops_are_turned_and_mirrored_equally_in_all_frames():
    picture = torch.linspace(0, 1, 48).expand(2, 48, 48)  # brighter to the right
    mirrored = set()
    for seed in range(20):
        shown = augment_mouth(picture, torch.Generator().manual_seed(seed))
        assert torch.equal(shown[0], shown[1])
        assert shown[0].std(0).max() > 1e-4  # the columns of a turned picture are of no single brightness
        mirrored.add(bool(shown[0, :, :24].mean() > shown[0, :, 24:].mean()))
    assert mirrored == {True, False}


def test_a_short_span_of_mouth_crops_is_masked(data, codec):
    for frames in (3, 40):
        mouth = torch.rand(frames, 8, 8)
        for seed in range(20):
            shown = hide_span(mouth, torch.Generator().manual_seed(seed))
            changed = (shown != mouth).flatten(1).any(1).nonzero()[:, 0]
            assert 2 <= len(changed) <= min(MAX_HIDDEN, frames)
            assert changed[-1] - changed[0] == len(changed) - 1
            torch.testing.assert_close(shown[changed], mouth.mean(0).expand(len(changed), 8, 8))
    never, always = (HiCoDiTDataset(data / "train", codec, hide=hide) for hide in (0.0, 1.0))
    one, other = (clips.load(0, torch.Generator().manual_seed(3))["mouth"] for clips in (never, always))
    assert not torch.equal(one, other)

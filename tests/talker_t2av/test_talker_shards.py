"""Talker-T2AV from prepared shards: examples, pairs, order and resuming within an epoch."""

from collections import Counter

import pytest
import torch
from shard_files import write_split
from talker_fixtures import DM, DS, STATS, latents, releases, save_talker

from engine.errors import UserError
from engine.shards.reader import Reading, ShardSplit
from engine.training.batches import MicroBatches
from talker_t2av.data import TalkerExamples, TalkerPairs
from talker_t2av.system import codec_digests
from tests.tiny import same
from whisperx_vae import WhisperXVAE

TEXTS = ["lay blue", "set red now", "bin green at two", "place", "a b c", "with five soon", "now"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """ROOT/releases: codecs; ROOT/shards/train: clips in shards of two."""
    root = tmp_path_factory.mktemp("corpus")
    save_talker(root / "releases")
    made = codec_digests(**codecs(root))
    samples = latents(TEXTS)
    for info, tensors in samples:
        tensors["mouth"] = torch.zeros(info["frames"], 8, 8, dtype=torch.uint8)  # of the other model
    digests = {"rvq": None, "whisperx_vae": made["speech"], "lia_x": made["motion"], "speaker": made["speaker"]}
    write_split(root / "shards" / "train", samples, 2, digests=digests, **STATS)
    return root


def codecs(root):
    return releases(root / "releases")


def index(root):
    return str(root / "shards" / "train" / "index.json")


def examples(root, task="t2av", **reading):
    return TalkerExamples(root / "shards" / "train", task, codecs(root), index(root), Reading(**reading))


def pairs(root, tasks=("t2av", "tts"), **shards):
    return TalkerPairs(root / "shards", tasks=tasks, codecs=codecs(root), stats=index(root), shards=shards)


@pytest.mark.parametrize("task", ["t2av", "tts"])
def test_an_example_holds_the_tokenised_text_and_the_stored_latents(root, task):
    found = examples(root, task)
    stored = ShardSplit(root / "shards" / "train")
    assert len(found) == 7 and torch.equal(found.frames, stored.frames)
    for i in range(7):
        item = found.load(i)
        _, tensors = stored[i]
        assert torch.equal(item["speech"], tensors["speech"].float())
        assert torch.equal(item["speaker"], tensors["speaker"].float())
        whole = len(tensors["motion"]) // 4 * 4 if task == "t2av" else 0
        torch.testing.assert_close(item["motion"], (tensors["motion"][:whole].float() - 0.1) / 0.5)
        prompt = found.words.prompt(TEXTS[i])
        assert item["input_ids"][: len(prompt)].tolist() == prompt and found.info(i)["key"] == f"clip{i}"


def test_every_pair_occurs_once_per_epoch_and_its_shards_are_prefetched(root):
    data = pairs(root, window=2)
    told = []
    data.sets[0].shards.files.prefetch = lambda shards: told.append(("t2av", {s["name"] for s in shards}))
    data.sets[1].shards.files.prefetch = lambda shards: told.append(("tts", {s["name"] for s in shards}))
    batches = MicroBatches(data, 1, 0)
    seen = Counter(index for number in range(7) for index in batches.samples(number))
    assert seen == Counter(range(7)) and data.blocks.sizes == [2, 2, 2, 1]
    used = {0: set(), 1: set()}
    for side, each in enumerate(data.sets):
        read = each.shards.read
        each.shards.read = lambda i, names, side=side, read=read: (used[side].add(f"{i // 2:06d}"), read(i, names))[1]
    batches[3]
    assert all(used[side] <= names for side, (_, names) in enumerate(told))


def test_latents_of_another_codec_are_refused(root, tmp_path):
    codec = WhisperXVAE.from_pretrained(codecs(root)["speech"])
    with torch.no_grad():
        next(codec.in_proj.parameters()).add_(1)
    codec.save(tmp_path / "speech", "card")
    with pytest.raises(UserError, match=r"prepared with whisperx_vae \w+, but whisperx_vae \w+ is in use"):
        TalkerExamples(root / "shards" / "train", codecs=codecs(root) | {"speech": str(tmp_path / "speech")})


def test_clips_with_an_unusable_text_are_skipped_and_counted(root, tmp_path, capsys):
    good, bad = ({"key": f"clip{i}", "text": text, "frames": 8} for i, text in enumerate(("now", "a <|end|> b")))
    zeros = {"speech": torch.zeros(8, DS), "motion": torch.zeros(8, DM), "speaker": torch.zeros(256)}
    write_split(tmp_path / "train", [(bad, zeros), (good, zeros)], 2, **STATS)
    found = TalkerExamples(tmp_path / "train", stats=tmp_path / "train" / "index.json")
    assert same(found.load(0), found.load(1)) and same(found.load(0), found.load(1))
    assert capsys.readouterr().err.count("clip clip1 is left out (1 of 2 so far)") == 1


def test_clips_without_motion_are_skipped_in_t2av_only_and_counted(root, tmp_path, capsys):
    split = ShardSplit(root / "shards" / "train")
    samples = [split[i] for i in range(4)]
    samples[1] = samples[1][0], {name: x for name, x in samples[1][1].items() if name != "motion"}
    write_split(tmp_path / "train", samples, 2, digests={}, **STATS)
    t2av, tts = (TalkerExamples(tmp_path / "train", task, stats=index(root)) for task in ("t2av", "tts"))
    keys = [t2av.info(i)["key"] for i in range(len(t2av))]
    assert all(len(t2av.load(i)["motion"]) for i in range(len(t2av)))
    assert [tts.info(i)["key"] for i in range(4)] == ["clip0", "clip1", "clip2", "clip3"]
    said = capsys.readouterr().err
    assert keys == ["clip0", "clip2", "clip3"] and "1 of 4 samples are skipped, as they have no motion\n" in said

"""Talker-T2AV from prepared shards: examples, pairs and their order, what is skipped."""

import pytest
import torch
from shard_files import write_split
from talker_fixtures import DM, DS, STATS, latents, releases, save_talker

from engine.errors import UserError
from engine.shards.reader import ShardSplit
from engine.training.batches import MicroBatches
from talker_t2av.data import TalkerExamples, TalkerPairs
from talker_t2av.model import MAX_FRAMES
from talker_t2av.system import codec_digests
from tests.tiny import same
from whisperx_vae import WhisperXVAE

TEXTS = ["lay blue", "set red now", "bin green at two", "place", "a b c", "with five soon", "now"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """ROOT/releases: codecs; ROOT/train: clips in shards of two."""
    root = tmp_path_factory.mktemp("corpus")
    save_talker(root / "releases")
    made = codec_digests(**releases(root / "releases"))
    samples = latents(TEXTS)
    for info, tensors in samples:
        tensors["mouth"] = torch.zeros(info["frames"], 8, 8, dtype=torch.uint8)  # of the other model
    digests = {"rvq": None, "whisperx_vae": made["speech"], "lia_x": made["motion"], "speaker": made["speaker"]}
    write_split(root / "train", samples, 2, digests=digests, **STATS)
    return root


@pytest.mark.parametrize("task", ["t2av", "tts"])
def test_an_example_holds_the_tokenised_text_and_the_stored_latents(root, task):
    examples = TalkerExamples(root / "train", task, releases(root / "releases"), root / "train" / "index.json")
    item = examples.load(3)
    _, stored = ShardSplit(root / "train")[3]
    assert torch.equal(item["speech"], stored["speech"].float())
    assert torch.equal(item["speaker"], stored["speaker"].float())
    whole = len(stored["motion"]) // 4 * 4 if task == "t2av" else 0
    torch.testing.assert_close(item["motion"], (stored["motion"][:whole].float() - 0.1) / 0.5)
    prompt = examples.words.prompt(TEXTS[3])
    assert item["input_ids"][: len(prompt)].tolist() == prompt


def test_a_window_of_a_clip_over_30_seconds_is_drawn(tmp_path):
    """Speech and motion of a frame are its number, which tells where a window begins."""
    frames = MAX_FRAMES + 20
    numbers = torch.arange(frames)[:, None].half()
    tensors = {"speech": numbers.expand(-1, DS), "motion": numbers.expand(-1, DM), "speaker": torch.zeros(256).half()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    plain = {"motion_mean": [0.0] * DM, "motion_std": [1.0] * DM}
    write_split(tmp_path / "train", [({"key": "long", "text": "now", "frames": frames}, tensors)], 1, **plain)
    examples = TalkerExamples(tmp_path / "train", stats=tmp_path / "train" / "index.json")
    starts = set()
    for seed in range(5):
        item = examples.load(0, torch.Generator().manual_seed(seed))
        start = int(item["speech"][0, 0])
        starts.add(start)
        for stream in ("speech", "motion"):
            shown = item[stream][:, 0].tolist()
            assert MAX_FRAMES - 4 < len(shown) <= MAX_FRAMES and shown == list(range(start, start + len(shown)))
    assert len(starts) > 1 and max(starts) <= 20


def test_every_pair_occurs_once_per_epoch_and_its_shards_are_prefetched(root, spy):
    codecs = releases(root / "releases")
    data = TalkerPairs(
        root, tasks=["t2av", "tts"], codecs=codecs, stats=root / "train/index.json", shards={"window": 2}
    )
    batches = MicroBatches(data, 1, 0)
    seen = [index for number in range(7) for index in batches.samples(number)]
    assert sorted(seen) == list(range(7)) and data.blocks.sizes == [2, 2, 2, 1]
    for examples in data.sets:
        spy(examples.shards, "read")
        spy(examples.shards.files, "prefetch")
    batches[3]
    for examples in data.sets:
        read = {f"{call.args[0] // 2:06d}" for call in examples.shards.read.call_args_list}
        (shards,) = examples.shards.files.prefetch.call_args.args
        assert read and read <= {shard["name"] for shard in shards}


def test_latents_of_another_codec_are_refused(root, tmp_path):
    codecs = releases(root / "releases")
    codec = WhisperXVAE.from_pretrained(codecs["speech"])
    with torch.no_grad():
        next(codec.in_proj.parameters()).add_(1)
    codec.save_pretrained(tmp_path / "speech", "card")
    with pytest.raises(UserError, match="prepared with whisperx_vae"):
        TalkerExamples(root / "train", codecs=codecs | {"speech": str(tmp_path / "speech")})


def test_clips_with_an_unusable_text_are_skipped_and_counted(root, tmp_path, capsys):
    good, bad = ({"key": f"clip{i}", "text": text, "frames": 8} for i, text in enumerate(("now", "a <|end|> b")))
    zeros = {"speech": torch.zeros(8, DS), "motion": torch.zeros(8, DM), "speaker": torch.zeros(256)}
    write_split(tmp_path / "train", [(bad, zeros), (good, zeros)], 2, **STATS)
    found = TalkerExamples(tmp_path / "train", stats=tmp_path / "train" / "index.json")
    assert same(found.load(0), found.load(1)) and same(found.load(0), found.load(1))
    assert capsys.readouterr().err.count("clip1") == 1


def test_clips_without_motion_are_skipped_in_t2av_only_and_counted(root, tmp_path, capsys):
    split = ShardSplit(root / "train")
    samples = [split[i] for i in range(4)]
    samples[1] = samples[1][0], {name: x for name, x in samples[1][1].items() if name != "motion"}
    write_split(tmp_path / "train", samples, 2, digests={}, **STATS)
    t2av, tts = (
        TalkerExamples(tmp_path / "train", task, stats=root / "train" / "index.json") for task in ("t2av", "tts")
    )
    keys = [t2av.info(i)["key"] for i in range(len(t2av))]
    assert all(len(t2av.load(i)["motion"]) for i in range(len(t2av)))
    assert [tts.info(i)["key"] for i in range(4)] == ["clip0", "clip1", "clip2", "clip3"]
    assert keys == ["clip0", "clip2", "clip3"] and "1 of 4 samples" in capsys.readouterr().err

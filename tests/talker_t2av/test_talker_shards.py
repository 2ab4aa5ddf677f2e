"""Talker-T2AV from prepared shards: the same examples and losses as from the latents that the shards were made of."""

import json
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from shard_files import write_split
from talker_fixtures import DM, DS, LLM, save_talker

from engine.config import CONFIGS
from engine.errors import UserError
from engine.seeding import MicroBatches
from engine.shards.reader import Reading
from engine.training.trainer import Trainer
from talker_t2av.data import Paired, TalkerShards
from talker_t2av.features import FeatureEncoders
from talker_t2av.shards import PreparedShards, digests_of, open_examples, pairs
from talker_t2av.task import TalkerTask
from whisperx_vae import WhisperXVAE

MODEL = {
    "llm": LLM, "speech_dim": DS, "motion_dim": DM, "encoder_layers": 1, "encoder_heads": 2, "head_layers": 2,
    "head_heads": 2, "max_positions": 16, "repeats": 1, "motion_weight": 1.0,
}  # fmt: skip
TRAINER = OmegaConf.to_container(OmegaConf.load(CONFIGS / "trainer/cpu.yaml")) | {
    "steps": 20, "batch_size": 2, "lr": 3e-3, "warmup": 0, "schedule": "constant", "ema_decay": 0.9, "log_every": 1,
    "validate_every": 100, "checkpoint_every": 100,
}  # fmt: skip
TEXTS = ["lay blue", "set red now", "bin green at two", "place", "a b c", "with five soon", "now"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """ROOT: prepared latents and releases; ROOT/shards: the same clips in shards of two."""
    root = tmp_path_factory.mktemp("corpus")
    save_talker(root / "releases")
    made = FeatureEncoders.load(**codecs(root)).digests()
    g, rows, samples = torch.Generator().manual_seed(0), [], []
    (root / "talker" / "train").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        frames = int(torch.randint(6, 25, (), generator=g))
        latents = {
            "speech": torch.randn(frames, DS, generator=g).half(),
            "motion": (0.5 * torch.randn(frames, DM, generator=g) + 0.1).half(),
            "speaker": torch.randn(256, generator=g).half(),
        }
        save_file(latents, root / "talker" / "train" / f"clip{i}.safetensors")
        rows.append({"id": f"clip{i}", "text": text, "frames": frames})
        other = {"mouth": torch.zeros(frames, 8, 8, dtype=torch.uint8)}  # of the other model
        samples.append(({"key": f"clip{i}", "text": text, "frames": frames}, latents | other))
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stats = {"motion_mean": [0.1] * DM, "motion_std": [0.5] * DM}
    (root / "talker" / "stats.json").write_text(json.dumps(stats | {"digests": made}))
    digests = {"rvq": None, "whisperx_vae": made["speech"], "lia_x": made["motion"], "speaker": made["speaker"]}
    write_split(root / "shards" / "train", samples, 2, digests=digests, **stats)
    speech_only = [(info, {k: x[k] for k in ("speech", "speaker")}) for info, x in samples]
    write_split(root / "speech" / "train", speech_only, 4, digests=digests | {"lia_x": None})
    return root


def codecs(root):
    return {name: str(root / "releases" / folder) for name, folder in NAMES.items()}


NAMES = {"speech": "speech", "motion": "motion", "speaker": "voice"}


def sharded(root, task="t2av", **reading):
    index = root / "shards" / "train" / "index.json"
    return PreparedShards(root / "shards" / "train", codecs(root), index, Reading(**reading), task)


def from_shards(root, tasks=("t2av", "tts"), **shards):
    index = root / "shards" / "train" / "index.json"
    return pairs(root / "shards", tasks=tasks, codecs=codecs(root), stats=index, shards=shards)


def train(root, data, run, **changes):
    torch.manual_seed(0)
    task = TalkerTask(MODEL, codecs(root), str(root / "talker" / "stats.json"))
    trainer = Trainer(task, data, TRAINER | changes, run)
    trainer.fit()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return trainer.task.state_dict(), [line["loss"] for line in lines if "loss" in line]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("task", ["t2av", "tts"])
def test_examples_of_shards_are_those_of_latents(root, task):
    plain, shards = TalkerShards(root, "train", task), sharded(root, task)
    assert len(plain) == len(shards) == 7 and torch.equal(plain.frames, shards.frames)
    for i in range(7):
        assert same(*(x.__getitem__(i, torch.Generator().manual_seed(i)) for x in (plain, shards)))
        assert shards.rows[i]["id"] == f"clip{i}" and shards.rows[i]["text"] == TEXTS[i]


def test_twenty_steps_from_shards_have_the_losses_of_the_direct_path(root, tmp_path):
    plain = Paired(TalkerShards(root, "train", "t2av"), TalkerShards(root, "train", "tts"))
    state, losses = train(root, plain, tmp_path / "a")
    same_state, same_losses = train(root, from_shards(root), tmp_path / "b")
    assert len(losses) == 20 and losses == same_losses and same(state, same_state)
    assert train(root, from_shards(root, window=2), tmp_path / "c", steps=2)[1] != losses[:2]


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 24}], ids=["count", "tokens"])
def test_a_run_stopped_within_an_epoch_goes_on_as_if_it_had_not_been(root, tmp_path, changes):
    state, losses = train(root, from_shards(root, window=2, streams=2), tmp_path / "whole", steps=4, **changes)
    train(root, from_shards(root, window=2, streams=2), tmp_path / "parts", steps=2, **changes)
    changes["workers"] = 1
    resumed, found = train(root, from_shards(root, window=2, streams=2), tmp_path / "parts", steps=4, **changes)
    assert losses == found and same(state, resumed)


def test_every_pair_comes_once_an_epoch_and_its_shards_are_announced(root):
    data = from_shards(root, window=2)
    told = []
    data.sets[0].shards.files.prefetch = lambda shards: told.append(("t2av", {s["name"] for s in shards}))
    data.sets[1].shards.files.prefetch = lambda shards: told.append(("tts", {s["name"] for s in shards}))
    batches = MicroBatches(data, 1, 0)
    seen = Counter(index for number in range(7) for _, index in batches.samples(number))
    assert seen == Counter(range(7)) and data.blocks.sizes == [2, 2, 2, 1]
    used = {0: set(), 1: set()}
    for side, examples in enumerate(data.sets):
        original = examples.read
        examples.read = lambda i, side=side, original=original: (used[side].add(f"{i // 2:06d}"), original(i))[1]
    batches[3]
    assert all(used[side] <= names for side, (_, names) in enumerate(told))


def test_blocks_of_the_larger_second_set(root):
    """Pairs are numbered so that the second set is half a turn ahead."""
    few = TalkerShards(root, "train", "t2av", limit=3)
    data = type(from_shards(root))(few, sharded(root, "tts", window=2))
    assert sum(data.blocks.sizes) == len(data) == 7
    borders = {sum(data.blocks.sizes[:i]) for i in range(1, len(data.blocks.sizes))}
    assert borders == {(border - 7 // 2) % 7 for border in (2, 4, 6, 7)}


def test_lengths_are_padded_patches(root):
    data = from_shards(root)
    frames = data.sets[0].frames
    expected = [2 * -(-max(int(frames[i]), int(frames[(i + 3) % 7])) // 4) for i in range(7)]
    assert data.lengths.tolist() == expected
    assert from_shards(root, tasks=["tts"]).lengths.tolist() == [-(-int(n) // 4) for n in frames]


def test_speech_alone_needs_no_motion(root):
    data = pairs(root / "speech", tasks=["tts"], codecs=codecs(root), stats=root / "talker" / "stats.json")
    item = data.sets[0].__getitem__(0, torch.Generator())
    assert same(item, sharded(root, "tts").__getitem__(0, torch.Generator()))
    with pytest.raises(UserError, match="speech/train holds no features of lia_x"):
        pairs(root / "speech", codecs=codecs(root), stats=root / "talker" / "stats.json")


def test_other_codecs_and_wrong_tasks_are_one_line(root, tmp_path):
    wrong = codecs(root)
    save_talker(tmp_path)
    codec = WhisperXVAE.from_pretrained(tmp_path / "speech")
    with torch.no_grad():
        next(codec.in_proj.parameters()).add_(1)
    codec.save(tmp_path / "speech", "card")
    wrong["speech"] = str(tmp_path / "speech")
    with pytest.raises(UserError, match=r"made with whisperx_vae \w+, but whisperx_vae \w+ is in use"):
        PreparedShards(root / "shards" / "train", wrong)
    with pytest.raises(UserError, match="task=av is unknown"):
        pairs(root, tasks=["av"])
    with pytest.raises(UserError, match=r"give .t2av, tts. or .tts."):
        pairs(root, tasks=["t2av"])


def test_a_root_tells_what_it_holds(root):
    assert type(open_examples(root, "train")) is TalkerShards
    assert type(open_examples(root / "shards", "train")) is PreparedShards
    index = root / "shards" / "train" / "index.json"
    assert digests_of(index) == digests_of(root / "talker" / "stats.json")


def test_packed_batches_have_the_losses_and_gradients_of_padded_ones(root):
    items = from_shards(root)
    batch = items.collate([items.__getitem__(i, torch.Generator().manual_seed(i)) for i in range(5)])
    found = []
    for packed in (False, True):
        torch.manual_seed(0)
        task = TalkerTask(MODEL | {"packed": packed}, codecs(root), str(root / "talker" / "stats.json"))
        torch.manual_seed(1)
        losses = task(batch, "model")
        losses["loss"].backward()
        found.append((losses, {name: p.grad for name, p in task.named_parameters()}))
    (one, a), (two, b) = found
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_packed_batch_is_counted_without_padding(root):
    data = from_shards(root)
    data.packed = True
    frames = data.sets[0].frames
    expected = [-(-int(frames[i]) // 4) - (-int(frames[(i + 3) % 7]) // 4) for i in range(7)]
    assert data.lengths.tolist() == expected

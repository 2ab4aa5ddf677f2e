"""Training of Talker-T2AV on prepared latents and on recordings, validation and release."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from shard_files import write_split
from talker_fixtures import DM, DS, LLM, face_file, save_talker

from engine.errors import UserError
from engine.media.ffmpeg import probe
from talker_t2av.data import TalkerPairs
from talker_t2av.losses import TalkerBatch, training_forward
from talker_t2av.model import TalkerT2AV
from talker_t2av.released import EMBEDDINGS
from talker_t2av.task import TalkerTask
from talker_t2av.text import TalkerTokenizer
from tests.releases import write_release

TEXTS = ["lay blue", "set red now", "bin green at two"]
MODEL = {
    "llm": LLM,
    "speech_dim": DS,
    "motion_dim": DM,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "head_layers": 2,
    "head_heads": 2,
    "max_positions": 16,
    "repeats": 1,
    "motion_weight": 1.0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of two splits, a grammar, and releases of random codecs."""
    root = tmp_path_factory.mktemp("corpus")
    g = torch.Generator().manual_seed(0)
    stats = {"motion_mean": [0.1] * DM, "motion_std": [0.5] * DM, "digests": {"whisperx_vae": "abc"}}
    for split in ("train", "seen"):
        samples = []
        for i, text in enumerate(TEXTS):
            frames, key = 14 + 3 * i, f"{split}_{i}"
            latents = {
                "speech": torch.randn(frames, DS, generator=g),
                "motion": 0.5 * torch.randn(frames, DM, generator=g) + 0.1,
                "speaker": torch.randn(256, generator=g),
            }
            info = {"key": key, "text": text, "frames": frames, "source": f"{split}/{key}.mp4"}
            samples.append((info, {k: v.half() for k, v in latents.items()}))
        write_split(root / "shards" / split, samples, 2, **stats)
    (root / "grammar.jsgf").write_text("#JSGF V1.0;\ngrammar g;\npublic <g> = (lay blue) | (set red now);\n")
    save_talker(root / "releases")
    return root


def make_task(root, **changes) -> TalkerTask:
    torch.manual_seed(0)
    arguments = {
        "model": MODEL,
        "codecs": {"speech": str(root / "releases" / "speech"), "motion": "some/motion", "speaker": "some/voice"},
        "stats": str(root / "shards" / "train" / "index.json"),
        "sampling": {"steps": 2, "temperature": 0.5, "guidance": 1.5},
    }
    return TalkerTask(**(arguments | changes))


def a_batch(root) -> dict[str, torch.Tensor]:
    data = TalkerPairs(root / "shards", stats=root / "shards" / "train" / "index.json")
    return data.collate([data.__getitem__(i, torch.Generator().manual_seed(i)) for i in range(3)])


def test_a_batch_is_learned(root):
    task, batch = make_task(root), a_batch(root)
    optimiser = torch.optim.AdamW(task.parts()["model"].parameters(), lr=3e-3)
    found = []
    for step in range(30):
        torch.manual_seed(step)
        losses = task(batch, "model")
        values = {name: float(value.detach()) for name, value in losses.items()}
        assert math.isclose(values["loss"], values["speech"] + values["motion"] + values["stop"], rel_tol=1e-5)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        found.append(values["loss"])
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_half_of_a_batch_is_speech_only(root):
    task, batch = make_task(root), a_batch(root)
    assert (batch["motion_frames"] > 0).tolist() == [True] * 3 + [False] * 3
    embeds = training_forward(task.model, TalkerBatch.of(batch)).embeds
    assert torch.equal(embeds[:, 0], task.model.task_embedding.weight[[1, 1, 1, 0, 0, 0]])
    assert task.tokens(batch) == int(batch["attention_mask"].sum())


def test_dubbing_gives_rows_with_motion_the_tasks_of_given_streams(root, tmp_path):
    dubbing = {"v2a": 0.4, "a2v": 0.3, "drift": 1.5}
    write_release(make_task(root), tmp_path / "two")
    task = make_task(root, model=MODEL | {"tasks": 4}, init=str(tmp_path / "two"), dubbing=dubbing)
    table = task.model.task_embedding.weight
    assert torch.equal(table[2], table[1]) and torch.equal(table[3], table[1])
    batch = {"motion_frames": torch.arange(4000) % 2}
    counts = task._tasks(batch)[1::2].bincount(minlength=4) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.3, 0.4, 0.3]), atol=0.05, rtol=0)
    assert not task._tasks(batch)[::2].any()
    assert torch.isfinite(task(a_batch(root), "model")["loss"])
    with pytest.raises(UserError, match="tasks=4"):
        make_task(root, dubbing=dubbing)


def test_validation_speaks_held_out_sentences(root, tmp_path):
    pytest.importorskip("pocketsphinx")
    checks = {"root": str(root / "shards"), "splits": ["seen"], "clips": 2, "corpus": str(root)}
    checks["grammar"] = str(root / "grammar.jsgf")
    for i in (0, 2):
        face_file(root / "seen" / f"seen_{i}.mp4")
    codecs = {name: str(root / "releases" / name) for name in ("speech", "motion", "speaker")}
    task = make_task(root, validation=checks, codecs=codecs).eval()
    results = task.validate(5, tmp_path)
    assert results.keys() == {"wer_seen", "stopped_seen", "length_error_seen"}
    assert 0 <= results["stopped_seen"] <= 1 and results["length_error_seen"] >= 0
    for name in ("seen_0", "seen_2"):
        assert probe(tmp_path / f"{name}.wav").audio and probe(tmp_path / f"{name}.mp4").video
    assert make_task(root).validate(5, tmp_path) == {}


def test_a_release_holds_all_that_inference_needs(root, tmp_path):
    task = make_task(root)
    write_release(task, tmp_path / "out", {"wer_seen": 0.5})
    model = TalkerT2AV.from_pretrained(tmp_path / "out")
    config = model.release
    assert model.config == task.model.config
    assert config["codecs"] == {
        "speech": str(root / "releases" / "speech"),
        "motion": "some/motion",
        "speaker": "some/voice",
    }
    assert config["motion"]["mean"] == pytest.approx([0.1] * DM) and config["digests"] == {"speech": "abc"}
    assert config["sampling"] == {"steps": 2, "temperature": 0.5, "guidance": 1.5}
    words = TalkerTokenizer.from_pretrained(tmp_path / "out")
    assert words.prompt("lay blue") == task.words.prompt("lay blue")
    assert "wer_seen | 0.5" in (tmp_path / "out" / "README.md").read_text()


def test_frozen_embeddings_leave_the_losses(root):
    batch = a_batch(root)
    found = []
    for changes, frozen in (({}, []), ({"freeze_embeddings": True}, [EMBEDDINGS])):
        task = make_task(root, **changes).train()
        torch.manual_seed(0)
        found.append(task(batch, "model")["loss"])
        found[-1].backward()
        assert [name for name, p in task.model.named_parameters() if p.grad is None] == frozen
    torch.testing.assert_close(*found)


def test_a_warm_start_is_taken(root, tmp_path):
    value = torch.full((32,), 3.0)
    save_file({"patch_encoder.norm.scale": value}, tmp_path / "model.safetensors")
    task = make_task(root, warm_start={"tts": str(tmp_path)})
    assert torch.equal(task.model.speech_patch_encoder.norm.scale.data, value)


def test_low_rank_updates_reach_backbone_and_heads_and_end_up_in_the_weights(root, tmp_path):
    pytest.importorskip("peft")
    write_release(make_task(root), tmp_path / "old")
    task = make_task(root, init=str(tmp_path / "old"))
    start = {k: v.clone() for k, v in task.state_dict().items()}
    task.adapt(2, 4.0)
    learns = [p for p in task.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learns, lr=1e-2)
    batch = a_batch(root)
    for step in range(2):
        torch.manual_seed(step)
        optimiser.zero_grad()
        task(batch, "model")["loss"].backward()
        optimiser.step()
    idle = {n for n, p in task.named_parameters() if "lora_B" in n and not p.any()}
    assert idle == set(), "these layers are used past their module's forward"
    adapted = {n.removeprefix("model.").split(".")[0] for n, p in task.named_parameters() if p.requires_grad}
    assert adapted >= {"llm", "speech_cfm", "motion_cfm", "speech_patch_encoder", "motion_patch_encoder"}
    write_release(task, tmp_path / "new")
    model = TalkerT2AV.from_pretrained(tmp_path / "new")
    losses = []
    for network in (task.model, model):
        task.model = network
        torch.manual_seed(0)
        losses.append(float(task.eval()(batch, "model")["loss"].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # half precision
    task.load_state_dict(start)
    torch.manual_seed(0)
    assert float(task(batch, "model")["loss"].detach()) != pytest.approx(losses[0], rel=2e-3)


def test_a_start_with_other_words_is_refused(root, tmp_path):
    write_release(make_task(root), tmp_path / "old")
    data = json.loads((tmp_path / "old" / "tokenizer.json").read_text())
    data["added_tokens"][-1]["content"] = "<other>"
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="has another vocabulary than"):
        make_task(root, init=str(tmp_path / "old"))


def test_mistakes_are_named(root):
    with pytest.raises(UserError, match="vocab_size=200 has to be 262"):
        make_task(root, model=MODEL | {"llm": LLM | {"vocab_size": 200}})
    with pytest.raises(UserError, match="motion_dim=7, but the motion has 5"):
        make_task(root, model=MODEL | {"motion_dim": 7})


def test_recomputed_and_compiled_blocks_leave_the_losses(root, prepared_blocks_change_nothing):
    prepared_blocks_change_nothing(lambda: make_task(root), a_batch(root))

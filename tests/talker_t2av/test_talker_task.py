"""Training of Talker-T2AV on prepared latents and on recordings, validation and release."""

import pytest
import torch
from shard_files import write_split
from talker_fixtures import DM, DS, LLM, MODEL, STATS, face_file, latents, releases, save_talker
from transformers import Qwen3Config, Qwen3ForCausalLM

from engine.errors import UserError
from engine.evaluation.validation import Share, figures_of
from engine.media.ffmpeg import probe
from engine.shards.reader import ShardSplit
from talker_t2av.data import TalkerPairs
from talker_t2av.model import TalkerT2AV
from talker_t2av.phonemes import SYMBOLS
from talker_t2av.system import codec_digests
from talker_t2av.task import TalkerTask
from talker_t2av.text import TalkerTokenizer
from talker_t2av.upstream import EMBEDDINGS
from tests.releases import write_release
from tests.tiny import batch_of

TEXTS = ["lay blue", "set red now", "bin green at two"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of two splits, a grammar, and releases of random codecs."""
    root = tmp_path_factory.mktemp("corpus")
    for seed, split in enumerate(("train", "seen")):
        digests = {"whisperx_vae": "abc"}
        write_split(root / "shards" / split, latents(TEXTS, f"{split}_", seed), 2, **STATS, digests=digests)
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
    return batch_of(TalkerPairs(root / "shards", stats=root / "shards" / "train" / "index.json"), 3)


def test_validation_speaks_held_out_sentences(root, tmp_path, shares_give_the_same_figures):
    pytest.importorskip("pocketsphinx")
    checks = {"root": str(root / "shards"), "splits": ["seen"], "clips": 2, "corpus": str(root)}
    checks |= {"grammar": str(root / "grammar.jsgf"), "metrics": ["wer", "wer_free", "mcd"]}
    for i in (0, 2):
        face_file(root / "seen" / f"seen_{i}.mp4")
    task = make_task(root, validation=checks, codecs=releases(root / "releases")).eval()
    results = figures_of([task.measure(tmp_path, Share())])
    losses = {f"{name}_seen" for name in ("loss", "loss_speech", "loss_motion", "loss_stop")}
    assert results.keys() == {"wer_seen", "stopped_seen", "length_error_seen"} | losses
    assert results["loss_seen"] == pytest.approx(sum(results[name] for name in losses - {"loss_seen"}), rel=1e-4)
    assert 0 <= results["stopped_seen"] <= 1 and results["length_error_seen"] >= 0
    for name in ("seen_0", "seen_2"):
        assert probe(tmp_path / f"{name}.wav").audio and probe(tmp_path / f"{name}.mp4").video
    assert figures_of([make_task(root).measure(tmp_path, Share())]) == {}
    shares_give_the_same_figures(task)


def test_a_release_holds_all_that_inference_needs(root, tmp_path):
    task = make_task(root)
    write_release(task, tmp_path, {"wer_seen": 0.5})
    model = TalkerT2AV.from_pretrained(tmp_path)
    assert model.config == task.model.config
    codecs = {"speech": str(root / "releases" / "speech"), "motion": "some/motion", "speaker": "some/voice"}
    assert model.release["codecs"] == codecs and model.release["digests"] == {"speech": "abc"}
    assert model.release["motion"]["mean"] == pytest.approx([0.1] * DM)
    assert model.release["sampling"].items() >= {"steps": 2, "temperature": 0.5, "guidance": 1.5}.items()
    assert TalkerTokenizer.from_pretrained(tmp_path).prompt("lay blue") == task.words.prompt("lay blue")
    assert "wer_seen | 0.5" in (tmp_path / "README.md").read_text()


def test_frozen_embeddings_do_not_change_the_losses(root):
    batch = a_batch(root)
    found = []
    for changes, frozen in (({}, []), ({"freeze_embeddings": True}, [EMBEDDINGS])):
        task = make_task(root, **changes).train()
        torch.manual_seed(0)
        found.append(task(batch, "model")["loss"])
        found[-1].backward()
        assert [name for name, p in task.model.named_parameters() if p.grad is None] == frozen
    torch.testing.assert_close(*found)


def test_low_rank_updates_reach_backbone_and_heads_and_end_up_in_the_weights(
    root, tmp_path, low_rank_updates_end_up_in_the_weights
):
    pytest.importorskip("peft")
    write_release(make_task(root), tmp_path / "old")
    task = make_task(root, init=str(tmp_path / "old"))
    learns = low_rank_updates_end_up_in_the_weights(task, a_batch(root), "model", TalkerT2AV.from_pretrained)
    adapted = {name.split(".")[1] for name in learns}
    assert adapted >= {"llm", "speech_cfm", "motion_cfm", "speech_patch_encoder", "motion_patch_encoder"}


def test_the_phoneme_head_learns_phonemes_of_the_frames(root, tmp_path):
    text = {"kind": "phonemes", "language": "en-us"}
    latents = {"speech": torch.randn(17, DS).half(), "speaker": torch.randn(256).half()}
    latents["phoneme"] = torch.arange(17, dtype=torch.uint8) // 3
    samples = [({"key": f"clip_{i}", "text": said, "frames": 17}, latents) for i, said in enumerate(TEXTS)]
    write_split(tmp_path / "shards" / "train", samples, 2, symbols=SYMBOLS)
    model = MODEL | {"phonemes": 1 + len(SYMBOLS)}
    task = make_task(root, model=model, tokenizer=text, guided_layers=[1], head_fraction=0.5)
    stats = root / "shards" / "train" / "index.json"
    few = {"root": tmp_path / "shards", "tasks": ["tts"], "tokenizer": text, "stats": stats}
    pairs = TalkerPairs(**few, phonemes=model["phonemes"])
    batch = pairs.collate([pairs.load(i) for i in range(3)])
    losses = task(batch, "model")
    assert {"phoneme", "alignment"} <= losses.keys()
    losses["loss"].backward()
    assert task.model.head_phoneme.weight.grad.any()
    unlabelled = TalkerPairs(**few, phonemes=0)
    assert not {"phoneme", "alignment"} & task(unlabelled.collate([unlabelled.load(0)]), "model").keys()
    with pytest.raises(UserError, match="phonemes=68"):
        TalkerPairs(**few, phonemes=9)

    write_release(task, tmp_path / "phonemes")
    assert TalkerTokenizer.from_pretrained(tmp_path / "phonemes").language == "en-us"
    start = tmp_path / "phonemes"
    for count in (68, 0, 68):  # a later stage may do without the auxiliary loss, or have it anew
        later = make_task(root, model=model | {"phonemes": count}, init=str(start), tokenizer=text)
        assert hasattr(later.model, "head_phoneme") == bool(count)
        start = tmp_path / f"later_{count}"
        write_release(later, start)


def qwen_folder(folder, **changes):
    """Qwen3 of the tests' size as transformers writes it."""
    torch.manual_seed(5)
    llm = Qwen3Config(**{"rope_theta": 1e6, "tie_word_embeddings": True, **LLM, **changes})
    model = Qwen3ForCausalLM(llm)
    model.save_pretrained(folder)
    return model.state_dict()


def test_training_starts_from_qwen_weights(root, tmp_path):
    state = qwen_folder(tmp_path / "qwen")
    model = make_task(root, warm_start={"qwen": str(tmp_path / "qwen")}).model
    for name, value in model.llm.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    qwen_folder(tmp_path / "other", intermediate_size=32)
    with pytest.raises(UserError, match=r"\[32, 32\]"):
        make_task(root, warm_start={"qwen": str(tmp_path / "other")})


@pytest.fixture
def known(root):
    """The codecs of speech and voices alone, and their digests as an index names them."""
    codecs = releases(root / "releases", "speech", "speaker")
    digests = codec_digests(**codecs)
    return codecs, {"whisperx_vae": digests["speech"], "speaker": digests["speaker"]}


def test_speech_alone_needs_no_motion_codec(root, tmp_path, known):
    """Neither the data set nor validation opens it, and shards without motion are enough."""
    split = ShardSplit(root / "shards" / "train")
    samples = [(info, {k: v for k, v in t.items() if k != "motion"}) for info, t in (split[i] for i in range(3))]
    codecs, digests = known
    write_split(tmp_path / "train", samples, 2, digests=digests)
    codecs = codecs | {"motion": None}
    data = TalkerPairs(tmp_path, tasks=["tts"], codecs=codecs)
    assert len(data.collate([data.load(0)])["speech"]) == 1
    with pytest.raises(UserError, match=r"codecs\.motion"):
        TalkerPairs(tmp_path, tasks=["t2av"], codecs=codecs)
    validation = {"root": str(tmp_path), "splits": ["train"], "clips": 2, "grammar": None, "metrics": []}
    task = make_task(root, stats=None, codecs=codecs, validation=validation, model=MODEL | {"motion_dim": 40})
    assert "stopped_train" in figures_of([task.eval().measure(tmp_path, Share())])
    assert "motion" not in task.release_info().config["codecs"]


def test_motion_codes_without_a_codec_digest_are_accepted(root, tmp_path, capsys, known):
    """Talker-T2AV-Data has motion codes and no pictures: no codec of ours made them."""
    split = ShardSplit(root / "shards" / "train")
    codecs, digests = known
    write_split(tmp_path / "train", [split[i] for i in range(3)], 2, digests=digests, **STATS)
    stats = tmp_path / "train" / "index.json"
    data = TalkerPairs(tmp_path, tasks=["t2av"], codecs=codecs | {"motion": "a/lia-x"}, stats=stats)
    assert len(data) == 3 and "a/lia-x" in capsys.readouterr().out

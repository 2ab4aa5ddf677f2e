"""Training data of the recogniser of GRID's sentences: parts of recordings, and changes that leave the words."""

import numpy as np
import pytest
import torch

from corpora.grid_recogniser import GridRecogniserTask, GridSentences, change
from engine.media.audio import write_wav
from engine.metrics.grid_recogniser import WORDS, GridRecogniser, GridRecogniserConfig, is_sentence
from engine.nn.mel import RATE
from tests import forked
from tests.tiny import same, train

SENTENCES = {
    "bbaf2n": "bin blue at f two now",
    "lbbc1a": "lay blue by c one again",
    "pgwi9s": "place green with i nine soon",
    "prav6s": "place red at v six soon",
    "sbbt3p": "set blue by t three please",
}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Five sentences of s1 whose audio is a tone from 1.0 s to 1.9 s, five words of 0.15 s in it."""
    time = np.arange(3 * RATE) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * time) * ((time >= 1.0) & (time < 1.9))
    for name, text in SENTENCES.items():
        write_wav(tmp_path / "s1" / f"{name}.wav", tone, RATE)
        (tmp_path / "s1" / f"{name}.mp4").write_bytes((tmp_path / "s1" / f"{name}.wav").read_bytes())
        rows = [f"{25_000 + 3_750 * i} {28_750 + 3_750 * i} {word}" for i, word in enumerate(text.split())]
        (tmp_path / "s1" / f"{name}.align").write_text("\n".join(["0 25000 sil", *rows, "47500 74500 sil"]))
    return tmp_path


def test_a_part_holds_the_whole_sentence_and_its_labels(corpus):
    clips = GridSentences(corpus, seconds=1.4)
    assert 0 < len(clips) < len(SENTENCES)
    starts = set()
    for seed in range(5):
        item = clips.load(0, torch.Generator().manual_seed(seed))
        labels = item["labels"]
        power = item["wave"].view(-1, 160).square().mean(1)
        assert len(item["wave"]) == 22_400 and len(labels) == 140
        assert labels[labels > 0].unique_consecutive().tolist() == item["words"].tolist()
        assert [WORDS[i - 1] for i in item["words"]] == clips.clips[0].text.split()
        assert ((labels > 0) == (power > 1e-4)).float().mean() > 0.97
        starts.add(int((labels > 0).nonzero()[0]))
    assert len(starts) > 1


def test_changes_differ_and_give_a_loss_that_training_lowers(corpus):
    torch.manual_seed(0)
    task = GridRecogniserTask({"channels": 16, "hidden": 16}, str(corpus), ["s1"], ["s1"], steps=10)
    clips = GridSentences(corpus)
    batch = clips.collate([clips.load(i % len(clips)) for i in range(4)])
    mel, lengths = change(batch["wave"], 64)
    assert mel.shape == (4, 64, 275) and mel.isfinite().all() and mel.amax() <= 2.5
    assert len(lengths.unique()) == 4 and lengths.min() >= 0.8 and lengths.max() <= 1.25
    losses = [step["recogniser"]["loss"].item() for step in train(task, batch, 20)]
    assert np.isfinite(losses).all() and losses[-1] < 0.6 * losses[0]


def test_training_starts_from_a_release_of_the_same_sizes(corpus, tmp_path):
    GridRecogniser(GridRecogniserConfig(channels=8, hidden=8)).save_pretrained(tmp_path / "release", "card")
    earlier = GridRecogniser.from_pretrained(tmp_path / "release")
    sizes = {"channels": 8, "hidden": 8}
    task = GridRecogniserTask(sizes, str(corpus), ["s1"], ["s1"], steps=1, init=str(tmp_path / "release"))
    assert task.recogniser.training and same(task.recogniser.state_dict(), earlier.state_dict())


def test_the_recipe_ends_in_a_release_that_hears_sentences(corpus):
    words = "trainer.steps=2 trainer.batch_size=2 trainer.warmup=1 trainer.validate_every=2 trainer.checkpoint_every=2"
    sizes = "task.recogniser.channels=8 task.recogniser.hidden=8 task.new_speakers=[s1] data.train.speakers=[s1]"
    settings = f"data.root={corpus} run={corpus}/run experiment=grid_recogniser {words} {sizes}"
    done = forked.run("train.py", *settings.split(), cwd=corpus)
    assert done.returncode == 0, done.stderr
    card = (corpus / "run" / "release" / "README.md").read_text()
    assert "GRID corpus, M. Cooke, J. Barker, S. Cunningham, X. Shao, CC BY 4.0" in card and "test/word_errors" in card
    heard = GridRecogniser.from_pretrained(corpus / "run" / "release").transcribe(np.zeros(RATE, np.float32), RATE)
    assert is_sentence(heard)

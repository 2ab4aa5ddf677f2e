"""Lags of audio against video, on made clips: mouths that open and close, and noise that is loud when they are open.

Axes: T video frames, S picture side, n samples.
"""

import csv

import numpy as np
import pytest
import soundfile
import torch

from corpora.preparation import lags as module
from corpora.preparation.clip import SourceClip
from corpora.preparation.job import _listing_digest
from corpora.preparation.lags import LagMeter, lag_of
from corpora.preparation.media import advance
from corpora.preparation.sources_grid import grid
from corpora.preparation.stage_runner import input_digest
from engine.errors import UserError
from engine.nn.mel import RATE
from scripts import measure_lags
from tests.shard_files import write_split

FRAMES = 75
SIDE = 32


def made(seed, lag):
    """Mouth crops (T, S, S) and audio (n,) that is late by `lag` seconds."""
    rng = np.random.default_rng(seed)
    knots = rng.random(20)
    opening = lambda seconds: np.interp(seconds, np.linspace(-0.3, 3.3, 20), knots)  # noqa: E731
    rows = np.abs(np.linspace(-1, 1, SIDE))[:, None]
    frames = [np.broadcast_to(rows < opening((t + 0.5) / 25), (SIDE, SIDE)) for t in range(FRAMES)]
    mouth = torch.from_numpy(200 - 150 * np.stack(frames)).to(torch.uint8)
    time = np.arange(FRAMES * RATE // 25) / RATE
    wave = opening(time - lag) ** 2 * rng.standard_normal(len(time)) / 10
    return mouth, torch.from_numpy(wave).float()


def test_lags_of_made_clips_are_found():
    true = np.random.default_rng(0).uniform(-0.05, 0.05, 60)
    meter = LagMeter()
    for seed, lag in enumerate(true):
        meter.add(*made(seed, lag))
    found = meter.measure().numpy()
    error = found - (true - np.median(true))
    assert not np.isnan(found).any()
    assert np.abs(error).mean() < 0.006 < 0.02 < np.abs(true).mean()


def test_a_clip_whose_best_lag_is_the_largest_is_unclear():
    bands = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert lag_of(bands, bands) == pytest.approx(0, abs=1e-3)
    assert lag_of(bands, torch.roll(bands, 5, 0)) == pytest.approx(0.05, abs=1e-3)
    assert np.isnan(lag_of(bands, torch.roll(bands, module.REACH, 0)))


def test_lags_are_finer_than_a_spectrum_frame():
    time = torch.arange(300)[:, None] / 100
    rates = torch.tensor([1.3, 2.1, 3.7])
    assert lag_of(torch.sin(6 * rates * time), torch.sin(6 * rates * (time - 0.013))) == pytest.approx(0.013, abs=1e-3)


def test_late_audio_is_moved_to_an_earlier_time():
    wave = np.arange(100)
    assert advance(wave, 0.1, 100)[0] == 10
    assert advance(wave, -0.1, 100)[10] == 0
    assert (advance(wave, 0.0, 100) == wave).all()


def test_grid_moves_audio_and_words_of_the_listed_clips(tmp_path):
    root = tmp_path / "grid"
    (root / "alignments/s1").mkdir(parents=True)
    (root / "s1").mkdir()
    for name in ("bbaf2n", "lbaf2n"):
        (root / f"s1/{name}.mpg").touch()
        (root / f"alignments/s1/{name}.align").write_text("0 25000 sil\n25000 50000 bin\n")
    table = tmp_path / "lags.csv"
    table.write_text("clip,lag\ns1-bbaf2n,0.0400\n")

    def clips(**settings):
        source = grid(root, protocol="seen", **settings)
        return {clip.key: clip for split in source.splits for clip in source.read(split)}

    moved = clips(lags=table)
    assert [moved[f"s1-{name}"].lag for name in ("bbaf2n", "lbaf2n")] == [0.04, 0.0]
    assert moved["s1-bbaf2n"].phonemes[1] == ("bin", pytest.approx(0.96), pytest.approx(1.96))
    assert moved["s1-lbaf2n"] == clips()["s1-lbaf2n"]
    for row in ("s1-bbaf2n,nan", "s1-bbaf2n,-900", "s2-bbaf2n,0.1"):
        table.write_text(f"clip,lag\n{row}\n")
        with pytest.raises(UserError, match=r"lags\.csv"):
            clips(lags=table)


def test_shards_prepared_with_other_lags_are_prepared_again():
    clips = [SourceClip("k", "k.mpg", lag=lag) for lag in (0.0, 0.01, 0.02)]
    assert len({_listing_digest([clip]) for clip in clips}) == 3
    assert len({input_digest(clip) for clip in clips}) == 3


def test_the_table_lists_the_clips_of_all_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_lags, "LEAST", 40)
    true = np.random.default_rng(0).uniform(-0.05, 0.05, 40)
    samples = []
    for seed, lag in enumerate(true):
        mouth, wave = made(seed, lag)
        soundfile.write(tmp_path / f"{seed}.wav", wave.numpy(), RATE)
        samples.append(({"key": f"k{seed}", "frames": FRAMES, "source": f"{seed}.wav"}, {"mouth": mouth}))
    for split, part in (("train", samples[5:]), ("val", samples[:5])):
        write_split(tmp_path / "shards" / split, part, per_shard=20)
    table = tmp_path / "new/lags.csv"
    monkeypatch.setattr("sys.argv", ["measure_lags.py", str(tmp_path / "shards"), str(tmp_path), str(table)])
    measure_lags.main()
    with table.open() as file:
        found = {row["clip"]: float(row["lag"]) for row in csv.DictReader(file)}
    assert "40 clips" in capsys.readouterr().out
    assert np.corrcoef([found[f"k{seed}"] for seed in range(40)], true)[0, 1] > 0.9
    monkeypatch.setattr(measure_lags, "LEAST", 41)
    with pytest.raises(UserError, match="40 clips"):
        measure_lags.main()

import json

import numpy as np
import pytest
import torch

from engine.errors import UserError, exit_process
from engine.evaluation.validation import Share, figures_of
from engine.media.audio import write_wav
from engine.shards.recordings import SpeechCrops
from engine.training import distributed
from rvq_codec import codebooks
from rvq_codec.latent_targets import SpeechFeatures
from rvq_codec.task import RVQCodecTask
from tests.forked import run_group
from tests.releases import write_release
from tests.tiny import DISCRIMINATORS, RVQ, train


def make_task(**changes):
    torch.manual_seed(0)
    arguments = {
        "codec": RVQ,
        "mel": {"n_mels": [10, 40], "windows": [128, 512]},
        "weights": {"mel": 15.0, "stft": 1.0, "spectrum": 2.0, "disturbance": 1.0, "feature": 2.0, "adversarial": 1.0},
        **DISCRIMINATORS,
        "pool": 500,
    }
    return RVQCodecTask(**(arguments | changes))


WAVES = {"wave": 0.1 * torch.randn(4, 1, 2400, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "train").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i, samples in enumerate((9600, 2880)):
        write_wav(tmp_path / "train" / f"c{i}.wav", 0.1 * rng.standard_normal(samples), 24_000)
        rows.append({"id": f"c{i}"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_decoder_only_training_keeps_the_codes_of_a_release(the_decoder_alone_goes_on_from_a_release):
    sizes = RVQ | {"levels": 2}
    the_decoder_alone_goes_on_from_a_release(make_task, WAVES, torch.randn(1, 1, 2400), sizes, "levels=3")


def test_validation_on_clips(corpus, tmp_path, shares_give_the_same_figures):
    task = make_task(validation={"root": corpus, "splits": ["train"], "clips": 2}).eval()
    results = figures_of([task.measure(tmp_path, Share())])
    assert 1 <= results["train/perplexity"] <= 16 and 0 < results["train/used"] <= 1 and results["train/mel"] > 0
    assert (tmp_path / "train-decoded.wav").is_file()
    shares_give_the_same_figures(task)


def test_the_first_levels_encode_the_envelope():
    features = {"mel_bands": 8, "low_samples": 4, "until": 1, "envelope_levels": 1, "keep": 1.0}
    task = make_task(features=features, quantizer_start=1, gan_start=None)
    logs = train(task, WAVES, 5)
    assert all("features" in log["generator"] for log in logs)
    task.begin_step(5)
    first, second = (level.in_project.weight_v for level in task.codec.quantizer.quantizers[:2])
    assert not first[:, 8:].any() and first[:, :8].all() and second.all()


def test_crops_at_other_speeds_move_the_pitch(tmp_path):
    (tmp_path / "train").mkdir()
    wave = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(48_000) / 24_000)
    write_wav(tmp_path / "train" / "a.wav", wave.astype(np.float32), 24_000)
    (tmp_path / "train.jsonl").write_text('{"id": "a", "text": ""}')
    crops = SpeechCrops(tmp_path, samples=24_000, speed=0.1)
    draws = [crops.load(0, torch.Generator().manual_seed(seed))["wave"] for seed in range(40)]
    assert {len(draw[0]) for draw in draws} == {24_000}
    found = {int(torch.fft.rfft(draw[0]).abs().argmax()) for draw in draws}  # bins of 1 Hz
    assert found == {900, 950, 1000, 1050, 1100}
    peaks = [float(draw.abs().max()) for draw in draws]  # of 0.3, at most 6 dB less
    assert 0.14 < min(peaks) < 0.2 < max(peaks) < 0.32
    for wrong in ({"speed": 1.0}, {"gain_db": -6.0}):
        with pytest.raises(UserError, match=f"data.train.{next(iter(wrong))}"):
            SpeechCrops(tmp_path, **wrong)


def test_speech_features_follow_the_wave():
    features = SpeechFeatures(20, 12, 24_000, 480)
    time = torch.arange(24_000) / 24_000
    low, high = (0.2 * torch.sin(2 * np.pi * f * time)[None, None] for f in (200, 3000))
    both = features(torch.cat([low, high]))
    assert both.shape == (2, 32, 50)
    loudest = both[:, :20, 5:-5].mean(2).argmax(1)
    assert loudest[0] < loudest[1]
    samples = both[0, 20:, 5:-5].T.flatten()  # 600 Hz; sample j of frame t is the wave at 480 t + 40 (j + 1/2)
    at = 40 * (torch.arange(len(samples)) + 60 + 0.5) / 24_000
    expected = torch.sin(2 * np.pi * 200 * at)
    assert torch.corrcoef(torch.stack([samples, expected]))[0, 1] > 0.99
    assert both[1, 20:, 5:-5].abs().max() < 0.2 * both[0, 20:, 5:-5].abs().max()


def test_a_start_from_a_release_skips_the_stages_of_a_new_codec(tmp_path):
    write_release(make_task(), tmp_path / "release")
    task = make_task(init=str(tmp_path / "release"), codec=RVQ | {"quantizer_dropout": 0.1})
    assert task.codec.quantizer.dropout == 0.1
    features = {"mel_bands": 8, "low_samples": 4, "until": 9, "envelope_levels": 1}
    again = make_task(init=str(tmp_path / "release"), features=features, quantizer_start=9, gan_start=None)
    assert "codebook" in train(again, WAVES, 1)[0]["generator"]  # the stages of a new codec are over


def test_another_decoder_is_new_with_decoder_only_and_an_error_without(tmp_path):
    sizes = RVQ | {"decoder": "conv", "conv_width": 16, "conv_ratios": [5, 4, 3]}
    write_release(make_task(codec=sizes), tmp_path / "release")
    wider = sizes | {"conv_width": 32}
    task = make_task(init=str(tmp_path / "release"), codec=wider, decoder_only=True)
    assert task.codec.config.conv_width == 32
    with pytest.raises(UserError, match="conv_width"):
        make_task(init=str(tmp_path / "release"), codec=wider)


def rank(folder):
    """One of two processes with other waves each, whose sums on a GPU would differ in the last digits."""
    distributed.init("cpu")
    number = distributed.rank()
    task = make_task(quantizer_start=1, gan_start=None).train()
    kmeans = codebooks.kmeans
    codebooks.kmeans = lambda *arguments: kmeans(*arguments) + 1e-3 * number
    counted = []
    for step in range(3):
        task.begin_step(step)
        if step == 1:
            books = [level.codebook.weight.clone() for level in task.codec.quantizer.quantizers]
        batch = {"wave": WAVES["wave"] * (1 + number)}
        task(batch, "discriminator")
        if batch["_run"]["quantized"] is not None:
            counted.append(codebooks.count_codes(batch["_run"]["quantized"].codes, task.codec.codes))
    torch.save({"own": sum(counted), "counts": task.counts, "books": books}, folder / f"{number}.pt")
    exit_process(0)


def test_ranks_count_codes_together_and_have_equal_code_books(tmp_path):
    run_group(tmp_path, 2, rank, tmp_path)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert not torch.equal(one["own"], two["own"])
    for each in (one, two):
        assert torch.equal(each["counts"], one["own"] + two["own"])
    assert all(map(torch.equal, one["books"], two["books"]))

"""Claims put to the test: intervals over seeds and clips, losses with the same masks, models that are derived."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_task import batch_of, make_task

from benchmarks import trained
from benchmarks.ablations import DERIVED, IDENTITY, SHARED, VARIANTS, derive, take, train_and_measure
from benchmarks.paired import compare, correlation, estimate, line, ratio
from benchmarks.per_clip import losses
from benchmarks.trained import make_once, measure_once, train
from engine.config import compose
from engine.errors import UserError
from hicodit.data import HiCoDiTDataset
from hicodit.model import ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.system import HiCoDiTSystem

VOICES = [str(i // 2) for i in range(40)]


def test_a_figure_of_weights_is_that_of_repeated_clips():
    pairs, counts = np.random.default_rng(0).normal(size=(5, 2)) + 3, np.array([2, 0, 1, 3, 1])
    repeated = np.repeat(pairs, counts, 0)
    assert ratio(pairs, counts[None])[0] == pytest.approx(repeated[:, 0].sum() / repeated[:, 1].sum())
    assert correlation(pairs, counts[None])[0] == pytest.approx(np.corrcoef(repeated.T)[0, 1])
    assert correlation(np.ones((3, 2)), np.ones((1, 3)))[0] == 0


def test_the_interval_holds_the_true_mean_in_about_95_of_100_draws():
    """Voices and seeds both vary; an interval over clips alone holds it in 60 of 100."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(60):
        voices, seeds = rng.normal(size=20).repeat(2), rng.normal(size=(3, 1)) * 0.5
        values = 5 + voices + seeds + 0.1 * rng.normal(size=(3, 40))
        mean, half = estimate(ratio, np.stack([values, np.ones_like(values)], -1), VOICES)
        inside += abs(mean - 5) < half
    assert inside >= 54


def test_a_paired_difference_is_free_of_what_both_share():
    values = np.random.default_rng(2).normal(size=(3, 40)) * 10
    one = np.stack([values, np.ones_like(values)], -1)
    two = one + [0.5, 0.0]
    two[:, 7] = np.nan  # a clip that does not count
    mean, half = estimate(ratio, two, VOICES, minus=one)
    assert mean == pytest.approx(0.5) and half < 1e-9
    assert estimate(ratio, one, VOICES)[1] > 1
    assert np.isnan(estimate(ratio, one, ["0"] * 40)[0])


def test_rows_compare_each_system_with_the_first():
    clips = {str(i): (float(i % 3), 1.0) for i in range(6)}
    more = {clip: (a + 1, b) for clip, (a, b) in clips.items()} | {"5": None}
    rows = compare(
        {"a": [{"x": clips}], "b": [{"x": more}]}, {"x": (ratio, "lower"), "y": (ratio, "lower")}, {c: c for c in clips}
    )
    assert rows[1]["x_minus_a"] == [1.0, 0.0] and "x_minus_a" not in rows[0] and line(rows[0]).startswith("a: x 1 +- ")


def test_every_model_meets_the_same_masks_whatever_its_batch(corpus, release):
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision="fp32")
    data = HiCoDiTDataset(corpus / "seen", release.parent / "codec")
    samples = [data.read(i) for i in range(6)]
    together, pair = losses(pipeline, samples), losses(pipeline, samples[3:5])
    assert together["dse_high"][3:5] == [pytest.approx(a, rel=1e-5) for a in pair["dse_high"]]
    assert together["dse_low"] != together["dse_high"] and len(together["identity_gain_low"]) == 6
    assert any(abs(gain) > 1e-4 for gain, _ in together["expression_gain_high"])
    assert all(abs(gain) < 1e-6 for gain, _ in together["expression_gain_low"])  # levels 1-2 do not see it


def test_without_the_identity_loss_the_score_network_learns_the_same(corpus, release):
    """So `DERIVED` need not train it again."""
    gradients = []
    for weight in (100.0, 0.0):
        task = make_task(corpus, release, identity_weight=weight)
        torch.manual_seed(0)
        task(batch_of(corpus, release), "model")["loss"].backward()
        gradients.append({name: p.grad for name, p in task.system.named_parameters() if p.grad is not None})
    full, without = gradients
    assert {n for n in full if n not in without or not torch.equal(full[n], without[n])} == {
        n for n in full if n.startswith(IDENTITY)
    }
    assert VARIANTS[next(iter(DERIVED))] == ["task.identity_weight=0"]


def test_a_derived_release_has_untrained_identity_parts_alone(release, tmp_path):
    trained, begin = HiCoDiTSystem.from_pretrained(release), HiCoDiTSystem.from_pretrained(release)
    for parameter in begin.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    begin.save(tmp_path / "begin", "a test")
    derive(release, tmp_path / "begin", tmp_path / "derived")
    made = HiCoDiTSystem.from_pretrained(tmp_path / "derived")
    for name, value in made.state_dict().items():
        expected = begin if name.startswith(IDENTITY) else trained
        assert torch.equal(value, expected.state_dict()[name]), name
    assert made.release["sampler"] == trained.release["sampler"]
    take(begin, trained, SHARED)
    same = {n.split(".")[1] for n, v in begin.state_dict().items() if torch.equal(v, trained.state_dict()[n])}
    assert same == {"lip", "expression"}


def test_what_has_to_be_trained_cannot_be_taken_from_a_trained_release(tmp_path):
    args = Namespace(trained=tmp_path, runs=tmp_path)
    with pytest.raises(UserError, match="cannot be made flat: only no_identity_loss_voice"):
        train_and_measure(args, "flat", 0)


def test_a_model_is_made_and_measured_once_unless_its_settings_change(tmp_path):
    made, measured = [], []
    for settings in (["a"], ["a"], ["b"]):
        make_once(tmp_path, settings, lambda: made.append(1))
        figures = measure_once(tmp_path / "figures-dev.json", lambda: measured.append(1) or {"wer": len(measured)})
        measure_once(tmp_path / "truth.json", dict)
    assert len(made) == len(measured) == 2 and figures == {"wer": 2} and (tmp_path / "truth.json").exists()


def test_the_training_takes_relative_paths_as_the_users(tmp_path, monkeypatch):
    """With a stand-in of train.py, which tells where it would read and write."""
    program = "import sys, pathlib\nfor word in sys.argv[1:]: print(pathlib.Path(word.partition('=')[2]).resolve())\n"
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "train.py").write_text(program)
    (tmp_path / "user").mkdir()
    monkeypatch.setattr(trained, "ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "user")
    train(Path("runs/full-0"), ["data.corpus=data/own", "init=begin"])
    places = Path("runs/full-0/training.log").read_text().splitlines()
    assert {str(tmp_path / "user" / name) for name in ("runs/full-0", "data/own", "begin")} <= set(places)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_settings_of_the_recipe(variant):
    model = compose("train", ["experiment=hicodit_synthetic_2", *VARIANTS[variant]]).task.model
    assert ModelConfig(**OmegaConf.to_container(model, resolve=True)).levels == 12

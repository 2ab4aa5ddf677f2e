"""Claims put to the test: variants are settings, losses meet the same masks, derived models, what is done once."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_task import batch_of, make_task

from benchmarks import claims
from benchmarks.claims import CLAIMS, compare, line, release_of, train
from benchmarks.hicodit_models import IDENTITY, SHARED, derive, losses_of, take
from engine.config import compose
from engine.evaluation.charts import chart_curves, chart_differences
from engine.metrics.registry import METRICS
from hicodit.data import HiCoDiTDataset
from hicodit.evaluate import stored_samples
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.system import HiCoDiTSystem


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_settings_of_the_recipes_and_columns_of_tables(claim):
    entry = CLAIMS[claim]
    assert compose("evaluate", entry["evaluate"]).corpus and set(entry["figures"]) <= set(METRICS)
    plain = compose("train", entry["train"]) if "train" in entry else None
    for name, variant in entry["variants"].items():
        assert set(variant) <= {"train", "derive", "generate", "model"}
        if "train" in variant:
            config = compose("train", [*entry["train"], *variant["train"]])
            assert OmegaConf.to_yaml(config) != OmegaConf.to_yaml(plain), name
            if claim == "orders":
                rows = [c.trainer.batch_size * len(c.data.train.tasks) for c in (config, plain)]
                assert rows[0] == rows[1], name


def test_every_model_meets_the_same_masks_whatever_its_batch(corpus, release):
    pipeline = HiCoDiTPipeline.from_pretrained(release, precision="fp32")
    samples = stored_samples(HiCoDiTDataset(corpus / "seen", release.parent / "codec", augment=False), 6)
    together, pair = losses_of(pipeline, samples), losses_of(pipeline, samples[3:5])
    torch.testing.assert_close(together[3:5, 0], pair[:, 0], rtol=1e-5, atol=0)
    growth = together[:, 1:] - together[:, :1]  # with other expressions, and with another face
    assert growth[:, 0, 1].abs().max() > 1e-4 > 1e-6 > growth[:, 0, 0].abs().max()  # levels 1-2 do not see expressions
    assert growth[:, 1, 0].abs().max() > 1e-4


def test_without_the_identity_loss_the_score_network_learns_the_same(corpus, release):
    """So a model without it is derived, and not trained again."""
    gradients = []
    for weight in (100.0, 0.0):
        task = make_task(corpus, release, identity_weight=weight)
        torch.manual_seed(0)
        task(batch_of(corpus, release), "model")["loss"].backward()
        gradients.append({name: p.grad for name, p in task.system.named_parameters() if p.grad is not None})
    full, without = gradients
    changed = {n for n in full if n not in without or not torch.equal(full[n], without[n])}
    assert changed == {n for n in full if n.startswith(IDENTITY)}


def test_a_derived_release_has_untrained_identity_parts_alone(release, tmp_path):
    trained, made = HiCoDiTSystem.from_pretrained(release), derive(release, tmp_path / "derived", 0)
    derived = HiCoDiTSystem.from_pretrained(made)
    for name, value in derived.state_dict().items():
        if "num_batches" not in name and value.std() > 0:
            assert torch.equal(value, trained.state_dict()[name]) != name.startswith(IDENTITY), name
    assert derived.release["sampler"] == trained.release["sampler"]
    HiCoDiTPipeline.from_pretrained(made)  # finds the tokenizer of the trained one
    take(derived, trained, SHARED)


def arguments(tmp_path):
    return Namespace(runs=tmp_path, claim="orders", corpus=Path("c"), shards=None, train=["trainer.lr=1"])


def test_a_model_is_trained_once_unless_its_settings_change(tmp_path, monkeypatch):
    made, claim = [], {"train": ["experiment=x"], "evaluate": ["table=synthetic_talker"], "variants": {"add": {}}}
    monkeypatch.setattr(claims, "train", lambda folder, settings: (folder.mkdir(parents=True), made.append(settings)))
    args = arguments(tmp_path)
    for rate in (1, 1, 2):
        args.train = [f"trainer.lr={rate}"]
        assert release_of(args, claim, "add", 3, tmp_path / "add-3") == tmp_path / "add-3" / "release"
        (tmp_path / "add-3" / "measured").write_text("")
    assert [settings[-1] for settings in made] == ["trainer.lr=1", "trainer.lr=2"]
    assert made[0][1:4] == ["data.corpus=c", "data.root=c/shards/talker", "trainer.seed=3"]


def test_the_training_takes_relative_paths_as_the_users(tmp_path, monkeypatch):
    """With a stand-in of train.py, which tells where it would read and write."""
    program = "import sys, pathlib\nfor word in sys.argv[1:]: print(pathlib.Path(word.partition('=')[2]).resolve())\n"
    for folder in ("checkout", "user"):
        (tmp_path / folder).mkdir()
    (tmp_path / "checkout" / "train.py").write_text(program)
    monkeypatch.setattr(claims, "ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "user")
    train(Path("runs/full-0"), ["data.corpus=data/own", "init=begin"])
    places = Path("runs/full-0/training.log").read_text().splitlines()
    assert {str(tmp_path / "user" / name) for name in ("runs/full-0", "data/own", "begin")} <= set(places)


def test_rows_compare_each_system_with_the_first_and_are_drawn(tmp_path):
    own = {str(i): (float(i % 3), 1.0) for i in range(6)}
    more = {clip: (a + 1, b) for clip, (a, b) in own.items() if clip != "5"}
    measured = {"fast_4": [{"wer": own}], "fast_8": [{"wer": more}], "true speech": [{"wer": own}]}
    rows = compare(measured, ["wer", "energy_correlation"], {})
    assert rows[1]["wer_minus_fast_4"] == [100.0, 0.0] and "wer_minus_fast_4" not in rows[0]
    assert line(rows[0]).startswith("fast_4: wer 100 +- ")
    chart_differences(rows[:2], ["wer"], tmp_path / "a.png")
    rows = [row | {"evaluations": [n, 0]} for n, row in zip((4, 8), rows)] + rows[2:]
    rows[2]["pesq"] = [2.0, 0.0]  # of the speech that has no evaluations: nothing to put on a logarithmic axis
    chart_curves(rows, ["wer", "pesq"], "evaluations", tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("a.png", "b.png"))

"""Claims put to the test: variants are settings, losses meet the same masks, derived models, what is done once."""

import pytest
import torch
from omegaconf import OmegaConf
from test_task import batch_of, make_task

from benchmarks.claims import CLAIMS
from benchmarks.hicodit_models import IDENTITY, SHARED, derive, losses_of, take
from engine.config import compose
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

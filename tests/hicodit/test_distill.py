"""Distillation: the student starts as the teacher's conditional branch, learns guidance, samples with one branch."""

import pytest
import torch

from engine.errors import UserError, run_cli
from engine.training.trainer import Trainer
from hicodit.conditions.released import ReleasedEncoderConfig
from hicodit.conditions.types import Conditions
from hicodit.data import HiCoDiTDataset
from hicodit.distill import DistillTask, draw_scales
from hicodit.generation import guided_posterior
from hicodit.guidance import combine, combine_rows
from hicodit.model import BRANCHES, ModelConfig, positions_of, rows_of
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import UNGUIDED, GuidanceScales
from hicodit.system import HiCoDiTSystem
from infer import main as infer
from tests.tiny import TRAINER, batch_of

SCALES = GuidanceScales(2.5, 1.25, 0.0, 2.0)
T = torch.tensor([0.9, 0.4])
SETTINGS = TRAINER | {"steps": 25, "batch_size": 3, "lr": 1e-2, "ema_decay": 0.5}


def make_student(corpus, release, **changes):
    torch.manual_seed(0)
    arguments = {"codec": str(release.parent / "codec"), "shards": str(corpus), "grammar": "none.jsgf"}
    return DistillTask(**({"init": str(release), "encoders": {"kind": "tiny"}} | arguments | changes))


@pytest.fixture
def student(corpus, release):
    return make_student(corpus, release)


@pytest.fixture
def conditions():
    g = torch.Generator().manual_seed(0)
    lip, identity = torch.randn(2, 20, 32, generator=g), torch.rand(2, 256, generator=g)
    return Conditions(lip, identity, torch.tensor([[1, 2], [3, 4]]), torch.tensor([20, 15]))


@pytest.fixture
def tokens():
    return torch.randint(0, 17, (2, 12, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_student_starts_as_the_teachers_conditional_branch(student, conditions, tokens):
    model, teacher = student.system.model, student.teacher.model
    for scales in (SCALES, UNGUIDED):
        log_q = [guided_posterior(m, conditions, s)(tokens, T, None) for m, s in ((model, scales), (teacher, UNGUIDED))]
        assert torch.equal(*log_q)
    torch.nn.init.normal_(model.guidance_proj[-1].weight)
    plain, guided = (guided_posterior(model, conditions, s)(tokens, T, None) for s in (UNGUIDED, SCALES))
    assert not torch.allclose(plain, guided)


def test_rows_with_scales_of_their_own_are_combined_as_by_branches():
    log_p = torch.randn(5, 3, 7).log_softmax(-1)
    rows = [SCALES, GuidanceScales(1.5, 0.5, 2.0, 0.25), UNGUIDED]
    out = combine_rows(log_p, torch.tensor([scales.values for scales in rows]))
    for i, scales in enumerate(rows):
        branches = [list(BRANCHES).index(name) for name in scales.branches]
        torch.testing.assert_close(out[i], combine(log_p[branches, i], scales))


def test_the_target_is_the_teachers_guided_posterior(student, conditions, tokens):
    where, scales = positions_of(tokens == 16, tokens.device), torch.tensor([SCALES.values, (1.5, 0.0, 2.0, 1.0)])
    target, (clip, level, frame) = student.teacher.targets(tokens, T, conditions, scales, where), rows_of(where)
    for i, row in enumerate((SCALES, GuidanceScales(1.5, 0.0, 2.0, 1.0))):
        guided = guided_posterior(student.teacher.model, conditions, row)(tokens, T, None)[i]
        own = clip == i
        torch.testing.assert_close(target[own], guided[level[own], frame[own]], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def distilled(corpus, release, tmp_path_factory):
    """The release of a few steps, and the KL divergence of held-out clips before and after."""
    student, data = make_student(corpus, release), HiCoDiTDataset(corpus / "train", release.parent / "codec")
    trainer, kl = Trainer(student, data, SETTINGS, run=tmp_path_factory.mktemp("run")), []
    before = {name: value.clone() for name, value in student.system.state_dict().items()}
    for do in (lambda: None, trainer.fit):
        do()
        torch.manual_seed(0)
        with torch.no_grad():
            kl.append(student.held_out_losses("seen")["kl"])
    frozen = [name for name in before if name.startswith("encoders") or "identity_adapter" in name]
    assert frozen and all(torch.equal(student.system.state_dict()[name], before[name]) for name in frozen)
    trainer.release(trainer.run / "release")
    return trainer.run / "release", kl


def test_a_few_steps_bring_the_student_closer(distilled):
    before, after = distilled[1]
    assert 0 < after < 0.8 * before


def test_its_release_samples_with_one_branch(distilled, release, clip):
    pipeline = HiCoDiTPipeline.from_pretrained(distilled[0], codec=release.parent / "codec", precision="fp32")
    assert pipeline.system.model.config.guidance_limit == 3.0 and pipeline.sampler.steps == 3
    rows, branches = [], []
    pipeline.system.model.stages[1].register_forward_hook(lambda m, x, y: rows.append(len(y[0])))
    pipeline.system.model.register_forward_hook(lambda m, x, y: branches.append(len(y)))
    crops, tokens = [pipeline.crops(clip)] * 2, []
    for scales in (SCALES, UNGUIDED):
        pipeline.guidance = scales
        tokens.append(pipeline.run(crops, [0, 1])[0].tokens)
        assert set(rows) == {2} and set(branches) == {1} and len(branches) in (3, 4)  # a row a clip at each step
        branches.clear()
    assert (tokens[0] != tokens[1]).any()


def test_a_student_may_teach(distilled, corpus, release):
    again = make_student(corpus, release, init=str(distilled[0]))
    batch = batch_of(HiCoDiTDataset(corpus / "train", release.parent / "codec"), 4)
    assert again(batch, "model")["loss"] < 1e-5
    later = make_student(corpus, release, init=str(distilled[0]), substeps=2, teacher_steps=2)
    assert later(batch, "model")["loss"] > 1e-4
    with pytest.raises(UserError, match="takes scales up to 3: set task"):
        make_student(corpus, release, init=str(distilled[0]), guidance_limit=4.0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("guidance.all=3.5", "guidance.all=3.5: this model learned scales from 1 to 3"),
        ("guidance.lip=-0.5", "guidance.lip=-0.5: this model learned scales from 0 to 3"),
        ("guidance.reading=C", "takes guidance as its input"),
    ],
)
def test_guidance_not_learned_is_one_line(distilled, release, clip, tmp_path, word, message, monkeypatch, capsys):
    words = {"weights": distilled[0], "codec": release.parent / "codec", "input": clip, "output": tmp_path}
    monkeypatch.setattr("sys.argv", ["infer.py", *(f"{k}={v}" for k, v in words.items()), word])
    with pytest.raises(SystemExit) as end:
        run_cli(infer)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error.strip().splitlines()[-1] and "Traceback" not in error


def test_a_release_with_the_released_encoders_is_distilled_from_features(release, tmp_path):
    config = ModelConfig(
        **vars(HiCoDiTSystem.from_pretrained(release).model.config) | {"face_dim": 512, "dropout": 0.1}
    )
    encoders = ReleasedEncoderConfig(lip={"width": 32})
    HiCoDiTSystem(config, encoders).save(tmp_path / "teacher", "a test")
    student = make_student(
        tmp_path, release, init=str(tmp_path / "teacher"), encoders={"kind": "released", "folder": None}
    )
    batch = {"frames": torch.tensor([20, 12]), "lip": torch.randn(2, 20, 32).half(), "ge2e": torch.rand(2, 256)}
    batch |= {"face_identity": torch.randn(2, 512).half(), "expression": torch.tensor([[1, 2], [3, 4]])}
    student.train()(batch | {"tokens": torch.randint(0, 16, (2, 12, 40))}, "model")["loss"].backward()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    with pytest.raises(UserError, match="use experiment=hicodit_distill_paper"):
        make_student(tmp_path, release, init=str(tmp_path / "teacher"))


def test_scales_are_drawn_over_the_stated_range():
    torch.manual_seed(0)
    scales = draw_scales(4000, 3.0)
    assert scales[:, 0].min() >= 1 and scales[:, 0].max() <= 3 and scales[:, 0].std() > 0.5
    assert ((scales[:, 1:] == 0).float().mean(0) - 0.5).abs().max() < 0.05
    assert scales[:, 1:].min() == 0 and 2.9 < scales[:, 1:].max() <= 3
    for row in scales[:50].tolist():
        GuidanceScales(*row).check_input(3.0)

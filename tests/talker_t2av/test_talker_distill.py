"""Distillation of the heads: exact targets, a start as the teacher, one evaluation a step, refusals in one line."""

import copy

import pytest
import torch
from shard_files import write_split
from talker_fixtures import DS, STATS, generate, latents, request, save_talker

from engine.errors import UserError
from talker_t2av.data import TalkerPairs
from talker_t2av.distill import TalkerDistillTask
from talker_t2av.losses import Examples
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import MODES, Sampling
from tests.releases import write_release
from tests.tiny import batch_of

STEPS = 2

DRAFTS = {"particles": 1, "particle_temperature": 0.8}  # defaults


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of four clips and a release of random weights."""
    root, texts = tmp_path_factory.mktemp("distill"), ["lay blue", "set red now", "bin green at two", "place it"]
    write_split(root / "shards" / "train", latents(texts), 2, **STATS, digests={"whisperx_vae": "abc"})
    save_talker(root / "releases")
    return root


def make_student(root, **changes) -> TalkerDistillTask:
    torch.manual_seed(0)
    weights, stats = root / "releases", str(root / "shards/train/index.json")
    arguments = {"init": str(weights / "talker"), "stats": stats, "student_steps": [STEPS]}
    codecs = {"speech": str(weights / "speech"), "motion": "some/motion", "speaker": "some/voice"}
    return TalkerDistillTask(**(arguments | {"codecs": codecs} | changes))


@pytest.fixture
def student(root):
    return make_student(root)


@pytest.fixture(scope="module")
def batch(root):
    return batch_of(TalkerPairs(root / "shards", stats=root / "shards/train/index.json"), 4)


@pytest.fixture
def examples():
    g = torch.Generator().manual_seed(1)
    x1, mu = torch.randn(5, DS, 4, generator=g), torch.randn(5, 32, generator=g)
    return Examples(x1, mu, torch.randn(5, DS, 4, generator=g), torch.randn(5, 256, generator=g))


@torch.no_grad()
def test_the_student_starts_as_the_teachers_conditional_branch(student, examples):
    head, teacher = student.model.speech_cfm, student.teacher.heads["speech"]
    e, t, u = examples, torch.linspace(0.1, 1, 5), torch.rand(5)
    given = {"x": e.x1, "mu": e.mu, "t": t, "cond": e.cond, "global_cond": e.global_cond}
    torch.testing.assert_close(head.mean_velocity(**given, length=u, guidance=1 + u), teacher.estimator(**given))
    torch.nn.init.normal_(head.estimator.step_mlp.linear_2.weight)
    outs = [head.mean_velocity(**given, length=a, guidance=b) for a, b in ((u, 1 + u), (u / 2, 1 + u), (u, 2 + u))]
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


@torch.no_grad()
def test_the_path_is_what_the_teacher_samples(student, examples):
    head, noise = student.teacher.heads["speech"], torch.randn_like(examples.x1)
    path = student.teacher.path("speech", examples, noise, torch.tensor([1.0, 1.5, 2.0, 2.0, 3.0]))
    assert torch.equal(path[0], noise) and torch.equal(path[1], noise)  # CFG-Zero* leaves the first step out
    for i, guidance in enumerate((1.0, 1.5, 2.0, 2.0, 3.0)):
        one = [x[i : i + 1] for x in (examples.mu, examples.cond, examples.global_cond, noise)]
        torch.testing.assert_close(head.sample(*one, head.schedule(10), guidance=guidance), path[-1, i : i + 1])


@pytest.fixture(scope="module")
def trained(root, batch):
    """A student after some steps on one batch, its loss before and after, and what did not change."""
    student = make_student(root, teacher_steps=10, guidance_limit=2.5)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(60):
        torch.manual_seed(step % 3)
        loss = student(batch, "model")["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    return student, losses, changed


def test_the_student_comes_closer_than_the_teachers_own_few_steps(trained, batch):
    student, losses, changed = trained
    assert changed and all(
        name.split(".")[1:3] in (["speech_cfm", "estimator"], ["motion_cfm", "estimator"]) for name in changed
    )
    assert losses[-1] < 0.5 * losses[0]
    torch.manual_seed(100)
    few = copy.copy(student.teacher)
    few.steps = STEPS
    for stream, examples in student.examples(batch).items():
        noise, head = 0.8 * torch.randn_like(examples.x1), student.heads[stream]
        guidance = torch.full((len(noise),), 1.5)
        wanted = student.teacher.path(stream, examples, noise, guidance)[-1]
        schedule = head.schedule(STEPS, guidance=1.5)
        own = head.sample(examples.mu, examples.cond, examples.global_cond, noise, schedule)
        teachers = few.path(stream, examples, noise, guidance)[-1]
        assert (own - wanted).square().mean() < 0.5 * (teachers - wanted).square().mean()


def test_its_release_takes_one_evaluation_a_step(trained, root, tmp_path):
    student = trained[0]
    write_release(student, tmp_path / "student")
    carried = student.release_info().config["sampling"]
    assert carried == {"steps": STEPS, "temperature": 0.8, "guidance": 1.5, "unguided": 0, "text_bytes": 190} | DRAFTS
    model = TalkerT2AV.from_pretrained(tmp_path / "student").eval()
    rows = []
    for head in (model.speech_cfm, model.motion_cfm):
        run = head.estimator.decoder.run
        head.estimator.decoder.run = lambda x, *rest, run=run: rows.append(len(x)) or run(x, *rest)
    made = {}
    for guidance in (1.0, 2.0):
        sampling = Sampling(STEPS, 0.8, guidance)
        made[guidance] = generate(model, [request(max_patches=2)] * 2, MODES["t2av"], sampling, use_stop=False)[0]
        assert rows == [2] * (2 * 2 * STEPS), rows  # two streams, two patches; no row for the unconditional branch
        rows.clear()
    assert not torch.allclose(made[1.0].speech, made[2.0].speech)
    with pytest.raises(UserError, match=r"sampling.guidance=3: this model learned scales from 1 to 2.5"):
        generate(model, [request()], MODES["tts"], Sampling(STEPS, 0.8, 3.0))
    with pytest.raises(UserError, match="is a student itself: name its teacher"):
        make_student(root, init=str(tmp_path / "student"))


def test_a_speech_only_batch_reaches_both_heads(student, root):
    data = TalkerPairs(root / "shards", stats=root / "shards/train/index.json", tasks=["tts"])
    losses = student(batch_of(data, 2), "model")
    assert losses["motion"] == 0 and losses["speech"] > 0
    losses["loss"].backward()
    assert all(p.grad is not None for p in student.model.motion_cfm.estimator.step_mlp.parameters())

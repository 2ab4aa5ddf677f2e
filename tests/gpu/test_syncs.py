"""How often the host waits for a CUDA device, shown on a fake one: pipelines, the service, and losses of every task."""

import copy
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from drawn_faces import talking_head
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cuda_graph import GraphedStep, GraphedSteps
from engine.precision import convert_matrices
from hicodit.conditions.types import Conditions
from hicodit.generation import generate
from hicodit.model import FLOAT32_MODULES, HiCoDiT, ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig
from hicodit.validation import stored_conditions
from service.workers import TalkerWorker, Ticket
from talker_t2av.pipeline import Job, TalkerPipeline
from tests.golden.golden_runs import RUNS, talker_t2av
from tests.gpu.fakes import CUDA, audited, faked
from tests.talker_t2av.talker_fixtures import face_file, save_talker, voice_file
from tests.tiny import HICODIT, batch_of
from whisperx_vae.latent_targets import LatentTargets

# The host reads the tokens of each window, with euler also how many frames each step reveals, once the expressions for
# the figure, and the audio of each batch of equal lengths.


@pytest.fixture(scope="module")
def hicodit(release):
    return HiCoDiTPipeline.from_pretrained(release, precision="fp32", compile=True)  # weights stay unpacked


def hicodit_on_fake_card(hicodit):
    """Return a pipeline on the device; inside `audited`."""
    moved = HiCoDiTPipeline(faked(hicodit.system), faked(hicodit.codec), hicodit.sampler, hicodit.guidance)
    moved.device = CUDA
    moved.graphs = GraphedSteps()
    return moved


@pytest.mark.parametrize(("method", "form"), [*((method, "normalised") for method in METHODS), ("euler", "literal")])
def test_steps_of_every_sampler_do_not_synchronise(hicodit, method, form):
    """With the literal form of guidance, which positions are revealed depends on the posterior."""
    crops = [hicodit.crops(talking_head(length)) for length in (40, 30)]
    reads = []
    for steps in (3, 6):
        with audited() as audit:
            moved = hicodit_on_fake_card(hicodit)
            moved.guidance = GuidanceScales(2.5, 1.25, 1.5, 2.0, form)
            moved.run(crops, range(2), sampler=replace(hicodit.sampler, method=method, steps=steps))
        assert not audit.waits
        reads.append(audit.reads)
    assert reads[0] == reads[1] and reads[0].total() <= 5, reads


def test_a_stream_reads_tokens_and_audio_of_each_hop(hicodit):
    head = talking_head(30)
    with audited() as audit:
        chunks = list(hicodit_on_fake_card(hicodit).stream(head, 0, lookahead=0.2))
    # Tokens and audio of each hop, and once the voice, which stays.
    assert audit.reads.total() == 2 * len(chunks) + 1 and not audit.waits, audit.reads


def test_conditions_of_a_validation_do_not_synchronise(hicodit):
    clips = [
        {"mouth": torch.zeros(frames, 48, 48, dtype=torch.uint8), "faces": torch.zeros(4, 64, 64, 3, dtype=torch.uint8)}
        for frames in (30, 20)
    ]
    with audited() as audit:
        conditions = stored_conditions(hicodit_on_fake_card(hicodit), clips)
    assert conditions.lip.device == CUDA
    assert not audit.reads and not audit.waits


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    root = tmp_path_factory.mktemp("talker")
    pipeline = TalkerPipeline.from_pretrained(save_talker(root, delay=1), precision="fp32", compile=True)
    pipeline.system.require("t2av")
    voice = str(voice_file(root / "voice.wav"))
    face = str(face_file(root / "face.mp4"))
    more = {"max_seconds": 3.2, "crop": "centre"}
    pipeline.jobs = {
        "tts": Job("tts", "hello", voice, **more),
        "official": Job("tts", "hello", voice, prefix_seconds=0.32, compat="official", **more),
        "t2av": Job("t2av", "hello", voice, face, **more),
        "prefix": Job("t2av", "hello", voice, face, prefix_seconds=0.32, **more),
    }
    return pipeline


@contextmanager
def talker_on_fake_card(talker, patches):
    """Give an audit, and a pipeline on its device whose stop head ends all rows after some patches."""
    with audited() as audit, mock.patch("talker_t2av.generation.GraphedStep", lambda step, *_: GraphedStep(step)):
        audit.answer = patches  # to the stop tests of all rows, read every fourth patch, in a stream each patch
        system = copy.copy(talker.system)
        for name, value in vars(talker.system).items():
            if isinstance(value, nn.Module):
                setattr(system, name, faked(value))
        yield audit, TalkerPipeline(system, talker.sampling)


@pytest.mark.parametrize(
    ("name", "stream", "expected"),
    [
        ("tts", False, 1),
        ("official", False, 1),
        ("t2av", False, 1),
        ("prefix", False, 1),
        ("tts", True, 2 * 4),  # stop test and audio of each patch
        ("t2av", True, 3 * 4),  # and pictures
    ],
)
def test_four_more_patches_are_one_more_read_and_in_a_stream_those_of_each_patch(talker, name, stream, expected):
    reads = []
    for patches in (6, 10):
        with talker_on_fake_card(talker, patches) as (audit, moved):
            list(moved.stream(talker.jobs[name])) if stream else moved(talker.jobs[name])
        assert not audit.waits
        reads.append(audit.reads)
    assert (reads[1] - reads[0]).total() == expected, reads


def test_the_service_reads_once_a_patch(talker):
    """Rows join and leave."""
    end = 6
    with talker_on_fake_card(talker, end) as (audit, moved):
        jobs = [moved.prepare(talker.jobs["tts"]) for _ in range(3)]
        audit.reads.clear()
        worker = TalkerWorker(moved, 4)
        heard = []
        one, two, three = (Ticket(job, on_patch=heard.append) for job in jobs)
        worker.join_batch(one)
        (batch,) = worker.batches.values()
        for step in range(end + 4):
            if step == 1:
                worker.join_batch(two)
            if step == 3:
                two.cancel()
            if step == 4:
                worker.join_batch(three)
            worker.step(batch)
    assert one.done() and three.done() and not worker.rows and len(heard) == end + 2 + end
    assert audit.reads.total() == end + 4 and not audit.waits, audit.reads


# Steps of the run, in which different losses count. RVQ: features and code books; a restart of dead codes and
# discriminators. WhisperX-VAE: a decoder of features; discriminators. LIA-X: guided motion codes, and free ones.
STEPS = dict.fromkeys([*RUNS, "talker_guided"], (0,)) | {"rvq_codec": (1, 2), "whisperx_vae": (0, 2), "lia_x": (0, 2)}


def made(name, folder):
    torch.manual_seed(0)
    if name == "talker_guided":  # by the place in the text and by phonemes
        task, data = talker_t2av(folder, phonemes=5)
        task.guided_layers = (1,)
        collate = data.collate

        def with_labels(items):
            batch = collate(items)
            zeros = batch["speech"][..., 0].long() * 0
            return batch | {"pointer": zeros, "phoneme": zeros.clone()}

        data.collate = with_labels
    else:
        task, data = RUNS[name](folder)
    if name == "whisperx_vae":
        task.targets = LatentTargets(8, 24_000, task.codec.hop)
        task.targets_until = 1
    return task, data


@pytest.mark.parametrize(("name", "step"), [(name, step) for name in STEPS for step in STEPS[name]])
def test_losses_do_not_synchronise(name, step, tmp_path):
    """Losses of all parts, as the trainer asks for them. Backward passes run in tests/gpu/test_cards.py."""
    task, data = made(name, tmp_path)
    with audited() as audit:
        fake = faked(task).train()
        # As the trainer gives it: some tensors stay on the host.
        batch = {k: v if k in task.on_host else faked(v) for k, v in batch_of(data).items()}
        fake.begin_step(step)
        for part in fake.parts():
            with torch.autocast("cuda", torch.bfloat16):
                losses = fake(batch, part)
            assert losses["loss"].device == CUDA and losses["loss"].ndim == 0
    assert not audit.reads and not audit.waits


class OutputTypes(TorchDispatchMode):
    """Counts calls by operator and type of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else [out]:
            if isinstance(result, torch.Tensor):
                self.calls[func.overloadpacket.__name__, result.dtype] += 1
        return out


def test_half_precision_of_hicodits_steps_is_where_it_is_meant():
    torch.manual_seed(0)
    model = convert_matrices(HiCoDiT(ModelConfig(**HICODIT)).eval(), torch.bfloat16, FLOAT32_MODULES)
    steps = 3
    frames = torch.tensor([20, 15])
    conditions = Conditions(torch.randn(2, 20, 32), torch.rand(2, 256), torch.tensor([[1, 4], [2, 0]]), frames)
    sampler = SamplerConfig("confidence", steps)
    with OutputTypes() as types, torch.inference_mode():
        generate(model, conditions, sampler, GuidanceScales(2.5, 1.25, 1.5, 2.0), [0, 1])
    half = {name for name, dtype in types.calls if dtype == torch.bfloat16}
    assert "_log_softmax" not in half and not half & {"cumsum", "sort", "native_layer_norm", "add_"}
    products = {dtype: count for (name, dtype), count in types.calls.items() if name == "linear"}
    assert set(products) == {torch.float32, torch.bfloat16}
    assert products[torch.float32] == 6 * steps  # modulation: two of time, two of the stages, two of temporal scales

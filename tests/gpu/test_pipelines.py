"""HiCoDiT's pipeline on a fake CUDA device: how often the host waits for it, and the precision of its operators."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from drawn_faces import talking_head
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cuda_graph import GraphedSteps
from engine.precision import convert_matrices
from hicodit.conditions.types import Conditions
from hicodit.generation import generate
from hicodit.model import FLOAT32_MODULES, HiCoDiT, ModelConfig
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig
from hicodit.validation import stored_conditions
from tests.gpu.fakes import CUDA, audited, faked
from tests.tiny import HICODIT

# The host reads the tokens of each window, with euler also how many frames each step reveals, once the expressions for
# the figure, and the audio of each batch of equal lengths.


@pytest.fixture(scope="module")
def pipeline(release):
    return HiCoDiTPipeline.from_pretrained(release, precision="fp32", compile=True)  # weights stay unpacked


def on_fake_card(pipeline):
    """Return a pipeline on the device; inside `audited`."""
    moved = HiCoDiTPipeline(faked(pipeline.system), faked(pipeline.codec), pipeline.sampler, pipeline.guidance)
    moved.device = CUDA
    moved.graphs = GraphedSteps()
    return moved


@pytest.mark.parametrize(("method", "form"), [*((method, "normalised") for method in METHODS), ("euler", "literal")])
def test_steps_of_every_sampler_do_not_synchronise(pipeline, method, form):
    """With the literal form of guidance, which positions are revealed depends on the posterior."""
    crops = [pipeline.crops(talking_head(length)) for length in (40, 30)]
    reads = []
    for steps in (3, 6):
        with audited() as audit:
            moved = on_fake_card(pipeline)
            moved.guidance = GuidanceScales(2.5, 1.25, 1.5, 2.0, form)
            moved.run(crops, range(2), sampler=replace(pipeline.sampler, method=method, steps=steps))
        assert not audit.waits
        reads.append(audit.reads)
    assert reads[0] == reads[1] and reads[0].total() <= 5, reads


def test_a_stream_reads_tokens_and_audio_of_each_hop(pipeline):
    head = talking_head(30)
    with audited() as audit:
        chunks = list(on_fake_card(pipeline).stream(head, 0, lookahead=0.2))
    # Tokens and audio of each hop, and once the voice, which stays.
    assert audit.reads.total() == 2 * len(chunks) + 1 and not audit.waits, audit.reads


def test_conditions_of_a_validation_do_not_synchronise(pipeline):
    clips = [
        {"mouth": torch.zeros(frames, 48, 48, dtype=torch.uint8), "faces": torch.zeros(4, 64, 64, 3, dtype=torch.uint8)}
        for frames in (30, 20)
    ]
    with audited() as audit:
        conditions = stored_conditions(on_fake_card(pipeline), clips)
    assert conditions.lip.device == CUDA
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

"""The inner loops of both models on a CUDA device that is not there: no host read, no shape that depends on data."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from engine.precision import convert_matrices
from hicodit import samplers
from hicodit.conditions.types import Conditions
from hicodit.generation import GuidedPosterior
from hicodit.model import FLOAT32, HiCoDiT, ModelConfig
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig
from talker_t2av.generation import PatchLoop
from talker_t2av.request import MODES, Sampling
from tests.gpu.fakes import CUDA, fake_cuda, faked
from tests.talker_t2av.talker_fixtures import DS, request, tiny_model

B, K, N, L, STEPS = 2, 12, 16, 40, 3
SCALES = GuidanceScales(2.5, 1.25, 1.5, 2.0)


def score_network(dtype: torch.dtype) -> HiCoDiT:
    torch.manual_seed(0)
    config = ModelConfig(codes=N, width=32, heads=4, low_blocks=2, high_blocks=2, cond_dim=16, lip_dim=8, face_dim=8)
    return convert_matrices(HiCoDiT(config).eval(), dtype, FLOAT32)


class FakeRun:
    """A sampler's state and its posterior on the fake device; what the host knows before is computed really."""

    def __init__(self, method: str, dtype: torch.dtype, steps: int = STEPS, **scales: float):
        frames = torch.tensor([20, 15])
        conditions = Conditions(torch.randn(B, 20, 8), torch.rand(B, 256), torch.tensor([[1, 4], [2, 0]]), frames)
        guidance = GuidanceScales(**vars(SCALES) | scales)
        with torch.inference_mode():
            self.posterior = GuidedPosterior(score_network(dtype), conditions, guidance)
        self.config, self.times = SamplerConfig(method, steps), torch.linspace(1, 0.1, steps)[:, None].expand(-1, B)
        self.lengths, self.masked = 2 * frames, torch.ones(B, K, L, dtype=torch.bool)
        self.frames = samplers.revealed_frames(torch.randint(0, steps, (B, K, L)), self.masked, steps)

    def on_device(self, device: torch.device) -> GuidedPosterior:
        for posterior in filter(None, (self.posterior, self.posterior.early)):
            for name in ("model", "conditioning"):
                setattr(posterior, name, faked(getattr(posterior, name), device))
        return self.posterior

    def loop(self, device: torch.device) -> None:
        """All steps; called inside `fake_cuda`."""
        state = samplers.SamplerState(
            self.on_device(device), torch.full((B, K, L), N, device=device), faked(self.masked, device),
            torch.full((B,), K * L), self.lengths, self.config, [], True, lambda step: step,
        )  # fmt: skip
        state.noise = lambda columns=1: torch.rand(columns, B, K, L, device=device)
        if self.config.method in ("euler", "fixed_count"):
            steps = samplers._planned(state, faked(self.frames, device), state.noise()[0], self.times)
        else:
            steps = samplers.FUNCTIONS[self.config.method](state)
        count = sum(1 for _ in steps)
        assert count == self.config.steps and state.tokens.shape == (B, K, L)


def run_sampler(method, dtype, **scales):
    """The operators of all steps of a sampler."""
    run = FakeRun(method, dtype, **scales)
    with fake_cuda(host=True) as operators, torch.inference_mode():
        run.loop(CUDA)
    return operators


@pytest.mark.parametrize("late", [1.0, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_sampler_steps_wait_for_nothing(method, late):
    operators = run_sampler(method, torch.float32, late=late)
    assert operators.counts["linear"] > 20 * STEPS  # the network did run
    assert operators.waiting == 0


def test_a_step_of_free_scores_waits_for_nothing():
    """Guidance readings A and B: which positions are revealed depends on the posterior."""
    run = FakeRun("euler", torch.float32, reading="A")
    with fake_cuda(), torch.inference_mode():
        tokens, masked, u = (
            torch.full((B, K, L), N, device=CUDA),
            faked(run.masked),
            torch.rand(2, B, K, L, device=CUDA),
        )
        t = rate = u[0, :, 0, 0]
        tokens, masked = samplers.thinned_step(run.on_device(CUDA), tokens, masked, t, rate, u, 1.0)
        assert tokens.shape == masked.shape == (B, K, L)


def test_half_precision_is_where_it_is_meant():
    operators = run_sampler("ordered", torch.bfloat16)
    half = {name for (name, dtype), n in operators.types.items() if dtype == torch.bfloat16}
    assert "_log_softmax" not in half and not half & {"cumsum", "sort", "native_layer_norm", "add_"}
    products = {dtype: n for (name, dtype), n in operators.types.items() if name == "linear"}
    assert set(products) == {torch.float32, torch.bfloat16}
    assert products[torch.float32] == 6 * STEPS  # modulation: two of time, two of the stages, two of temporal scales


def test_the_fake_device_sees_a_host_read():
    """`entropy` asks after every fourth step whether all is revealed."""
    run = FakeRun("entropy", torch.float32, steps=4)
    with fake_cuda(host=True), torch.inference_mode(), pytest.raises(DataDependentOutputException):
        run.loop(CUDA)


def run_patches(dtype, guidance):
    """Talker: the operators of backbone, both solvers, both encoders and the stop test, three times."""
    model = tiny_model().to_precision(dtype)
    loop = PatchLoop(model, [request(), request(9)], MODES["t2av"], Sampling(3, guidance=guidance))
    before = {name: value.shape for name, value in vars(loop.state).items() if isinstance(value, torch.Tensor)}
    with fake_cuda() as operators, torch.inference_mode():
        loop.model = model = faked(model)
        loop.heads = {"speech": model.speech_cfm, "motion": model.motion_cfm}
        loop.encoders = {"speech": model.speech_tokens, "motion": model.motion_tokens}
        for name in ("conditions", "noise", "known", "padding", "first_test"):
            setattr(loop, name, faked(getattr(loop, name)))
        for schedule in loop.schedules.values():
            object.__setattr__(schedule, "shifts", faked(schedule.shifts))
        for layer in loop.state.cache.layers:
            layer.keys, layer.values = faked(layer.keys), faked(layer.values)
            layer.device = CUDA
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length = faked(layer.cumulative_length)
        for name in before:
            setattr(loop.state, name, faked(getattr(loop.state, name)))
        loop.state.context = faked(loop.state.context)
        operators.counts.clear()
        for index in range(3):
            noise = {stream: loop.noise[stream][index] for stream in ("speech", "motion")}
            patches, token, stop = loop.step(noise, loop.known[index], False)
    assert patches["speech"].shape == (2, 4, DS) and token.shape == (2, model.width) and stop.shape == (2,)
    assert before == {name: value.shape for name, value in vars(loop.state).items() if isinstance(value, torch.Tensor)}
    return operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_patch_waits_for_nothing(guidance, dtype):
    operators = run_patches(dtype, guidance)
    assert {d for name, d in operators.types if name == "linear"} == {
        dtype,
        torch.float32,
    }  # stop

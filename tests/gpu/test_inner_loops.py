"""The inner loops of both models on a CUDA device that is not there: no host read, no shape that depends on data."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from benchmarks.common import Operators
from engine.cuda_graph import GraphedSteps, map_tensors
from engine.precision import convert_matrices
from hicodit import samplers
from hicodit.conditions.types import Conditions
from hicodit.generation import GuidedPosterior, LatePosterior, guided_posterior
from hicodit.model import FLOAT32, HiCoDiT, ModelConfig
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig
from talker_t2av.fused import fuse_layers
from talker_t2av.generation import Rows
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import MODES, Sampling
from tests.gpu.fakes import CUDA, fake_cuda, faked
from tests.talker_t2av.talker_fixtures import request, tiny_model

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
            self.posterior = guided_posterior(score_network(dtype), conditions, guidance)
        self.config, self.times = SamplerConfig(method, steps), torch.linspace(1, 0.1, steps)[:, None].expand(-1, B)
        self.lengths, self.masked = 2 * frames, torch.ones(B, K, L, dtype=torch.bool)
        self.frames = samplers.revealed_frames(torch.randint(0, steps, (B, K, L)), self.masked, steps)

    def on_device(self, device: torch.device) -> GuidedPosterior | LatePosterior:
        def move(posterior: GuidedPosterior) -> GuidedPosterior:
            parts = {name: faked(getattr(posterior, name), device) for name in ("model", "conditioning")}
            return replace(posterior, **parts)

        if isinstance(self.posterior, LatePosterior):
            return LatePosterior(move(self.posterior.guided), move(self.posterior.early))
        return move(self.posterior)

    def loop(self, device: torch.device) -> None:
        """All steps; called inside `fake_cuda`."""
        state = samplers.SamplerState(
            self.on_device(device), torch.full((B, K, L), N, device=device), faked(self.masked, device),
            torch.full((B,), K * L), self.lengths, self.config, [], True, GraphedSteps(),
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


def run_patches(rows, requests, mode=nullcontext):
    """Run three steps of Talker's `rows` on the fake device, in the context `mode`; return the operators.

    A read of the stop tests finds that no row has ended. Whole pipelines, in `test_talker_pipelines`, count the reads.
    """
    going = mock.patch.object(FakeTensor, "cpu", lambda x: SimpleNamespace(tolist=lambda: [99] * len(x)))
    for asked in requests:
        rows.join(asked)
    shapes, model = map_tensors(lambda x: x.shape, rows.state), rows.model
    with fake_cuda() as operators, torch.inference_mode(), going:
        rows.device, rows.model = CUDA, faked(model)
        rows.heads = {"speech": rows.model.speech_cfm, "motion": rows.model.motion_cfm}
        rows.encoders = {"speech": rows.model.speech_tokens, "motion": rows.model.motion_tokens}
        for name in ("state", "plan", "cache", "times", "log_weights", "given"):
            if hasattr(rows, name):
                setattr(rows, name, faked(getattr(rows, name)))
        for schedule in rows.schedules.values():
            object.__setattr__(schedule, "shifts", faked(schedule.shifts))
        operators.counts.clear()
        operators.types.clear()
        with mode():
            for _ in range(3):
                rows.step()
    assert all(patch.shape[1] == 4 for patch in (rows.patch.speech, rows.patch.motion) if patch is not None)
    assert map_tensors(lambda x: x.shape, rows.state) == shapes
    return operators


def half_rows(dtype=torch.bfloat16, steps=3, guidance=2.0, model=None, **how):
    """Two rows of t2av with the networks as a pipeline has them."""
    model = (model or tiny_model()).to_precision(dtype)
    fuse_layers(model)
    return Rows(model, MODES["t2av"], Sampling(steps, guidance=guidance), 2, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_patch_waits_for_nothing(guidance, dtype):
    operators = run_patches(half_rows(dtype, guidance=guidance), [request(), request(9)])
    assert {d for name, d in operators.types if name == "linear"} == {dtype, torch.float32}  # stop


def test_launches_and_casts_of_a_patch_in_half_precision():
    """At the depth of the paper. The ceilings only fall."""
    config, attention, launches = tiny_model().config, [], Operators()
    model = TalkerT2AV(replace(config, llm=config.llm | {"num_hidden_layers": 28}, encoder_layers=4, head_layers=8))

    def attend(q, k, v, **_):  # one kernel on CUDA; fake tensors would show the operators that compute it elsewhere
        attention.append(1)
        return torch.empty_like(q)

    @contextmanager
    def counted():
        attention.clear()  # that of the prompts
        with launches:
            yield

    with (
        mock.patch("torch.inference_mode", lambda mode=True: torch.no_grad()),  # it hides operators
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attend),
    ):
        run_patches(half_rows(steps=10, model=model.eval()), [request(), request(9)], counted)
    assert len(attention) == 3 * (28 + 2 * 4 + 2 * 8 * 9)
    total, casts = (launches.kernels + len(attention)) / 3, launches.names["_to_copy"] / 3
    assert total < 3550 and casts < 72

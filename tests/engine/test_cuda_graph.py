"""CUDA graphs of a step, with a mock of the graphs that runs on the CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_graph import GraphedStep
from tests.gpu.dying_graphs import DyingOutputs


@dataclass(frozen=True)
class State:
    count: Tensor
    parts: dict[str, Tensor]


class Step:
    """Writes a row of a cache and sums it; notes the addresses of what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def __call__(self, state: State, scale: float, cache: Tensor) -> tuple[State, Tensor]:
        self.seen.append((state.count.data_ptr(), state.parts["a"].data_ptr(), cache.data_ptr()))
        cache.index_copy_(0, state.count[None], (scale * state.parts["a"])[None])
        return State(state.count + 1, {"a": state.parts["a"] + cache.sum(0)}), cache.sum()


def run(step, backend, steps=5, caches=1):
    graphed = GraphedStep(step, backend=backend)
    results = []
    for n in range(caches):
        cache = torch.zeros(8 + n, 3)
        state = State(torch.tensor(0), {"a": torch.arange(3.0)})
        for _ in range(steps):
            state, total = graphed(state, 0.5, fixed=(cache,))
            results += [state.count, state.parts["a"], total]
    return graphed, results


def test_outputs_equal_the_step_and_survive_the_next_replay():
    backend = DyingOutputs()
    _, expected = run(Step(), None)
    _, results = run(step := Step(), backend)
    assert backend.captures == 1 and backend.replays == 5
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
    assert len(set(step.seen)) == 1  # the addresses of all runs


def test_new_shapes_constants_or_fixed_tensors_capture_a_new_graph(monkeypatch):
    monkeypatch.setattr("engine.cuda_graph.LIMIT", 3)
    backend = DyingOutputs()
    graphed = GraphedStep(lambda x, scale, cache: x * scale + cache, backend=backend)
    caches = torch.ones(4), torch.ones(4)
    for x, scale, cache, graphs in (
        (torch.ones(4), 2.0, caches[0], 1),
        (torch.zeros(4), 2.0, caches[0], 1),
        (torch.zeros(4, dtype=torch.double), 2.0, caches[0], 2),
        (torch.zeros(4), 3.0, caches[0], 3),
        (torch.zeros(4), 2.0, caches[1], 4),
        (torch.zeros(1), 2.0, caches[0][:1], 5),
        (torch.zeros(4), 3.0, caches[0], 5),  # among the last three
        (torch.ones(4), 2.0, caches[0], 6),  # was dropped
    ):
        assert torch.equal(graphed(x, scale, fixed=(cache,)), x * scale + cache)
        assert backend.captures == graphs and len(graphed.graphs) <= 3


def test_a_graph_captured_in_inference_mode_works_outside_of_it():
    graphed = GraphedStep(lambda x: x + 1, backend=DyingOutputs())
    with torch.inference_mode():
        graphed(torch.zeros(2))
    assert graphed(torch.ones(2)).tolist() == [2, 2]

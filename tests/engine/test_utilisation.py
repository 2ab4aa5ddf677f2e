import pytest
import torch

from engine.training.speed import Utilisation, peak_tflops


@pytest.mark.parametrize("heads", [4, 2], ids=["one_to_one", "grouped"])
def test_flops_of_attention_are_counted_on_the_cpu(heads):
    """Axes: B batch, H heads, L sequence, D head width."""
    b = 2
    h = 4
    length = 64
    d = 16
    q = torch.randn(b, h, length, d, requires_grad=True)
    use = Utilisation(peak=1e-6)
    k = torch.randn(b, heads, length, d, requires_grad=True)

    def step():
        torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=heads < h).sum().backward()
        return 1

    with use.counting():
        use.tokens = step()
    forward = 2 * 2 * b * h * length * length * d  # two matrix products; five in the backward pass
    assert use.share(tokens=1, steps=1, seconds=7.0)["mfu"] == forward * 3.5 / 7.0 / 1e6


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.1), ("T4", None)],
)
def test_a_gpu_is_recognised_by_its_full_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(None, torch.device("cuda")) == peak

"""What tests/gpu shows on tensors without data, on real GPUs: one for steps, sampling, resuming; two for NCCL.

    python scripts/check_gpu.py --gpus 2 --only tests two_gpus    # runs all of tests/gpu and writes a record

Without the cards each test is skipped and says so.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from engine.cuda_graph import GraphedStep
from engine.metrics.picture import ssim_map
from engine.training.settings import TrainerConfig
from engine.training.trainer import Trainer
from talker_t2av.generation import BatchedDecoder
from talker_t2av.request import MODES, Sampling
from tests.forked import free_port
from tests.golden.golden_runs import RUNS, TRAINER
from tests.talker_t2av.talker_fixtures import request, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CARDS = torch.cuda.device_count()
one_card = pytest.mark.skipif(CARDS < 1, reason="needs a CUDA GPU")
two_cards = pytest.mark.skipif(CARDS < 2, reason=f"needs two CUDA GPUs, {CARDS} present")
ON_CARD = {"device": "cuda", "steps": 6, "validate_every": 100, "checkpoint_every": 100, "log_every": 1}


def logged(run):
    """Losses by step; a run that resumes writes a step again."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: {k: v for k, v in line.items() if "loss" in k} for line in lines if "lr" in line}


def train(name, run, **changes):
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        task, data = RUNS[name](Path(folder))
        task.measure = lambda folder, share: {}
        config = TrainerConfig(**TRAINER | ON_CARD | {"batch_size": data.batch} | changes)
        trainer = Trainer(task, data, config, run)
        trainer.fit()
    return trainer


@one_card
@pytest.mark.parametrize("name", RUNS)
def test_steps_of_every_task_synchronise_only_to_check_the_gradient(name, tmp_path, monkeypatch):
    """From the fourth step on PyTorch raises an error where the host waits for the GPU; restarts of RVQ's code books,
    discriminators and all stages have begun by then."""

    def in_mode(method, mode):
        plain = getattr(Trainer, method)

        def call(trainer, *arguments):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode if trainer.step >= 3 else "default")
            try:
                return plain(trainer, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        monkeypatch.setattr(Trainer, method, call)

    in_mode("_train_step", "error")
    in_mode("_stop_unless_finite", "default")
    train(name, tmp_path / "run", precision="bf16")
    losses = logged(tmp_path / "run")
    assert len(losses) == 6 and all(math.isfinite(x) for step in losses.values() for x in step.values())


@one_card
def test_a_run_on_a_gpu_resumes_where_it_stopped(tmp_path):
    whole = train("voice_encoder", tmp_path / "whole", schedule="constant")
    train("voice_encoder", tmp_path / "parts", schedule="constant", steps=3, checkpoint_every=3)
    parts = train("voice_encoder", tmp_path / "parts", schedule="constant")
    assert whole.step == parts.step == 6
    one = logged(tmp_path / "whole")
    two = logged(tmp_path / "parts")
    for step, losses in one.items():
        assert two[step] == pytest.approx(losses, rel=1e-5)


def start(jobs, processes, script=ROOT / "tests/engine/parallel_runs.py", **more):
    """Processes of one run as torchrun would start them, each with its card."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "codecs")))
    shared = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DEVICE": "cuda"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(jobs)],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes)},
        )
        for r in range(processes)
    ]


def job(run, processes, **changes):
    changes = {"schedule": "constant", "accumulate": 4 // processes} | ON_CARD | changes
    return {"run": str(run), "node": processes, "changes": changes}


@two_cards
def test_two_gpus_train_as_one(tmp_path):
    """DDP, FSDP2 and a run that changes from one to the other, over NCCL."""
    jobs = [job(tmp_path / way, 2, parallel=way) for way in ("ddp", "fsdp")]
    jobs += [job(tmp_path / "both", 2, steps=3, parallel="fsdp"), job(tmp_path / "both", 2)]
    started = start([job(tmp_path / "one", 1)], 1)
    assert [process.wait(600) for process in started] == [0]
    assert [process.wait(600) for process in start(jobs, 2)] == [0, 0]
    one = logged(tmp_path / "one")
    for way in ("ddp", "fsdp", "both"):
        found = logged(tmp_path / way)
        for step, losses in one.items():
            assert found[step] == pytest.approx(losses, rel=1e-3), (way, step)


@two_cards
def test_a_killed_rank_ends_the_other_and_the_run_resumes(tmp_path):
    endless = [job(tmp_path / "run", 2, steps=100_000, checkpoint_every=10)]
    started = start(endless, 2)
    end = time.monotonic() + 300
    while not list((tmp_path / "run/checkpoints").glob("step-*/info.json")):
        assert time.monotonic() < end and all(process.poll() is None for process in started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGKILL)
    assert started[0].wait(900) != 0  # at the latest when a collective's time is over: ten minutes
    kept = max(int(path.parent.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*/info.json"))
    again = start([job(tmp_path / "run", 2, steps=kept + 3)], 2)
    assert [process.wait(300) for process in again] == [0, 0]
    assert max(logged(tmp_path / "run")) >= kept + 3


@one_card
@pytest.mark.parametrize("compiled", [False, True])
def test_replays_of_a_graph_are_the_step(compiled):
    def step(x, i, cache):
        cache.index_copy_(0, i[None], x[None])
        return x + cache.sum(0), i + 1

    results = []
    for device, compile in (("cpu", False), ("cuda", compiled)):
        graphed = GraphedStep(step, device, compile)
        x = torch.ones(3, device=device)
        i = torch.tensor(0, device=device)
        cache = torch.zeros(4, 3, device=device)
        for _ in range(4):
            x, i = graphed(x, i, fixed=(cache,))
            results.append(x.cpu())
        assert len(graphed.graphs) == (device == "cuda")
    assert all(torch.equal(a, b) for a, b in zip(results[:4], results[4:]))


@one_card
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_the_talker_equal_its_eager_steps(compiled):
    model = tiny_model().cuda()
    results = []
    for eager in (True, False):
        decoder = BatchedDecoder(
            model, MODES["t2av"], Sampling(3, guidance=2.0), 4, use_stop=False, compile=compiled and not eager
        )
        if eager:
            decoder.run_step.backend = None
        for _ in range(2):
            results.append(decoder.generate([request(4 + s, s, max_patches=3 + 2 * s) for s in range(4)]))
        assert len(decoder.run_step.graphs) == (0 if eager else 3)  # four rows, two, one
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a.speech, b.speech, atol=1e-3, rtol=0)
            torch.testing.assert_close(a.motion, b.motion, atol=1e-3, rtol=0)


@one_card
def test_the_gradient_of_ssim_does_not_depend_on_tf32(monkeypatch):
    """Training in bfloat16 permits TF32, in which variances of smooth images are noise."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    pictures = 0.9 + 0.01 * torch.rand(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))

    def gradient(device, dtype):
        a, b = pictures.to(device, dtype, copy=True).unbind()
        a.requires_grad_()
        ssim_map(a, b, 2.0).mean().backward()
        return a.grad.double().cpu()

    exact = gradient("cpu", torch.float64)
    assert (gradient("cuda", torch.float32) - exact).norm() < 0.01 * exact.norm()

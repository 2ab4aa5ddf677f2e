import io
import pickle
import shutil
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.metadata as dcp_metadata

from engine.errors import UserError
from engine.files import write_json
from engine.training import checkpoint, checkpoint_reader
from engine.training.checkpoint import Checkpoints


def state(value=1.0):
    return {
        "model.weight": torch.full((3, 4), value),
        "model.count": torch.tensor(7),
        "optim.model.weight.exp_avg": torch.full((3, 4), value / 2),
    }


BATCHES = {"samples": 0, "streams": 1, "group": 1}


def save(root, step, keep=3, best=None, **results):
    checkpoints = Checkpoints(root, keep, best)
    folder = checkpoints.save(step, state(float(step)), {"config": {"lr": 0.1}, **BATCHES})
    checkpoints.wait()
    if results:
        checkpoints.note(step, results)
    return folder


def data_file(folder):
    return next(folder.glob("*.distcp"))


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]
    flip_a_bit(tmp_path / "step-00000020")
    save(tmp_path, 17, keep=2)  # damaged later ones go when a new one is written
    assert checkpoint.steps(tmp_path) == [15, 17]


def test_the_best_checkpoint_is_kept(tmp_path):
    for step, wer in ((5, 0.9), (10, 0.2), (15, float("nan")), (20, 0.5), (25, 0.4)):
        save(tmp_path, step, keep=1, best="min wer", wer=wer)
    assert checkpoint.steps(tmp_path) == [10, 25] and checkpoint.best(tmp_path, "min wer") == 10
    assert checkpoint.best(tmp_path, "max wer") == 25 and checkpoint.best(tmp_path, "max stoi") is None


def test_a_checkpoint_is_a_snapshot_of_the_state_at_the_call(tmp_path, monkeypatch):
    begin = threading.Event()
    original = checkpoint.dcp.save
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *a, **k: begin.wait(10) and original(*a, **k))
    checkpoints = Checkpoints(tmp_path, 2)
    live = state(1.0)
    folder = checkpoints.save(1, live, BATCHES)
    live["model.weight"].fill_(9.0)  # training continues
    assert not folder.exists()
    begin.set()
    checkpoints.wait()
    read = state(0.0)
    checkpoint.load(folder, read)
    assert torch.equal(read["model.weight"], torch.ones(3, 4))


def flip_a_bit(folder):
    data = bytearray(data_file(folder).read_bytes())
    data[len(data) // 2] ^= 1
    data_file(folder).write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip_a_bit, "changed"),
        (lambda folder: data_file(folder).unlink(), "missing"),
        (
            lambda folder: (folder / "info.json").write_text('{"step": 2, "samples": null}'),
            "samples must be an integer",
        ),
        (lambda folder: write_json(folder / "info.json", {"step": 2, "files": {}, **BATCHES}), "lists no files"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path, harm, said):
    good = save(tmp_path, 1)
    bad = save(tmp_path, 2)
    lines = []
    assert checkpoint.newest(tmp_path, lines.append) == bad and lines == []
    harm(bad)
    assert checkpoint.newest(tmp_path, lines.append) == good
    assert len(lines) == 1 and said in lines[0] and str(bad) in lines[0]
    harm(good)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.newest(tmp_path, lines.append)


def test_an_incomplete_checkpoint_is_ignored_and_removed(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000009.writing")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 2)
    assert not list(tmp_path.glob(".step-*"))


def test_tensors_of_another_model_are_refused(tmp_path):
    folder = save(tmp_path, 1)
    smaller = state() | {"model.weight": torch.zeros(2, 2)}
    more = state() | {"model.new": torch.zeros(1)}
    fewer = state()
    del fewer["model.count"]
    for other, named in ((smaller, r"\(3, 4\), .* \(2, 2\)"), (more, r"model\.new"), (fewer, r"model\.count")):
        with pytest.raises(UserError, match=named):
            checkpoint.load(folder, other)
    extra = state() | {"optim.model.bias.exp_avg": torch.zeros(1)}  # a parameter that never had a gradient
    checkpoint.load(folder, extra)
    assert "optim.model.bias.exp_avg" not in extra


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone, as several processes have one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_failing_process_does_not_wait_for_a_stuck_checkpoint(tmp_path, monkeypatch, group):
    monkeypatch.setattr(checkpoint, "FAILING", 0.05)
    disk = threading.Event()
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *a, **k: disk.wait(120))
    checkpoints = Checkpoints(tmp_path / "run", 3)
    checkpoints.save(1, state(), BATCHES)
    checkpoints.wait(failing=True)
    assert checkpoints._thread.is_alive()
    disk.set()
    checkpoints.wait()


class Attribute:
    """Is pickled as `getattr(found, name)`."""

    def __init__(self, found, name):
        self.asked = found, name

    def __reduce__(self):
        return getattr, self.asked


def test_unpickling_metadata_allows_getattr_for_memory_formats_only():
    """Python 3.11.2 writes them so."""
    formats = dcp_metadata._MEM_FORMAT_ENCODING

    def read(found, name):
        return checkpoint_reader._Unpickler(io.BytesIO(pickle.dumps(Attribute(found, name)))).load()

    assert read(formats, "TORCH_CONTIGUOUS_FORMAT") is formats.TORCH_CONTIGUOUS_FORMAT
    for found, name in ((formats, "__init__"), (dcp_metadata.Metadata, "__init__"), (torch.Size, "numel")):
        with pytest.raises(pickle.UnpicklingError, match=f"requests '{name}'"):
            read(found, name)

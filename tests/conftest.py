import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import torch
from _pytest.logging import LogCaptureHandler

from engine import processes
from engine.errors import UserError
from engine.evaluation.validation import Share, figures_of
from engine.training.task import Task
from tests import forked
from tests.file_server import file_server  # noqa: F401  (a fixture)
from tests.hub_stand_in import stand_in_hub  # noqa: F401  (a fixture)
from tests.releases import write_release
from tests.tiny import HICODIT, train

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # tests run in a process for each core
os.environ |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "codecs"))), "OMP_NUM_THREADS": "1"}

processes.get_context = lambda _: forked.SERVER  # in place of "spawn": as separate, and there at once

# Files that take longest, longest first, so that none is left for the end in several processes (`-n 2`).
LONG = [
    f"tests/{name}.py"
    for name in (
        "rehearsal/test_rehearsal", "hicodit/test_inference", "engine/test_parallel", "scripts/test_check_gpu",
        "rehearsal/test_grid_recipe", "talker_t2av/test_talker_pipeline", "hicodit/test_hard_videos",
        "corpora/test_synthetic_corpus", "corpora/test_prepare_job", "talker_t2av/test_evaluation_tables",
        "engine/test_kills", "engine/test_plan", "scripts/test_late_errors", "hicodit/test_task",
        "hicodit/test_pipeline", "engine/test_trainer", "talker_t2av/test_talker_inference",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(name) if (name := item.nodeid.split("::")[0]) in LONG else len(LONG))


@pytest.fixture(autouse=True)
def signals_end_processes_again():
    """A handler that a test leaves would keep processes that are forked later from ending."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def logging_is_as_before():
    """A handler that a test leaves would write to its captured stream, which is closed when later tests log."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    level = root.level
    yield
    for handler in list(root.handlers):
        if handler not in handlers and not isinstance(handler, LogCaptureHandler):
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def spy(monkeypatch) -> Callable[[Any, str], Mock]:
    """Returns a function that replaces OWNER.NAME by a mock, which does the same and knows its calls."""

    def watch(owner: Any, name: str) -> Mock:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, create_autospec(original, side_effect=original))
        return getattr(owner, name)

    return watch


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Folder of a tiny HiCoDiT release with random weights; its tokenizer lies beside it."""
    from hicodit.conditions.encoders import TinyEncoderConfig
    from hicodit.model import ModelConfig
    from hicodit.system import HiCoDiTSystem
    from rvq_codec import RVQCodec, RVQCodecConfig

    root = tmp_path_factory.mktemp("releases")
    torch.manual_seed(0)
    codec = RVQCodecConfig(
        encoder_width=4, ratios=(8, 5, 4, 3), latent_channels=16, codebook_size=16, codebook_dim=4, vocos_dim=16,
        vocos_intermediate=32, vocos_layers=1, n_fft=960,
    )  # fmt: skip
    RVQCodec(codec).save_pretrained(root / "codec", "a test")
    model = ModelConfig(**HICODIT)
    system = HiCoDiTSystem(model, TinyEncoderConfig(lip_dim=32, lip_heads=4, face_dim=16, face_width=4))
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    system.save_pretrained(root / "hicodit", "a test", {"codec": "codec", "sampler": {"method": "euler", "steps": 3}})
    return root / "hicodit"


@pytest.fixture
def low_rank_updates_end_up_in_the_weights(tmp_path) -> Callable[..., set[str]]:
    """Asserts that low-rank updates of a task learn alone, all of them, and are added to the weights of its release."""

    def check(task: Task, batch: dict[str, Any], name: str, read: Callable[[Path], torch.nn.Module]) -> set[str]:
        """Return the names of the parameters that learn.

        Args:
            name: the task's attribute that is its network.
            read: makes the network from the folder of a release.
        """
        start = {key: value.clone() for key, value in task.state_dict().items()}
        task.adapt(2, 4.0)
        learns = {key for key, p in task.named_parameters() if p.requires_grad}
        train(task, batch, 4)
        idle = {key for key, p in task.named_parameters() if "lora_B" in key and not p.any()}
        assert idle == set(), "these layers are used past their module's forward"
        write_release(task, tmp_path / "adapted")
        new = read(tmp_path / "adapted")
        losses = []
        changed = {key for key, value in new.state_dict().items() if not torch.equal(value, start[f"{name}.{key}"])}
        assert changed == {key.removeprefix(f"{name}.").split(".lora_")[0] + ".weight" for key in learns}

        def measure(network: torch.nn.Module) -> None:
            setattr(task, name, network)
            torch.manual_seed(0)
            losses.append(float(task.eval()(batch, "model")["loss"].detach()))

        measure(getattr(task, name))
        measure(new)
        task.load_state_dict(start)
        measure(new)
        assert losses[0] == pytest.approx(losses[1], rel=2e-3) != losses[2]  # half precision
        return learns

    return check


@pytest.fixture
def the_decoder_alone_goes_on_from_a_release(tmp_path) -> Callable[..., None]:
    """Asserts that a codec's task with `decoder_only` keeps the codes of a release, which must be of the same sizes."""

    def check(
        make_task: Callable[..., Task], batch: dict[str, Any], signal: torch.Tensor, sizes: dict[str, Any], message: str
    ) -> None:
        """Sizes are those of another codec, and `message` is what is said of them."""
        init = str(tmp_path / "release")
        write_release(make_task(), tmp_path / "release")
        task = make_task(init=init, decoder_only=True)
        before = {name: value.clone() for name, value in task.codec.state_dict().items()}
        train(task, batch, 2)
        after = task.codec.state_dict()
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert "decoder" in changed <= {"decoder", "out_proj"}
        write_release(task, tmp_path / "again")
        first, again = (type(task.codec).from_pretrained(tmp_path / name) for name in ("release", "again"))
        assert torch.equal(first.encode(signal), again.encode(signal))
        with pytest.raises(UserError, match=r"task\.init"):
            make_task(decoder_only=True)
        with pytest.raises(UserError, match=message):
            make_task(init=init, codec=sizes)

    return check


@pytest.fixture
def shares_give_the_same_figures(tmp_path) -> Callable[..., None]:
    """Asserts that a validation in two and in four processes gives the figures of one, and each has a part in it."""

    def measured(task: Task, share: Share) -> dict[str, Any]:
        torch.manual_seed(0)  # as the trainer does in every process
        folder = tmp_path / f"share-{share.rank}-of-{share.count}"
        folder.mkdir()
        with torch.no_grad():
            return task.measure(folder, share)

    def written(count: int) -> list[str]:
        folders = [tmp_path / f"share-{rank}-of-{count}" for rank in range(count)]
        return sorted(path.name for folder in folders for path in folder.rglob("*") if path.is_file())

    def check(task: Task, tolerance: float = 1e-4) -> None:
        whole = figures_of([measured(task, Share())])
        files = written(1)
        for count in (2, 4):
            shares = [measured(task, Share(rank, count)) for rank in range(count)]
            assert sum(map(bool, shares)) >= 2
            assert figures_of(shares) == pytest.approx(whole, rel=tolerance, nan_ok=True)
            assert written(count) == files

    return check

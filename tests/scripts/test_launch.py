"""What scripts/launch.py makes of torchrun: time to save for a run that is told to stop, and an honest exit code."""

import signal
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing import PContext, SignalException

from engine.training.signals import REQUEUE
from scripts import launch


class Processes(PContext):
    """Processes that end with the given codes."""

    def __init__(self, codes):
        self.timeouts = []
        self._tail_logs = []
        self.filtered_stdout = None
        self.filtered_stderr = None
        self.subprocess_handlers = {i: SimpleNamespace(proc=SimpleNamespace(returncode=c)) for i, c in enumerate(codes)}

    def _close(self, death_sig, timeout=30):
        self.timeouts.append(timeout)

    def _start(self): ...
    def _poll(self): ...
    def pids(self): ...


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch", "--nproc_per_node=2", "train.py"])


@pytest.mark.parametrize(
    ("number", "codes", "answer"),
    [
        (signal.SIGTERM, [REQUEUE, REQUEUE], REQUEUE),
        (signal.SIGUSR1, [REQUEUE, -9], REQUEUE),  # all saved before one could leave
        (signal.SIGTERM, [-9, -9], 1),  # nothing was saved in time
        (signal.SIGTERM, [0, 0], 0),
        (signal.SIGINT, [REQUEUE, REQUEUE], 130),
    ],
)
def test_a_stop_has_time_to_save_and_says_whether_it_did(monkeypatch, number, codes, answer):
    processes = Processes(codes)

    def run(_):
        try:
            raise SignalException("told to stop", sigval=number)
        except SignalException as stop:  # as the agent does
            processes.close(stop.sigval)
            raise

    monkeypatch.setattr(launch, "run", run)
    assert launch.main() == answer
    assert processes.timeouts == [launch.GRACE] and launch.GRACE > 200


def test_processes_of_a_failed_run_are_not_waited_for(monkeypatch):
    processes = Processes([1])
    monkeypatch.setattr(launch, "run", lambda _: processes.close())
    launch.main()
    assert processes.timeouts == [30]


@pytest.mark.parametrize(
    "argument", ["--nproc_per_node=many", "--nnodes=few", "--nnodes=0", "--nproc_per_node=0", "--rdzv_backend=post"]
)
def test_an_invalid_argument_is_one_line(monkeypatch, capsys, argument):
    monkeypatch.setattr("sys.argv", ["launch", argument, "train.py"])
    assert launch.main() == 2
    assert capsys.readouterr().err.startswith("error: ")

import os
import signal

import pytest

from engine.training import signals
from engine.training.signals import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_requests_a_stop_and_repeats_are_ignored(number):
    before = signal.getsignal(number)
    with stop_requests() as stops:
        assert not stops
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stops
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts(monkeypatch):
    monkeypatch.setattr(signals, "ONE_PRESS", 0.0)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stops:
        os.kill(os.getpid(), signal.SIGINT)
        assert stops
        os.kill(os.getpid(), signal.SIGINT)

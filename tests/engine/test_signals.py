import os
import signal

import pytest

from engine.training import signals
from engine.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_first_signal_only_asks_and_repeats_are_ignored(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_later_second_ctrl_c_interrupts(monkeypatch):
    monkeypatch.setattr(signals, "ONE_PRESS", 0.0)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)

"""Curves from logs: what is read, in which panel it lands, and that a picture comes out."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from scripts import plot_run
from scripts.plot_run import labels, panel, panels, read_curves


@pytest.fixture
def runs(tmp_path):
    """Two logs of a GAN, the second cut by a kill and half as long."""
    for name, steps in (("one/run", 60), ("two/run", 30)):
        rows = []
        for step in range(1, steps + 1):
            loss = {"generator/loss": 5.0 / step, "discriminator/loss": 0.0, "grad_norm": 100.0 / step**2, "lr": 1e-3}
            rows.append({"step": step, **loss, "samples_per_s": 1.0, "tokens_per_s": 9.0, "mfu": None})
        rows.append({"step": steps, "validation/wer_seen": 0.1, "validation/wer_unseen": 0.2})
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 61, "gen')
    return [tmp_path / "one/run", tmp_path / "two/run"]


def test_several_runs_are_plotted_in_one_figure(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "curves.png"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, runs), "--out", str(out)])
    plot_run.main()
    assert "5 panels, 2 runs" in capsys.readouterr().out
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[1] > 1500
    for colour in ((31, 119, 180), (255, 127, 14)):  # a curve of each run
        assert (np.abs(picture.astype(int) - colour).sum(2) < 30).sum() > 500


def test_curves_are_read_in_a_fixed_order(runs):
    curves = read_curves(runs[0])
    steps, values = curves["generator/loss"]
    assert len(steps) == 60 and values[4] == 1.0 and read_curves(runs[0] / "log.jsonl").keys() == curves.keys()
    assert panels([curves]) == ["generator/loss", "grad_norm", "lr", "tokens_per_s", "validation/wer"]
    assert panel("validation/wer_unseen") == ("validation/wer", "--") and panel("validation/wer_seen")[1] == "-"
    assert panel("validation/unseen/mel") == ("validation/mel", "--") == panel("validation/mel_unseen")
    assert labels(runs) == ["one/run", "two/run"]

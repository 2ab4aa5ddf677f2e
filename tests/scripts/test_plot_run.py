"""Curves from the logs of several runs."""

import json
import sys

import numpy as np
from PIL import Image

from scripts import plot_run


def test_several_runs_are_plotted_in_one_figure(tmp_path, monkeypatch, capsys):
    """Two logs of a GAN, both cut by a kill, the second half as long."""
    for name, steps in (("one", 60), ("two", 30)):
        rows = []
        for step in range(1, steps + 1):
            loss = {"generator/loss": 5.0 / step, "discriminator/loss": 0.0, "grad_norm": 100.0 / step**2, "lr": 1e-3}
            rows.append({"step": step, **loss, "samples_per_s": 1.0, "tokens_per_s": 9.0, "mfu": None})
        rows.append({"step": steps, "validation/wer_seen": 0.1, "validation/wer_unseen": 0.2})
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 61, "gen')
    out = tmp_path / "new" / "curves.png"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", f"{tmp_path}/one", f"{tmp_path}/two", "--out", str(out)])
    plot_run.main()
    assert "5 panels, 2 runs" in capsys.readouterr().out
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[1] > 1500
    for colour in ((31, 119, 180), (255, 127, 14)):  # a curve of each run
        assert (np.abs(picture.astype(int) - colour).sum(2) < 30).sum() > 500

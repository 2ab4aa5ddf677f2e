"""Speech quality and intelligibility: DNSMOS, UTMOS, PESQ, STOI.

- DNSMOS, predicted mean opinion score (MOS) of quality, 1 to 5, without a reference: `p808`, Reddy et al. 2021,
  arXiv:2010.15258 (HiCoDiT's, as its ground-truth rows suggest); `p835`, the overall score of Reddy et al. 2022,
  arXiv:2110.01763. Both networks are included in the package speechmos (MIT). As in the official implementation, clips
  under 9 s are repeated, and longer ones are averaged over windows.
- UTMOS, predicted MOS of naturalness, 1 to 5, without a reference (Saeki et al. 2022, arXiv:2204.02152): the strong
  learner of utmos22, by the package utmos-pytorch (MIT), which states that it equals the original; weights MIT. Clips
  are processed one by one, as padding would change the score.
- PESQ, quality against the ground truth: narrow band at 8 kHz (ITU-T P.862), wide band at 16 kHz (P.862.2), by
  the package pesq (MIT), which wraps the ITU's program.
- STOI (Taal et al. 2011) and ESTOI (Jensen & Taal 2016), intelligibility against the ground truth, by the
  package pystoi (MIT).

PESQ and STOI require time-aligned waveforms, of which the longer one is trimmed.

Axes: N samples.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from engine.errors import UserError, require, require_librosa
from engine.media.audio import resample_wave
from engine.metrics.metric import Figure, Metric, Take, wave_of
from engine.release import load_strict
from engine.torch_files import read_checkpoint

RATE = 16_000


class DNSMOS(Metric):
    figures: ClassVar = {"dnsmos": Figure("DNSMOS", 1, meaning="predicted MOS of speech quality, 1 to 5")}
    packages = ("speechmos", "onnxruntime", "librosa")
    protocols = ("p808", "p835")

    def load(self) -> None:
        require_librosa()
        package = require("speechmos.dnsmos", "speechmos", "metrics")
        folder = Path(package.__file__).parent / "dnsmos_models"
        options = package.ort.SessionOptions()
        options.intra_op_num_threads = 1  # limit the threads, as the package would use all cores
        self.model = package.DNSMOS.__new__(package.DNSMOS)
        self.model.onnx_sess = package.ort.InferenceSession(str(folder / "sig_bak_ovr.onnx"), options)
        self.model.p808_onnx_sess = package.ort.InferenceSession(str(folder / "model_v8.onnx"), options)

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        scores = self.model(wave_of(take.audio, RATE).clip(-1, 1), RATE, False)
        return {"dnsmos": (float(scores["p808_mos" if self.protocol == "p808" else "ovrl_mos"]), 1)}


class UTMOS(Metric):
    figures: ClassVar = {"utmos": Figure("UTMOS", 1, meaning="predicted MOS of naturalness, 1 to 5")}
    packages = ("utmos_pytorch",)
    weight_files = ("utmos_state_dict.pt",)
    parallel = False

    def load(self) -> None:
        package = require("utmos_pytorch.utmos_torch", "utmos-pytorch", "metrics")
        (file,) = self.files
        with torch.device("meta"):  # the package would ignore missing tensors
            load_strict(package.UTMOSModel(), dict(read_checkpoint(file)), file, assign=True)
        self.network = package.UTMOSScoreTorch(str(file), self.device)

    @torch.inference_mode()
    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        wave = torch.from_numpy(wave_of(take.audio, RATE).copy()).to(self.device)
        return {"utmos": (float(self.network.score(wave[None]).reshape(-1)[0]), 1)}


class PESQ(Metric):
    figures: ClassVar = {
        "pesq_wide": Figure("PESQ wide", 1, meaning="perceived quality against the ground truth, 16 kHz"),
        "pesq_narrow": Figure("PESQ narrow", 1, meaning="perceived quality against the ground truth, 8 kHz"),
    }
    packages = ("pesq",)
    needs_truth = True
    trims = True

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        true = wave_of(truth.audio, RATE)
        made = wave_of(take.audio, RATE)
        pesq = require("pesq", "pesq")
        length = min(len(true), len(made))
        found = {}
        try:
            for figure, rate, band in (("pesq_wide", 16_000, "wb"), ("pesq_narrow", 8_000, "nb")):
                pair = (resample_wave(wave[:length], RATE, rate) for wave in (true, made))
                found[figure] = (float(pesq.pesq(rate, *pair, band)), 1)
        except pesq.PesqError as error:  # such as no utterance, or less than 0.25 s
            raise UserError(f"PESQ cannot be computed: {error.args[0].decode()}") from error
        except ValueError as error:  # near-silent signals yield NaN
            raise UserError("PESQ cannot be computed: a signal is silent or nearly silent") from error
        return found


class STOI(Metric):
    figures: ClassVar = {"stoi": Figure("STOI", 1, 3, meaning="intelligibility against the ground truth, 0 to 1")}
    packages = ("pystoi",)
    version = 3
    needs_truth = True
    trims = True
    extended: ClassVar[bool] = False

    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        """Measure a clip.

        Clips with less than 0.4 s of speech are rejected, as pystoi would only warn and return 1e-5, and so are silent
        signals: ESTOI of these is that of the random numbers which pystoi adds.
        """
        true = wave_of(truth.audio, RATE)
        made = wave_of(take.audio, RATE)
        length = min(len(true), len(made))
        if not true[:length].any() or not made[:length].any():
            raise UserError("STOI cannot be computed: a signal is silent")
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            value = float(require("pystoi", "pystoi").stoi(true[:length], made[:length], RATE, self.extended))
        if any("Not enough STFT frames" in str(warning.message) for warning in given):
            raise UserError("STOI cannot be computed: less than 0.4 s of speech in both signals")
        (figure,) = self.figures
        return {figure: (value, 1)}


class ESTOI(STOI):
    figures: ClassVar = {"estoi": Figure("ESTOI", 1, 3, meaning="extended STOI against the ground truth, 0 to 1")}
    extended = True

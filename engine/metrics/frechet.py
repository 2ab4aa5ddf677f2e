"""FID and FVD: Frechet distance between face features of generated and ground-truth videos.

|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means and covariances (Heusel et al. 2017, arXiv:1706.08500;
Unterthiner et al. 2018, arXiv:1812.01717). The Talker-T2AV paper does not state its protocol, and values of different
protocols differ by up to a factor of four: compare within a table only.

- FID: 16 evenly spaced frames of each clip, cut to the face, through the Inception network of the package
  torch-fidelity (Apache-2.0, weights too).
- FVD: consecutive windows of 16 face squares of 224 pixels, through the I3D network of StyleGAN-V (a TorchScript
  file, which runs as a program; no licence stated).

With few clips the distance is biased upwards: 2,048 features require many thousands of frames.

Axes: T frames, F rows of features, D features.
"""

from __future__ import annotations

import tempfile
from typing import Any, ClassVar

import numpy as np
import torch

from engine.errors import UserError, require
from engine.metrics.lip_sync import face_video
from engine.metrics.metric import Figure, Metric, Take
from engine.torch_files import read_checkpoint

FRAMES = 16  # frames per clip (FID) or per window (FVD)


def frechet_distance(one: np.ndarray, two: np.ndarray) -> float:
    """Return the Frechet distance between two sets of features (F, D), modelled as Gaussians."""
    if min(len(one), len(two)) < 2:
        raise UserError("the Frechet distance needs at least two rows of features in each set")
    one = one.astype(np.float64)
    two = two.astype(np.float64)
    shift = one.mean(0) - two.mean(0)
    # With S = A^T A, tr (S1 S2)^(1/2) is the sum of the singular values of A1 A2^T. Only R of A = Q R counts there.
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, two)]
    spread = sum(np.square(x).sum() for x in centred)
    roots = [np.linalg.qr(x, mode="r") for x in centred]
    common = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + spread - 2 * common))  # rounding errors can be negative


class FID(Metric):
    figures: ClassVar = {"fid": Figure("FID", -1, meaning="distance of image features to the ground truth")}
    packages = ("torch_fidelity",)
    weight_files = ("weights-inception-2015-12-05-6726825d.pth",)
    inputs = ("video",)
    parallel = False

    def load(self) -> None:
        package = require("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "metrics")
        (file,) = self.files
        with tempfile.NamedTemporaryFile(suffix=".pth") as plain:  # the package would execute code in a damaged file
            torch.save(dict(read_checkpoint(file)), plain.name)
            self.network = package.FeatureExtractorInceptionV3("inception", ["2048"], plain.name).to(self.device)

    @torch.inference_mode()
    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        faces = face_video(take.video)
        chosen = faces[np.linspace(0, len(faces) - 1, min(FRAMES, len(faces))).round().astype(int)]
        (features,) = self.network(torch.from_numpy(chosen).permute(0, 3, 1, 2).to(self.device))
        return {"fid": features.float().cpu().numpy()}


class FVD(Metric):
    figures: ClassVar = {"fvd": Figure("FVD", -1, 1, meaning="distance of video features to the ground truth")}
    weight_files = ("i3d_torchscript.pt",)
    inputs = ("video",)
    parallel = False

    def load(self) -> None:
        (file,) = self.files
        try:
            self.network = torch.jit.load(str(file), map_location=self.device).eval()
        except RuntimeError as error:
            raise UserError(f"{file} is not a TorchScript file ({str(error).splitlines()[0]})") from error

    @torch.inference_mode()
    def measure(self, take: Take, truth: Take) -> dict[str, Any]:
        faces = face_video(take.video)
        windows = len(faces) // FRAMES
        if not windows:
            raise UserError(f"the clip has {len(faces)} frames, and FVD needs {FRAMES}")
        faces = torch.from_numpy(faces[: windows * FRAMES]).reshape(windows, FRAMES, *faces.shape[1:])
        options = {"rescale": True, "resize": True, "return_features": True}
        clips = (window[None].permute(0, 4, 1, 2, 3).float().to(self.device) for window in faces)
        rows = [self.network(clip, **options) for clip in clips]
        return {"fvd": torch.cat(rows).float().cpu().numpy()}

"""Golden cases of the visual encoders: `avhubert_*`, `mouth_align_*`, `arcface_*`.

Axes: B batch, T video frames, E model width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.faces.track import fill_landmarks
from engine.official import rename
from engine.release import load_strict
from hicodit.conditions import align, arcface, avhubert
from tests.golden.runners import Case, runner
from tests.reference import mouth


def _hubert(case: Case) -> avhubert.AVHubert:
    """The case's network. Targets and masks of pre-training are not even filled: they are large."""
    state = case.weights(lambda key: rename(key, avhubert.RULES) is not None)
    said = {key: case.config[key] for key in ("encoder_attention_heads", "layer_norm_first") if key in case.config}
    return avhubert.AVHubert.from_upstream(state, case.name, said)


@runner("avhubert_preproc")
def preprocessing(case: Case) -> dict[str, Tensor]:
    return {"video": avhubert.prepare_mouth(case.inputs["frames"].double() / 255).float()[None, None]}


@runner("avhubert_resnet")
@torch.no_grad()
def front_end(case: Case) -> dict[str, Tensor]:
    state = avhubert.our_state(case.weights())
    network = nn.ModuleDict(
        {"front_end": avhubert.VideoFrontEnd(), "video_proj": nn.Linear(*state["video_proj.weight"].shape[::-1])}
    )
    load_strict(network.eval(), {k: v for k, v in state.items() if k.startswith(tuple(network))}, case.name)
    video = case.inputs["video"]
    stem = network["front_end"].stem(video)  # (B, C, T, 22, 22)
    features = network["front_end"](video[:, 0])
    return {
        "stem_mean": stem.mean((-1, -2)),
        "stem_std": stem.std((-1, -2)),
        "features": features.transpose(1, 2),
        "projected": network["video_proj"](features).transpose(1, 2),
    }


@runner("avhubert_")
@torch.no_grad()
def hubert(case: Case) -> dict[str, Tensor]:
    model = _hubert(case)
    features = model.front_end(case.inputs["video"][:, 0])
    video = model.video_proj(features)
    fused = model.fuse(video)
    out = {"resnet": features.transpose(1, 2), "fused": fused, "last": model.encode(fused)}
    if "padding_mask" in case.inputs:
        out["last_padded"] = model.encode(fused, ~case.inputs["padding_mask"])
    for name in case.outputs:
        if name.startswith("layer"):
            number = name.removeprefix("layer")
            out[name] = model.encode(fused, layer=int(number) if number.isdigit() else model.config.layers)
    if "zero_audio_input" in case.outputs:
        # Filterbanks of zeros come out of the audio projection as its bias, which is not the absence of audio.
        bias = case.weights(lambda key: key == "feature_extractor_audio.proj.bias")["feature_extractor_audio.proj.bias"]
        heard = model.fuse(video, bias.expand_as(video))
        out |= {"zero_audio_pre_encoder": heard, "zero_audio_input": model.encode(heard)}
    return out


def _rgb(pictures: Tensor) -> np.ndarray:
    return np.ascontiguousarray(pictures.numpy()[..., ::-1])


@runner("mouth_align_avhubert")
def mouth_avhubert(case: Case) -> dict[str, Tensor | np.ndarray]:
    i = {name: value.numpy() for name, value in case.inputs.items()}
    landmarks = fill_landmarks(i["landmarks"], i["present"])
    stable = list(case.meta.get("stable", align.STABLE))
    window = case.meta.get("window", align.WINDOW)
    points = landmarks[:, stable]
    mean = i["mean_face"][stable]
    matrix, centre = align.avhubert_poses(points, landmarks[:, align.MOUTH], mean, window)
    crop = align.avhubert_mouth(_rgb(case.inputs["frames_bgr"]), align.cut_poses(matrix, centre))
    homogeneous = np.concatenate([matrix, np.broadcast_to([0.0, 0.0, 1.0], (len(matrix), 1, 3))], 1)
    return {"landmarks_interpolated": landmarks, "matrix": homogeneous, "mouth_centre": centre, "crop_grey": crop}


@runner("mouth_align_autoavsr")
def mouth_auto_avsr(case: Case) -> dict[str, np.ndarray]:
    i = {name: value.numpy() for name, value in case.inputs.items()}
    landmarks = fill_landmarks(i["landmarks"], i["present"])
    stable = case.meta.get("stable", mouth.AUTO_AVSR_STABLE)
    window = case.meta.get("window", align.WINDOW)
    crop, matrix = mouth.auto_avsr_mouth(_rgb(case.inputs["frames_bgr"]), landmarks, i["mean_face"], stable, window)
    return {"matrix": matrix, "crop_grey": crop}


@runner("arcface_align")
def face_alignment(case: Case) -> dict[str, np.ndarray]:
    points = case.inputs["landmarks"].numpy()
    picture = _rgb(case.inputs["image_bgr"])
    matrices = np.stack([align.face_matrix(p) for p in points])
    crops = np.stack([align.warp(picture, matrix, align.ARCFACE_SIDE) for matrix in matrices])
    return {"matrix": matrices, "crop_bgr": crops[..., ::-1].copy()}


@runner("arcface_iresnet")
@torch.no_grad()
def iresnet(case: Case) -> dict[str, Tensor]:
    model = arcface.ArcFace.from_upstream(case.weights(), case.name)
    faces = torch.from_numpy(_rgb(case.inputs["image_bgr"])).movedim(-1, -3).float() / 255
    picture = arcface.prepare_faces(faces if faces.ndim == 4 else faces[None])
    embedding = model.embed(picture)
    out = {"input": picture, "embedding": embedding, "unit": F.normalize(embedding, dim=-1)}
    for i, level in enumerate(model.maps(picture), 1):
        out |= {f"layer{i}": level, f"layer{i}_mean": level.mean((-1, -2))}
    return out

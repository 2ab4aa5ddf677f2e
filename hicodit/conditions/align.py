"""Alignment of face images to a canonical pose by similarity transforms: the mouth for AV-HuBERT, the face for ArcFace.

Axes: T frames, P landmarks, M landmarks of the mouth, H height, W width, S image side. Points are (x, y) in pixels; a
matrix (2, 3) maps source points to points of the aligned image.

68 landmarks are numbered as in iBUG 300-W. Five are left eye, right eye, nose, left mouth corner, right mouth corner,
as seen in the image (the order of ArcFace and YuNet).
"""

from __future__ import annotations

import cv2
import numpy as np

from engine.errors import UserError
from engine.faces.detectors import transform

MOUTH_SIDE = 96
FRAME_SIDE = 256  # side of the frame with the mean face, in pixels
WINDOW = 12  # number of frames over which AV-HuBERT's preprocessing averages landmarks

# Points of a mean face in a 256 x 256 frame: the base of the nose and the eye corners, which speech does not move,
# and the mouth centre (published with the LRW preprocessing that AV-HuBERT uses).
# indices into 68 landmarks
STABLE = (33, 36, 39, 42, 45)
MOUTH = slice(48, 68)
MEAN_STABLE = np.array([[128.87, 137.30], [92.52, 94.37], [112.77, 94.94], [145.53, 94.54], [166.68, 93.57]])
MEAN_MOUTH = np.array([129.31, 157.82])

# Five points of an aligned face in a 112 x 112 image, from the published code of ArcFace (arXiv 1801.07698).
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
ARCFACE_SIDE = 112


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Fit the least-squares similarity transform (2, 3) float64, without reflection, from `source` (P, 2) to `target`
    (P, 2).

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns" (1991), computed in the
    precision of the arguments.
    """
    centre = source.mean(0)
    goal = target.mean(0)
    spread = (source - centre).var(0).sum()
    if not spread > 0:
        raise UserError("all landmarks of a face coincide: the pose cannot be estimated")
    covariance = (target - goal).T @ (source - centre) / len(source)
    left, size, right = np.linalg.svd(covariance)
    sign = np.array([1.0, np.sign(np.linalg.det(covariance)) or 1.0])
    turn = (left * sign) @ right
    scale = 1.0 / spread * (size @ sign)
    return np.column_stack([scale * turn, goal - scale * (turn @ centre)])


def warp(picture: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Resample `picture` (H, W[, 3]) through `matrix` to (size, size[, 3]) uint8, bilinear, black outside of the image.

    The results equal `warpAffine` of OpenCV 5; OpenCV 4 rounds positions to 1/32 pixel.
    """
    inverse = cv2.invertAffineTransform(np.asarray(matrix, np.float64)).astype(np.float32)
    x = np.arange(size, dtype=np.float32)
    # float32 throughout; the last multiply-add rounds once, as with a fused instruction
    sx, sy = (
        (x.astype(np.float64) * row[0] + (x * row[1] + row[2]).astype(np.float64)[:, None]).astype(np.float32)
        for row in inverse
    )
    return np.rint(bilinear(picture, sx, sy)).astype(np.uint8)


def bilinear(picture: np.ndarray, sx: np.ndarray, sy: np.ndarray, unit: float = 1.0) -> np.ndarray:
    """Sample an image (H, W[, 3]) uint8, divided by `unit`, at positions sx, sy (S, S). The result has their dtype.
    Pixels outside count as 0.
    """
    number = sx.dtype.type
    left = max(0, int(sx.min()))  # convert only the required region
    top = max(0, int(sy.min()))
    right = max(0, int(sx.max()) + 2)
    bottom = max(0, int(sy.max()) + 2)
    picture = picture[top:bottom, left:right] / number(unit)
    sx = sx - number(left)
    sy = sy - number(top)
    height, width = picture.shape[:2]
    padded = np.pad(picture, [(2, 2), (2, 2), (0, 0)][: picture.ndim])
    left = np.floor(sx)
    top = np.floor(sy)
    fx = sx - left
    fy = sy - top
    column = np.clip(left, -2, width).astype(np.intp) + 2
    row = np.clip(top, -2, height).astype(np.intp) + 2
    if picture.ndim == 3:
        fx = fx[..., None]
        fy = fy[..., None]
    upper = padded[row, column] + fx * (padded[row, column + 1] - padded[row, column])
    lower = padded[row + 1, column] + fx * (padded[row + 1, column + 1] - padded[row + 1, column])
    return upper + fy * (lower - upper)


def face_picture(picture: np.ndarray, points: np.ndarray, size: int) -> np.ndarray:
    """Crop the face (size, size, 3) uint8 from `picture` (H, W, 3) in ArcFace's pose, given five points (5, 2)."""
    matrix = face_matrix(points, size)
    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale < 0.5:  # reduce the image first, as bilinear sampling would skip pixels
        picture = cv2.GaussianBlur(picture, (0, 0), 0.25 / scale)
    return warp(picture, matrix, size)


def face_matrix(points: np.ndarray, size: int = ARCFACE_SIDE) -> np.ndarray:
    """Return the transform (2, 3) from five points (5, 2) to ArcFace's pose. Pixel centres are preserved at other image
    sizes.
    """
    target = ARCFACE_POINTS if size == ARCFACE_SIDE else (ARCFACE_POINTS + 0.5) * (size / ARCFACE_SIDE) - 0.5
    return similarity(np.asarray(points, np.float32), target.astype(np.float32))


def mouth_poses(landmarks: np.ndarray) -> np.ndarray:
    """Return AV-HuBERT's transforms (T, 2, 3) from frames to mouth crops, given landmarks (T, P, 2) of every frame.

    With 68 landmarks, this is AV-HuBERT's preprocessing. With five, the eyes and the mouth centre are used.
    """
    if landmarks.shape[1] == 68:
        return cut_poses(*avhubert_poses(landmarks[:, list(STABLE)], landmarks[:, MOUTH]))
    mouth = landmarks[:, 3:]
    stable = np.concatenate([landmarks[:, :2], mouth.mean(1, keepdims=True)], 1)
    return cut_poses(*avhubert_poses(stable, mouth, _MEAN_EYES_AND_MOUTH))


def avhubert_poses(
    stable: np.ndarray, mouth: np.ndarray, mean: np.ndarray = MEAN_STABLE, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Return AV-HuBERT's transforms (T, 2, 3) to the mean face in its 256 x 256 frame, and the mouth centres (T, 2)
    there.

    Args:
        stable: (T, P, 2) landmarks that speech does not move.
        mouth: (T, M, 2).
        mean: (P, 2) of the mean face.
        window: number of frames over which stable landmarks are averaged, starting at the current frame. The last full
            window is used for all later frames.
    """
    window = min(len(stable), window)
    full = len(stable) - window + 1
    matrices = [similarity(stable[i : i + window].mean(0), mean) for i in range(full)]
    matrices += [matrices[-1]] * (window - 1)
    centres = [transform(matrix, points).mean(0) for matrix, points in zip(matrices, mouth)]
    return np.stack(matrices), np.stack(centres)


def cut_poses(matrices: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Compose transforms (T, 2, 3) to the mean face's frame with the crop of a 96 x 96 square around `centres` (T, 2),
    at integer positions.

    Squares that exceed the frame are moved inside.
    """
    half = MOUTH_SIDE // 2
    out = matrices.copy()
    out[:, :, 2] -= np.clip(centres, half, FRAME_SIDE - half).round() - half
    return out


def avhubert_mouth(frames: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Crop the mouth (T, 96, 96) uint8 grey as in AV-HuBERT's preprocessing, but without its lossy intermediate file.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        poses: (T, 2, 3) transforms to the crops.
    """
    mouths = []
    x = np.arange(MOUTH_SIDE, dtype=np.float64)
    for frame, matrix in zip(frames, poses, strict=True):
        to_x, to_y = cv2.invertAffineTransform(matrix)
        sx = to_x[0] * x + to_x[1] * x[:, None] + to_x[2]
        sy = to_y[0] * x + to_y[1] * x[:, None] + to_y[2]
        values = bilinear(frame, sx, sy, 255) * 255
        mouths.append(cv2.cvtColor(values.astype(np.uint8), cv2.COLOR_RGB2GRAY))  # the original truncates
    return np.stack(mouths)


# The centre of an eye is halfway between its corners (36 and 39, 42 and 45).
_MEAN_EYES_AND_MOUTH = np.stack([MEAN_STABLE[1:3].mean(0), MEAN_STABLE[3:5].mean(0), MEAN_MOUTH])

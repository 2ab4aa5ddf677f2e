"""Pictures of a face brought into a standard pose by a similarity: the mouth of AV-HuBERT, the face of ArcFace.

Axes: T frames, P landmarks, H height, W width, S picture side. Points are (x, y) in pixels; a matrix (2, 3) maps source
points to picture points.

68 landmarks are numbered as iBUG 300-W does: 27-35 nose, 36-41 and 42-47 eyes, 48-67 mouth. Five points are the eye on
the picture's left, the eye on its right, nose, mouth corner on the left, on the right (ArcFace's and YuNet's order).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from engine.errors import UserError

MOUTH_SIDE = 96
FRAME_SIDE = 256  # of the frame in which the mean face stands
MOUTH = slice(48, 68)

# Landmarks of a mean face in a 256 x 256 frame: those that no speech moves, and the middle of the mouth (published with
# LRW preprocessing; the values are facts of AV-HuBERT's input).
STABLE = (33, 36, 39, 42, 45)
MEAN_STABLE = np.array([[128.87, 137.30], [92.52, 94.37], [112.77, 94.94], [145.53, 94.54], [166.68, 93.57]])
MEAN_MOUTH = np.array([129.31, 157.82])
AUTO_AVSR_STABLE = (28, 33, 36, 39, 42, 45, 48, 54)
WINDOW = 12  # frames over which landmarks are averaged

# Five points of an aligned face in a 112 x 112 picture (ArcFace, arXiv 1801.07698, as its published code has them).
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
ARCFACE_SIDE = 112


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares similarity without reflection from `source` (P, 2) onto `target` (P, 2): (2, 3) float64.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns" (1991), in the precision
    of its arguments.

    Raises:
        UserError: the points of `source` coincide.
    """
    centre, goal = source.mean(0), target.mean(0)
    spread = (source - centre).var(0).sum()
    if not spread > 0:
        raise UserError("the landmarks of a face fall on one point: no pose can be found from them")
    covariance = (target - goal).T @ (source - centre) / len(source)
    left, size, right = np.linalg.svd(covariance)
    sign = np.array([1.0, np.sign(np.linalg.det(covariance)) or 1.0])
    turn = (left * sign) @ right
    scale = 1.0 / spread * (size @ sign)
    return np.column_stack([scale * turn, goal - scale * (turn @ centre)])


def warp(picture: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """(size, size[, 3]) uint8: `picture` (H, W[, 3]) seen through `matrix`, bilinear, black outside.

    The same numbers as OpenCV 5's `warpAffine`; OpenCV 4 rounds positions to 1/32 pixel.
    """
    inverse = _inverse(matrix).astype(np.float32)
    x = np.arange(size, dtype=np.float32)
    # float32 throughout; the last multiply-add rounds once, as a fused instruction does
    sx, sy = (
        (x.astype(np.float64) * row[0] + (x * row[1] + row[2]).astype(np.float64)[:, None]).astype(np.float32)
        for row in inverse
    )
    values = _bilinear(picture.astype(np.float32), sx, sy)
    return np.rint(values).astype(np.uint8)


def _inverse(matrix: np.ndarray) -> np.ndarray:
    (a, b, tx), (c, d, ty) = np.asarray(matrix, np.float64)
    scale = a * d - b * c
    scale = 1 / scale if scale else 0.0
    p, q, r, s = d * scale, -b * scale, -c * scale, a * scale
    return np.array([[p, q, -p * tx - q * ty], [r, s, -r * tx - s * ty]])


def _bilinear(picture: np.ndarray, sx: np.ndarray, sy: np.ndarray) -> np.ndarray:
    """Values of `picture` (H, W[, 3]) at positions sx, sy (S, S), in their type; a missing neighbour counts as 0."""
    left, top = np.floor(sx), np.floor(sy)
    fx, fy = sx - left, sy - top
    height, width = picture.shape[:2]
    padded = np.pad(picture, [(2, 2), (2, 2), (0, 0)][: picture.ndim])
    column = np.clip(left, -2, width).astype(np.intp) + 2
    row = np.clip(top, -2, height).astype(np.intp) + 2
    if picture.ndim == 3:
        fx, fy = fx[..., None], fy[..., None]
    upper = padded[row, column] + fx * (padded[row, column + 1] - padded[row, column])
    lower = padded[row + 1, column] + fx * (padded[row + 1, column + 1] - padded[row + 1, column])
    return upper + fy * (lower - upper)


def align_face(picture: np.ndarray, points: np.ndarray, size: int = ARCFACE_SIDE) -> np.ndarray:
    """Face (size, size, 3) uint8 of `picture` (H, W, 3) as ArcFace wants it, from five points (5, 2)."""
    return warp(picture, face_matrix(points, size), size)


def face_picture(picture: np.ndarray, points: np.ndarray, size: int) -> np.ndarray:
    """`align_face` for a picture much larger than `size`."""
    matrix = face_matrix(points, size)
    return warp(_blurred(picture, matrix), matrix, size)


def face_matrix(points: np.ndarray, size: int = ARCFACE_SIDE) -> np.ndarray:
    """(2, 3): five points (5, 2) onto ArcFace's; pixel centres stay pixel centres in pictures of another size."""
    target = ARCFACE_POINTS if size == ARCFACE_SIDE else (ARCFACE_POINTS + 0.5) * (size / ARCFACE_SIDE) - 0.5
    return similarity(np.asarray(points, np.float32), target.astype(np.float32))


def mouth_picture(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mouth (96, 96) uint8 grey of `picture` (H, W, 3) in AV-HuBERT's pose, from five points (5, 2), smoothed already.

    Eyes and mouth take the place of the 68 landmarks: detectors without a large download find no more.
    """
    matrix = similarity(_eyes_and_mouth(points), _MEAN_EYES_AND_MOUTH)
    corner = np.clip(_apply(matrix, points[3:]).mean(0), MOUTH_SIDE / 2, FRAME_SIDE - MOUTH_SIDE / 2) - MOUTH_SIDE / 2
    matrix[:, 2] -= corner.round()
    return cv2.cvtColor(warp(_blurred(picture, matrix), matrix, MOUTH_SIDE), cv2.COLOR_RGB2GRAY)


def _eyes_and_mouth(points: np.ndarray) -> np.ndarray:
    """Five points (5, 2) -> both eyes and the middle of the mouth (3, 2)."""
    return np.stack([points[0], points[1], points[3:].mean(0)])


# An eye's middle is halfway between its corners (36 and 39, 42 and 45).
_MEAN_EYES_AND_MOUTH = np.stack([MEAN_STABLE[1:3].mean(0), MEAN_STABLE[3:5].mean(0), MEAN_MOUTH])


def _blurred(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`picture`, without detail that is too fine for what `matrix` makes of it: bilinear sampling would skip pixels."""
    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    return cv2.GaussianBlur(picture, (0, 0), 0.25 / scale) if scale < 0.5 else picture


def fill_landmarks(landmarks: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(T, P, 2): frames where `present` (T,) is false get landmarks on the line between their neighbours'.

    Raises:
        UserError: no frame has landmarks.
    """
    if not present.any():
        raise UserError("no frame of the clip has landmarks")
    time, known = np.arange(len(landmarks)), np.flatnonzero(present)
    flat = landmarks.reshape(len(landmarks), -1).astype(np.float64)
    filled = np.stack([np.interp(time, known, column[known]) for column in flat.T], 1)
    filled[known] = flat[known]
    return filled.reshape(landmarks.shape)


def avhubert_matrices(points: np.ndarray, mean_points: np.ndarray = MEAN_STABLE, window: int = WINDOW) -> np.ndarray:
    """AV-HuBERT's transforms (T, 2, 3) from points (T, P, 2) of every frame onto those of the mean face (P, 2).

    Points are averaged over up to `window` frames that BEGIN at the current one; the last full window serves all frames
    after its first.
    """
    window = min(len(points), window)
    full = len(points) - window + 1
    matrices = [similarity(points[i : i + window].mean(0), mean_points) for i in range(full)]
    return np.stack(matrices + [matrices[-1]] * (window - 1))


def avhubert_mouth(
    frames: np.ndarray,
    landmarks: np.ndarray,
    mean_stable: np.ndarray = MEAN_STABLE,
    stable: Sequence[int] = STABLE,
    window: int = WINDOW,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mouth pictures as AV-HuBERT's own preparation cuts them, without its detour over a lossy file.

    Args:
        frames: (T, H, W, 3) uint8 RGB. landmarks: (T, 68, 2) of every frame. mean_stable: (P, 2) the mean face's
            points of numbers `stable`. window: frames over which landmarks are averaged.

    Returns:
        mouth (T, 96, 96) uint8 grey, matrices (T, 2, 3), and mouth centres (T, 2) in the 256 x 256 frame.
    """
    matrices = avhubert_matrices(landmarks[:, list(stable)], mean_stable, window)
    centres = np.stack([_apply(m, points[MOUTH]).mean(0) for m, points in zip(matrices, landmarks)])
    mouths = []
    for frame, matrix, centre in zip(frames, matrices, centres):
        inverse, x = _inverse(matrix), np.arange(FRAME_SIDE, dtype=np.float64)
        sx, sy = (row[0] * x + row[1] * x[:, None] + row[2] for row in inverse)
        values = _bilinear(frame / 255.0, sx, sy) * 255
        pose = cv2.cvtColor(values.astype(np.uint8), cv2.COLOR_RGB2GRAY)  # the original cuts fractions off
        mouths.append(_cut(pose, centre))
    return np.stack(mouths), matrices, centres


def auto_avsr_mouth(
    frames: np.ndarray, landmarks: np.ndarray, mean_face: np.ndarray, stable: Sequence[int] = AUTO_AVSR_STABLE
) -> tuple[np.ndarray, np.ndarray]:
    """Mouth pictures as Auto-AVSR cuts them.

    The averaging window is centred, shorter at the ends, and moved to the current frame's own middle; the `stable`
    points fix the transform by least median of squares; grey comes before the warp.

    Args:
        frames: (T, H, W, 3) uint8 RGB. landmarks: (T, 68, 2) of every frame. mean_face: (68, 2) in a 256 x 256 frame.

    Returns:
        mouth (T, 96, 96) uint8 grey and matrices (T, 2, 3).

    Raises:
        UserError: a mouth lies too far from the middle of the picture, or no transform fits.
    """
    mouths, matrices, stable = [], [], list(stable)
    for i, frame in enumerate(frames):
        half = min(WINDOW // 2, i, len(frames) - 1 - i)
        smooth = landmarks[i - half : i + half + 1].mean(0)
        smooth = smooth + landmarks[i].mean(0) - smooth.mean(0)
        matrix = cv2.estimateAffinePartial2D(smooth[stable], mean_face[stable], method=cv2.LMEDS)[0]
        if matrix is None:
            raise UserError(f"frame {i}: its landmarks are no face's: no transform to the mean face fits")
        centre = _apply(matrix, smooth)[MOUTH].mean(0)
        if np.abs(centre - FRAME_SIDE / 2).max() > MOUTH_SIDE / 2 + 5:
            raise UserError(f"frame {i}: the mouth lies at {centre.round()} of a {FRAME_SIDE} x {FRAME_SIDE} picture")
        grey = warp(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), matrix, FRAME_SIDE)
        mouths.append(_cut(grey, centre))
        matrices.append(matrix)
    return np.stack(mouths), np.stack(matrices)


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (P, 2) through a matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def _cut(picture: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The `MOUTH_SIDE` square around `centre`, moved inside `picture` where it would stick out."""
    half = MOUTH_SIDE // 2
    x, y = (round(np.clip(c, half, side - half)) for c, side in zip(centre, picture.shape[::-1]))
    return picture[y - half : y + half, x - half : x + half]

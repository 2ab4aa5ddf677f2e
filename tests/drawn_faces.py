"""Faces drawn with a few ellipses, for tests that need something to find."""

import cv2
import numpy as np


def draw_face(opening: float, side: int = 128) -> np.ndarray:
    """A frontal face that OpenCV's cascade finds; `opening` of the mouth in [0, 1]."""
    if side < 128:
        return cv2.resize(draw_face(opening), (side, side), interpolation=cv2.INTER_AREA)
    s = side / 128
    image = np.full((side, side, 3), (150, 160, 170), np.uint8)

    def ellipse(x, y, a, b, colour):
        cv2.ellipse(image, (int(x * s), int(y * s)), (int(a * s), int(b * s)), 0, 0, 360, colour, -1, cv2.LINE_AA)

    ellipse(64, 66, 36, 46, (225, 185, 155))
    ellipse(64, 34, 36, 18, (70, 45, 30))
    for x in (49, 79):
        ellipse(x, 60, 8, 4, (250, 250, 250))
        ellipse(x, 60, 4, 4, (40, 30, 25))
        cv2.line(image, (int((x - 9) * s), int(51 * s)), (int((x + 9) * s), int(51 * s)), (70, 45, 30), int(3 * s))
    cv2.line(image, (int(64 * s), int(62 * s)), (int(62 * s), int(76 * s)), (175, 130, 105), int(3 * s))
    ellipse(64, 90, 14, 3 + 8 * opening, (150, 60, 60))
    return image


def talking_head(frames: int, side: int = 128) -> np.ndarray:
    return np.stack([draw_face(0.5 + 0.5 * np.sin(i), side) for i in range(frames)])


def scene(frames: int, heads: list, size: tuple[int, int] = (120, 320)) -> np.ndarray:
    """Frames (T, H, W, 3) with drawn heads; each is a function of the frame number to (x, y, side) or None."""
    out = np.full((frames, *size, 3), (150, 160, 170), np.uint8)
    for i in range(frames):
        for place in heads:
            where = place(i)
            if where is not None:
                x, y, side = where
                head = draw_face(0.5 + 0.5 * np.sin(i), side)
                out[i, y : y + side, x : x + side] = head[: size[0] - y, : size[1] - x]
    return out

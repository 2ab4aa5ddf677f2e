"""Stands in for dlib where it is not installed: 68 landmarks of an average face in whichever box is given."""

from types import SimpleNamespace

import numpy as np


class rectangle:
    def __init__(self, left, top, right, bottom):
        self.corner = np.array([left, top])
        self.side = right - left


def _ring(count, x, y, width, height):
    """Points (count, 2) on an ellipse, in fractions of the box."""
    angle = np.pi - 2 * np.pi * np.arange(count) / count
    return np.stack([x + width * np.cos(angle), y - height * np.sin(angle)], 1)


JAW = np.stack([np.linspace(0.05, 0.95, 17), 0.4 + 0.6 * np.sin(np.linspace(0, np.pi, 17))], 1)
BROWS = np.stack([np.linspace(0.15, 0.85, 10), np.full(10, 0.2)], 1)
NOSE = np.concatenate([
    np.stack([np.full(4, 0.5), np.linspace(0.33, 0.54, 4)], 1), np.stack([np.linspace(0.4, 0.6, 5), np.full(5, 0.6)], 1)
])  # fmt: skip
EYES = [_ring(6, x, 0.32, 0.08, 0.03) for x in (0.3, 0.7)]
MOUTH = [_ring(12, 0.5, 0.77, 0.16, 0.06), _ring(8, 0.5, 0.77, 0.11, 0.03)]
SHAPE = np.concatenate([JAW, BROWS, NOSE, *EYES, *MOUTH])


def get_frontal_face_detector():
    return lambda picture: []


def shape_predictor(path):
    def predict(picture, box):
        points = box.corner + SHAPE * box.side
        return SimpleNamespace(parts=lambda: [SimpleNamespace(x=x, y=y) for x, y in points])

    return predict

"""Stands in for dlib where it is not installed: 68 landmarks of an average face in whichever box is given."""

from types import SimpleNamespace

import numpy as np


class rectangle:
    def __init__(self, left, top, right, bottom):
        self.corner = np.array([left, top])
        self.side = right - left


# In fractions of the box: nose, eyes and mouth; jaw and brows lie on the nose, as nothing reads them.
SHAPE = np.full((68, 2), (0.5, 0.6))
SHAPE[36:42] = np.linspace((0.22, 0.32), (0.38, 0.32), 6)
SHAPE[42:48] = np.linspace((0.62, 0.32), (0.78, 0.32), 6)
SHAPE[48:] = np.linspace((0.34, 0.77), (0.66, 0.77), 20)


def get_frontal_face_detector():
    return lambda picture: []


def shape_predictor(path):
    def predict(picture, box):
        points = box.corner + SHAPE * box.side
        return SimpleNamespace(parts=lambda: [SimpleNamespace(x=x, y=y) for x, y in points])

    return predict

"""Stands in for the package whose folder `models` holds dlib's predictor; the stand-in of dlib reads no file."""

"""Conditions of the score network: their types, and the encoders that make them from pictures of a face."""

from hicodit.conditions.types import EXPRESSIONS, Conditions

__all__ = ["EXPRESSIONS", "Conditions"]

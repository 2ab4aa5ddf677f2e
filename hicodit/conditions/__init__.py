"""What the score network is told: the typed conditions, the encoders that make them from face crops, face tracking."""

from hicodit.conditions.types import EXPRESSIONS, NO_EXPRESSION, Conditions

__all__ = ["EXPRESSIONS", "NO_EXPRESSION", "Conditions"]

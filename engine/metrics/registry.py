"""Registry of all metrics, by the names of their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import UserError
from engine.metrics.emotion import Emotion
from engine.metrics.frechet import FID, FVD
from engine.metrics.lip_sync import LipSync
from engine.metrics.mcd import MCD
from engine.metrics.metric import Bitrate, Metric, Stated
from engine.metrics.phonemes import DurationDistance, PhonemeErrors
from engine.metrics.picture import Reconstruction
from engine.metrics.quality import DNSMOS, ESTOI, PESQ, STOI, UTMOS
from engine.metrics.speaker import OwnVoice, SpeakerSimilarity
from engine.metrics.speech import Endings, MouthOpening, PitchContour, Prosody, Synchrony
from engine.metrics.words import LipWords, WordErrors

CLASSES = (
    WordErrors, LipWords, PhonemeErrors, DNSMOS, UTMOS, MCD, LipSync, Emotion, SpeakerSimilarity, PESQ, STOI, ESTOI,
    DurationDistance, FID, FVD, Bitrate, OwnVoice, Prosody, PitchContour, Synchrony, Endings, Reconstruction,
    MouthOpening, Stated,
)  # fmt: skip
METRICS: dict[str, type[Metric]] = {figure: metric for metric in CLASSES for figure in metric.figures}


def metric_of(figure: str) -> type[Metric]:
    """Return the class that measures a figure."""
    if figure not in METRICS:
        raise UserError(f"metric {figure!r} is unknown; available: {', '.join(METRICS)}")
    return METRICS[figure]


def metrics_of(figures: Sequence[str]) -> dict[type[Metric], list[str]]:
    """Group figures by the metric that measures them, in the given order."""
    found: dict[type[Metric], list[str]] = {}
    for figure in figures:
        found.setdefault(metric_of(figure), []).append(figure)
    return found


def protocol_of(metric: type[Metric], given: Mapping[str, str]) -> str:
    """Return the protocol in `given` for one of the metric's figures, or the metric's first protocol."""
    return next((given[figure] for figure in metric.figures if figure in given), metric.protocols[0])

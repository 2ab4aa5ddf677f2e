"""Registry of all metrics, by the names of their figures. The module of a metric is imported when a figure is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import UserError
from engine.instantiate import target
from engine.metrics.metric import Metric

METRICS = {  # figures of each class of this package
    "words.WordErrors": ("wer", "wer_free", "wer_shuffled", "wer_free_shuffled", "letter_errors", "cer"),
    "words.LipWords": ("wer_lips",),
    "phonemes.PhonemeErrors": ("per",),
    "quality.DNSMOS": ("dnsmos",),
    "quality.UTMOS": ("utmos",),
    "mcd.MCD": ("mcd",),
    "lip_sync.LipSync": ("lse_c", "lse_d"),
    "emotion.Emotion": ("emotion_accuracy", "emotion_similarity"),
    "speaker.SpeakerSimilarity": ("speaker_similarity",),
    "quality.PESQ": ("pesq_wide", "pesq_narrow"),
    "quality.STOI": ("stoi",),
    "quality.ESTOI": ("estoi",),
    "phonemes.DurationDistance": ("duration_distance",),
    "frechet.FID": ("fid",),
    "frechet.FVD": ("fvd",),
    "metric.Bitrate": ("bitrate",),
    "speaker.OwnVoice": ("own_voice_first", "voice_similarity"),
    "speech.Prosody": ("pitch_range_correlation", "energy_correlation", "pitch_range_right_way", "energy_right_way"),
    "speech.PitchContour": ("f0_correlation", "log_f0_rmse"),
    "speech.Synchrony": ("synchrony", "synchrony_late", "synchrony_early"),
    "speech.Endings": ("ends_in_time", "ends_late", "ends_cut", "runs_away", "length_error"),
    "picture.Reconstruction": ("psnr", "ssim", "mouth_psnr", "mouth_movement", "eyes_psnr", "eyes_movement"),
    "speech.MouthOpening": ("mouth_opening",),
    "metric.Evaluations": ("evaluations",),
}
FIGURES = {figure: name for name, figures in METRICS.items() for figure in figures}  # class of each figure


def metric_of(figure: str) -> type[Metric]:
    """Return the class that measures a figure."""
    if figure not in FIGURES:
        raise UserError(f"metric {figure!r} is unknown; available: {', '.join(FIGURES)}")
    return target(f"engine.metrics.{FIGURES[figure]}")


def metrics_of(figures: Sequence[str]) -> dict[type[Metric], list[str]]:
    """Group figures by the metric that measures them, in the given order."""
    found: dict[type[Metric], list[str]] = {}
    for figure in figures:
        found.setdefault(metric_of(figure), []).append(figure)
    return found


def protocol_of(metric: type[Metric], given: Mapping[str, str]) -> str:
    """Return the protocol in `given` for one of the metric's figures, or the metric's first protocol."""
    return next((given[figure] for figure in metric.figures if figure in given), metric.protocols[0])

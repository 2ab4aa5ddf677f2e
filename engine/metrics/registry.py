"""All metrics by the names of their figures. Evaluation and the trainer's validation find them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from engine.errors import UserError
from engine.metrics.metric import Metric

CLASSES = {  # the figures that each measures
    "words.WordErrors": "wer wer_free wer_shuffled wer_free_shuffled cer",
    "words.LipWords": "wer_lips",
    "phonemes.PhonemeErrors": "per",
    "quality.DNSMOS": "dnsmos",
    "quality.UTMOS": "utmos",
    "mcd.MCD": "mcd",
    "lip_sync.LipSync": "lse_c lse_d",
    "emotion.Emotion": "emotion_accuracy emotion_similarity",
    "speaker.SpeakerSimilarity": "speaker_similarity",
    "quality.PESQ": "pesq_wide pesq_narrow",
    "quality.STOI": "stoi",
    "quality.ESTOI": "estoi",
    "phonemes.DurationDistance": "duration_distance",
    "frechet.FID": "fid",
    "frechet.FVD": "fvd",
    "metric.Bitrate": "bitrate",
    "speaker.OwnVoice": "own_voice_first voice_similarity",
    "speech.Prosody": "pitch_range_correlation energy_correlation pitch_range_right_way energy_right_way",
    "speech.Synchrony": "synchrony synchrony_late synchrony_early",
    "speech.Endings": "ends_in_time ends_late ends_cut runs_away length_error",
    "picture.Reconstruction": "psnr ssim mouth_psnr mouth_movement eyes_psnr eyes_movement",
    "speech.MouthOpening": "mouth_opening",
    "metric.Stated": "evaluations",
}
METRICS = {figure: name for name, figures in CLASSES.items() for figure in figures.split()}


def metric_of(figure: str) -> type[Metric]:
    """Return the class that measures a figure."""
    if figure not in METRICS:
        raise UserError(f"metric {figure!r} is unknown; there are: {', '.join(METRICS)}")
    module, name = METRICS[figure].split(".")
    return getattr(import_module(f"engine.metrics.{module}"), name)


def metrics_of(figures: Sequence[str]) -> dict[type[Metric], list[str]]:
    """Return figures by the class that measures them, in the order given."""
    found: dict[type[Metric], list[str]] = {}
    for figure in figures:
        found.setdefault(metric_of(figure), []).append(figure)
    return found


def protocol_of(metric: type[Metric], given: Mapping[str, str]) -> str:
    """Return what `given` says for one of the metric's figures; where it says nothing, the metric's first protocol."""
    return next((given[figure] for figure in metric.figures if figure in given), metric.protocols[0])

"""All metrics by the names of their figures. Evaluation and the trainer's validation find them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from engine.errors import UserError
from engine.metrics.metric import Figure, Metric

METRICS = {  # figure: the class that measures it
    "wer": "words.WordErrors",
    "wer_free": "words.WordErrors",
    "wer_shuffled": "words.WordErrors",
    "wer_free_shuffled": "words.WordErrors",
    "cer": "words.WordErrors",
    "per": "phonemes.PhonemeErrors",
    "dnsmos": "dnsmos.DNSMOS",
    "utmos": "utmos.UTMOS",
    "mcd": "mcd.MCD",
    "lse_c": "lip_sync.LipSync",
    "lse_d": "lip_sync.LipSync",
    "emotion_accuracy": "emotion.Emotion",
    "emotion_similarity": "emotion.Emotion",
    "speaker_similarity": "speaker_similarity.SpeakerSimilarity",
    "pesq_wide": "pesq.PESQ",
    "pesq_narrow": "pesq.PESQ",
    "stoi": "stoi.STOI",
    "estoi": "stoi.ESTOI",
    "duration_distance": "durations.DurationDistance",
    "fid": "frechet.FID",
    "fvd": "frechet.FVD",
    "bitrate": "bitrate.Bitrate",
    "own_voice_first": "own_voice.OwnVoice",
    "voice_similarity": "own_voice.OwnVoice",
    "pitch_range_correlation": "prosody.Prosody",
    "energy_correlation": "prosody.Prosody",
    "pitch_range_right_way": "prosody.Prosody",
    "energy_right_way": "prosody.Prosody",
    "synchrony": "synchrony.Synchrony",
    "synchrony_late": "synchrony.Synchrony",
    "synchrony_early": "synchrony.Synchrony",
    "ends_in_time": "endings.Endings",
    "ends_late": "endings.Endings",
    "ends_cut": "endings.Endings",
    "runs_away": "endings.Endings",
    "length_error": "endings.Endings",
    "psnr": "reconstruction.Reconstruction",
    "ssim": "reconstruction.Reconstruction",
    "mouth_psnr": "reconstruction.Reconstruction",
    "mouth_movement": "reconstruction.Reconstruction",
    "eyes_psnr": "reconstruction.Reconstruction",
    "eyes_movement": "reconstruction.Reconstruction",
    "mouth_opening": "synchrony.MouthOpening",
    "evaluations": "stated.Stated",
    "seconds_a_second": "stated.Stated",
}


def metric_of(figure: str) -> type[Metric]:
    """The class that measures a figure.

    Raises:
        UserError: there is no figure of that name.
    """
    if figure not in METRICS:
        raise UserError(f"metric {figure!r} is unknown; there are: {', '.join(METRICS)}")
    module, name = METRICS[figure].split(".")
    return getattr(import_module(f"engine.metrics.{module}"), name)


def metrics_of(figures: Sequence[str]) -> dict[type[Metric], list[str]]:
    """Figures by the class that measures them, in the order given."""
    found: dict[type[Metric], list[str]] = {}
    for figure in figures:
        found.setdefault(metric_of(figure), []).append(figure)
    return found


def protocol_of(metric: type[Metric], given: Mapping[str, str]) -> str:
    """What `given` says for one of the metric's figures; where it says nothing, the metric's first protocol."""
    return next((given[figure] for figure in metric.figures if figure in given), metric.protocols[0])


def description(figure: str) -> Figure:
    return metric_of(figure).figures[figure]

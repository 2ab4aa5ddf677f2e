"""Files that a model generated say so in their metadata: the comment of MP4, WAV, MP3, FLAC and Ogg files."""

from __future__ import annotations


def generated_comment(model: str, what: str) -> str:
    """Return the comment of a generated file.

    Args:
        model: name of the model, such as "HiCoDiT". what: what it generated, such as "speech and face".

    The last word is the value of IPTC's property `digitalSourceType` for media that a trained model generated.
    """
    return f"AI-generated {what}: {model}, speaking-faces; digitalSourceType trainedAlgorithmicMedia"

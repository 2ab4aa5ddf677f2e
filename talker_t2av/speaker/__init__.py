"""The encoder of reference voices: WavLM with an ECAPA-TDNN head."""

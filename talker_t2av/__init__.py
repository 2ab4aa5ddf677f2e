"""Talker-T2AV: text, speech and motion to speech and motion, one patch of 160 ms at a time."""

"""Talker-T2AV: generation of speech and talking faces from text, speech or motion, in patches of 160 ms."""

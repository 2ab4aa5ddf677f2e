"""Network blocks, discriminators and losses that more than one codec needs."""

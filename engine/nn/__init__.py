"""Network blocks, discriminators and losses shared by several codecs."""

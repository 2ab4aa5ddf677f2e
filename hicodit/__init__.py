"""HiCoDiT: silent face video to speech by masked discrete diffusion over RVQ tokens (arXiv 2604.15923)."""

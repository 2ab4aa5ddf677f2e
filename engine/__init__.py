"""Training and media machinery that knows no model: trainer, checkpoints, release folders, audio and video files."""

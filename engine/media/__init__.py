"""Video and audio files in and out, through the ffmpeg binary of imageio-ffmpeg and libsndfile."""

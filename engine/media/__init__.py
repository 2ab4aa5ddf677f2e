"""Reading and writing of video and audio files, with the ffmpeg binary of imageio-ffmpeg and libsndfile."""

"""Where the face is in a clip: detectors, tracks through time, a picture of the track to check."""

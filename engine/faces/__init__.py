"""Face localisation in video clips: detectors, tracking over time, and a visualisation of the track."""

"""The synthetic talking-face corpus: GRID-style sentences, espeak-ng voices and a rendered 2-D face."""

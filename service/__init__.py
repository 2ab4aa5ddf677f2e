"""The web service of `scripts/serve.py` and the browser page of `scripts/demo.py`."""

"""The web service of `scripts/serve.py` and the page of `scripts/demo.py`: what they do beside reading arguments."""

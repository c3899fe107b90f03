"""Embedding rows for inference: pages, releases, a hot-id cache and the sidecar that answers look-ups.

This package knows nothing of features, models or training; it imports neither torch nor torchrank.
"""

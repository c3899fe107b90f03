"""Embedding rows for inference: pages, releases, a hot-id cache and the sidecar that answers look-ups.

    codec.py, pages.py, release.py       a row in bytes; a table in a file; what a release states of its tables
    gather.py                            kernels: pool and pad encoded rows into a model's inputs
    backend.py                           the seam; memmap.py and redis_backend.py implement it, open.py chooses
    publish.py, releases.py              write, verify, commit; activate, roll back
    lookup.py                            what a scorer asks; store.py answers in process, client.py through a sidecar
    hot_cache.py, cache_*.py             hot rows of all tables within one byte budget; cache_policy.py: which make room
    sidecar*.py, protocol.py, resp.py    the process on an inference host, and what it speaks

This package knows nothing of features, models or training; it imports neither torch nor torchrank.
"""

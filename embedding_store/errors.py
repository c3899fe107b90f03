"""Everything this package raises on purpose.

StoreError
├── InvalidStoreURL      the URL names no backend, or names one wrongly
├── InvalidRelease       a bundle, page file or manifest that cannot be published or read
├── UnknownRelease       no such release in this store
├── UnknownTable         the release has no such table
├── ReleaseConflict      the active release is not the one the caller expected
├── StoreUnavailable     the store cannot be reached: says nothing about whether an id exists
│   └── StoreNotReady    it can, but does not take this: rights, memory, disk, settings; the message says what to set
└── ProtocolError        a malformed frame, or a reply that does not fit the request
"""

from __future__ import annotations


class StoreError(Exception):
    """Base class: catching it catches whatever the store itself can report."""


class InvalidStoreURL(StoreError, ValueError):
    pass


class InvalidRelease(StoreError, ValueError):
    pass


class UnknownRelease(StoreError, LookupError):
    pass


class UnknownTable(StoreError, LookupError):
    pass


class ReleaseConflict(StoreError):
    pass


class StoreUnavailable(StoreError, ConnectionError):
    pass


class StoreNotReady(StoreUnavailable):
    pass


class ProtocolError(StoreError):
    pass

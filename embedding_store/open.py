"""From a store URL to a backend or a store.

memmap://DIR                                      files; DIR absolute (memmap:///var/store) or relative
redis://[USER[:PASSWORD]@]HOST[:PORT][/DB]        rediss:// with TLS
redis+unix://[USER[:PASSWORD]@]/path/to/socket
redis+cluster://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…]      rediss+cluster:// with TLS; options: `redis_url.py`
"""

from __future__ import annotations

from embedding_store.backend import Backend
from embedding_store.degrade import DegradePolicy
from embedding_store.errors import InvalidStoreURL
from embedding_store.store import EmbeddingStore

REDIS_SCHEMES = ("redis", "rediss", "redis+unix", "redis+cluster", "rediss+cluster")


def open_backend(url: str) -> Backend:
    """Raises InvalidStoreURL. Does not connect yet."""
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme == "memmap":
        from embedding_store.memmap import MemmapBackend

        folder = url.removeprefix("memmap://")
        if not folder:
            raise InvalidStoreURL("memmap:// names no directory; accepted: memmap://DIR")
        return MemmapBackend(folder)
    if scheme in REDIS_SCHEMES:
        from embedding_store.redis_backend import RedisBackend
        from embedding_store.redis_url import parse_redis_url

        return RedisBackend(parse_redis_url(url))
    accepted = ", ".join(f"{name}://" for name in ("memmap", *REDIS_SCHEMES))
    # Only the scheme is repeated: the rest may hold a password.
    raise InvalidStoreURL(f"store URL has scheme {scheme or None!r}; accepted: {accepted}")


def open_store(url: str, *, cache_bytes: int = 0, degrade: DegradePolicy | None = None) -> EmbeddingStore:
    """A look-up over `url` with a cache of at most `cache_bytes` over all tables and releases; 0: no cache."""
    return EmbeddingStore(open_backend(url), cache_bytes=cache_bytes, degrade=degrade)

"""What went wrong on the way to a sidecar and back, as errors of this package that name its address."""

from __future__ import annotations

from embedding_store.client_reply import ErrorReplyError
from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable

Failure = (ErrorReplyError, ProtocolError, OSError)  # what connections raise


def explained(error: Exception, address: str, seconds: float) -> StoreError:
    """error: one of `Failure`; seconds: what the call was given."""
    if isinstance(error, ErrorReplyError):
        return type(error.error)(f"{address}: {error.error}")
    if isinstance(error, ProtocolError):
        return ProtocolError(f"{address}: {error}")
    if isinstance(error, TimeoutError):
        return StoreUnavailable(f"{address}: no answer within {seconds:.3f} s")
    return StoreUnavailable(f"{address} cannot be reached: {getattr(error, 'strerror', None) or error}")

"""What went wrong on the way to a sidecar and back, as errors of this package that name its address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from embedding_store.client_reply import ErrorReplyError
from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable


@contextmanager
def explained(address: str, seconds: float) -> Iterator[None]:
    """seconds: what the call was given. Raises StoreError's kinds only, for whatever I/O raises."""
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(f"{address}: {error}") from error
    except StoreError:
        raise
    except ErrorReplyError as reply:
        raise type(reply.error)(f"{address}: {reply.error}") from None
    except TimeoutError as error:
        raise StoreUnavailable(f"{address}: no answer within {seconds:.3f} s") from error
    except OSError as error:
        raise StoreUnavailable(f"{address} cannot be reached: {error.strerror or error}") from error

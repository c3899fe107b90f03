"""The connection that releases are managed and published over: redis-py, as `redis_backend.py` and `redis_writer.py`
use it. Rows are read over others, see `redis_read.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import ClusterError, MovedError, NoPermissionError, ReadOnlyError, RedisClusterException
from redis.retry import Retry

from embedding_store.errors import StoreError, StoreNotReady, StoreUnavailable
from embedding_store.redis_url import RedisAddress


def connect(address: RedisAddress) -> redis.Redis:
    """A client, for a cluster a RedisCluster: the commands are the same. That one connects at once, the other does not.

    One server: one retry over a new connection, for those that it closed while idle; none after a timeout.
    """
    options: dict[str, Any] = {
        "username": address.username,
        "password": address.password,
        "socket_timeout": address.timeout,
        "socket_connect_timeout": min(address.connect_timeout, address.timeout),
        "protocol": 2,
    }
    if address.tls:
        options |= {
            "ssl": True,
            "ssl_ca_certs": address.ca_file,
            "ssl_certfile": address.cert_file,
            "ssl_keyfile": address.key_file,
        }
    if address.cluster:
        nodes = [cast(Any, ClusterNode)(host, port) for host, port in address.cluster]  # it has no annotations
        retry = Retry(NoBackoff(), 3)  # each after reading the topology anew; redis-py's default are ten
        return cast(
            redis.Redis, redis.RedisCluster(startup_nodes=nodes, require_full_coverage=False, retry=retry, **options)
        )
    retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
    if address.socket is not None:
        return redis.Redis(unix_socket_path=address.socket, db=address.db, retry=retry, **options)
    return redis.Redis(host=address.host, port=address.port, db=address.db, retry=retry, **options)


@contextmanager
def errors(address: RedisAddress) -> Iterator[None]:
    """Turns what redis-py raises into this package's errors; none of them repeats credentials."""
    try:
        yield
    except redis.AuthenticationError as error:
        raise StoreUnavailable(f"{address} refused the credentials: {error}") from error
    except redis.TimeoutError as error:
        raise StoreUnavailable(f"{address} did not answer within {address.timeout:g} s") from error
    except redis.BusyLoadingError as error:
        raise StoreUnavailable(f"{address} is still loading its data") from error
    except (redis.ConnectionError, ClusterError, RedisClusterException) as error:
        raise StoreUnavailable(f"{address} cannot be reached: {error}") from error
    except redis.OutOfMemoryError as error:
        advice = "raise maxmemory, or remove old releases (torchrank gc); publishing again goes on where it stopped"
        raise StoreNotReady(f"{address} has no memory left for writing: {advice}") from error
    except NoPermissionError as error:
        raise StoreNotReady(f"{address} does not let this user do that: {_answer(error)}") from error
    except MovedError as error:
        raise StoreNotReady(f"{address} is a node of a cluster, not the store: use redis+cluster://") from error
    except ReadOnlyError as error:
        raise StoreNotReady(f"{address} is a read-only replica: write to its master") from error
    except redis.RedisError as error:
        raise StoreError(f"{address} answered: {_answer(error)}") from error


def _answer(error: redis.RedisError) -> str:
    """Without the command and its arguments, which redis-py puts before the answer where it was one of a pipeline."""
    return str(error).rpartition("of pipeline caused error: ")[2]

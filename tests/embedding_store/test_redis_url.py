"""Store URLs of Redis: what each means, and how the others are refused without repeating a password."""

from __future__ import annotations

import traceback

import pytest

from embedding_store.errors import InvalidStoreURL, StoreError
from embedding_store.open import open_backend
from embedding_store.redis_url import RedisAddress, parse_redis_url


def test_urls() -> None:
    assert parse_redis_url("redis://h") == RedisAddress(host="h")
    assert parse_redis_url(f"rediss://u:p%40@h:1/2?ca_file={__file__}&timeout=0.5&prefix=x") == RedisAddress(
        host="h", port=1, tls=True, ca_file=__file__, username="u", password="p@", db=2, prefix="x", timeout=0.5
    )
    assert parse_redis_url("redis+unix:///a/b%20c?db=3") == RedisAddress(socket="/a/b c", db=3)
    assert str(parse_redis_url("redis://:p@[::1]:7/1")) == "redis://[::1]:7/1"
    assert parse_redis_url("redis://h?connect_timeout=0.1&connections=3") == RedisAddress(
        host="h", connect_timeout=0.1, connections=3
    )


def test_urls_of_clusters() -> None:
    one = parse_redis_url("redis+cluster://h")
    assert one == RedisAddress(host="h", cluster=(("h", 6379),), in_cluster=True)
    several = parse_redis_url("rediss+cluster://u:p%2C@a:1,[::2]:3,B?replicas=yes&prefix=x")
    assert several == RedisAddress(
        host="a", port=1, cluster=(("a", 1), ("::2", 3), ("b", 6379)), tls=True, username="u", password="p,",
        replicas=True, prefix="x", in_cluster=True,
    )  # fmt: skip
    assert str(several) == "rediss+cluster://a:1,[::2]:3,b:6379"
    node = several.node(("10.0.0.1", 7))
    assert (str(node), node.password, node.replicas) == ("rediss://10.0.0.1:7/0", "p,", True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "ftp://secret@h",
            r"scheme 'ftp'; accepted: memmap://, redis://, rediss://, redis\+unix://, redis\+cluster://, rediss\+cluster://",
        ),
        ("/var/store", "scheme None; accepted: memmap://"),
        ("memmap://", "names no directory"),
        ("redis://", "redis:// names no host"),
        ("redis://h/x", "database is 'x'; accepted: a number"),
        ("redis://h/1?db=1", "gives the database twice"),
        ("redis://h?timout=secret", "option 'timout'; accepted: db, prefix, timeout"),
        ("redis://h?timeout=0", "timeout is '0'; accepted: seconds, more than 0"),
        ("redis://h?timeout=nan", "timeout is 'nan'"),
        ("redis://h?prefix=a:b", "prefix 'a:b': a name has"),
        ("redis://h:99999", "port is not a number"),
        ("redis://u:secret/pass@h", r"a password with / : @ # \? \[ \] in it must"),
        ("redis://u:1/secret@h", r"a password with / : @ # \? \[ \] in it must"),
        ("redis://u:1?secret@h", r"a password with / : @ # \? \[ \] in it must"),
        ("redis://u:1#secret@h", r"a password with / : @ # \? \[ \] in it must"),
        ("redis://u:[secret@h", r"a password with / : @ # \? \[ \] in it must"),
        ("redis://u:secret\N{ACCOUNT OF}@h", r"a password with / : @ # \? \[ \] in it must"),
        ("ftp://u:[secret@h", "scheme 'ftp'"),
        ("redis://h/" + 5000 * "9", "database is '9"),
        ("redis://h?password_file=/nowhere/at/all", "password_file /nowhere/at/all: No such file"),
        ("rediss://h?ca_file=/nowhere/at/all", "ca_file /nowhere/at/all: there is no such file"),
        ("redis+unix://path/socket", "needs an absolute path"),
        ("redis://h:0", "port is not a number from 1 to 65535"),
        ("redis://::1", "host is not HOST"),
        ("redis://h?connections=0", "connections is '0'; accepted: a number from 1 to 1000"),
        ("redis://h?connect_timeout=-1", "connect_timeout is '-1'; accepted: seconds, more than 0"),
        ("redis://h?replicas=yes", r"replicas is for redis\+cluster:// and rediss\+cluster://; this is redis://"),
        ("redis+cluster://h?replicas=maybe", "replicas is 'maybe'; accepted: yes, no"),
        ("redis+cluster://", r"redis\+cluster:// names no host; accepted: redis\+cluster://HOST\[:PORT\]\[,HOST"),
        ("redis+cluster://a,,b", "host is not HOST"),
        ("redis+cluster://a,u:1/secret@h", r"a password with / : @ # \? \[ \] in it must"),
        ("redis+cluster://a/1", "database is '1'; a cluster has only database 0"),
        ("redis+cluster://a?db=x", "database is 'x'; accepted: a number"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(InvalidStoreURL, match=message) as caught:
        open_backend(url)
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value, StoreError)

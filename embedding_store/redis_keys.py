"""The keys of a store in Redis, and the record of a release. PREFIX is the URL's, default `torchrank`:

    {PREFIX}:releases               hash: release -> its namespace and manifest; a field appears when all pages stand
    {PREFIX}:active                 hash: model -> history of activations
    {PREFIX}:writing                hash: CONTENT -> namespace and manifest, of publications that have not committed
    {PREFIX}:CONTENT:lease          string that expires: the publisher who is at work on that
    {PREFIX}:NAMESPACE:verified     hash: table -> how far that publication has come
    {PREFIX}:removing               hash: namespace -> namespace and manifest, of what gc has taken out of the above
    {PREFIX}:removed                hash: of all that was ever taken out, CONTENT -> release, and release -> CONTENT
    {PREFIX}:since                  hash: release, or CONTENT -> ms of the server's clock: see `Stored.idle`
    {PREFIX}:pins                   hash: owner of a pin -> releases, and ms of the server's clock until which it holds
    PREFIX:NAMESPACE:TABLE:PAGE     string: one page of rows, or one bucket of a sparse table
    PREFIX:NAMESPACE:TABLE:hot      string: the hot list

CONTENT is `backend.namespace`, a checksum of the manifest, and so is NAMESPACE. Only what is published again after gc
removed it gets a namespace of its own, so that no delayed command of that gc can hit it.

The braces are a cluster's hash tag: scripts touch several of these keys, which have to live on one node. Pages have
none, and spread over all nodes. Nothing here or elsewhere looks at keys that are not ours, or at all keys.
"""

from __future__ import annotations

import msgspec

from embedding_store.errors import InvalidRelease
from embedding_store.release import ReleaseManifest, decode_manifest


class Record(msgspec.Struct, frozen=True):
    namespace: str
    manifest: ReleaseManifest


class _Encoded(msgspec.Struct):
    namespace: str
    manifest: msgspec.Raw


class Pin(msgspec.Struct, frozen=True):
    releases: list[str]
    until: int  # ms of the server's clock


def control_key(prefix: str, *parts: object) -> str:
    return ":".join((f"{{{prefix}}}", *map(str, parts)))


def page_key(prefix: str, namespace: str, table: str, what: int | str) -> str:
    """`what`: a page's number, or "hot"; "" for the part that all pages of the table have in common."""
    return f"{prefix}:{namespace}:{table}:{what}"


def decode_record(address: str, release: str, value: bytes) -> Record:
    try:
        encoded = msgspec.json.decode(value, type=_Encoded)
        return Record(encoded.namespace, decode_manifest(encoded.manifest))
    except msgspec.DecodeError as error:
        raise InvalidRelease(f"{address}: the record of {release} cannot be read: {error}") from error

"""The keys of a store in Redis, and the record of a release. PREFIX is the URL's, default `torchrank`:

    {PREFIX}:releases               hash: release -> its namespace and manifest; a field appears when all pages stand
    {PREFIX}:writing                hash: namespace -> namespace and manifest, of publications that have not committed
    {PREFIX}:active                 hash: model -> history of activations
    {PREFIX}:NAMESPACE:verified     set: tables that a publication under way has finished
    PREFIX:NAMESPACE:TABLE:PAGE     string: one page of rows
    PREFIX:NAMESPACE:TABLE:hot      string: the hot list

The braces are a cluster's hash tag: scripts touch several of the first four, which have to live on one node. Pages
have none, and spread over all nodes. Nothing here or elsewhere looks at keys that are not ours, or at all keys.
"""

from __future__ import annotations

import msgspec

from embedding_store.errors import InvalidRelease
from embedding_store.release import ReleaseManifest


class Record(msgspec.Struct, frozen=True):
    namespace: str
    manifest: ReleaseManifest


def control_key(prefix: str, *parts: object) -> str:
    return ":".join((f"{{{prefix}}}", *map(str, parts)))


def page_key(prefix: str, namespace: str, table: str, what: int | str) -> str:
    """`what`: a page's number, or "hot"; "" for the part that all pages of the table have in common."""
    return f"{prefix}:{namespace}:{table}:{what}"


def decode_record(address: str, release: str, value: bytes) -> Record:
    try:
        return msgspec.json.decode(value, type=Record)
    except msgspec.DecodeError as error:
        raise InvalidRelease(f"{address}: the record of {release} cannot be read: {error}") from error

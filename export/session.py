"""Scorer: a bundle's dense graph in ONNX Runtime, its embedding rows out of a store. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedding_store.errors import InvalidRelease, UnknownRelease
from embedding_store.lookup import ABSENT, STALE, UNAVAILABLE, EmbeddingLookup, LookupReply
from embedding_store.release import TableInfo
from export.assemble import Assembler, InputType
from export.bundle import InvalidBundle, Manifest, read_manifest
from export.runtime import Provider, open_session
from torchrank.features.batch import FeatureBatch

_INPUT_TYPES: dict[str, InputType] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scores:
    """Per task one probability per candidate, float32 [N], and how many ids were scored with another row than their
    own: `absent` ones have none in their table; the others' could not be fetched, and a default row (`unavailable`) or
    one of an earlier release (`stale`) stood in for it, where the store's policy allows that."""

    release: str
    tasks: dict[str, NDArray[np.float32]]
    absent: int
    unavailable: int = 0
    stale: int = 0


class Scorer:
    """Thread-safe. The bundle's tables are not read: their rows come from `lookup`, of the bundle's own release."""

    def __init__(
        self,
        bundle: Path,
        lookup: EmbeddingLookup,
        *,
        variant: str = "fp32",
        provider: Provider = "cpu",
        threads: int = 1,
        spin: bool = False,
    ) -> None:
        """`threads` compute one graph run; `spin` lets them wait busily, which is faster on a host of one's own.

        Raises InvalidBundle, UnfitRuntime, and UnknownRelease, InvalidRelease, StoreUnavailable out of the store.
        """
        self.manifest = read_manifest(bundle)
        self.release = self.manifest.release
        self.variant = variant
        self._bundle = bundle
        self._lookup = lookup
        self._session = open_session(
            bundle / self.manifest.variant(variant).file, provider=provider, threads=threads, spin=spin
        )
        inputs = {node.name: _input_type(node) for node in self._session.get_inputs()}
        self._assembler = Assembler(self.manifest.schema, self.manifest.tables, inputs)
        self._outputs = list(self.manifest.schema.tasks)
        _check_graph(self._session, self.manifest, self._assembler.widths())
        self.check_store()

    def check_store(self) -> None:
        """The store answers, and holds this very bundle. Raises UnknownRelease, InvalidRelease, StoreUnavailable."""
        try:
            stored = self._lookup.manifest(self.release)
        except UnknownRelease as error:
            raise UnknownRelease(
                f"{error}\nrelease {self.release} is not in the store; "
                f"publish it with: torchrank publish {self._bundle} --store URL"
            ) from error
        own, theirs = ({table.name: table for table in tables} for tables in (self.manifest.tables, stored.tables))
        for name in sorted(own.keys() | theirs.keys()):
            difference = _difference(own.get(name), theirs.get(name))
            if difference:
                raise InvalidRelease(
                    f"release {self.release} in the store was not published from {self._bundle}: table {name!r} "
                    f"{difference}; a release is never written twice: export under a new version, and publish that"
                )

    def check_reachable(self) -> None:
        """Asks the store something that no manifest kept in memory can answer. Raises StoreUnavailable."""
        with contextlib.suppress(UnknownRelease):  # a model that was never activated is an answer too
            self._lookup.manifest(model=self.manifest.model)

    def score(self, features: FeatureBatch, *, timeout: float | None = None) -> Scores:
        """`timeout`, in seconds, bounds the look-up. Raises UnknownRelease, StoreUnavailable."""
        return self.run(features, self.fetch(features, timeout=timeout))

    def fetch(self, features: FeatureBatch, *, timeout: float | None = None) -> LookupReply:
        """The rows of all tables, in one look-up. Raises UnknownRelease, StoreUnavailable."""
        return self._lookup.lookup(self.release, self._assembler.ids(features), timeout=timeout)

    def run(self, features: FeatureBatch, reply: LookupReply) -> Scores:
        """The graph alone, on the rows that `fetch` brought for the same features."""
        outputs: Sequence[NDArray[np.float32]] = self._session.run(
            self._outputs, self._assembler.inputs(features, reply)
        )
        absent, unavailable, stale = _count(reply)
        return Scores(reply.release, dict(zip(self._outputs, outputs, strict=True)), absent, unavailable, stale)


def _difference(own: TableInfo | None, theirs: TableInfo | None) -> str:
    if own is None or theirs is None:
        return f"is only in the {'store' if own is None else 'bundle'}"
    fields = TableInfo.__struct_fields__
    return " and ".join(
        f"has {field} {getattr(own, field)!r} in the bundle, {getattr(theirs, field)!r} in the store"
        for field in fields
        if getattr(own, field) != getattr(theirs, field)
    )


def _count(reply: LookupReply) -> tuple[int, int, int]:
    """Ids that are absent, unavailable, stale; ids and not rows, of which several ids may share one."""
    totals = np.zeros(4, np.int64)
    for table in reply.tables.values():
        if table.status.any():  # FOUND is 0
            totals += np.bincount(table.status[table.index], minlength=4)
    return int(totals[ABSENT]), int(totals[UNAVAILABLE]), int(totals[STALE])


def _input_type(node: ort.NodeArg) -> InputType:
    if node.type not in _INPUT_TYPES:
        raise InvalidBundle(f"input {node.name!r} of the graph is a {node.type}; accepted: {', '.join(_INPUT_TYPES)}")
    return _INPUT_TYPES[node.type]


def _check_graph(session: ort.InferenceSession, manifest: Manifest, widths: dict[str, int]) -> None:
    for node in session.get_inputs():
        last = node.shape[-1]
        if node.name in widths and isinstance(last, int) and last != widths[node.name]:
            raise InvalidBundle(
                f"input {node.name!r} of the graph has {last} columns, but {widths[node.name]} in the manifest's schema"
            )
    outputs = [node.name for node in session.get_outputs()]
    missing = [task for task in manifest.schema.tasks if task not in outputs]
    if missing:
        raise InvalidBundle(f"the graph has no output for: {', '.join(missing)}; it has: {', '.join(outputs)}")

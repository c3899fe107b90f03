"""The peer of scripts/bench/sidecar.py: the same store, cache and frames behind a Python gRPC server on a unix socket.

    python -m scripts.bench.sidecar_grpc --store URL --socket PATH --cache-size BYTES [--threads N]

Bytes go through as they are (no protobuf message), and the client is the sidecar client's own code around another
exchange, so that what differs is the transport and the server around the store.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.client_calls import SidecarCalls
from embedding_store.lookup import EmbeddingLookup, LookupReply
from embedding_store.open import open_store
from embedding_store.protocol import REQUEST_MAGIC, ReplyLayout, decode_request, request_names
from embedding_store.release import ReleaseManifest
from embedding_store.store import EmbeddingStore

METHOD = "/torchrank.Store/Lookup"
_OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]


class GrpcClient(EmbeddingLookup):
    """Thread-safe. The manifest is given: what is measured is look-ups."""

    def __init__(self, socket: str, manifest: ReleaseManifest) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        grpc.channel_ready_future(self._channel).result(timeout=60)
        self._lookup = self._channel.unary_unary(METHOD)
        self._calls = SidecarCalls()
        self._manifest = manifest
        self._encoded = np.frombuffer(msgspec.json.encode(manifest), np.uint8)

    def manifest(self, release: str | None = None, *, model: str | None = None) -> ReleaseManifest:
        return self._manifest

    def lookup(
        self, release: str, ids: Mapping[str, NDArray[np.int64]], *, timeout: float | None = None
    ) -> LookupReply:
        call = self._calls.lookup(release, ids)
        seconds = 5.0 if timeout is None else timeout
        try:
            exchange = next(call)
            while True:
                if exchange.length is None:  # TR.INFO, once
                    exchange = call.send(self._encoded)
                    continue
                head, distinct, _ = exchange.request(seconds)
                frame = bytes(head[head.index(REQUEST_MAGIC) :]) + distinct
                content = np.frombuffer(self._lookup(frame, timeout=seconds), np.uint8)
                if exchange.meanwhile is not None:
                    exchange.meanwhile(content)  # gRPC says only now where the reply is
                exchange = call.send(content)
        except StopIteration as returned:
            result: LookupReply = returned.value
            return result

    def close(self) -> None:
        self._channel.close()


class Answers:
    """Request frame in, reply frame out."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self._plans: dict[bytes, tuple[str, NDArray[np.int64], ReplyLayout]] = {}

    def answer(self, frame: bytes) -> bytes:
        request = decode_request(bytearray(frame))
        if request.key not in self._plans:
            release, tables = request_names(request)
            manifest = self._store.manifest(release)
            places = np.array([manifest.places[name] for name in tables], np.int64)
            layout = ReplyLayout(release, [manifest.table(name).row_bytes for name in tables])
            self._plans[request.key] = release, places, layout
        release, tables, layout = self._plans[request.key]
        places = layout.places(request.counts)
        head, payload = layout.head(request.counts), bytearray(places.bytes)
        payload[: len(head)] = head
        out = np.frombuffer(payload, np.uint8)
        status = out[places.status : places.status + len(request.ids)]
        batch = IdBatch(tables, np.array(request.counts, np.int64), request.ids)
        misses = self._store.begin(release, batch, out, np.array(places.starts, np.int64), status)
        if misses is not None:
            self._store.finish(misses, timeout=request.timeout)
        return bytes(payload)


def serve_in_threads(answers: Answers, socket: str, threads: int) -> None:
    server = grpc.server(ThreadPoolExecutor(threads), options=_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(lambda frame, context: answers.answer(frame))
    server.add_registered_method_handlers("torchrank.Store", {"Lookup": handler})
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("torchrank.Store", {"Lookup": handler}),))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


async def serve_in_a_loop(answers: Answers, socket: str) -> None:
    async def lookup(frame: bytes, context: object) -> bytes:
        return answers.answer(frame)

    server = grpc.aio.server(options=_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(lookup)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("torchrank.Store", {"Lookup": handler}),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--cache-size", type=int, required=True)
    parser.add_argument("--threads", type=int, default=8, help="0: grpc.aio, in one event loop")
    options = parser.parse_args()
    with open_store(options.store, cache_bytes=options.cache_size) as store:
        for history in store.backend.histories().values():
            store.warm(history[-1])
        if options.threads:
            serve_in_threads(Answers(store), options.socket, options.threads)
        else:
            asyncio.run(serve_in_a_loop(Answers(store), options.socket))


if __name__ == "__main__":
    main()

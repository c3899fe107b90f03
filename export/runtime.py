"""ONNX Runtime as a dense graph wants it: its version, its execution provider, a session's options.

ONNX Runtime takes a graph to the CPU, with no more than a line in its log, where the provider that was asked for does
not load. Here that is an error.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from export.bundle import InvalidBundle

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
OLDEST = (1, 23)  # of ONNX Runtime, as in pyproject.toml


class UnfitRuntime(ValueError):
    """The installed ONNX Runtime is too old, or has not the provider that was asked for."""


class _Execution(NamedTuple):
    """What ONNX Runtime calls a provider, those that take the nodes it has no kernel for, and where it comes from."""

    name: str
    then: tuple[str, ...]
    package: str


_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_EXECUTION: dict[Provider, _Execution] = {
    "cpu": _Execution(_CPU, (), "onnxruntime"),
    "cuda": _Execution(_CUDA, (_CPU,), "onnxruntime-gpu, installed in place of onnxruntime, with CUDA and cuDNN"),
    "tensorrt": _Execution(
        "TensorrtExecutionProvider", (_CUDA, _CPU),
        "onnxruntime-gpu, installed in place of onnxruntime, with CUDA, cuDNN and TensorRT",
    ),
}  # fmt: skip

# They share no base class but Exception.
_LOAD_ERRORS = (
    ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile, ort_errors.NotImplemented, ort_errors.RuntimeException,
)  # fmt: skip
_PROVIDER_ERRORS = (RuntimeError, ort_errors.EPFail, ort_errors.EngineError)
RUN_ERRORS = (*_LOAD_ERRORS, *_PROVIDER_ERRORS)  # of a session that loaded


def open_session(
    model: Path, *, provider: Provider = "cpu", threads: int = 1, spin: bool = False
) -> ort.InferenceSession:
    """Raises UnfitRuntime, and InvalidBundle where the file is missing or no graph that this ONNX Runtime loads.

    `threads` compute one run; `spin` lets them wait busily.
    """
    check_version(ort.__version__)
    execution = _EXECUTION[provider]
    said = _prepare(provider)
    try:
        # Without `enable_fallback=0` a provider that does not load is given up for the CPU in Python, too.
        session = ort.InferenceSession(
            model, _options(threads, spin), providers=[execution.name, *execution.then], enable_fallback=0
        )
    except _LOAD_ERRORS as error:
        raise InvalidBundle(f"{model} cannot be loaded: {error}") from error
    except _PROVIDER_ERRORS as error:
        if provider == "cpu":
            raise
        raise _not_loaded(provider, f"{said}{error}".strip()) from error
    if execution.name not in session.get_providers():
        found = ", ".join(session.get_providers())
        raise _not_loaded(provider, f"{said}the session has only {found}; the lines above say why")
    return session


def check_version(found: str) -> None:
    """Raises UnfitRuntime where `found`, of onnxruntime, is older than `OLDEST`."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnfitRuntime(
            f"onnxruntime {found} is installed; accepted: {oldest} or newer: pip install 'onnxruntime>={oldest}'"
        )


def _options(threads: int, spin: bool) -> ort.SessionOptions:
    """For small latency in little memory; what was measured is in docs/negative-results.md.

    Inputs are not bound: `session.run` reads numpy arrays where they are.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; warnings about the graph were the exporter's to heed
    # A plan of the memory per shape of the inputs: candidates vary, so that nearly every request would have its own.
    options.enable_mem_pattern = False
    # Spinning threads take the cores that the store, the HTTP server and other sessions need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def _prepare(provider: Provider) -> str:
    """Checks that the provider was built in, loads CUDA's libraries, and gives what could not be loaded."""
    available = ort.get_available_providers()
    execution = _EXECUTION[provider]
    if execution.name not in available:
        names = [name for name, other in _EXECUTION.items() if other.name in available]
        raise UnfitRuntime(
            f"provider {provider!r}: the installed onnxruntime {ort.__version__} has no {execution.name}; "
            f"available: {', '.join(names)}; {provider} comes with {execution.package}"
        )
    if provider == "cpu":
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints what it misses
        ort.preload_dlls()
    return said.getvalue()


def _not_loaded(provider: Provider, reason: str) -> UnfitRuntime:
    execution = _EXECUTION[provider]
    return UnfitRuntime(
        f"provider {provider!r}: {execution.name} does not load on this host: {reason}\n"
        f"{provider} needs {execution.package}; nothing runs on the CPU instead"
    )

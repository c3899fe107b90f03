"""Which operation of which module the ONNX exporter could not express: its own message says neither in a line."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn


def what_cannot_be_expressed(error: BaseException, root: nn.Module) -> str:
    """`op OP in module NAME (CLASS)`, as far as the error tells; `root` is what was exported."""
    frames = [frame for each in _chain(error) for frame in _frames(each)]
    for frame in reversed(frames):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and node.op == "call_function":
            return f"op {node.target} in {_of_node(node)}"
    names = {id(module): name for name, module in root.named_modules()}
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names and frame.f_code.co_name == "forward":
            return f"{_first_line(_innermost(error))} in {_module(names[id(module)], type(module).__name__)}"
    return _first_line(_innermost(error))


def _of_node(node: torch.fx.Node) -> str:
    """The innermost module whose `forward` the operation came from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "no module that the exporter knows of"
    name, kind = stack[-1]
    return _module(name, kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__)


def _module(name: str, kind: str) -> str:
    """`name` within the exported wrapper, whose `model` is the user's model."""
    name = name.removeprefix("model").removeprefix(".")
    return f"module {name!r} ({kind})" if name else f"the model itself ({kind})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _innermost(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

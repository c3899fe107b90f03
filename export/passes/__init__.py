"""Graph passes: the dense graph as the exporter gives it becomes one that does less for the same scores.

A pass is a function that changes an `onnx_ir.Model` in place and returns how often it found what it looks for; 0 leaves
the graph as it is. `export/optimize.py` runs them in this order, proves each by itself, and leaves out one that is
switched off, that fails, or whose graph gives other scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from export.passes.canonical import write_canonically
from export.passes.duplicates import remove_duplicates
from export.passes.flat_products import flatten_products
from export.passes.fold import fold
from export.passes.horizontal import fuse_products
from export.passes.order import order_nodes
from export.passes.target_attention import split_target_attention
from export.passes.user_rows import split_user_rows


class GraphPass(NamedTuple):
    name: str  # what `--without` and reports call it
    apply: Callable[[ir.Model], int]


PASSES: tuple[GraphPass, ...] = (
    GraphPass("fold", fold),
    GraphPass("canonical", write_canonically),
    GraphPass("duplicates", remove_duplicates),
    GraphPass("target_attention", split_target_attention),
    GraphPass("horizontal", fuse_products),
    GraphPass("user_rows", split_user_rows),
    GraphPass("flat_products", flatten_products),
    GraphPass("order", order_nodes),
)

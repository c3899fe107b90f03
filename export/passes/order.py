"""The order in which nodes run: each as late as its first reader allows, a node's first operand last of all.

A product's first operand is its largest by far and is read once more from end to end; computed just before, it is still
in a near cache. Values that live shorter also need less memory at a time. ONNX Runtime keeps a graph's order.
"""

from __future__ import annotations

import onnx_ir as ir


def order_nodes(model: ir.Model) -> int:
    """Returns how many nodes run at another place than before."""
    before = list(model.graph)
    after = _in_order(model.graph)
    moved = sum(one is not two for one, two in zip(before, after, strict=True))
    if moved:
        model.graph.remove(after)
        model.graph.extend(after)
    return moved


def _in_order(graph: ir.Graph) -> list[ir.Node]:
    """From the outputs backwards, depth first, last operands first. Without recursion: a graph may be deep."""
    ordered: dict[ir.Node, None] = {}
    for output in graph.outputs:
        waiting = [(node, False) for node in [output.producer()] if node is not None]
        while waiting:
            node, operands_are_there = waiting.pop()
            if operands_are_there:
                ordered.setdefault(node)
            elif node not in ordered:
                waiting.append((node, True))
                # The end of the list is taken first, so that the last operand is computed first.
                sources = [value.producer() for value in node.inputs if value is not None]
                waiting += [(source, False) for source in sources if source is not None]
    rest = [node for node in graph if node not in ordered]
    return [*ordered, *rest]

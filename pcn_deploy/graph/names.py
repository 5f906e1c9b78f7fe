"""Names that tell where a node or a tensor of the graph comes from: the paths of the network's modules.

The exporter notes on each node the modules that it belongs to; the notes are not stored, the names are. So messages of
runtimes, profiles and comparisons layer by layer speak of `layer1.0.conv1`, not of `node_Conv_12`.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

from pcn_deploy.graph.repeat import SCOPES

_NO_MODULE = "_empty_nn_module_stack"
"""What torch notes where it knows of no module."""


def name_by_module(graph: ir.Graph) -> dict[str, str]:
    """Name nodes and the outputs of modules by the paths of the modules that made them.

    A node is called `PATH.NAME`, with the name that the exporter gave it; the output of a module is called `PATH`, by
    the innermost module that returns it. Inputs, outputs and initialisers of the graph keep their names, and so do
    nodes of Q/DQ, which have the path of their layer already.

    Args:
        graph: With the exporter's notes on its nodes; its nodes and values are renamed in place.

    Returns:
        The tensor that each module returns, by its path: of modules that return one tensor, and are called once.
    """
    inside: dict[str, list[ir.Node]] = {}
    for node in graph:
        paths = _paths(node)
        for path in paths:
            inside.setdefault(path, []).append(node)
        if paths and node.name and not node.name.startswith(f"{paths[-1]}."):
            node.name = f"{paths[-1]}.{node.name}"
    returned: dict[str, ir.Value] = {}
    for path, nodes in inside.items():
        members = set(nodes)
        left = [value for node in nodes for value in node.outputs if _leaves(value, members)]
        if len(left) == 1:
            returned[path] = left[0]
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    taken |= {value.name for value in (*graph.inputs, *graph.outputs)}
    named: set[ir.Value] = set(graph.outputs)
    for path in sorted(returned, key=lambda path: -path.count(".")):  # the innermost first
        value = returned[path]
        if value not in named and path not in taken:
            value.name = path
            named.add(value)
    return {path: str(value.name) for path, value in returned.items()}


def _paths(node: ir.Node) -> list[str]:
    """Paths of the modules that a node belongs to, the outermost first; the network itself has none."""
    noted = node.metadata_props.get(SCOPES)
    scopes: list[str] = ast.literal_eval(noted)[:-1] if noted else []  # the last is the name of the node
    return [scope for scope in scopes if scope and not scope.startswith(_NO_MODULE)]


def _leaves(value: ir.Value, members: set[ir.Node]) -> bool:
    """Whether somebody outside of these nodes reads a value that one of them makes."""
    return value.is_graph_output() or any(use.node not in members for use in value.uses())

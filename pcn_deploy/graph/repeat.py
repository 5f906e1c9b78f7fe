"""Export one of many equal blocks, then unroll the graph: time to export no longer grows with depth.

A trunk of sixty equal blocks takes the exporter sixty times the time of one, and tells it nothing new. So the network
is exported with one block per run of equal blocks, and the nodes of that block are repeated in the graph, each
repetition with the weights of its own block.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from pcn_deploy.errors import ModelError
from pcn_deploy.network.hooks import hooked
from pcn_deploy.network.sharing import share_weights

log = logging.getLogger(__name__)

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes, on each node, the modules it belongs to."""


@dataclass(frozen=True)
class Run:
    """Equal blocks that follow each other in an `nn.Sequential`.

    Attributes:
        parent: Name of the sequential module.
        names: Names of the blocks in it, two or more, in order.
    """

    parent: str
    names: tuple[str, ...]

    def path(self, name: str) -> str:
        """Full name of one of the blocks."""
        return f"{self.parent}.{name}" if self.parent else name


def find_runs(model: nn.Module, example: Tensor) -> list[Run]:
    """Find runs of blocks with the same structure that keep the shape of their one tensor.

    Args:
        model: Network in evaluation mode.
        example: An input, `(N, C, H, W)`.

    Returns:
        The runs, none inside another.
    """
    candidates: list[Run] = []
    for path, module in model.named_modules():
        if type(module) is nn.Sequential and not any(_holds(run, path) for run in candidates):
            candidates += [Run(path, names) for names in _equal_neighbours(module)]
    runs = _plain_chains(model, example, candidates) if candidates else []
    return runs if runs and _ask_nothing_else(model, example[:1], runs) else []


def _holds(run: Run, path: str) -> bool:
    """Whether a module is one of the blocks of a run, or lies inside one."""
    return any(f"{path}.".startswith(f"{run.path(name)}.") for name in run.names)


def _equal_neighbours(sequence: nn.Sequential) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    previous: object = None
    for name, block in sequence._modules.items():  # named_children() leaves out a module that comes a second time
        structure = _structure(block) if any(True for _ in block.parameters()) else None
        if structure is None or structure != previous:
            if len(group) > 1:
                yield tuple(group)
            group = []
        group.append(name)
        previous = structure
    if len(group) > 1:
        yield tuple(group)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What decides the graph of a module, apart from the values of its weights."""
    hidden = {"_parameters", "_buffers", "_modules"}
    settings = tuple((key, _setting(value)) for key, value in sorted(module.__dict__.items()) if key not in hidden)
    tensors = tuple(
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
        for group in (module._parameters, module._buffers)
        for name, tensor in group.items()
    )
    children = tuple((name, _structure(child)) for name, child in module._modules.items() if child is not None)
    return (type(module), settings, tensors, children)


def _setting(value: Any) -> Any:
    """A comparable form of an attribute: its value if that is plain, else its identity."""
    if isinstance(value, bool | int | float | str | type(None)):
        return value
    if isinstance(value, list | tuple | set):
        return (type(value), *(_setting(item) for item in value))
    if isinstance(value, dict):
        return (dict, *((str(key), _setting(item)) for key, item in value.items()))
    return id(value)


def _plain_chains(model: nn.Module, example: Tensor, runs: list[Run]) -> list[Run]:
    """Those runs that are executed once, as a whole and nowhere else, by blocks that keep the shape of their input.

    A network may also loop over the blocks itself and do more between them; that cannot be told from one block.
    """
    calls: Counter[str] = Counter()
    keeping: set[str] = set()

    def record(path: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[path] += 1
            if len(inputs) == 1 and isinstance(output, Tensor) and getattr(inputs[0], "shape", None) == output.shape:
                keeping.add(path)

        return hook

    watched = {run.parent for run in runs} | {run.path(name) for run in runs for name in run.names}
    handles = (model.get_submodule(path).register_forward_hook(record(path)) for path in watched)
    with hooked(handles), torch.no_grad():
        model(example)
    return [
        run
        for run in runs
        if calls[run.parent] == 1 and all(calls[run.path(name)] == 1 for name in run.names)
        if run.path(run.names[0]) in keeping
    ]


def _ask_nothing_else(model: nn.Module, example: Tensor, runs: list[Run]) -> bool:
    """Whether the network does no more with its blocks than execute them.

    It may also read their weights, or count them. Then it computes something else without them than with blocks that
    hand on what they are given.
    """
    image = torch.linspace(-1, 1, example.numel()).reshape(example.shape)
    others = [run.path(name) for run in runs for name in run.names[1:]]
    handles = (model.get_submodule(path).register_forward_hook(lambda _m, inputs, _o: inputs[0]) for path in others)
    try:
        with torch.no_grad():
            with hooked(handles):
                expected = model(image.clone())
            outputs = keep_first(model, runs)(image.clone())
    except Exception as error:  # the network's own code, which may ask its blocks for anything
        log.debug("The network cannot do without some of its blocks: %r", error)
        return False
    pairs = zip(_tensors(expected), _tensors(outputs), strict=True)
    return all(torch.equal(first.nan_to_num(), second.nan_to_num()) for first, second in pairs)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def keep_first(model: nn.Module, runs: list[Run]) -> nn.Module:
    """A copy of the network with only the first block of each run; weights are shared."""
    short = share_weights(model)
    for run in runs:
        sequence = short.get_submodule(run.parent)
        for name in run.names[1:]:
            delattr(sequence, name)
    return short


def unroll(graph: ir.Graph, model: nn.Module, run: Run) -> None:
    """Repeat the nodes of the first block of a run for the other blocks, in place.

    Args:
        graph: Graph exported from `keep_first(model, ...)`, not optimised: equal weights must not be merged yet.
        model: The whole network; its tensors become the initialisers of the repetitions.
        run: The run to unroll.

    Raises:
        ModelError: If the nodes of the block do not read one tensor and return one: it cannot be repeated.
    """
    first = run.path(run.names[0])
    body = _body(graph, first)
    entry, result = _boundary(body)
    later = [use for use in result.uses() if use.node not in body]
    outputs = [index for index, value in enumerate(graph.outputs) if value is result]
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    anchor, current = body[-1], result
    for name in run.names[1:]:
        repetition = _Repetition(graph, first, run.path(name), tensors, {entry: current})
        for node in body:
            copied = repetition.copy(node)
            graph.insert_after(anchor, copied)
            anchor = copied
        current = repetition.mapping[result]
    for use in later:
        use.node.replace_input_with(use.idx, current)
    for index in outputs:
        graph.outputs[index] = current


def _body(graph: ir.Graph, path: str) -> list[ir.Node]:
    """The nodes of a block, in order; also those without a note that stand between its nodes and nowhere else."""
    body = {node for node in graph if f"'{path}'" in node.metadata_props.get(SCOPES, "")}
    for node in graph:
        if SCOPES not in node.metadata_props:
            writers = {value.producer() for value in node.inputs if value is not None} - {None}
            readers = {use.node for value in node.outputs for use in value.uses()}
            if writers & body and readers and readers <= body:
                body.add(node)
    return [node for node in graph if node in body]


def _boundary(body: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """The one computed tensor a block reads, and the one it returns.

    Sizes do not count: a block keeps the shape of its tensor, so a size from outside, or one that the first block
    passes on, is the same for all of them.
    """
    inside = set(body)
    made = {value for node in body for value in node.outputs}
    read = {
        value
        for node in body
        for value in node.inputs
        if value is not None and value not in made and _is_computed(value) and value.dtype != ir.DataType.INT64
    }
    returned = {
        value
        for value in made
        if value.is_graph_output()
        or (value.dtype != ir.DataType.INT64 and any(use.node not in inside for use in value.uses()))
    }
    if len(read) != 1 or len(returned) != 1:
        msg = f"A repeated block reads {len(read)} tensors and returns {len(returned)}; expected one of each."
        raise ModelError(msg)
    return read.pop(), returned.pop()


def _is_computed(value: ir.Value) -> bool:
    producer = value.producer()
    return not value.is_initializer() and (producer is None or producer.op_type != "Constant")


@dataclass
class _Repetition:
    """One block of a run on its way into the graph.

    Attributes:
        graph: Where it goes.
        first: Name of the block whose nodes are copied.
        path: Name of the block that the copies stand for.
        tensors: Parameters and buffers of the whole network.
        mapping: What stands for each tensor of the first block.
    """

    graph: ir.Graph
    first: str
    path: str
    tensors: dict[str, Tensor]
    mapping: dict[ir.Value, ir.Value]

    def copy(self, node: ir.Node) -> ir.Node:
        """The counterpart of a node."""
        noted = node.metadata_props.get(SCOPES)
        copied = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else self.input(value) for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            metadata_props={SCOPES: noted.replace(f"'{self.first}", f"'{self.path}")} if noted else {},
        )
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name, new.shape, new.type = f"{self.path}:{old.name}", old.shape, old.type
            self.mapping[old] = new
        return copied

    def input(self, value: ir.Value) -> ir.Value:
        """The counterpart of an input: a copied tensor, the block's own weight, or the same constant."""
        name = value.name or ""
        if value not in self.mapping and value.is_initializer() and name.startswith(f"{self.first}."):
            own = self.path + name.removeprefix(self.first)
            if own not in self.tensors:
                msg = f"A repeated block holds {name}, which has no counterpart {own}."
                raise ModelError(msg)
            array = self.tensors[own].detach().numpy()
            weight = ir.Value(name=own, const_value=ir.tensor(array, name=own), shape=value.shape, type=value.type)
            self.graph.register_initializer(weight)
            self.mapping[value] = weight
        return self.mapping.get(value, value)

"""The data flow of one run: which module made each tensor, who read it, and the products that no layer owns.

Modules tell only what they are called; a product may also be a function call in the forward of any module. So every
operation is seen where PyTorch executes it, with the module at work. Nothing is traced: whatever a network asks its
tensors for, it is answered.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcn_deploy.network.diagnosis.places import Place, place_at_work
from pcn_deploy.network.hooks import hooked

PRODUCTS = {
    *("aten::convolution", "aten::mkldnn_convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *("aten::mv", "aten::addmv", "aten::dot", "aten::linear", "aten::matmul", "aten::conv2d"),
    *("aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd"),
}
"""Operators that multiply, among them the two that hold the projections of an attention."""

KEEPING = {"aten::constant_pad_nd", "aten::avg_pool2d", "aten::max_pool2d_with_indices", "aten::clone", "aten::cat"}
"""Operators that, like a view, make no value larger than those they read."""


@dataclass(eq=False)
class Value:
    """One state of a tensor.

    Attributes:
        maker: Path of the module whose own operation made it; empty for the network itself or the outside.
        image: Whether it depends on the image.
        depth: Products on the longest way to it.
        source: What it only moves values of, as a view, a slice or a padding does.
        readers: Path of the module of each operation that read it.
    """

    maker: str = ""
    image: bool = False
    depth: int = 0
    source: Value | None = None
    readers: list[str] = field(default_factory=list)

    @property
    def origin(self) -> Value:
        """The value that it comes from by moving values only."""
        return self if self.source is None else self.source.origin


@dataclass(frozen=True, kw_only=True)
class Product:
    """An executed product of an activation with a constant.

    Attributes:
        path: The module that does it.
        operator: Name of the operator.
        place: Where it stands in the code, if no layer owns it.
        is_vector: Whether the constant is one row or one column of a matrix product.
    """

    path: str
    operator: str
    place: Place | None
    is_vector: bool


@dataclass(frozen=True, kw_only=True)
class Addition:
    """An executed addition of two activations of one shape."""

    path: str
    operands: tuple[Value, Value]
    is_map: bool


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a module: the states of the tensors it was given and of the first one it returned."""

    caller: str
    inputs: tuple[Value, ...]
    output: Value | None


class DataFlow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What one run of a network did.

    Attributes:
        products: Products of activations with constants, in order.
        additions: Additions of activations, in order.
        calls: The calls of each module, by its path.
        image: The image.
        results: What the network returned.
    """

    def __init__(self, model: nn.Module, image: Tensor, *, places: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []
        self.additions: list[Addition] = []
        self.calls: dict[str, list[Call]] = {}
        self._model, self._places = model, places
        self._stack: list[str] = [""]
        self._inputs: list[tuple[Value, ...]] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self.image = self._remember(image, Value(image=True))
        handles = (handle for path, module in model.named_modules() if path for handle in self._follow(path, module))
        with hooked(handles), torch.no_grad(), self:
            self.results = [self.value(tensor) for tensor in _tensors(model(image))]

    def times(self) -> Counter[str]:
        """How often each module was called."""
        return Counter({path: len(calls) for path, calls in self.calls.items()})

    def value(self, tensor: Tensor) -> Value:
        """The present state of a tensor."""
        reference, value = self._known.get(id(tensor), (None, None))
        if value is None or reference is None or reference() is not tensor:
            return self._remember(tensor, Value())
        return value

    def _remember(self, tensor: Tensor, value: Value) -> Value:
        self._known[id(tensor)] = (weakref.ref(tensor), value)
        return value

    def _follow(self, path: str, module: nn.Module) -> Iterable[Any]:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(path)
            self._inputs.append(tuple(self.value(tensor) for tensor in _tensors((args, kwargs))))

        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._stack.pop()
            made = [self.value(tensor) for tensor in _tensors(output)]
            call = Call(caller=self._stack[-1], inputs=self._inputs.pop(), output=made[0] if made else None)
            self.calls.setdefault(path, []).append(call)

        return module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation and note what it does."""
        tensors = _tensors((args, kwargs or {}))
        read = [self.value(tensor) for tensor in tensors]
        outputs = func(*args, **(kwargs or {}))
        path, name = self._stack[-1], func._schema.name
        for value in read:
            value.readers.append(path)
        depends = any(value.image for value in read)
        multiplies = depends and name in PRODUCTS
        if multiplies and not all(value.image for value in read):
            owned = is_plain_layer(self._model.get_submodule(path))
            pairs = zip(tensors, read, strict=True)
            constants = [tensor for tensor, value in pairs if not value.image and tensor.ndim > 1]
            is_vector = "conv" not in name and any(min(tensor.shape[-2:]) == 1 for tensor in constants)
            place = None if owned else self._place()
            self.products.append(Product(path=path, operator=name, place=place, is_vector=is_vector))
        made = _tensors(outputs)
        adds = name in ("aten::add", "aten::add_") and len(read) == 2 and all(value.image for value in read)
        if adds and tensors[0].shape == tensors[1].shape == made[0].shape:
            self.additions.append(Addition(path=path, operands=(read[0], read[1]), is_map=tensors[0].ndim == 4))
        depth = max((value.depth for value in read), default=0) + multiplies
        moves = bool(read) and (_is_view(func) or name in KEEPING)
        for tensor in made:
            source = max(read, key=lambda value: value.image) if moves else None
            self._remember(tensor, Value(maker=path, image=depends, depth=depth, source=source))
        return outputs

    def _place(self) -> Place | None:
        if not self._places:
            return None
        return place_at_work(self._model, reversed(list(traceback.walk_stack(sys._getframe()))))


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    alias = returned[0].alias_info if returned else None
    return alias is not None and not alias.is_write


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def has_forward_of(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether neither a subclass nor the instance has other methods than a class of torch's."""
    return all(getattr(type(module), name) is getattr(kind, name) and name not in vars(module) for name in methods)


def is_plain_layer(module: nn.Module | None) -> bool:
    """Whether a module is a Conv2d or Linear that does only what its class in torch does."""
    if isinstance(module, nn.Conv2d):
        return has_forward_of(module, nn.Conv2d, "__call__", "forward", "_conv_forward")
    return isinstance(module, nn.Linear) and has_forward_of(module, nn.Linear, "__call__", "forward")

"""Named architectures and how to make one: from the registry, a module or a file. Importing this imports no torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcn_deploy.errors import CheckpointError, DependencyError, ModelError, OptionError
from pcn_deploy.models.catalogue import MODELS, ModelInfo
from pcn_deploy.models.libraries import LIBRARIES, find_library, make_library_network

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.models.containers import StateDict

log = logging.getLogger(__name__)

_DECIDED_BY_FILE = {"num_classes", "in_channels", "image_size"}
"""What a checkpoint may decide about an architecture whose name fixes the rest."""


def list_models() -> list[ModelInfo]:
    """Every registered architecture, in the order people should see them."""
    return list(MODELS.values())


def find_model(name: str) -> ModelInfo | None:
    """Look a name up.

    Args:
        name: A registry name, `timm:NAME`, `torchvision:NAME`, `package.module:factory` or `file.py:factory`.

    Returns:
        The entry, or None for a network of a library and the user's own factory.

    Raises:
        ModelError: If it is neither; the closest names are in the message.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" in name:
        return None
    close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(MODELS)}."
    libraries = ", ".join(f"{prefix}:NAME" for prefix in LIBRARIES)
    msg = (
        f"Unknown model {name!r}. {hint} Networks of libraries are given as {libraries}, your own as "
        "package.module:factory or file.py:factory."
    )
    raise ModelError(msg)


def is_own_factory(name: str) -> bool:
    """Whether a name is that of the user's own factory, which may bring weights of its own; raises as `find_model`."""
    return find_model(name) is None and find_library(name) is None


def create_model(
    name: str,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    checkpoint_weights: str = "auto",
    **architecture: Any,
) -> nn.Module:
    """Make a network in evaluation mode, float32, on the CPU.

    Args:
        name: A registry name, `timm:NAME`, `torchvision:NAME`, `package.module:factory` or `file.py:factory`.
        weights: Checkpoint, `.safetensors` or a PyTorch file; loaded strictly.
        random_weights: Use freshly initialised weights. One of the two must be given; only the user's own factory may
            bring weights of its own instead.
        num_classes: Number of logits; by default what the checkpoint holds, else the architecture's own. The user's own
            factory is called with it, and is refused if it does not take it.
        seed: Seed of the random weights.
        checkpoint_weights: Of a checkpoint that holds an average too, take the `raw` or the averaged (`ema`) weights;
            by default those that the tools of the field evaluate (`containers.py`), and a warning says which.
        **architecture: Further arguments of the network, such as `width`, `depth` and `patch` of a PatchConvNet, or
            what timm's and torchvision's own functions take.

    Returns:
        The network.

    Raises:
        OptionError: If neither or both of `weights` and `random_weights` are given, or the shape is impossible.
        ModelError: If the name is unknown or the user's factory fails.
        CheckpointError: If the checkpoint is unreadable, unsafe or does not fit.
        DependencyError: If torch, or the library that has the network, is missing.
    """
    made = make_model(
        name,
        weights=weights,
        random_weights=random_weights,
        num_classes=num_classes,
        seed=seed,
        checkpoint_weights=checkpoint_weights,
        **architecture,
    )
    for note in made.notes:
        log.warning(note)
    return made.network


@dataclass(frozen=True, kw_only=True)
class MadeModel:
    """A network, and which weights it has.

    Attributes:
        network: In evaluation mode.
        weights_from: `file`, `random`, or `factory` where the user's own factory brought them.
        checkpoint_weights: Which weights of the file were taken, `ema` or `raw`; empty where there is no file.
        checkpoint_key: The key they were under, or the beginning of their names.
        class_names: What the checkpoint calls its classes, in the order of the outputs; empty if it does not tell.
        notes: What the user should know of them.
    """

    network: nn.Module
    weights_from: str
    checkpoint_weights: str = ""
    checkpoint_key: str = ""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_model(
    name: str,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    checkpoint_weights: str = "auto",
    **architecture: Any,
) -> MadeModel:
    """As `create_model`, and tell which weights the network has; raises the same."""
    info, library = find_model(name), find_library(name)
    check_weights_choice(name, weights, random_weights=random_weights)
    try:
        import torch

        from pcn_deploy.models import checkpoint
    except ModuleNotFoundError as error:
        raise DependencyError.for_extra(error.name or "torch", "compile", "making a network") from error
    taken = checkpoint.read_checkpoint(Path(weights), checkpoint_weights) if weights is not None else None
    state = taken.state if taken else None
    if num_classes is not None:
        architecture["num_classes"] = num_classes
    notes: tuple[str, ...] = (taken.note,) if taken and taken.note else ()
    class_names = taken.class_names if taken else ()
    with torch.random.fork_rng(devices=[]), _default_dtype_kept():
        torch.manual_seed(seed)
        if library:
            made = make_library_network(name, Path(weights) if weights is not None else None, state, architecture)
            model, notes, class_names = made.network, (*notes, *made.notes), class_names or made.class_names
        elif info is None:
            model = _call_user_factory(name, architecture)
            if state is not None:
                _load_into_user_network(model, state, str(weights))
        elif state is None:
            model = _make(info, _arguments(info, {}, architecture))
        else:
            model = _load_registered(info, state, str(weights), architecture)
    try:
        model.eval()
    except NotImplementedError as error:
        msg = f"{name!r} returned a program of torch.export, which has no modules. Return the network it was made from."
        raise ModelError(msg) from error
    if taken:
        return MadeModel(
            network=model,
            weights_from="file",
            checkpoint_weights=taken.kind,
            checkpoint_key=taken.where,
            class_names=class_names,
            notes=notes,
        )
    if info or library or random_weights:
        return MadeModel(network=model, weights_from="random")
    note = f"no --weights were given: the network has the weights that {name} makes or loads itself."
    return MadeModel(network=model, weights_from="factory", notes=(note,))


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """A user's factory may leave another type of new tensors behind."""
    import torch

    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _load_registered(info: ModelInfo, state: StateDict, origin: str, architecture: dict[str, Any]) -> nn.Module:
    """A registered network with the weights of a checkpoint."""
    from pcn_deploy.models.checkpoint import load_strict, without_prefix

    state = without_prefix(state)
    try:
        model, state = _shaped_by(info, state, architecture)
        load_strict(model, state, origin)
    except CheckpointError as error:
        raise CheckpointError("\n".join([str(error), *_advice(info, state)])) from error
    return model


def _shaped_by(info: ModelInfo, state: StateDict, architecture: dict[str, Any]) -> tuple[nn.Module, StateDict]:
    """A registered network without values, of the shape that a checkpoint tells, and the checkpoint in our layout."""
    import torch

    state, read = _load(info.reader)(state)
    with torch.device("meta"):
        return _make(info, _arguments(info, read, architecture)), state


def _load_into_user_network(model: nn.Module, state: StateDict, origin: str) -> None:
    from pcn_deploy.models.checkpoint import differences, inner_states, load_strict

    try:
        load_strict(model, state, origin)
    except CheckpointError as error:
        fitting = [
            f"Its {len(inner)} tensors under '{head}.' fit: save those only."
            for head, inner in inner_states(state)
            if not differences(model, inner)
        ]
        raise CheckpointError("\n".join([str(error), *fitting])) from error


def _advice(info: ModelInfo, state: StateDict) -> list[str]:
    """What a checkpoint that does not fit is: another registered network, or one of them beside other tensors."""
    from pcn_deploy.models.checkpoint import inner_states

    fitting = _that_fit(state)
    if info.name in fitting:
        return [f"It fits {info.name} as it is: leave --num-classes and arguments of the architecture out."]
    if fitting:
        return [f"It fits {' and '.join(fitting)}: give that as the model."]
    for head, inner in inner_states(state):
        fitting = _that_fit(inner)
        if fitting:
            return [f"Its {len(inner)} tensors under '{head}.' fit {' and '.join(fitting)}: save those only."]
    return []


def _that_fit(state: StateDict) -> list[str]:
    """Names of the registered networks that load a state dict."""
    from pcn_deploy.models.checkpoint import differences

    names: list[str] = []
    for info in MODELS.values():
        if names and not info.arguments:  # `patchconvnet` takes what its named forms take
            continue
        with suppress(CheckpointError, OptionError):
            if "num_classes" not in _load(info.reader)(state)[1]:  # of another family: the ends have other names
                continue
            model, renamed = _shaped_by(info, state, {})
            if not differences(model, renamed):
                names.append(info.name)
    return names


def check_weights_choice(name: str, weights: object, *, random_weights: bool) -> None:
    """Random weights are never silent: a network known by its name needs either a checkpoint or the word.

    Raises:
        ModelError: As `find_model`.
        OptionError: If neither or both are given; the user's own factory may do without.
    """
    if (weights is not None and random_weights) or not (is_own_factory(name) or weights is not None or random_weights):
        msg = "Give exactly one of weights (--weights FILE) and random_weights (--random-weights)."
        raise OptionError(msg)


def _arguments(info: ModelInfo, read: dict[str, Any], architecture: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a registered network: what the user says, then its name, then the checkpoint."""
    if info.arguments:
        read = {key: value for key, value in read.items() if key in _DECIDED_BY_FILE}
    return {**read, **info.arguments, **architecture}


def _make(info: ModelInfo, arguments: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = _load(info.factory)(**arguments)
    except TypeError as error:
        msg = f"{info.name} does not take these arguments: {error}."
        raise OptionError(msg) from error
    return model


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _call_user_factory(spec: str, arguments: dict[str, Any]) -> nn.Module:
    from torch import nn

    where, _, attribute = spec.rpartition(":")
    beside = [Path(where).resolve().parent] if where.endswith(".py") else []
    for folder in (Path.cwd(), *beside):  # where `python -m` and `python FILE` look, and the console script does not
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        msg = f"{spec!r}: {where} cannot be imported: {type(error).__name__}: {error}"
        raise ModelError(msg) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ModelError(_no_factory(spec, module, attribute))
    if isinstance(factory, nn.Module):
        msg = f"{spec!r} is a network, not a function that makes one. Write def factory(): return {attribute}"
        raise ModelError(msg)
    _check_signature(spec, factory, arguments)
    try:
        model = factory(**arguments)
    except (Exception, SystemExit) as error:
        msg = f"{spec!r} could not be made into a network: {type(error).__name__}: {error}"
        raise ModelError(msg) from error
    if not isinstance(model, nn.Module):
        msg = f"{spec!r} returned {type(model).__name__}; a factory must return a torch.nn.Module."
        raise ModelError(msg)
    return model


def _no_factory(spec: str, module: Any, attribute: str) -> str:
    own = sorted(
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    )
    close = difflib.get_close_matches(attribute, own, n=5, cutoff=0.5) or own[:10]
    there = f"it has {', '.join(close)}" if close else "it defines no function or class"
    return f"{spec!r}: there is no function or class {attribute!r}; {there}."


def _check_signature(spec: str, factory: Any, arguments: dict[str, Any]) -> None:
    """Refuse a factory that does not take the arguments, before it is called: its own errors look the same."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of code without Python source
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        keywords = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"
        if list(arguments) == ["num_classes"]:
            msg = (
                f"{spec!r} takes {signature}, so it cannot be told --num-classes {arguments['num_classes']}, which is "
                "passed to it as num_classes. Leave the option out, or let the function take num_classes."
            )
            raise ModelError(msg) from error
        msg = (
            f"{spec!r} takes {signature}, but is called with {keywords}: {error}.\nWay round: write a function that "
            "takes just that and calls it, and name the function instead: "
            f"def net(): return {spec.rpartition(':')[2]}(...)"
        )
        raise ModelError(msg) from error


def _import_file(path: Path) -> Any:
    name = f"pcn_deploy_user_{path.stem}"  # apart from any installed module of that name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        msg = f"no such file: {path}"
        raise FileNotFoundError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

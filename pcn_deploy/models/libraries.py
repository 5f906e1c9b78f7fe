"""Networks of other libraries by their names: `timm:NAME` and `torchvision:NAME`. Importing this imports neither.

A library is imported when one of its names is used, and nothing is downloaded. A further library is a subclass of
`Library` in a file of its own, and its entry in `LIBRARIES`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import CheckpointError, ModelError, PcnDeployError
from pcn_deploy.models.library import Evaluation, Library
from pcn_deploy.models.timm_networks import Timm
from pcn_deploy.models.torchvision_networks import Torchvision

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.models.containers import StateDict

FEW, MORE = 3, 5
"""Two numbers of classes: the tensors that differ between them are the classifier."""


@dataclass(frozen=True, kw_only=True)
class LibraryNetwork:
    """A network of a library, and what its checkpoint told beside the weights.

    Attributes:
        network: It, with the weights of the checkpoint or random ones.
        class_names: What the library calls the classes of weights that it publishes itself; empty for others.
        notes: What the user should know of it.
    """

    network: nn.Module
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


LIBRARIES: dict[str, Library] = {library.package: library for library in (Timm(), Torchvision())}
"""By the prefix of their names."""


def find_library(spec: str) -> tuple[Library, str] | None:
    """The library of a name with its prefix, and the name without it; None for other names."""
    prefix, colon, name = spec.partition(":")
    return (LIBRARIES[prefix], name) if colon and prefix in LIBRARIES else None


def configured_evaluation(spec: str, weights: str | Path | None = None) -> Evaluation | None:
    """How a network of a library is evaluated.

    Args:
        spec: `timm:NAME` or `torchvision:NAME`.
        weights: Its checkpoint; what the training script kept in it beside the weights counts first.

    Returns:
        The transform, and what says so; None for a network of no library.

    Raises:
        ModelError: If the library has no such network.
        DependencyError: If the library is not installed.
        CheckpointError: If the checkpoint cannot be read.
        OptionError: If the transform is not possible here.
    """
    found = find_library(spec)
    if found is None:
        return None
    library, name = found
    library.check(name)
    path = Path(weights) if weights is not None else None
    trained, notes = _trained(library, name, path)
    try:
        evaluation = library.evaluation(name, path, trained)
    except PcnDeployError:
        raise
    except Exception as error:  # what lies in a checkpoint may be anything
        msg = f"{spec} has no image transform that can be read: {type(error).__name__}: {error}"
        raise ModelError(msg) from error
    return replace(evaluation, notes=(*notes, *evaluation.notes))


def arguments_at(spec: str, resolution: tuple[int, int]) -> dict[str, Any]:
    """Arguments with which a network of a library takes images of a height and width, in pixels.

    Args:
        spec: Any name of a network.
        resolution: The height and width.

    Returns:
        Plain values, for `create_model`; none for a network of no library, or one that takes any size.

    Raises:
        DependencyError: If the library is not installed.
    """
    found = find_library(spec)
    return found[0].arguments_at(found[1], resolution) if found else {}


def configured_transform(spec: str, weights: str | Path | None = None) -> Transform:
    """The evaluation transform of a network of timm or torchvision.

    Args:
        spec: `timm:NAME` or `torchvision:NAME`.
        weights: Its checkpoint; what timm's or torchvision's training script kept in it counts first.

    Returns:
        The transform, for `CompileOptions` and `ImageSource`.

    Raises:
        ModelError: If it is no name of a library, or the library has no such network.
        DependencyError: If the library is not installed.
        CheckpointError: If the checkpoint cannot be read.
        OptionError: If the transform is not possible here.
    """
    evaluation = configured_evaluation(spec, weights)
    if evaluation is None:
        msg = f"{spec!r} says of no transform: only {' and '.join(f'{one}:NAME' for one in LIBRARIES)} do."
        raise ModelError(msg)
    return evaluation.transform


def make_library_network(
    spec: str, weights: Path | None, state: StateDict | None, arguments: dict[str, Any]
) -> LibraryNetwork:
    """Make a network of a library, and load a checkpoint into it.

    Args:
        spec: `timm:NAME` or `torchvision:NAME`.
        weights: The file of the checkpoint, or None for random weights.
        state: Its tensors.
        arguments: Keyword arguments of the library; without `num_classes` the checkpoint tells it.

    Raises:
        ModelError: If the library has no such network, or cannot make it.
        DependencyError: If the library is not installed.
        CheckpointError: If the checkpoint does not fit.
    """
    from pcn_deploy.models.checkpoint import load_strict

    found = find_library(spec)
    if found is None:
        msg = f"{spec!r} is no name of a library."
        raise ModelError(msg)
    library, name = found
    library.check(name)
    trained, _ = _trained(library, name, weights)

    def make(**more: Any) -> nn.Module:
        try:
            network: nn.Module = library.create(name, weights, trained, {**more, **arguments})
        except Exception as error:  # whatever the library raises, such as for an argument it does not take
            msg = f"{spec} could not be made: {type(error).__name__}: {error}"
            raise ModelError(msg) from error
        return network

    if state is None or weights is None:
        return LibraryNetwork(network=make())
    outlines = [_outline(library, name, weights, trained, {**arguments, "num_classes": count}) for count in (FEW, MORE)]
    state, notes = _part_of(outlines[0], state, weights)
    classes = _classes(outlines, state)
    network = make(**({} if classes is None else {"num_classes": classes}))
    try:
        load_strict(network, state, str(weights))
    except CheckpointError as error:
        advice = _advice(library, name, weights, classes, arguments.get("num_classes"))
        raise CheckpointError("\n".join([str(error), *advice])) from error
    return LibraryNetwork(network=network, class_names=library.class_names(name, weights), notes=notes)


def _trained(library: Library, name: str, weights: Path | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments with which a network was trained, where its checkpoint tells them; and what to know of them."""
    from pcn_deploy.models.checkpoint import read_training_arguments

    trained = read_training_arguments(weights) if weights is not None else {}
    model = str(trained.get("model", "")).rpartition("/")[2]
    if library.architecture(model) == library.architecture(name):
        return trained, ()
    note = f"{weights} was trained as {model}: the arguments of its training are not used for {library.package}:{name}."
    return {}, (note,) if model else ()


def _outline(library: Library, name: str, weights: Path, trained: Mapping[str, Any], arguments: dict[str, Any]) -> Any:
    """A network without values where it can be made so: names and shapes of its tensors are what is wanted."""
    import torch

    try:
        with torch.device("meta"):
            return library.create(name, weights, trained, arguments)
    except Exception:  # its code needs values
        return library.create(name, weights, trained, arguments)


def _part_of(network: nn.Module, state: StateDict, weights: Path) -> tuple[StateDict, tuple[str, ...]]:
    """The tensors of a network in a checkpoint, under its names: a LightningModule keeps others beside it."""
    from pcn_deploy.models.checkpoint import COUNTER, inner_states, listed, named_as

    def names(tensors: Mapping[str, Any]) -> set[str]:
        return {name for name in tensors if not name.endswith(COUNTER)}

    expected = names(network.state_dict())
    named = named_as(network, state)
    if names(named) == expected:
        return named, ()
    for head, inner in inner_states(state):
        renamed = named_as(network, inner)
        if names(renamed) == expected:
            others = listed(name for name in state if not name.startswith(f"{head}."))
            return renamed, (
                f"{weights} holds the network under '{head}.' and other tensors beside it, left: {others}.",
            )
    return named, ()


def _classes(outlines: Sequence[nn.Module], state: StateDict) -> int | None:
    """The number of classes of a checkpoint: the length of the axes that change with it; None without such tensors."""
    few, more = (outline.state_dict() for outline in outlines)
    counts = Counter(
        state[name].shape[axis]
        for name, tensor in few.items()
        if name in state and name in more and state[name].ndim == tensor.ndim == more[name].ndim
        for axis, lengths in enumerate(zip(tensor.shape, more[name].shape, strict=True))
        if lengths == (FEW, MORE)
    )
    return counts.most_common(1)[0][0] if counts else None


def _advice(library: Library, name: str, weights: Path, held: int | None, asked: int | None) -> list[str]:
    """What else a checkpoint that does not fit could be."""
    from pcn_deploy.models.checkpoint import read_training_arguments

    model = str(read_training_arguments(weights).get("model", "")).rpartition("/")[2]
    lines = []
    if held is not None and asked not in (None, held):
        lines.append(f"Its classifier has {held} classes, --num-classes says {asked}: leave it out.")
    if model and library.architecture(model) != library.architecture(name):
        lines.append(f"The file was trained as {model}: give {library.package}:{model} as the model.")
    return lines

"""Named architectures and how to make one: from the registry, a module or a file. Importing this imports no torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcn_deploy.errors import DependencyError, ModelError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.models.checkpoint import StateDict

_PATCHCONVNET = "pcn_deploy.models.patchconvnet:PatchConvNet"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A named architecture.

    Attributes:
        name: Name on the command line.
        factory: `module:callable` that makes it.
        arguments: Keyword arguments of the factory.
        parameters: Number of parameters at 1,000 classes; 0 where the checkpoint decides.
        gmacs: Multiply-accumulates of one image at `resolution`, in 10^9; 0 where the checkpoint decides.
        checkpoints: Official files that load unchanged.
        resolution: Height and width it was published for, in pixels.
    """

    name: str
    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    gmacs: float = 0.0
    checkpoints: str = ""
    resolution: tuple[int, int] = (224, 224)


def _patchconvnet(name: str, parameters: int, gmacs: float, checkpoints: str, **arguments: Any) -> ModelInfo:
    return ModelInfo(
        name=name,
        factory=_PATCHCONVNET,
        arguments=arguments,
        parameters=parameters,
        gmacs=gmacs,
        checkpoints=checkpoints,
    )


# Shapes and LayerScale initial values: facebookresearch/deit, patchconvnet_models.py. Counts: `tests/models`.
_MODELS = {
    info.name: info
    for info in (
        _patchconvnet(
            "patchconvnet_s60",
            25_231_096,
            3.98,
            "s60_224_1k, s60_{224,384,512}_21k",
            width=384,
            depth=60,
            layer_scale=1e-4,
        ),
        _patchconvnet("patchconvnet_s120", 47_723_896, 7.49, "s120_224_1k", width=384, depth=120),
        _patchconvnet("patchconvnet_b60", 99_388_936, 15.80, "b60_224_1k, b60_{224,384}_21k", width=768, depth=60),
        _patchconvnet("patchconvnet_b120", 188_611_336, 29.77, "b120_224_1k, b120_{224,384}_21k", width=768, depth=120),
        _patchconvnet("patchconvnet_l60", 176_009_576, 28.04, "none published", width=1024, depth=60),
        _patchconvnet("patchconvnet_l120", 334_294_376, 52.85, "none published", width=1024, depth=120),
        _patchconvnet(
            "patchconvnet_s60_multi",
            25_614_712,
            5.31,
            "s60_multi_{scratch,finetune}_1k",
            width=384,
            depth=60,
            layer_scale=1e-4,
            multi_class_token=True,
        ),
        _patchconvnet("patchconvnet", 0, 0.0, "any of the above and your own: the shape is read from the file"),
    )
}


def list_models() -> list[ModelInfo]:
    """Every registered architecture, in the order people should see them."""
    return list(_MODELS.values())


def find_model(name: str) -> ModelInfo | None:
    """Look a name up.

    Args:
        name: A registry name, `package.module:factory` or `file.py:factory`.

    Returns:
        The entry, or None for the user's own factory.

    Raises:
        ModelError: If it is neither; the closest names are in the message.
    """
    if name in _MODELS:
        return _MODELS[name]
    if ":" in name:
        return None
    close = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(_MODELS)}."
    msg = f"Unknown model {name!r}. {hint} Your own network is given as package.module:factory or file.py:factory."
    raise ModelError(msg)


def create_model(
    name: str,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    **architecture: Any,
) -> nn.Module:
    """Make a network in evaluation mode, float32, on the CPU.

    Args:
        name: A registry name, `package.module:factory` or `file.py:factory`.
        weights: Checkpoint, `.safetensors` or a PyTorch file; loaded strictly.
        random_weights: Use freshly initialised weights. One of the two must be given; only the user's own factory may
            bring weights of its own instead.
        num_classes: Number of logits; by default what the checkpoint holds, else the architecture's own.
        seed: Seed of the random weights.
        **architecture: Further arguments of the network, such as `width`, `depth` and `patch` of a PatchConvNet.

    Returns:
        The network.

    Raises:
        OptionError: If neither or both of `weights` and `random_weights` are given, or the shape is impossible.
        ModelError: If the name is unknown or the user's factory fails.
        CheckpointError: If the checkpoint is unreadable, unsafe or does not fit.
        DependencyError: If torch is missing.
    """
    info = find_model(name)
    check_weights_choice(info, weights, random_weights=random_weights)
    try:
        import torch

        from pcn_deploy.models import checkpoint
    except ModuleNotFoundError as error:
        raise DependencyError.for_extra(error.name or "torch", "compile", "making a network") from error
    state = checkpoint.read_state_dict(Path(weights)) if weights is not None else None
    if num_classes is not None:
        architecture["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if info is None:
            model = _call_user_factory(name, architecture)
        else:
            if state is not None and checkpoint.has_class_heads(state):
                state = checkpoint.stack_class_heads(state)
                architecture |= {} if info.arguments else {"multi_class_token": True}
            arguments = _arguments(info, state, architecture)
            with torch.device("meta" if state is not None else "cpu"):
                model = _make(info, arguments)
    if state is not None:
        checkpoint.load_strict(model, state, str(weights))
    return model.eval()


def check_weights_choice(info: ModelInfo | None, weights: object, *, random_weights: bool) -> None:
    """Random weights are never silent: a registered network needs either a checkpoint or the word.

    Raises:
        OptionError: If neither or both are given; the user's own factory (`info` is None) may do without.
    """
    if (weights is not None and random_weights) or (info is not None and weights is None and not random_weights):
        msg = "Give exactly one of weights (--weights FILE) and random_weights (--random-weights)."
        raise OptionError(msg)


def _arguments(info: ModelInfo, state: StateDict | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a registered network: what the user says, then its name, then the checkpoint."""
    from pcn_deploy.models.checkpoint import infer_patchconvnet

    inferred: dict[str, Any] = {}
    if state is not None:
        read = infer_patchconvnet(state)
        decided_by_file = set(read) if not info.arguments else {"num_classes", "in_channels"}
        inferred = {key: value for key, value in read.items() if key in decided_by_file}
    return {**inferred, **info.arguments, **given}


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
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the console script, unlike `python -m`, does not look there
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        factory = getattr(module, attribute)
        model = factory(**arguments)
    except (Exception, SystemExit) as error:
        msg = f"{spec!r} could not be made into a network: {type(error).__name__}: {error}"
        raise ModelError(msg) from error
    if not isinstance(model, nn.Module):
        msg = f"{spec!r} returned {type(model).__name__}; a factory must return a torch.nn.Module."
        raise ModelError(msg)
    return model


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

"""Which weights a checkpoint holds: those of training, an average of them, or both; and which of them are taken.

By default the ones that the tools of the field evaluate are taken. Sources:

- timm, `models/_helpers.py load_state_dict(use_ema=True)`: `state_dict_ema`, then `model_ema`, then the raw ones. DeiT
  writes `model_ema` too; its own `main.py --eval` loads `model`.
- torchvision, `references/classification/train.py`: with `--model-ema` the average is evaluated; it is an
  `AveragedModel`, with `module.` before each name and a counter `n_averaged`.
- mmengine, `hooks/ema_hook.py before_save_checkpoint`: what the hook writes has been *exchanged*, so `state_dict` is
  the average and `ema_state_dict` (`module.`, counter `steps`) the raw weights. mmcv did the same with buffers `ema_…`.
- Lightning, `callbacks/weight_averaging.py`: `state_dict` is the average, `current_model_state` the raw weights.
- Lightning modules that keep the average as a member: `ema_model.`, `model_ema.` beside `model.`.
- Lightning, callbacks of the users' own (`EMACallback`, `EMA`): their state under `callbacks` holds the average, which
  they exchange with the raw weights in `on_validation_start`.
- fairseq, `trainer.py state_dict`: `extra_state.ema` is the average; its commands evaluate `model`, the raw weights
  (`checkpoint_utils.py load_model_ensemble_and_task`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from pcn_deploy.errors import CheckpointError, OptionError

StateDict: TypeAlias = dict[str, Tensor]

AUTO, EMA, RAW = "auto", "ema", "raw"
CHOICES = (AUTO, EMA, RAW)
RAW_FIRST = "raw-first"
"""What bundles were built from before there was a choice: raw weights, averaged ones where there are no others."""

CONTAINERS = ("model", "state_dict", "model_state_dict")
"""Keys under which raw weights are looked for first."""

_AVERAGED = re.compile(r"(?i:(^|[_.])(ema|swa|averaged?)([_.]|$))|(?<=[a-z])(EMA|SWA)([_.]|$)")
_OTHERS = re.compile(r"optim|sched|scaler|loss|criterion|config|args|meta|hyper|callback|loop")
COUNTERS = frozenset({"n_averaged", "steps", "step", "num_updates", "updates", "decay", "initted"})
"""What averages count in tensors of one element beside the weights."""

_LISTED = 16
"""Entries of a list that are looked at: of optimizers and the like."""

_CALLBACK = re.compile(r"EMA|SWA|Averag|ExponentialMoving")
_FAIRSEQ = "extra_state.ema"
_TIMM = ("state_dict_ema", "model_ema")

_INNER = ("module", "ema_model", "state_dict", "model", "shadow")
_WRAPPERS = ("_orig_mod.", "module.", "ema_model.", "module.", "_orig_mod.", "module.")
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.replace(".", "_"),  # mmcv: buffers cannot have dots
    lambda name: name.replace(".", ""),  # LitEma of latent diffusion
)


@dataclass(frozen=True)
class Weights:
    """One set of weights in a checkpoint, and where it was found: a key, or the beginning of names."""

    state: StateDict
    where: str


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The weights that were taken.

    Attributes:
        state: Tensors by name.
        kind: `ema` or `raw`.
        where: The key they were under, or the beginning of their names; empty for a flat file.
        note: What the user should know, where there was a choice.
        class_names: What the file calls the classes, in the order of the outputs; empty if it does not tell.
    """

    state: StateDict
    kind: str
    where: str
    note: str = ""
    class_names: tuple[str, ...] = ()


def choose_weights(content: Mapping[Any, Any], origin: str, which: str = AUTO) -> Taken | None:
    """Find the weights of a checkpoint and take some.

    Args:
        content: What the file holds.
        origin: Its path, for messages.
        which: One of `CHOICES`, or `RAW_FIRST`.

    Returns:
        The weights; None if there are none.

    Raises:
        CheckpointError: If it does not hold the kind that is asked for.
        OptionError: If there is no such kind.
    """
    if which not in (*CHOICES, RAW_FIRST):
        msg = f"Weights {which!r} of a checkpoint: known are {', '.join(CHOICES)}."
        raise OptionError(msg)
    by_kind = _find(content)
    if not by_kind:
        return None
    if EMA not in by_kind and (place := _nameless(content)):
        by_kind.setdefault(_UNLIKE, Weights({}, place))
    unlike = by_kind.pop(_UNLIKE, None)
    evaluated = (RAW, EMA) if EMA in by_kind and by_kind[EMA].where == _FAIRSEQ else (EMA, RAW)
    wanted = {AUTO: evaluated, RAW_FIRST: (RAW, EMA)}.get(which, (which,))
    kind = next((kind for kind in wanted if kind in by_kind), None)
    if kind is None:
        there, weights = next(iter(by_kind.items()))
        place = f"under {weights.where!r}" if weights.where else "without a container"
        msg = f"{origin} holds no {_WORDS[which]} weights, only {_WORDS[there]} ones {place}. Leave the choice out."
        raise CheckpointError(msg)
    taken = by_kind[kind]
    if len(by_kind) == 1:
        note = ""
        if unlike:
            what = "of other tensors" if unlike.state else "without the names of its tensors"
            note = f"{origin} holds an average too ({_place(unlike)}), {what}: it was left."
        return Taken(state=taken.state, kind=kind, where=taken.where, note=note)
    note = (
        f"{origin} holds averaged weights ({_place(by_kind[EMA])}) and raw ones ({_place(by_kind[RAW])}): the "
        f"{_WORDS[kind]} ones were taken{_why(by_kind, which)}; --checkpoint-weights {RAW if kind == EMA else EMA} "
        "takes the others."
    )
    return Taken(state=taken.state, kind=kind, where=taken.where, note=note)


_UNLIKE = "unlike"  # an average of other tensors than the raw weights
_WORDS = {EMA: "averaged (EMA)", RAW: "raw"}


def _place(weights: Weights) -> str:
    return repr(weights.where) if weights.where else "the names without that"


def _why(by_kind: dict[str, Weights], which: str) -> str:
    if which != AUTO:
        return ""
    where = by_kind[EMA].where
    if where.rpartition(".")[2] in CONTAINERS and not _AVERAGED.search(where):
        return ", which the tool that wrote the file puts there for evaluation"
    if where == _FAIRSEQ:
        return ", as fairseq evaluates"
    if where in _TIMM:
        return ", as timm's loader does"
    if where.startswith("callbacks.") and "ema" in where.lower():
        return ", as such callbacks validate"
    return ", as an average is kept to be evaluated"


def _find(content: Mapping[Any, Any]) -> dict[str, Weights]:
    """The averaged and the raw weights, if there are any."""
    inner, prefix = _opened(content)
    held = {str(key): each for key, value in inner.items() if (each := _weights(value, f"{prefix}{key}"))}
    flat = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    if len(flat) > max((len(each.state) for each in held.values()), default=0):
        return _apart(Weights(flat, prefix.rstrip(".")))
    if {"state_dict", "current_model_state"} <= held.keys():  # Lightning
        return {EMA: held["state_dict"], RAW: held["current_model_state"]}
    weights = [key for key in held if not _OTHERS.search(key)]
    averages = [held[key] for key in weights if _AVERAGED.search(key)] + _deep(content)
    plain = [key for key in weights if not _AVERAGED.search(key)]
    known = [key for key in CONTAINERS if key in held]
    raw = max(known, key=lambda key: len(held[key].state)) if known else plain[0] if len(plain) == 1 else ""
    by_kind = _apart(held[raw]) if raw else {}
    if not averages:
        return by_kind
    if not raw:
        return {EMA: Weights(_members(averages[0].state), averages[0].where)}
    for average in averages:
        members = _members(average.state)
        if _is_exchanged(inner, average.where.removeprefix(prefix)):
            return {EMA: by_kind[RAW], RAW: Weights(members, average.where)}
        if whole := _mirrored(members, _members(held[raw].state)):
            return {EMA: Weights(whole, average.where), RAW: by_kind[RAW]}
    return {**by_kind, _UNLIKE: averages[0]}


def _opened(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], str]:
    """The checkpoint inside a file that holds it under a key of its own, and where it is, with a dot at the end."""
    prefix = ""
    while not any(isinstance(item[1], Tensor) or _is_container(*item) for item in content.items()):
        inside = [key for key, value in content.items() if not _OTHERS.search(str(key)) and _holds_containers(value)]
        if len(inside) != 1:
            break
        content, prefix = content[inside[0]], f"{prefix}{inside[0]}."
    return content, prefix


def _is_container(key: Any, value: Any) -> bool:
    """Whether it is what weights are looked for in, or holds tensors itself, under whatever key."""
    known = key in CONTAINERS or _AVERAGED.search(str(key))
    return bool(_tensors(value)[0]) if known else len(_tensors(value, 0)[0]) > 1


def _holds_containers(value: Any, depth: int = 3) -> bool:
    return isinstance(value, Mapping) and any(
        _is_container(*item) or (depth > 0 and _holds_containers(item[1], depth - 1)) for item in value.items()
    )


def _places(content: Any, place: str = "", depth: int = 5) -> Iterator[tuple[str, str, Any]]:
    """What lies in a file, in whatever dictionaries and lists: place, key and value; not the tensors themselves."""
    if isinstance(content, Mapping):
        items = [(str(key), f"{place}.{key}" if place else str(key), value) for key, value in content.items()]
    else:
        items = [(str(index), f"{place}[{index}]", value) for index, value in enumerate(content[:_LISTED])]
    for key, where, value in items:
        if isinstance(value, Mapping | list | tuple):
            yield key, where, value
            if depth:
                yield from _places(value, where, depth - 1)


def _deep(content: Mapping[Any, Any]) -> list[Weights]:
    """Averages where no weights are looked for; first those whose own key says it."""
    places = [(key, where, value) for key, where, value in _places(content) if "." in where]
    named = [each for each in places if _AVERAGED.search(each[0])]
    named += [each for each in places if each[1].startswith("callbacks.") and _CALLBACK.search(each[0])]
    return [weights for _, where, value in named if (weights := _weights(value, where))]


def _nameless(content: Mapping[Any, Any]) -> str:
    """Where an average is a list of tensors, as `torch_ema` keeps them: nothing says which is which."""
    for key, where, value in _places(content):
        if _AVERAGED.search(key) or _CALLBACK.search(key):
            inner = value if isinstance(value, Mapping) else {"": value}
            for name, tensors in inner.items():
                if isinstance(tensors, list | tuple) and tensors and all(isinstance(one, Tensor) for one in tensors):
                    return f"{where}.{name}".rstrip(".")
    return ""


def _weights(value: Any, where: str) -> Weights | None:
    """The tensors of a container, and where they are in it."""
    state, inner = _tensors(value)
    return Weights(state, f"{where}{inner}") if state else None


def _is_exchanged(content: Mapping[Any, Any], key: str) -> bool:
    """Whether it was mmengine that wrote the file: what is called the average is then the raw weights."""
    meta, average = content.get("meta"), content.get(key, {})
    by_name = isinstance(meta, Mapping) and "mmengine_version" in meta
    return key == "ema_state_dict" and (by_name or "steps" in average)


def _tensors(value: Any, depth: int = 2) -> tuple[StateDict, str]:
    """Tensors by name in a container, or in one inside it, and where inside; nothing if it holds other things."""
    if not isinstance(value, Mapping):
        return {}, ""
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if len(tensors) > 1 or not depth:
        return tensors, ""
    for key in _INNER:
        inner, where = _tensors(value.get(key), depth - 1)
        if inner:
            return inner, f".{key}{where}"
    return tensors, ""


def _members(state: StateDict) -> StateDict:
    """The tensors of the network in the state of an object around it: without counters, and without its own name."""
    for wrapper in _WRAPPERS:
        state = {name: value for name, value in state.items() if name not in COUNTERS or value.numel() > 1}
        inner, _ = _split(state, wrapper)
        if len(inner) == len(state) or (inner and wrapper == "ema_model."):  # lucidrains keep `online_model.` beside it
            state = inner
    return {name: value for name, value in state.items() if name not in COUNTERS or value.numel() > 1}


def _apart(weights: Weights) -> dict[str, Weights]:
    """Weights of which some are an average of the others: both, if their names tell."""
    state = weights.state
    if "n_averaged" in state:
        return {EMA: weights}
    for head in sorted({name.partition(".")[0] for name in state if _AVERAGED.search(name.partition(".")[0])}):
        average, rest = _split(state, f"{head}.")
        for where, raw in [(weights.where, rest), *_groups({**rest, **_split(average, "online_model.")[0]})]:
            if whole := _mirrored(_members(average), _members(raw)):
                return {EMA: Weights(whole, f"{head}."), RAW: Weights(raw, where)}
    kept, rest = _split(state, "ema_")
    if kept and (whole := _mirrored(kept, rest)):  # mmcv, exchanged too
        return {EMA: Weights(rest, weights.where), RAW: Weights(whole, "ema_")}
    return {RAW: weights}


def _split(state: StateDict, prefix: str) -> tuple[StateDict, StateDict]:
    """What begins with a prefix, without it, and the rest."""
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return inner, {name: value for name, value in state.items() if not name.startswith(prefix)}


def _groups(state: StateDict) -> Iterator[tuple[str, StateDict]]:
    """The parts of a state with one beginning each, largest first."""
    heads = Counter(name.partition(".")[0] for name in state)
    for head, _ in heads.most_common():
        yield f"{head}.", _split(state, f"{head}.")[0]


def _mirrored(average: StateDict, raw: StateDict) -> StateDict:
    """The average under the names of the raw weights, buffers that it lacks from those; nothing if it is of others."""
    for spelling in _SPELLINGS:
        pairs = {name: average[spelling(name)] for name in raw if spelling(name) in average}
        alike = all(value.shape == raw[name].shape for name, value in pairs.items())
        if pairs and alike and len(pairs) == len(average) and 2 * len(pairs) >= len(raw):
            return {**raw, **pairs}
    return {}

"""A precision plan as a TOML file: written from a bundle, edited, given back. Standard library only.

On Python 3.10, where it has no TOML reader, `tomli` is needed to read one.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pcn_deploy.calibration.plan.rules import (
    CODES,
    POSSIBLE_RULES,
    PRECISIONS,
    REMAINDERS,
    RESIDUAL_ADD,
    LayerFacts,
    PlanEntry,
    PrecisionPlan,
)
from pcn_deploy.errors import DependencyError, OptionError

ALLOWED = {
    "fp32": ("fp32",),
    "fp16": ("fp16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    **{codes: (codes, "fp16", "fp32") for codes in CODES},
}
"""What a layer may be in a plan of each precision."""

_TABLES = {"layers": False, "operations": True}
_KEYS = ("kind", "precision", "reason", "input_amax", "nodes")
_HEAD = """\
# Precision plan of pcn-deploy. Edit it and build with --recipe FILE.toml; a layer left out follows the rules.
# input_amax: magnitude that the largest code of a layer's input stands for; left out, it is calibrated.
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A plan given by the user.

    Attributes:
        precision: The precision of the build.
        remainder: Type of everything that is not quantised; the precision itself where that is none of `CODES`.
        entries: The layers it decides, and the operations that modules do themselves.
        source: Where it comes from, for messages.
    """

    precision: str
    remainder: str
    entries: tuple[PlanEntry, ...]
    source: str = "the recipe"

    @property
    def layers(self) -> dict[str, PlanEntry]:
        """The layers it decides, by name."""
        return {entry.op: entry for entry in self.entries if not entry.operations}

    def apply(self, plan: PrecisionPlan, facts: Sequence[LayerFacts], modules: Sequence[str]) -> PrecisionPlan:
        """Replace what the rules decided by what the recipe says.

        Args:
            plan: The plan by the rules, of the same precision and remainder.
            facts: The layers of the network.
            modules: Names of all modules of the network; that of the network itself is an empty string.

        Raises:
            OptionError: If the recipe names what the network does not have, or quantises what cannot be.
        """
        known = {layer.path: layer for layer in facts}
        for entry in self.entries:
            self._check_name(entry, modules if entry.operations else list(known))
        layers = self.layers
        entries = tuple(replace(layers[x.op], kind=x.kind) if x.op in layers else x for x in plan.entries)
        quantized = {entry.op: entry.precision for entry in entries if entry.precision in CODES}
        for path, entry in layers.items():
            if entry.kind not in ("", known[path].kind):
                msg = f"{self._at(entry)} is a {entry.kind} there and a {known[path].kind} in this network."
                raise OptionError(msg)
            against = _against_codes(known[path], quantized) if path in quantized else ""
            if against:
                others = _or(ALLOWED[entry.precision][1:])
                msg = f"{self._at(entry)} cannot be {entry.precision}: {against}. Expected {others}."
                raise OptionError(msg)
        entries = tuple(
            replace(entry, precision=plan.remainder, reason="its branch does not end in an INT8 layer")
            if entry.op in quantized
            and known[entry.op].kind == RESIDUAL_ADD
            and known[entry.op].branch not in quantized
            else entry
            for entry in entries
        )
        own = tuple(entry for entry in self.entries if entry.operations)
        return replace(plan, entries=entries + own)

    def _at(self, entry: PlanEntry) -> str:
        table = "operations" if entry.operations else "layers"
        return f"{self.source}: [{table}.{json.dumps(entry.op, ensure_ascii=False)}]"

    def _check_name(self, entry: PlanEntry, known: Sequence[str]) -> None:
        if entry.op not in known:
            close = difflib.get_close_matches(entry.op, known, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "The recipe is for another network."
            msg = f"{self._at(entry)}: this network has no such module that is executed. {hint}"
            raise OptionError(msg)


def _against_codes(layer: LayerFacts, quantized: dict[str, str]) -> str:
    """Why a layer cannot be quantised, whether or not it would gain."""
    if layer.kind == RESIDUAL_ADD and quantized[layer.path] != "int8":
        return "an addition is quantised in INT8 only"
    if layer.kind == RESIDUAL_ADD:
        joined = layer.branch in quantized
        return "" if joined else f"an addition is INT8 only together with its branch, {layer.branch!r}"
    return next((reason for rule in POSSIBLE_RULES if (reason := rule(layer))), "")


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)


def write_recipe(plan: PrecisionPlan) -> str:
    """Write a plan as TOML, such that `parse_recipe` returns it to the bit."""
    lines = [_HEAD, f'precision = "{plan.precision}"']
    if plan.precision in CODES:
        lines.append(f'remainder = "{plan.remainder}"')
    for entry in plan.entries:
        table = "operations" if entry.operations else "layers"
        lines += ["", f"[{table}.{_quoted(entry.op)}]", f"kind = {_quoted(entry.kind)}"]
        lines.append(f'precision = "{entry.precision}"')
        if entry.input_amax is not None:
            lines.append(f"input_amax = {float(entry.input_amax)!r}")
        if entry.nodes:
            lines.append(f"nodes = [{', '.join(map(_quoted, entry.nodes))}]")
        lines.append(f"reason = {_quoted(entry.reason)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML: JSON's, but for DEL and the escapes of characters beyond ASCII."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        OptionError: If it cannot be read, or does not say what is expected.
        DependencyError: If Python 3.10 has no `tomli`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"The recipe {path} cannot be read: {error}. Write one with: pcn-compile inspect FILE.pcn --recipe"
        raise OptionError(msg) from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, source: str = "the recipe") -> Recipe:
    """Read a recipe from TOML.

    Args:
        text: The TOML.
        source: Where it comes from, for messages.

    Raises:
        OptionError: If it is no TOML (with the line), or a key or value is not what is expected (with the key).
        DependencyError: If Python 3.10 has no `tomli`.
    """
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ModuleNotFoundError as error:
        purpose = "reading a recipe on Python 3.10"
        raise DependencyError.for_extra(error.name or "tomli", "compile", purpose, ("tomli",)) from error
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # what is no TOML, or more than Python takes
        msg = f"{source} is not valid TOML: {error}."
        raise OptionError(msg) from error
    _check_keys(data, ("precision", "remainder", *_TABLES), source)
    precision = _choice(data, "precision", PRECISIONS, source)
    remainder = _choice(data, "remainder", REMAINDERS, source, "fp16") if precision in CODES else precision
    if precision not in CODES and data.get("remainder", precision) != precision:
        msg = f"{source}: remainder is {data['remainder']!r}; with precision {precision} leave it out."
        raise OptionError(msg)
    entries = [
        _entry(name, table, precision, own, f"{source}: [{key}.{json.dumps(name, ensure_ascii=False)}]")
        for key, own in _TABLES.items()
        for name, table in _table(data.get(key, {}), f"{source}: {key}").items()
    ]
    return Recipe(precision=precision, remainder=remainder, entries=tuple(entries), source=source)


def _entry(name: str, value: Any, precision: str, operations: bool, at: str) -> PlanEntry:
    table = _table(value, at)
    _check_keys(table, _KEYS, at)
    allowed = tuple(each for each in ALLOWED[precision] if not (operations and each in CODES))
    kind, reason = table.get("kind", ""), table.get("reason", "as the recipe says")
    if not (isinstance(kind, str) and isinstance(reason, str)):
        msg = f"{at}: kind and reason are texts; found {kind!r} and {reason!r}."
        raise OptionError(msg)
    chosen = _choice(table, "precision", allowed, at)
    nodes = table.get("nodes", [])
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes) or (nodes and not operations):
        msg = f"{at}: nodes is a list of texts such as 'Pow.0', in a table of operations; found {nodes!r}."
        raise OptionError(msg)
    amax = table.get("input_amax")
    if amax is not None:
        if chosen not in CODES:
            msg = f"{at}: input_amax goes only where precision is int8 or fp8. Remove it."
            raise OptionError(msg)
        number = isinstance(amax, int | float) and not isinstance(amax, bool)
        if not number or not 0 < amax <= sys.float_info.max:
            msg = f"{at}: input_amax is {amax!r}; expected a finite number above 0."
            raise OptionError(msg)
    return PlanEntry(
        op=name,
        kind=kind,
        precision=chosen,
        reason=reason,
        input_amax=None if amax is None else float(amax),
        operations=operations,
        nodes=tuple(nodes),
    )


def _table(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        msg = f"{at} is {value!r}; expected a table."
        raise OptionError(msg)
    return value


def _check_keys(table: dict[str, Any], known: Sequence[str], at: str) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        nested = isinstance(table[unknown[0]], dict)
        quotes = ' A name with dots goes in quotes: [layers."blocks.0.conv"].' if nested else ""
        msg = f"{at}: unknown key {unknown[0]!r}; expected {', '.join(known)}.{quotes}"
        raise OptionError(msg)


def _choice(table: dict[str, Any], key: str, known: Sequence[str], at: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if value not in known:
        problem = f"is {value!r}" if key in table else "is missing"
        msg = f"{at}: {key} {problem}; expected {_or(known)}."
        raise OptionError(msg)
    return str(value)

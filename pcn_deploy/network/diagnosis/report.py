"""Say where and why a network cannot be compiled: the module's path, the line of its code, the cause, the way round.

Nothing in here may hide the error it explains: what cannot be found out is left out of the report.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pcn_deploy.errors import ModelError
from pcn_deploy.network.diagnosis.causes import find_cause, operator_in
from pcn_deploy.network.diagnosis.places import (
    Place,
    chain_of,
    place_in_traceback,
    place_of_node,
    place_of_specialisation,
    safely,
)

log = logging.getLogger(__name__)

_GENERAL = "rewrite that line with plain tensor operations, or leave the part out of the network."


def difference_error(sqnr_db: float) -> ModelError:
    """Explain that the scripted or exported network computes something else than the network itself.

    Args:
        sqnr_db: SQNR of its logits.
    """
    return obstacle(
        f"The exported network computes something else than the network itself ({sqnr_db:.1f} dB)",
        None,
        "forward decides something by how it is run, such as torch.compiler.is_exporting(), or by what Python knows of "
        "a tensor, such as type(x).",
        "leave the decision out.",
    )


def export_error(model: nn.Module, error: Exception, replay: Callable[[], Any]) -> ModelError:
    """Explain why a module cannot be exported; `replay` exports once more, for an error that does not say where."""
    place = safely(place_of_node, error) or safely(place_in_traceback, model, error)
    if place is None and "Constraints violated" in str(error):
        place = safely(place_of_specialisation, model, replay)
    return ModelError(report("The network cannot be exported to ONNX", error, place))


def running_error(model: nn.Module, error: Exception, headline: str) -> ModelError:
    """Explain why a module cannot be executed."""
    return ModelError(report(headline, error, safely(place_in_traceback, model, error)))


def obstacle(headline: str, place: Place | None, reason: str, advice: str) -> ModelError:
    """Explain what was found without an error of torch."""
    where = f"{headline}: {place}" if place else f"{headline}."
    return ModelError(f"{where}\nCause: {reason}\nWay round: {advice}")


def output_error(output: Any) -> ModelError:
    """Explain that a network returns, for one image, no floating-point tensor with one row for it."""
    words = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    if isinstance(output, dict) and output:
        words += f" with {', '.join(map(str, list(output)[:6]))}"
    advice = "return the tensors themselves, alone or in a tuple, a dict or a dataclass"
    if isinstance(output, Tensor) and not output.is_floating_point():
        words += f" of {str(output.dtype).removeprefix('torch.')}"
        advice = "return the logits, and take argmax or topk of what the engine returns"
    elif isinstance(output, Tensor) and output.ndim <= 1:
        advice = "keep the axis of the batch: x.flatten(1) for x.squeeze(), which drops it where there is one image"
    elif isinstance(output, dict | list | tuple) and any(isinstance(one, Tensor) for one in tree_leaves(output)):
        advice = "return numbers before they are rounded to classes, and keep the axis of the batch"
    msg = f"The network returns {words}; expected floating-point tensors with one row for each image, such as (N, K)."
    return ModelError(f"{msg}\nWay round: {advice}.")


def report(headline: str, error: BaseException, place: Place | None) -> str:
    """The message: the place, the cause, the framework's first line, the way round."""
    try:
        return _report(headline, error, place)
    except Exception as failure:  # an error that cannot even be put into words
        log.debug("The report failed: %r", failure)
        return f"{headline}.\nTorch says: {type(error).__name__}"


def _report(headline: str, error: BaseException, place: Place | None) -> str:
    words = [f"{type(link).__name__}: {str(link).strip()}" for link in chain_of(error)]
    text = "\n".join(words)
    cause = find_cause(text)
    root = words[-1] if "See the stack trace" in words[0] or "Failed to convert" in words[0] else words[0]
    lines = [f"{headline}: {place}" if place else f"{headline}."]
    if cause:
        lines.append(f"Cause: {cause.reason.format(operator=operator_in(text))}")
    lines += [f"Torch says: {_first_line(root)}", f"Way round: {cause.advice if cause else _GENERAL}"]
    return "\n".join(lines)


def _first_line(words: str) -> str:
    kind, _, rest = words.partition(": ")
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("Expected a value of type")] or lines  # of many signatures
    if len(lines) > 1 and re.search(r"\) -> .*:$", lines[0]):  # the signature that a call did not fit
        lines = lines[1:]
    return f"{kind}: {lines[0].removesuffix(':').strip() if lines else 'no message'}"

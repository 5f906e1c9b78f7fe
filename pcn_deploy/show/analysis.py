"""The picture of an analysis: which layers cost most, and where in the network they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcn_deploy.errors import DependencyError, OutputError

if TYPE_CHECKING:
    from pcn_deploy.calibration.search.analysis import Analysis

SHOWN = 25
"""Layers in the ranking; a picture of all of them could not be read."""
_NAMED = 40
"""Layers whose names fit along an axis."""
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
"""From the palette of Okabe and Ito, which people with any colour vision can tell apart."""


def check_picture(path: Path) -> None:
    """Refuse early what `draw` could not do after a long analysis.

    Raises:
        DependencyError: If matplotlib is missing.
        OutputError: If it does not know the ending of the file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DependencyError.for_extra(error.name or "matplotlib", "plot", "drawing the analysis") from error
    known = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        msg = f"{path}: a picture ends in .png, .svg or .pdf."
        raise OutputError(msg)


def draw(analysis: Analysis, path: Path, title: str) -> None:
    """Draw the ranking beside the course through the network.

    Args:
        analysis: What was found.
        path: A file whose ending matplotlib knows, such as `.png` or `.svg`.
        title: Heading.

    Raises:
        DependencyError: If matplotlib is missing.
        OutputError: If the file cannot be written.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(SHOWN, len(analysis.sensitivity.layers))
    figure = Figure(figsize=(13, max(4.5, 1.8 + 0.28 * shown)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _ranking(left, analysis, shown)
    _course(right, analysis)
    figure.legend(loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        msg = f"The picture cannot be written to {path}: {error}."
        raise OutputError(msg) from error


def _ranking(axes: Any, analysis: Analysis, shown: int) -> None:
    layers = analysis.sensitivity.layers[:shown]
    rows = range(shown)
    axes.barh(rows, [one.only_quantized.sqnr_db for one in layers], color=_BLUE, height=0.7, label="whole layer")
    axes.plot([one.input_only.sqnr_db for one in layers], rows, "o", color=_ORANGE, label="its input only")
    weights = [(one.weight_only.sqnr_db, row) for row, one in zip(rows, layers, strict=True) if one.weight_only]
    axes.plot([x for x, _ in weights], [y for _, y in weights], "D", color=_GREEN, label="its weights only")
    axes.axvline(analysis.sensitivity.all_quantized.sqnr_db, color=_GREY, linestyle="--", label="all layers")
    axes.set_yticks(rows, [one.op for one in layers], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the logits with only that in INT8, dB (less is worse)")
    axes.set_title(f"The {shown} layers that cost most, of {len(analysis.sensitivity.layers)}", fontsize=10)


def _course(axes: Any, analysis: Analysis) -> None:
    by_name = {one.op: one for one in analysis.sensitivity.layers}
    every = analysis.sensitivity.all_quantized.sqnr_db
    gains = [by_name[name].only_kept.sqnr_db - every for name in analysis.order]
    axes.bar(range(len(gains)), gains, color=_BLUE, width=0.9)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    if len(gains) <= _NAMED:
        axes.set_xticks(range(len(gains)), analysis.order, rotation=90, fontsize=8)
    axes.set_xlabel("layer, in the order of the network")
    axes.set_ylabel("gain of SQNR if only it is left out, dB")
    axes.set_title("What giving up one layer brings back", fontsize=10)

"""What a person sees: progress bars and notes on stderr, tables, sentences and JSON on stdout."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress

from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.cli.steps import Bars, Lines, columns, ticking
from pcn_deploy.cli.tables import print_table as print_table
from pcn_deploy.cli.text import for_stderr, for_stdout
from pcn_deploy.cli.verdict import counted as counted
from pcn_deploy.cli.verdict import explain_sqnr
from pcn_deploy.data.classes import first_of
from pcn_deploy.progress import Progress as ProgressCallable
from pcn_deploy.progress import silent

if TYPE_CHECKING:
    from pcn_deploy.calibration.search.search import SearchResult
    from pcn_deploy.proof.budget import BudgetProof
    from pcn_deploy.tasks.role import Column
    from pcn_deploy.verbs.steps.advice import Attempt
from pcn_deploy.tasks.report import ParityReport
from pcn_deploy.tasks.roles import get_role


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[ProgressCallable]:
    """Show the steps of the body on stderr.

    Args:
        quiet: Show nothing.
    """
    if quiet:
        yield silent
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        with ticking(Lines(time.monotonic)) as lines:
            yield lines
        return
    with Progress(*columns(), console=console) as progress:
        yield Bars(progress)


@contextmanager
def user_code() -> Iterator[None]:
    """Within the body what a network's own code prints goes to stderr: stdout is for our result."""
    with redirect_stdout(sys.stderr):
        try:
            kept = os.dup(1)
        except OSError:  # no stdout at all
            yield
            return
        try:
            os.dup2(2, 1)  # for what is printed below Python
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def note(text: str, *, quiet: bool) -> None:
    """Tell something on stderr that is not an error."""
    if not quiet:
        click.echo(for_stderr(f"Note: {text}"), err=True)


def tell(text: str) -> None:
    """Print sentences on stdout, as wide as the screen."""
    click.echo(for_stdout(text))


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def size(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**18 else f"{count / 2**10:.1f} KiB"


def print_parity(title: str, reports: Sequence[ParityReport], precision: str) -> None:
    """Print one row per parity report, one for each further comparison that it holds, and what the dB mean."""
    columns = [*_PARITY_COLUMNS, *(column.title for column in _columns(reports))]
    print_table(title, columns, parity_rows(reports))
    if meaning := explain_sqnr(precision, reports):
        tell(meaning)


def print_plan(layers: Sequence[Sequence[str]], *, explain: bool) -> None:
    """Print how many layers have which precision, and why; `explain` prints each of them first.

    Args:
        layers: Name, kind, precision and reason of each.
        explain: Print every layer too.
    """
    if explain:
        print_table("Precision per layer", ["layer", "kind", "precision", "reason"], [list(layer) for layer in layers])
    alike: dict[tuple[str, str, str], list[str]] = {}
    for _, kind, precision, reason in layers:
        alike.setdefault((precision, kind, _NUMBER.sub("", reason)), []).append(reason)
    rows = [
        [str(len(reasons)), kind, precision, reasons[0] + (" (figures of the first)" if len(set(reasons)) > 1 else "")]
        for (precision, kind, _), reasons in sorted(alike.items(), key=lambda each: -len(each[1]))
    ]
    title = "Precision" if explain else "Precision (every layer: --explain)"
    print_table(title, ["layers", "kind", "precision", "reason"], rows)


_NUMBER = re.compile(r"\d[\d.e+%-]*")
"""Figures in a reason, that differ from layer to layer where the reason is the same."""


def parity_rows(reports: Sequence[ParityReport]) -> list[list[str]]:
    """The rows of `print_parity`."""
    columns = _columns(reports)
    return [row for report in reports for row in _parity_rows(report, columns)]


def _columns(reports: Sequence[ParityReport]) -> tuple[Column, ...]:
    """What the role of the first output shows beside what all roles have."""
    return get_role(reports[0].role).columns if reports else ()


def _parity_rows(report: ParityReport, columns: tuple[Column, ...]) -> list[list[str]]:
    metrics, target, parts = report.metrics, report.target, report.parts
    executed = "" if report.executed_by == target else f" (run by {report.executed_by})"
    own = _parity_row(target + executed, report.images, metrics, passed=report.passed)
    own[1] += " (constant)" if report.constant else ""
    rows = [own + [column.text(metrics) for column in columns]]
    for name, seen in report.executions.items():
        shown = [column.text(seen) for column in columns]
        rows.append(_parity_row(f"  {name}", report.images, seen, passed=parts[name]) + shown)
    further: list[tuple[str, str, int | str]] = [("edge", "edge images", "-")] if "edge_sqnr_db" in metrics else []
    further += [(name, name.replace("_", " "), report.images) for name in list(report.outputs)[1:]]
    for name, words, images in further:
        part = {key.removeprefix(f"{name}_"): value for key, value in metrics.items() if key.startswith(f"{name}_")}
        if part:
            rows.append(_parity_row(f"  {words}", images, part, passed=parts[name]) + ["-"] * len(columns))
    return rows


def _parity_row(name: str, images: int | str, metrics: dict[str, float], *, passed: bool) -> list[str]:
    """The columns of every role."""
    error = f"{metrics['max_abs_error']:.2g}" if "max_abs_error" in metrics else "-"
    figures = [f"{metrics['cosine_min']:.6f}", f"{metrics['sqnr_db']:.1f}", error]
    return [name, "passed" if passed else "FAILED", str(images), *figures]


_PARITY_COLUMNS = ["engine", "parity", "images", "worst cosine", "SQNR dB", "max abs error"]


def failures(reports: Iterable[ParityReport | BudgetProof]) -> str:
    """Which limits were broken, each told once: by whom, and with the figures of the first of them."""
    broken: dict[str, tuple[str, list[str]]] = {}
    for report in reports:
        executed = getattr(report, "executions", ())  # of a proof of parity only
        for failure in report.failures:
            name = next((name for name in executed if failure.startswith(f"{name}: ")), report.target)
            sentence = failure.removeprefix(f"{name}: ")
            _, names = broken.setdefault(_FIGURES.sub("", sentence), (sentence, []))
            names += [] if name in names else [name]
    return "; ".join(f"{', '.join(names)}: {sentence}" for sentence, names in broken.values())


_FIGURES = re.compile(r"-?\d[\d.]*(?= dB| of )| of the worst image, .+?,(?= is below)")
"""In a failure, what differs from one execution to another that breaks the same limit."""


PROOF_COLUMNS = ["target", "images", "lost", "gained", "drop", "95 % bound", "budget", "verdict"]


_VERDICTS = {"proven": "proven", "broken": "BROKEN", "open": "open"}


def proof_row(proof: BudgetProof) -> list[str]:
    """One row per proof of the budget; see `PROOF_COLUMNS`."""
    counts = proof.counts
    return [
        proof.target + ("" if proof.executed_by == proof.target else f" (run by {proof.executed_by})"),
        str(counts.images),
        str(counts.lost),
        str(counts.gained),
        f"{counts.drop:.2f}",
        f"{counts.drop_bound:.2f}",
        f"{proof.budget:.2f}",
        "NOT PROVEN" if proof.verdict == "open" and proof.asked else _VERDICTS[proof.verdict],
    ]


def basis(manifest: Manifest, proofs: Sequence[BudgetProof]) -> list[str]:
    """What the verdict of a build rests on."""
    judged = manifest.judged
    golden = counted(judged.golden_images, "image")
    seen = "They calibrated the engine too" if judged.golden_calibrated else "They did not calibrate the engine"
    lines = [f"Golden set: {golden}, from {manifest.golden}. {seen}. {judged.edge_images} edge images beside them."]
    if not proofs:
        return [*lines, f"The accuracy was not judged: {judged.accuracy}"]
    proof, counts = proofs[0], proofs[0].counts
    trained = f"labels of {proof.data}, of which the trained network gets {proof.top1:.2f} %"
    right = trained if proof.labelled else f"answers of the trained network to {proof.data} (there are no labels)"
    images = "none of these images chose the plan" if proof.held_out else "these images chose the plan too"
    lines.append(f"Accuracy: judged on {counted(counts.images, 'image')} by the {right}; {images}.")
    lines.append("One-sided 95 % bound: inverted McNemar test (Tango 1998).")
    if any(one.verdict == "open" for one in proofs):
        needed = max(one.images_needed or 0 for one in proofs)
        more = f"{needed} images like these would prove it" if needed else "more images like these would not prove it"
        lines.append(f"Open: so few images neither prove nor break a drop within {proof.budget:.2f} points; {more}.")
    return lines


def recovery_summary(recovery: dict[str, int]) -> str:
    """What each recovery changed."""
    changed = ", ".join(f"{name} ({counted(count, 'layer')})" for name, count in recovery.items())
    return f"Recovery: {changed}."


SHOWN = 5
"""Names that a sentence holds; `--explain` shows all."""


def search_summary(search: SearchResult, quantized: int) -> str:
    """What a search found."""
    left = search.unquantized
    names = f": {first_of(left)} (all: --explain)" if len(left) > SHOWN else f": {', '.join(left)}" if left else ""
    return (
        f"Search: {counted(len(left), 'layer')} left unquantised{names}; {quantized} quantised. "
        f"{counted(search.evaluations, 'plan')} judged, simulated drop {search.counts.drop:.2f} points."
    )


def tried(advice: Sequence[Attempt], *, explain: bool) -> str:
    """What was tried, best first; of many layers the first are named unless `explain` asks for all."""
    shown = []
    for attempt in advice:
        layers = str(attempt).split(_NEXT_LAYER)
        if len(layers) > SHOWN and not explain:
            result = str(attempt).removeprefix(attempt.words)
            more = f" and {len(layers) - SHOWN} more layers (all: --explain){result}"
            layers = [*layers[: SHOWN - 1], layers[SHOWN - 1] + more]
        shown.append(_NEXT_LAYER.join(layers))
    return "; ".join(shown)


_NEXT_LAYER = ", [layers."

"""`pcn-compile verify`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from pcn_deploy.artefact.engine import Engine
from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.artefact.provenance import check_readable, make_again
from pcn_deploy.cli import display, options, verdict
from pcn_deploy.cli.main import set_verbosity
from pcn_deploy.data.classes import Classes
from pcn_deploy.data.images import ImageSource, check_place
from pcn_deploy.data.processes import join
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import ParityError
from pcn_deploy.output_file import check_output, write_text
from pcn_deploy.proof.executions import ROUNDED
from pcn_deploy.tasks.changed import ChangedAnswer, confusions, to_csv
from pcn_deploy.tasks.limits import budget_for
from pcn_deploy.tasks.report import ParityReport
from pcn_deploy.tasks.roles import get_role
from pcn_deploy.verbs.load import load_to_verify
from pcn_deploy.verbs.verify import verify


@click.command("verify")
@options.bundle_argument
@options.target_option
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE.npz",
    help="Compare on these images (sub-folders are classes) with the eager network; needs torch and the weights.",
)
@options.classes_option
@options.weights_option
@click.option(
    "--images", type=click.IntRange(min=1), metavar="N", help="Use at most N images, spread over all of them."
)
@options.changed_option
@options.overwrite_option
@options.max_drop_option
@options.json_option
@options.verbosity_options
def command(
    file: Path,
    target: str | None,
    data: Path | None,
    classes: Path | None,
    weights: Path | None,
    images: int | None,
    changed: Path | None,
    overwrite: bool,
    max_drop: float | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Check that an engine of FILE.pcn equals the trained network.

    Without --data the golden set in the bundle is used, which needs neither torch nor the weights. With --data the
    eager network is made again from the weights the bundle was built from, wherever they are now (--weights).
    """
    set_verbosity(verbose, quiet)
    if data is None and (weights or classes or images or changed):
        message = (
            "--weights, --changed, --classes and --images go with --data; else the golden set of the bundle is used."
        )
        raise click.UsageError(message)
    if changed is not None:
        check_output(changed, overwrite=overwrite, option="--changed")
    if data is not None:
        check_place(data)
    if weights is not None:
        check_readable(weights)
    answers: list[ChangedAnswer] = []
    with join() as processes:
        silent = quiet or as_json or not processes.first
        report, manifest = _verify(file, target, data, classes, weights, images, max_drop, answers, quiet=silent)
        if processes.first and changed is not None:
            write_text(changed, to_csv(answers, manifest.class_names), option="--changed")
        if processes.first and as_json:
            display.print_json({**report.to_json(), "changed": confusions(answers, manifest.class_names)})
        elif processes.first:
            _show(report, manifest, given=data is not None)
            if changed is not None:
                display.tell(f"Wrote {changed}: {display.counted(len(answers), 'image')} with another answer.")
        if not report:
            message = f"Parity failed: {'; '.join(report.failures)}."
            raise ParityError(message)


def _verify(
    file: Path,
    target: str | None,
    data: Path | None,
    classes: Path | None,
    weights: Path | None,
    images: int | None,
    max_drop: float | None,
    changed: list[ChangedAnswer],
    *,
    quiet: bool,
) -> tuple[ParityReport, Manifest]:
    """The report, and what the bundle says of itself; images with another answer are put into `changed`."""
    named = None if classes is None else Classes.of(classes)
    with (
        display.user_code(),
        load_to_verify(file, target, judging=data is not None) as engine,
        display.progress_bars(quiet=quiet) as progress,
    ):
        engine.bundle.check_members()
        manifest = engine.bundle.manifest
        budget = manifest.parity_budget
        if max_drop is not None:
            budget = replace(budget, top1_drop=budget_for(manifest.precision, max_drop).top1_drop)
        source = data and _open_images(data, engine, images, named)
        reference = make_again(manifest, weights) if data is not None else None
        early = source.notes if source else ()
        if engine.executed_by != engine.target:
            why = get_backend(engine.target).availability().detail
            how = ", every tensor rounded to its type" if engine.executed_by == ROUNDED else ""
            early = (f"{why}. ONNX Runtime runs the graph that the {engine.target} engine was built from{how}.", *early)
        for text in early:
            display.note(text, quiet=quiet)
        to_prove = max_drop is not None
        report = verify(
            engine,
            source,
            reference=reference,
            budget=budget,
            to_prove=to_prove,
            changed=changed,
            progress=progress,
        )
    for text in report.notes:
        if text not in early:
            display.note(text, quiet=quiet)
    return report, manifest


def _open_images(data: Path, engine: Engine, limit: int | None, classes: Classes | None) -> ImageSource:
    """The images, whose labels can be classes of the engine."""
    source = ImageSource(data, engine.transform, limit=limit, classes=classes)
    first = engine.spec.outputs[0]
    if source.has_labels and get_role(first.role).labelled:
        source.check_classes(int(first.shape[-1]), engine.class_names)
    return source


def _show(report: ParityReport, manifest: Manifest, *, given: bool) -> None:
    display.tell(verdict.of_verify(manifest, report, given=given))
    display.print_parity(f"Parity with the eager network on {report.data}", [report], manifest.precision)
    if report.unreadable:
        display.tell(f"{display.counted(report.unreadable, 'image')} could not be read, left out.")
    for sentence in get_role(report.role).sentences(report.metrics, report.task, report.budget):
        display.tell(sentence)

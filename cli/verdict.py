"""The verdict in a sentence: what it means, and on what it rests. What a dB is, from the limits of parity."""

from __future__ import annotations

from collections.abc import Sequence

from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.proof.budget import BudgetProof
from pcn_deploy.tasks.bound import DROPS
from pcn_deploy.tasks.limits import BUDGETS
from pcn_deploy.tasks.metrics import SQNR_CEILING_DB
from pcn_deploy.tasks.report import ParityReport


def counted(count: int, thing: str) -> str:
    """A number of things in words: 1 image, 2 images."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def of_build(manifest: Manifest, reports: Sequence[ParityReport], proofs: Sequence[BudgetProof], failed: str) -> str:
    """The verdict on a build.

    Args:
        manifest: Of its bundle.
        reports: Of parity, one per engine.
        proofs: Of the drop, one per engine, or none.
        failed: Why it failed; empty if it passed.
    """
    judged = manifest.judged
    accuracy = _of_proofs(proofs) if proofs else f"the accuracy was not judged ({_first_sentence(judged.accuracy)})"
    unproven = all(reports) and all(proof.verdict != "broken" for proof in proofs)
    return _sentence(
        manifest.precision, reports, judged.golden_images, judged.edge_images, accuracy, failed, unproven=unproven
    )


def of_verify(manifest: Manifest, report: ParityReport, *, given: bool) -> str:
    """The verdict on an engine of a bundle, on its golden set or on images that were `given`."""
    judged, metrics = manifest.judged, report.metrics
    if report.task:
        accuracy = _drop(
            metrics["top1_drop"], metrics["top1_drop_bound"], report.budget.top1_drop, report.task, report.images
        )
    else:
        why = "the images have no labels" if given else "the golden set has no labels: --data DIR takes images that do"
        accuracy = f"the accuracy was not judged ({why})"
    edges = 0 if given else judged.edge_images
    unproven = report.task == "open" and all(text.startswith(DROPS) for text in report.failures)
    failed = "; ".join(report.failures)
    return _sentence(manifest.precision, [report], report.images, edges, accuracy, failed, unproven=unproven)


def _sentence(
    precision: str,
    reports: Sequence[ParityReport],
    images: int,
    edges: int,
    accuracy: str,
    failed: str,
    *,
    unproven: bool,
) -> str:
    """The verdict; `unproven` where nothing failed but the proof of a drop that was asked for."""
    targets = " and ".join(report.target for report in reports)
    several = len(reports) > 1
    engines = f"the {precision.upper()} engine{'s' if several else ''} for {targets}"
    if failed and unproven:
        keep, breaks = ("keep", "break") if several else ("keeps", "breaks")
        return (
            f"Not proven: {failed}. These images do not show whether {engines} {keep} the largest drop or {breaks} it."
        )
    if failed:
        do = "do" if several else "does"
        return f"Failed: {failed}. So {engines} {do} not answer as the trained network does."
    elsewhere = sorted({report.target for report in reports if report.executed_by != report.target})
    graphs = f". For {' and '.join(elsewhere)} the graph of the engine was run, not the engine" if elsewhere else ""
    if any(report.constant for report in reports):
        return f"Passed, but the network answers the same to every image: nothing else was judged of {engines}{graphs}."
    answer = "answer" if several else "answers"
    seen = _seen([report.metrics for report in reports], images, edges)
    return f"Passed: {engines} {answer} as the trained network does: {seen}; {accuracy}{graphs}."


def _seen(metrics: Sequence[dict[str, float]], images: int, edges: int) -> str:
    """The SQNR of the engine that has the least, on real images and on edge images."""
    worst = min(each["sqnr_db"] for each in metrics)
    words = f"SQNR {worst:.1f} dB on {counted(images, 'image')}"
    if edges and all("edge_sqnr_db" in each for each in metrics):
        words += f" and {min(each['edge_sqnr_db'] for each in metrics):.1f} dB on {counted(edges, 'edge image')}"
    return words


def _of_proofs(proofs: Sequence[BudgetProof]) -> str:
    """What the engine tells that may drop most."""
    worst = max(proofs, key=lambda proof: proof.counts.drop_bound)
    counts = worst.counts
    return _drop(counts.drop, counts.drop_bound, worst.budget, worst.verdict, counts.images, labelled=worst.labelled)


def _drop(drop: float, bound: float, budget: float, task: str, images: int, *, labelled: bool = True) -> str:
    on = f"on {images} {'labelled images' if labelled else 'images, by the answers of the trained network'}"
    if task == "proven":
        return f"accuracy drop at most {bound:.2f} points with 95 % confidence {on}"
    return (
        f"accuracy drop {drop:.2f} points {on}, which are too few to tell whether it is within {budget:.2f} "
        f"(at most {bound:.2f} with 95 % confidence)"
    )


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".") or "no labelled images were at hand"


def explain_sqnr(precision: str, reports: Sequence[ParityReport]) -> str:
    """What the SQNR of the worst engine means, and what this precision and the next stricter one must keep."""
    if not reports or any(report.constant for report in reports):
        return ""
    worst, least = min(report.metrics["sqnr_db"] for report in reports), reports[0].budget.sqnr_db
    if worst >= SQNR_CEILING_DB:
        means = f"SQNR {worst:.0f} dB stands for answers that are equal to the last bit."
    else:
        means = f"SQNR {worst:.1f} dB: the error is {error_share(worst)} of the answer (root mean square)."
    stricter = sorted((budget.sqnr_db, name) for name, budget in BUDGETS.items() if budget.sqnr_db > least)
    others = ", ".join(f"{name.upper()} {limit:g} dB ({error_share(limit)})" for limit, name in stricter)
    limit = f"{precision.upper()} must keep {least:g} dB ({error_share(least)})"
    return f"{means} {limit}{f'; for comparison, {others}' if others else ''}. More is better."


def error_share(decibels: float) -> str:
    """How large the error is beside the answer, in percent, for an SQNR in dB."""
    share = 100 * 10 ** (-decibels / 20)
    return "less than 0.01 %" if share < 0.01 else f"{share:.2g} %" if share < 100 else f"{share:.0f} %"

"""`pcn-compile bench`."""

from __future__ import annotations

from pathlib import Path

import click

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.engine import Engine
from pcn_deploy.cli import display, options
from pcn_deploy.cli.main import set_verbosity
from pcn_deploy.engines.registry import TARGETS, get_backend
from pcn_deploy.errors import DependencyError, ParityError
from pcn_deploy.verbs.bench import Latency, bench, stand_in


@click.command("bench")
@options.bundle_argument
@click.option("--target", type=click.Choice(TARGETS), help="Measure this engine only. [default: all that run here]")
@click.option(
    "--batch", type=click.IntRange(min=1), metavar="N", help="Images per run. [default: OPT of the bundle's range]"
)
@click.option(
    "--seconds", type=float, default=3.0, show_default=True, metavar="S", help="Time each engine for so long."
)
@options.json_option
@options.verbosity_options
def command(
    file: Path, target: str | None, batch: int | None, seconds: float, as_json: bool, verbose: int, quiet: bool
) -> None:
    """Measure the engines of FILE.pcn that run here: latency host to host, copies included, and throughput."""
    set_verbosity(verbose, quiet)
    bundle = Bundle.open(file)
    targets = [target] if target else [entry.target for entry in bundle.engines]
    latencies: dict[str, Latency] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, ParityError] = {}
    with display.progress_bars(quiet=quiet or as_json) as progress:
        for name in targets:
            state = get_backend(name).availability()
            reason = stand_in(bundle, name) if state.can_run else state.detail
            if reason and not target:
                skipped[name] = reason.rstrip(".")
                continue
            try:
                with Engine.open(bundle, name) as engine:
                    size = batch or engine.spec.batch.opt
                    latencies[name] = bench(engine, batch=size, seconds=seconds, progress=progress)
            except ParityError as error:
                failed[name] = error
    if not latencies and not failed:
        details = "; ".join(f"{name}: {detail}" for name, detail in skipped.items())
        message = f"None of the engines in {file} can run here: {details}"
        raise DependencyError(message)
    if as_json:
        skipped |= {name: str(error) for name, error in failed.items()}
        display.print_json({**{name: latency.to_json() for name, latency in latencies.items()}, "skipped": skipped})
    else:
        _show(latencies, skipped)
    if failed:
        raise ParityError("\n".join(map(str, failed.values())))


def _show(latencies: dict[str, Latency], skipped: dict[str, str]) -> None:
    rows = [
        [
            name,
            str(x.batch),
            str(x.runs),
            f"{x.p50:.2f}",
            f"{x.p90:.2f}",
            f"{x.p99:.2f}",
            f"{x.throughput_ips:.1f}",
        ]
        for name, x in latencies.items()
    ]
    if rows:
        display.print_table("Latency", ["target", "batch", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s"], rows)
    for name, detail in skipped.items():
        display.tell(f"{name} was not measured: {detail}.")

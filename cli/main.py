"""Entry point of `pcn-compile`: the group, lazy loading of commands, errors turned into exit codes."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import sys
from importlib import import_module
from typing import Any

import click

from pcn_deploy import __version__
from pcn_deploy.cli.text import for_stderr
from pcn_deploy.data.processes import is_first
from pcn_deploy.errors import (
    BuildError,
    BundleError,
    DependencyError,
    IncompatibleError,
    OptionError,
    ParityError,
    PcnDeployError,
    ProcessError,
)
from pcn_deploy.memory import own_process

own_process()
# At its end Python looks through all objects for cycles, several times: of torch and its exporter that takes a second.
atexit.register(gc.freeze)

COMMANDS = {
    "models": "List architectures: parameters, GMACs, checkpoints they load.",
    "build": "Compile a checkpoint into a bundle of engines with parity reports.",
    "analyze": "Measure what each layer costs when it becomes INT8.",
    "engine": "Add an engine for this device to a bundle; needs no torch.",
    "verify": "Check again that an engine equals the trained network.",
    "slim": "Leave out of a bundle what the devices it ships to do not need.",
    "inspect": "Show what is inside a bundle: precision per layer, provenance.",
    "bench": "Measure latency and throughput of the engines in a bundle.",
    "extract": "Write an engine as a plain file, with what its user must know as JSON.",
    "run": "Classify images with an engine of a bundle.",
    "doctor": "Show what this machine can build and run, and what is missing.",
}
"""Every command with the line that the group's help shows; kept here so that help imports none of them."""

EXIT_CODES: dict[type[PcnDeployError], int] = {
    OptionError: 2,
    ParityError: 3,
    IncompatibleError: 4,
    BundleError: 5,
    BuildError: 6,
    DependencyError: 7,
}


class LazyGroup(click.Group):
    """Imports a command when it is called, and turns our errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"pcn_deploy.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the closest command for an unknown one."""
        import difflib

        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and close and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and report errors of ours on stderr."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            shown = io.StringIO()
            error.show(shown)
            click.echo(for_stderr(shown.getvalue()), nl=False, err=True)
            ctx.exit(error.exit_code)
        except PcnDeployError as error:
            if is_first() or isinstance(error, ProcessError):
                click.echo(for_stderr(f"Error: {error}"), err=True)
            ctx.exit(next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", prog_name="pcn-compile")
def main() -> None:
    """Compile attention-augmented convolutional networks into TensorRT engines, with the proof of parity inside.

    \b
    Exit codes: 0 done, 1 error, 2 usage, 3 parity failed,
    4 engine does not fit this device, 5 bundle corrupt or not trusted,
    6 engine build failed, 7 dependency missing.
    """  # noqa: D301 - click reads the backspace character


def set_verbosity(verbose: int, quiet: bool) -> None:
    """Send log records of this package to stderr at the level asked for."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("pcn_deploy").setLevel(level)


if __name__ == "__main__":
    main()

"""Every error this library raises on purpose.

The tree is shallow, so that a caller can catch by cause::

    PcnDeployError
    ├── ModelError            unknown model, or one that cannot be exported
    ├── CheckpointError       a weights file that is missing, corrupt, unsafe or of another network
    ├── DataError             images or arrays that cannot be used
    ├── OptionError           options that contradict each other or the network
    ├── OutputError           the output exists, or cannot be written
    ├── ParityError           an engine that disagrees with the eager model by more than the budget
    ├── IncompatibleError     an engine that does not fit this device or this library version
    ├── BundleError           a bundle that is corrupt, altered, of a newer schema or not trusted
    ├── BuildError            the backend refused or failed to build an engine
    ├── ExecutionError        an engine that fails while it runs
    ├── StockSessionError     a graph that ONNX Runtime with default options refuses, or crashes on
    ├── ProcessError          another process of the same run that died or cannot be reached
    └── DependencyError       a package or library that is missing; the message says how to install it

A message says what was found, what was expected, and what to do next. Anything that is not a
`PcnDeployError` is a bug of ours.
"""

from pcn_deploy.remedies import install


class PcnDeployError(Exception):
    """Root of all errors raised on purpose."""


class ModelError(PcnDeployError):
    """The model is unknown, or cannot be exported."""


class CheckpointError(PcnDeployError):
    """The weights file is missing, corrupt, unsafe, or belongs to another network."""


class DataError(PcnDeployError):
    """Images or arrays are missing, unreadable, misshapen or not finite."""


class OptionError(PcnDeployError):
    """Options contradict each other, or the network cannot take them."""


class OutputError(PcnDeployError):
    """The output file exists, or cannot be written."""


class ParityError(PcnDeployError):
    """An engine disagrees with the eager model by more than the budget allows."""


class IncompatibleError(PcnDeployError):
    """An engine does not fit this device or this version of its library."""


class BundleError(PcnDeployError):
    """A bundle is corrupt, altered, of a newer schema, or not trusted."""


class BuildError(PcnDeployError):
    """A backend refused the graph or failed to build an engine from it."""


class ExecutionError(PcnDeployError):
    """An engine failed while it ran on inputs that fit it."""


class StockSessionError(PcnDeployError):
    """ONNX Runtime with default options, in a process of its own, refused a graph or crashed on it."""


class ProcessError(PcnDeployError):
    """Another process of the same run died, disagrees or cannot be reached."""


class DependencyError(PcnDeployError):
    """A package or a shared library is missing."""

    @classmethod
    def for_extra(cls, package: str, extra: str, purpose: str, only: tuple[str, ...] = ()) -> "DependencyError":
        """Name the missing package and the line that installs it on this machine, by the rule of `remedies.py`.

        Args:
            package: The import that failed, such as `torch`.
            extra: The extra of this distribution that installs it, such as `compile`.
            purpose: What it is needed for, such as "building a bundle".
            only: Which libraries of the extra it needs; by default all.

        Returns:
            The error, ready to be raised.
        """
        return cls(f"{package} is not installed; {purpose} needs it. {install(extra, only=only)}")

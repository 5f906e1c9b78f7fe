"""What sets the two flavours of TensorRT apart; all other code is shared."""

from __future__ import annotations

from dataclasses import dataclass

from pcn_deploy.remedies import install

PORTABLE = ("SM80", "SM86", "SM89", "SM120")
"""Compute capabilities of Ampere, Ada and Blackwell: what TensorRT-RTX builds for unless told otherwise.

Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
"""

FIRST_FP8 = 89
"""Compute capability of the first GPUs with FP8, Ada, as a number. TensorRT-RTX 1.7 refuses the graph for SM86."""


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One flavour of TensorRT.

    Attributes:
        target: Name on the command line and in the bundle.
        title: Name as people write it.
        extra: Extra of this distribution that installs it.
        module: Python module of the bindings, which load the library behind them; both have the same interface.
        ahead_of_time: Whether it builds without a GPU, for a list of compute capabilities.
    """

    target: str
    title: str
    extra: str
    module: str
    ahead_of_time: bool = False

    @property
    def remedy(self) -> str:
        """How this flavour is installed here."""
        return install(self.extra)


TENSORRT = Flavour(target="tensorrt", title="TensorRT", extra="tensorrt", module="tensorrt")

TENSORRT_RTX = Flavour(
    target="tensorrt-rtx",
    title="TensorRT-RTX",
    extra="tensorrt-rtx",
    module="tensorrt_rtx",
    ahead_of_time=True,
)

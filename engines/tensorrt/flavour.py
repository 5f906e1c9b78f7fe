"""What sets the two flavours of TensorRT apart; all other code is shared."""

from __future__ import annotations

from dataclasses import dataclass

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
        modules: Python bindings, in the order they are tried; all have the same interface.
        library_package: Installed package whose folder also holds the shared libraries, or an empty string.
        library_prefixes: Beginnings of the file names of those libraries, in the order they are loaded.
        ahead_of_time: Whether it builds without a GPU, for a list of compute capabilities.
    """

    target: str
    title: str
    extra: str
    modules: tuple[str, ...]
    library_package: str = ""
    library_prefixes: tuple[str, ...] = ()
    ahead_of_time: bool = False

    @property
    def remedy(self) -> str:
        """The pip line that installs this flavour."""
        return f"Install it: pip install 'pcn-deploy[{self.extra}]'"


TENSORRT = Flavour(target="tensorrt", title="TensorRT", extra="tensorrt", modules=("tensorrt",))

TENSORRT_RTX = Flavour(
    target="tensorrt-rtx",
    title="TensorRT-RTX",
    extra="tensorrt-rtx",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    library_package="onnxruntime_ep_nv_tensorrt_rtx",
    library_prefixes=("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"),
    ahead_of_time=True,
)

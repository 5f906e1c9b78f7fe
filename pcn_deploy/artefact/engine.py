"""The runtime: open a bundle's engine and run it. numpy and the engine's own library, no torch."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pcn_deploy.aliases import Images
from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.manifest import Manifest
from pcn_deploy.calibration.plan.rules import in_fp32
from pcn_deploy.data.frames import Frames, preprocess
from pcn_deploy.data.transform import FAR
from pcn_deploy.engines.base import OPEN, Array, Backend, OpenOptions, Session
from pcn_deploy.engines.onnxruntime import open_plain, truncates_half
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.errors import DataError, OptionError, ParityError, PcnDeployError
from pcn_deploy.members import GRAPH
from pcn_deploy.specs import LOGITS
from pcn_deploy.tasks.classification import ClassScore, most_likely

SPACING = 8
"""Every so many-th row and column is looked at for that."""

log = logging.getLogger(__name__)


class Engine:
    """An opened engine of a bundle; use it as a context manager, or call `close`.

    Attributes:
        bundle: Where it comes from.
        target: Which engine of the bundle it is.
        executed_by: What executes it; another target only where `target` cannot run on this machine.
        spec: Its inputs, outputs and batch range.
        transform: The evaluation transform that its inputs went through.
        class_names: What the classes are called, in the order of the logits; empty if the bundle does not know.
    """

    def __init__(self, bundle: Bundle, target: str, executed_by: str, session: Session) -> None:
        self.bundle = bundle
        self.target = target
        self.executed_by = executed_by
        self.spec = session.spec
        self.transform = bundle.manifest.transform
        self.class_names = tuple(bundle.manifest.class_names)
        self._session = session
        self._limit: float | None = FAR * max(map(abs, bundle.manifest.input_range or self.transform.range))

    @classmethod
    def open(
        cls, bundle: Bundle, target: str, *, executed_by: str | None = None, options: OpenOptions = OPEN
    ) -> Engine:
        """Open one engine; its hash is checked before anything is deserialised.

        Args:
            bundle: A bundle that holds an engine for `target`.
            target: Which one.
            executed_by: Let this backend run the portable graph in its place.
            options: On which device, on whose stream.

        Raises:
            OptionError: If what executes it has no such device.
            BundleError: If there is no such engine, or its bytes are not what was packed.
            DependencyError: If its library is missing, or it needs a GPU that is not there.
            IncompatibleError: If it does not fit this device or library version.
        """
        entry = bundle.engine(target)
        backend = get_backend(executed_by or target)
        member = entry.member if backend.target == target else backend.member
        spec = bundle.manifest.interface
        backend.check_can_run()
        if backend.target == "cpu":
            _warn_of_cut_codes(bundle.manifest)
        return cls(bundle, target, backend.target, backend.open(bundle.read(member), spec, options))

    def __call__(self, images: Any) -> Any:
        """Run any number of images.

        Args:
            images: float32 `(N, C, H, W)`, transformed; a numpy array or a torch tensor.

        Returns:
            The first output, such as logits `(N, K)`, float32, of the same kind as `images`.

        Raises:
            DataError: If the images do not fit the engine.
        """
        if isinstance(images, np.ndarray):
            return self.predict(images)
        import torch

        return torch.from_numpy(self.predict(images.detach().cpu().numpy())).to(images.device)

    def preprocess(self, frames: Frames, *, color: str = "rgb") -> Images:
        """Transform frames as the images that calibrated and judged the engine were, to the bit.

        Args:
            frames: One frame or several: uint8 arrays `(H, W, 3)` or `(N, H, W, 3)` of any size, pictures of Pillow, or
                files; all kinds are in `data.frames.preprocess`.
            color: Order of the channels of arrays: `rgb`, or `bgr` as OpenCV has them.

        Returns:
            float32 `(N, C, H, W)`.

        Raises:
            OptionError: If the order of the channels is unknown.
            DataError: If there is no frame, or one is no image or not of 8 bits.
            DependencyError: If Pillow is missing.
        """
        return preprocess(frames, self.transform, color=color)

    def classify(self, frames: Frames, k: int = 5, *, color: str = "rgb") -> list[list[ClassScore]]:
        """The most likely classes of frames.

        Args:
            frames: As `preprocess` takes them.
            k: Number of classes for each; fewer where the network has fewer.
            color: As `preprocess` takes it.

        Returns:
            For each frame its classes, best first: `index`, `name` and `probability` of each.

        Raises:
            OptionError: If the engine has no logits, `k` is below 1, or the order of the channels is unknown.
            DataError: If there is no frame, or one is no image or not of 8 bits.
            ParityError: If the engine returns NaN or infinity.
        """
        logits = self.spec.output_of(LOGITS)
        if logits is None or k < 1:
            msg = f"At least one class must be asked for, not {k}." if logits else "The engine has no logits."
            raise OptionError(msg)
        images = self.preprocess(frames, color=color)
        outputs = self.outputs(images)
        for index in range(len(images)):
            rows = {name: values[index : index + 1] for name, values in outputs.items()}
            check_finite(rows, self, f"frame {index}", images[index : index + 1])
        return [most_likely(row, k, self.class_names) for row in outputs[logits.name]]

    def predict(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run any number of images, in as few batches as the engine allows.

        Args:
            images: float32 `(N, C, H, W)`, transformed.

        Returns:
            The first output, float32 `(N, ...)`, such as logits `(N, K)`.

        Raises:
            DataError: If the images do not fit the engine, or there are none.
        """
        return self.outputs(images)[self.spec.outputs[0].name]

    def outputs(self, images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
        """Run any number of images and return everything the engine gives.

        Args:
            images: float32 `(N, C, H, W)`, transformed.

        Returns:
            What `spec.outputs` lists, by name, float32 `(N, ...)`: of a classifier `logits` `(N, K)`, and where the
            bundle was built with it `attention_map` `(N, T, H', W')`, the weight of each position for each of T class
            tokens.

        Raises:
            DataError: If the images do not fit the engine, or there are none.
        """
        if images.ndim == 0 or len(images) == 0:
            msg = "No images were given."
            raise DataError(msg)
        self._warn_of_range(images)
        size, count = self.spec.batch.max, len(images)
        if count <= size:
            return self.run_batch(images)
        outputs = {tensor.name: np.empty(tensor.with_batch(count), tensor.dtype) for tensor in self.spec.outputs}
        for start in range(0, count, size):
            batch = slice(start, start + size)
            self.run_batch(images[batch], {name: values[batch] for name, values in outputs.items()})
        return outputs

    def _warn_of_range(self, images: Images) -> None:
        """Say so, once, where a look at some pixels shows that nobody normalised the images."""
        if self._limit is None or images.ndim != 4:
            return
        some = np.abs(images[..., ::SPACING, ::SPACING])
        if some.size and some.max() > self._limit:
            low, high = self.bundle.manifest.input_range or self.transform.range
            log.warning(
                "The images hold values of up to %.4g; those that judged this engine ran from %.3g to %.3g. Images of "
                "0 to 255 must be normalised first: engine.preprocess(frames) does it.",
                some.max(),
                low,
                high,
            )
            self._limit = None

    def run_batch(self, images: npt.NDArray[np.float32], out: dict[str, Array] | None = None) -> dict[str, Array]:
        """Run at most `spec.batch.max` images; a batch below the engine's minimum is filled up with copies.

        Args:
            images: float32 `(N, C, H, W)`, transformed.
            out: Arrays to write all outputs into, by name, `(N, ...)`.

        Returns:
            The outputs by name, `(N, ...)`.
        """
        name, missing = self.spec.inputs[0].name, self.spec.batch.min - len(images)
        if missing <= 0:
            return self._session.run({name: images}, out)
        filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        outputs = {key: values[: len(images)] for key, values in self._session.run({name: filled}).items()}
        for key, values in (out or {}).items():
            values[:] = outputs[key]
        return out or outputs

    def close(self) -> None:
        """Release the engine."""
        self._session.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _warn_of_cut_codes(manifest: Manifest) -> None:
    """Say so where ONNX Runtime cuts off the INT8 codes of a graph that was built with a version that rounds them."""
    if (manifest.precision, manifest.remainder) != ("int8", "fp16"):
        return
    import onnxruntime

    here, built_by = onnxruntime.__version__, manifest.provenance.get("built_by", {}).get("onnxruntime")
    if built_by != here and truncates_half():
        log.warning(
            "ONNX Runtime %s cuts INT8 codes off where they are made of FP16, and this bundle was built with %s: "
            "answers may have more error than was proven. pcn-compile verify says how much. Install onnxruntime>=1.30, "
            "or build with --remainder fp32.",
            here,
            built_by,
        )


def check_finite(
    outputs: dict[str, npt.NDArray[np.float32]],
    engine: Engine,
    image: str,
    images: npt.NDArray[np.float32] | None = None,
) -> None:
    """Refuse what an engine returned where it is no answer.

    Args:
        outputs: Of the engine, by name.
        engine: The engine.
        image: What it was asked about.
        images: The same as `(N, C, H, W)`, transformed, to find out whether FP32 has an answer.

    Raises:
        ParityError: If a value is NaN or infinite.
    """
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            target, manifest = engine.target, engine.bundle.manifest
            precision, option = manifest.precision, in_fp32(manifest.precision, manifest.remainder)
            advice = f"Check it: pcn-compile verify --target {target}. "
            answered = None if images is None or precision == "fp32" else _answers_in_fp32(engine, images)
            if precision == "fp32":
                advice += "It is FP32 already: if that passes, see whether the trained network answers this image."
            elif answered is False:
                advice = (
                    "Its graph has no answer in FP32 either, so no precision helps: it is the trained network that has "
                    "none. Do not ask it about such images, or mend it, as by a division that cannot be by zero."
                )
            else:
                advice += f"If that fails, build with {option or '--precision fp32'}."
                advice += " In FP32 the graph has an answer." if answered else ""
            msg = f"The {target} engine returns NaN or infinite {name} for {image}, which is no answer. {advice}"
            raise ParityError(msg)


def _answers_in_fp32(engine: Engine, images: npt.NDArray[np.float32]) -> bool | None:
    """Whether the graph of an engine is finite for images where nothing but its weights is rounded; None if unknown."""
    try:
        from pcn_deploy.engines.rounded import widen

        spec = engine.bundle.manifest.interface
        graph = widen(engine.bundle.read(GRAPH))
        with Engine(engine.bundle, engine.target, "cpu", open_plain(graph, spec)) as plain:
            outputs = plain.outputs(images)
    except (ImportError, PcnDeployError):  # without the libraries of a build
        return None
    return all(bool(np.isfinite(values).all()) for values in outputs.values())


def executor(backend: Backend) -> str:
    """Which backend runs an engine on this machine: its own, or `cpu` with the same graph where that cannot run."""
    return backend.target if backend.availability().can_run else "cpu"

"""Building a plan from a typed ONNX graph: one recipe for TensorRT 10.3, 10.13, 11 and TensorRT-RTX 1."""

from __future__ import annotations

import logging
import platform
import re
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from pcn_deploy.engines.base import EngineArtifact, GraphSource
from pcn_deploy.engines.tensorrt import cuda
from pcn_deploy.engines.tensorrt.flavour import FIRST_FP8, PORTABLE, Flavour
from pcn_deploy.engines.tensorrt.library import version
from pcn_deploy.engines.tensorrt.messages import Messages, interrupt_deferred, log_of
from pcn_deploy.engines.tensorrt.monitor import Meter, attach
from pcn_deploy.engines.tensorrt.wanted import check_precision, wanted_by
from pcn_deploy.errors import BuildError, OptionError
from pcn_deploy.progress import Progress
from pcn_deploy.specs import EngineSpec

_LOG = logging.getLogger(__name__)

_NEXT = (
    "If memory ran out, close other programs or build for a smaller batch. If an operator is refused, "
    "try a newer TensorRT, or give that part of the network precision fp32 in a recipe, if it has another."
)
_NO_OPERATOR = re.compile(r"operator: (\w+) \(checkFallbackPluginImporter\)")
"""How TensorRT's parser says that it knows no operator of this name."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings of a build.

    Attributes:
        compute_capabilities: What TensorRT-RTX builds for, such as `SM89`. TensorRT: the GPU at hand.
        tf32: Let FP32 convolutions and products round their inputs to TF32 (10 bits of mantissa). Off,
            because a tensor the graph types as FP32 is meant to be computed as FP32.
    """

    compute_capabilities: tuple[str, ...] = PORTABLE
    tf32: bool = False


def fp8_capable(flavour: Flavour, options: BuildOptions) -> tuple[str, ...]:
    """The compute capabilities to build an FP8 engine for; of the default ones, those that have it.

    Raises:
        OptionError: If one that was asked for has not.
    """
    asked = options.compute_capabilities if flavour.ahead_of_time else (cuda.current().capability,)
    able = tuple(name for name in asked if int(name.removeprefix("SM")) >= FIRST_FP8)
    if able != asked != PORTABLE:
        lacking = [name for name in asked if name not in able]
        msg = (
            f"{', '.join(lacking)} cannot compute in FP8; Ada (SM{FIRST_FP8}) and later GPUs can. "
            "Build with --precision int8 or fp16 for this device."
        )
        raise OptionError(msg)
    return able


def check_capabilities(trt: Any, flavour: Flavour, options: BuildOptions) -> None:
    """Check the GPUs that an engine is built ahead of time for.

    Raises:
        OptionError: If there are none, or the library does not know one.
    """
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    wrong = [name for name in options.compute_capabilities if name not in names]
    if wrong or not options.compute_capabilities:
        asked = ", ".join(wrong) or "none"
        msg = f"Compute capabilities asked for: {asked}. {flavour.title} knows: {', '.join(names)}."
        raise OptionError(msg)


def build(trt: Any, flavour: Flavour, source: GraphSource, options: BuildOptions, progress: Progress) -> EngineArtifact:
    """Build an engine.

    The bindings release the GIL while they build (seen with TensorRT-RTX 1.7.1: another thread runs on at
    full pace), so a display that refreshes in a thread of its own stays alive.

    Args:
        trt: The loaded bindings.
        flavour: Which flavour they are of.
        source: The graph and its interface.
        options: Settings.
        progress: Told about the build, as `TensorRT build` or `TensorRT-RTX build`.

    Raises:
        BuildError: If TensorRT refuses the graph or fails to build it; its own messages are included.
        OptionError: If a compute capability is not known to this version.
        KeyboardInterrupt: If Ctrl-C was pressed; TensorRT has then stopped in good order.
    """
    log, messages = log_of(trt)
    messages.clear()
    with interrupt_deferred() as pressed:
        meter = Meter(progress, f"{flavour.title} build", pressed.is_set)
        plan, facts = _Build(trt, flavour, log, messages).run(source, options, meter)
    if meter.error is not None:
        raise meter.error
    if plan is None:
        msg = f"{flavour.title} {version(trt)} failed to build the engine:{messages.summary()}\n{_NEXT}"
        raise BuildError(msg)
    for text in messages.of("WARNING"):
        _LOG.info("%s: %s", flavour.title, text)
    meter.finish()
    if meter.error is not None:
        raise meter.error
    return EngineArtifact(data=memoryview(plan), built_with=facts)


@dataclass(frozen=True)
class _Build:
    """The steps of one build; each raises `BuildError` in TensorRT's words."""

    trt: Any
    flavour: Flavour
    log: Any
    messages: Messages

    def run(self, source: GraphSource, options: BuildOptions, meter: Meter) -> tuple[Any, dict[str, str]]:
        meter.start()
        builder = self._builder()
        # Strong typing is the only mode of TensorRT 11 and of TensorRT-RTX, where the flag may be given all
        # the same; in TensorRT 10 it must be given. Its number differs between versions: it is looked up.
        network = builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self.trt.OnnxParser(network, self.log)  # holds the weights: must outlive the build
        graph = source.read_onnx()
        if not parser.parse(graph):
            self._refuse("did not accept the ONNX graph", parser)
        counts = check_precision(self.trt, network, graph)
        config = builder.create_builder_config()
        if not options.tf32:
            config.clear_flag(self.trt.BuilderFlag.TF32)
        if "FP8" in wanted_by(graph)[1]:
            options = replace(options, compute_capabilities=fp8_capable(self.flavour, options))
        del graph  # the parser has a copy
        target = self._target(config, options)
        batch = self._batch(builder, network, config, source.spec)
        monitor = attach(self.trt, config, meter)
        plan = builder.build_serialized_network(network, config)
        del monitor, parser
        tf32 = "allowed" if options.tf32 else "off"
        return plan, {
            **self._facts(),
            **target,
            "batch": batch,
            "tf32": tf32,
            **counts,
        }

    def _builder(self) -> Any:
        try:
            return self.trt.Builder(self.log)
        except (TypeError, RuntimeError) as error:  # what the bindings make of a null pointer
            self._refuse("could not start a builder", cause=error)

    def _refuse(self, what: str, parser: Any = None, cause: Exception | None = None) -> NoReturn:
        said = [str(parser.get_error(index)) for index in range(parser.num_errors)] if parser else []
        reason = self.messages.summary(said)
        absent = _NO_OPERATOR.search(reason)
        advice = _NEXT
        if absent:
            advice = (
                f"It has no operator {absent[1]}. Express that part of the network with others, run it before or after "
                "the engine, or build for --target cpu alone."
            )
        msg = f"{self.flavour.title} {version(self.trt)} {what}:{reason}\n{advice}"
        raise BuildError(msg) from cause

    def _target(self, config: Any, options: BuildOptions) -> dict[str, str]:
        """Choose what to build for, and put it in words."""
        if not self.flavour.ahead_of_time:
            device = cuda.current()
            return {"compute_capabilities": device.capability, "device": device.name}
        known = self.trt.ComputeCapability.__members__
        check_capabilities(self.trt, self.flavour, options)
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, name in enumerate(options.compute_capabilities):
            if not config.set_compute_capability(known[name], index):
                self._refuse(f"cannot build for {name}")
        return {"compute_capabilities": ", ".join(options.compute_capabilities)}

    def _batch(self, builder: Any, network: Any, config: Any, spec: EngineSpec) -> str:
        """Add one optimisation profile if the graph has a symbolic batch, and put the range in words."""
        shapes = {item.name: tuple(item.shape) for item in map(network.get_input, range(network.num_inputs))}
        outputs = {network.get_output(index).name for index in range(network.num_outputs)}
        expected = {item.name: item.with_batch(-1) for item in spec.inputs}
        if shapes != expected or outputs != {item.name for item in spec.outputs}:
            msg = (
                f"The ONNX graph has inputs {shapes} and outputs {sorted(outputs)}; its specification says "
                f"{expected} and {sorted(item.name for item in spec.outputs)} (-1: batch). Export it again."
            )
            raise BuildError(msg)
        dynamic = [item for item in spec.inputs if -1 in expected[item.name]]
        if not dynamic:
            return "static"
        profile = builder.create_optimization_profile()
        for item in dynamic:
            sizes = (spec.batch.min, spec.batch.opt, spec.batch.max)
            profile.set_shape(item.name, *(item.with_batch(size) for size in sizes))
        if config.add_optimization_profile(profile) < 0:
            self._refuse(f"did not accept the batch range {spec.batch}")
        return str(spec.batch)

    def _facts(self) -> dict[str, str]:
        facts = {
            "flavour": self.flavour.title,
            "version": version(self.trt),
            "typed": "strongly",
            "platform": f"{platform.system()} {platform.machine()}".lower(),
            "host": " ".join((*platform.libc_ver(), "Python", platform.python_version())).strip(),
        }
        driver = cuda.devices().driver
        if driver:  # TensorRT-RTX builds without one
            facts["cuda_driver"] = cuda.version_text(driver)
        return facts

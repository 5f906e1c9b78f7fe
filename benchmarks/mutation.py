"""Mutation score of the verdict: how many wrong graphs would be called passed?

Usage: python benchmarks/mutation.py [--mutants N] [--images N] [--network NAME ...] [--precision P ...]
           [--record FILE] [--markdown FILE]

Every network is built in every precision. Each mutant is the built graph with one change (`mutants.py`). A mutant
*matters* if its answers leave the budget on any of the test images, none of which it was built with, edge images among
them, where those of the unchanged graph keep it: computed here in float64, without the code that gives verdicts. (An
image that the unchanged graph itself keeps narrowly is left by any other rounding; so the distance 1 - cosine must also
have doubled.) The verdict is that of the build: the golden set as it ships, and what else the proof executes. The score
is the share of those that matter which it catches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from kinds import tasks
from kinds_networks import KINDS
from mutants import Mutation, mutations
from trained import Task

import pcn_deploy
from pcn_deploy import Bundle, CompileOptions, ImageSource
from pcn_deploy.proof.executions import prove
from pcn_deploy.specs import BatchRange
from pcn_deploy.tasks.limits import ParityBudget

NETWORKS = [f"shapes, {kind}" for kind in KINDS]
PRECISIONS = ("fp32", "fp16", "int8")
TITLE = """# Mutation score of the verdict

Printed by `python benchmarks/mutation.py --markdown benchmarks/mutation.md`, which says what a mutant is
and when it matters."""
CALIBRATION_IMAGES = 256
BATCH = 64
SEED = 0

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        network: Name of the network.
        precision: Precision of the graph.
        kind: Kind of the mutation.
        place: Where it is.
        matters: Why it matters, empty if it does not.
        caught: What the verdict said, empty if it passed.
    """

    network: str
    precision: str
    kind: str
    place: str
    matters: str
    caught: str


def edge_images(images: Images) -> tuple[Images, list[str]]:
    """Images that break things: one colour, the extremes, noise, one bright pixel; with their names."""
    low, high = images.min((0, 2, 3)), images.max((0, 2, 3))
    middle, shape = (low + high) / 2, images.shape[1:]
    plain = {"black": low, "white": high, "grey": middle, "dark grey": low + (high - low) / 16}
    plain |= {f"only channel {channel}": np.where(np.arange(len(low)) == channel, high, low) for channel in range(3)}
    found = {name: np.broadcast_to(colour[:, None, None], shape) for name, colour in plain.items()}
    rng = np.random.default_rng(SEED)
    noise = rng.random(shape, np.float32)
    found["noise"] = low[:, None, None] + noise * (high - low)[:, None, None]
    found["salt and pepper"] = np.where(noise[:1] < 0.5, low[:, None, None], high[:, None, None])
    found["checkerboard"] = np.where(np.indices(shape[1:]).sum(0)[None] % 2, low[:, None, None], high[:, None, None])
    found["faint"] = middle[:, None, None] + (noise - 0.5) * (high - low)[:, None, None] / 255
    one = np.broadcast_to(low[:, None, None], shape).copy()
    one[:, shape[1] // 2, shape[2] // 2] = high
    found["one bright pixel"] = one
    return np.stack([np.ascontiguousarray(image, np.float32) for image in found.values()]), list(found)


class Judge:
    """Says whether a graph's answers leave the budget where those of the unchanged graph keep it.

    Only float64 arithmetic on logits: nothing of `pcn_deploy.tasks.parity` is used.
    """

    def __init__(self, task: Task, images: Images, names: list[str], original: bytes, budget: ParityBudget) -> None:
        self.images, self.names, self.labels, self.budget = images, names, task.labels, budget
        with torch.inference_mode():
            parts = [task.network(torch.from_numpy(part)).numpy() for part in _parts(images)]
        self.reference = np.concatenate(parts).astype(np.float64)
        self.original = np.concatenate(list(_run(original, images))).astype(np.float64)
        self.edges = len(images) - len(task.labels)

    def why(self, graph: bytes) -> str:
        """Why a graph matters; empty if it keeps the budget."""
        done, answers = 0, []
        try:
            for logits in _run(graph, self.images):
                part = slice(done, done + len(logits))
                done += len(logits)
                answers.append(logits.astype(np.float64))
                if reason := self._one_image(part, answers[-1]):
                    return reason
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            return f"refused: {str(error).splitlines()[0][:80]}"
        return self._all_images(np.concatenate(answers))

    def _one_image(self, part: slice, answers: Logits) -> str:
        if answers.shape != self.reference[part].shape:
            return "another shape"
        finite = np.isfinite(answers).all(1)
        if not finite.all():
            return f"not finite on {self.names[part.start + int((~finite).argmax())]}"
        cosine, was = (_cosines(self.reference[part], each) for each in (answers, self.original[part]))
        left = (cosine < self.budget.cosine_min) & (was >= self.budget.cosine_min) & (1 - cosine > 2 * (1 - was))
        if left.any():
            worst = int(np.where(left, cosine, 2).argmin())
            return f"cosine {was[worst]:.4f} -> {cosine[worst]:.4f} on {self.names[part.start + worst]}"
        return ""

    def _all_images(self, answers: Logits) -> str:
        real = slice(self.edges, None)
        for name, centred in (("SQNR", 0), ("SQNR of differences", 1)):
            found, was = (
                _sqnr(self.reference[real], each[real], centred=bool(centred)) for each in (answers, self.original)
            )
            if found < self.budget.sqnr_db <= was:
                return f"{name} {was:.1f} -> {found:.1f} dB"
        drop = _top1(self.reference[real], self.labels) - _top1(answers[real], self.labels)
        return f"top-1 drops by {drop:.2f}" if drop > self.budget.top1_drop else ""


def _parts(images: Images) -> Iterator[Images]:
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


def _run(graph: bytes, images: Images) -> Iterator[npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # mutants that cannot run are told by their exception
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for part in _parts(images):
        yield session.run(None, {name: part})[0]


def _cosines(reference: Logits, answers: Logits) -> Logits:
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(answers, axis=1)
    cosines: Logits = (reference * answers).sum(1) / np.maximum(norms, 1e-300)
    return cosines


def _sqnr(reference: Logits, answers: Logits, *, centred: bool) -> float:
    if centred:
        reference, answers = (each - each.mean(1, keepdims=True) for each in (reference, answers))
    noise = ((reference - answers) ** 2).sum()
    return 200.0 if noise == 0 else float(10 * np.log10((reference**2).sum() / noise))


def _top1(answers: Logits, labels: npt.NDArray[np.int64]) -> float:
    return 100 * float((answers.argmax(1) == labels).mean())


def build(task: Task, precision: str) -> Bundle:
    """The bundle of a network, as a user would build it."""
    options = CompileOptions(
        precision=precision, transform=task.transform, batch=BatchRange(min=1, opt=8, max=BATCH), targets=("cpu",)
    )
    source = ImageSource([task.calibration[:CALIBRATION_IMAGES]], task.transform)
    return pcn_deploy.compile(task.network, options, calibration=source).bundle


def verdict(bundle: Bundle, graph: bytes) -> str:
    """What the proof of the build says of another graph in the place of its own; empty if it passes."""
    changed = Bundle(replace(bundle.manifest, members={}, engines=[]))
    for name in bundle.manifest.members:
        changed.add(name, bundle.read(name))
    changed.add_engine("cpu", "model.onnx", graph, {})
    try:
        return "; ".join(prove(changed, "cpu").failures)
    except Exception as error:  # a vendor's, when the graph cannot run
        return f"refused: {str(error).splitlines()[0][:80]}"


def drawn(model: onnx.ModelProto, count: int, seed: str) -> list[Mutation]:
    """Mutations of a graph, drawn so that every kind has its turn."""
    kinds: dict[str, list[Mutation]] = defaultdict(list)
    for mutation in mutations(model):
        kinds[mutation.kind].append(mutation)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
    shuffled = [[group[i] for i in rng.permutation(len(group))] for _, group in sorted(kinds.items())]
    found: list[Mutation] = []
    while len(found) < count and any(shuffled):
        found += [group.pop() for group in shuffled if group]
    return found[:count]


def examine(task: Task, precision: str, count: int) -> Iterator[Outcome]:
    """Mutants of one built graph."""
    bundle = build(task, precision)
    original = bundle.read("model.onnx")
    edges, edge_names = edge_images(task.images)
    names = [*edge_names, *(f"image {index}" for index in range(len(task.images)))]
    budget = bundle.manifest.parity_budget
    judge = Judge(task, np.concatenate([edges, task.images]), names, original, budget)
    unchanged = verdict(bundle, original)
    if unchanged:
        print(f"! {task.name} {precision}: the unchanged graph does not pass: {unchanged}", flush=True)
    model = with_initializers(original)
    for mutation in drawn(model, count, f"{task.name} {precision}"):
        mutant = onnx.ModelProto()
        mutant.CopyFrom(model)
        mutation.apply(mutant)
        graph = mutant.SerializeToString()
        yield Outcome(
            network=task.name,
            precision=precision,
            kind=mutation.kind,
            place=mutation.place,
            matters=judge.why(graph),
            caught=verdict(bundle, graph),
        )


def with_initializers(graph: bytes) -> onnx.ModelProto:
    """The graph with its Constant nodes as initialisers."""
    model = onnx.load_from_string(graph)
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        (attribute,) = node.attribute
        value = onnx.helper.get_attribute_value(attribute)
        tensor = value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(value))
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    return model


def table(outcomes: list[Outcome]) -> str:
    """The score by kind, precision and network, and every survivor, as Markdown."""
    lines: list[str] = []
    for key in ("kind", "precision", "network"):
        lines += [f"| {key} | mutants | matter | caught of those | caught, though they do not matter |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for name in sorted({getattr(each, key) for each in outcomes}):
            lines.append(_row(name, [each for each in outcomes if getattr(each, key) == name]))
        lines += [_row("**all**", outcomes), ""]
    survivors = [each for each in outcomes if each.matters and not each.caught]
    lines.append(f"Survivors: {len(survivors)}" + (":\n" if survivors else "."))
    lines += [f"- {each.network}, {each.precision}: {each.kind}, {each.place}: {each.matters}" for each in survivors]
    return "\n".join(lines)


def _row(name: str, outcomes: list[Outcome]) -> str:
    matter = [each for each in outcomes if each.matters]
    caught = sum(bool(each.caught) for each in matter)
    share = f"{caught} ({100 * caught / len(matter):.1f} %)" if matter else "-"
    others = sum(bool(each.caught) and not each.matters for each in outcomes)
    return f"| {name} | {len(outcomes)} | {len(matter)} | {share} | {others} |"


def read_record(path: Path) -> list[Outcome]:
    """The outcomes that an earlier run left behind."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def main() -> None:
    """Examine every network in every precision; print the score and the survivors."""
    parser = argparse.ArgumentParser(description="Mutation score of the verdict.")
    parser.add_argument("--mutants", type=int, default=60, help="of each built graph")
    parser.add_argument("--images", type=int, default=2000, help="that judge whether a mutant matters")
    parser.add_argument("--network", action="append", help="of kinds.tasks(); default: six on the shapes")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--record", type=Path, default=Path("out/mutation.jsonl"), help="a killed run goes on")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    given = parser.parse_args()
    given.record.parent.mkdir(parents=True, exist_ok=True)
    for task in tasks(given.images):
        if task.name not in (given.network or NETWORKS):
            continue
        for precision in given.precision or PRECISIONS:
            if (task.name, precision) in {(each.network, each.precision) for each in read_record(given.record)}:
                continue
            started = time.perf_counter()
            found = list(examine(task, precision, given.mutants))
            with given.record.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(each)) + "\n" for each in found)
            caught = sum(bool(each.caught) for each in found if each.matters)
            counts = f"{caught} of {sum(bool(each.matters) for each in found)} caught, {len(found)} mutants"
            print(f"{task.name}, {precision}: {counts}, {time.perf_counter() - started:.0f} s", flush=True)
    text = table(read_record(given.record))
    print(f"\n{text}")
    if given.markdown:
        given.markdown.write_text(f"{TITLE}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

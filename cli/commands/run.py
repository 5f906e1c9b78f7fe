"""`pcn-compile run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pcn_deploy.cli import display, options
from pcn_deploy.data.classes import read_names
from pcn_deploy.data.image_files import ImageFile, survey
from pcn_deploy.errors import ParityError
from pcn_deploy.show.heatmap import picture_paths
from pcn_deploy.specs import LOGITS
from pcn_deploy.verbs.load import load
from pcn_deploy.verbs.run import Prediction, classify


@click.command("run")
@options.bundle_argument
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@options.target_option
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, metavar="K", help="Classes to show.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Names of the classes, instead of those in the bundle: one per line in the order of the outputs, or any other "
    "file that `--classes` of build takes.",
)
@click.option(
    "--heatmap",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Write a picture of where the network looked, laid over the image: PATH is a .png, .jpg or .webp for one "
    "image, or a folder for any number. The bundle must have been built with --with-attention-map.",
)
@click.option(
    "--class",
    "heatmap_class",
    type=click.IntRange(min=0),
    metavar="K",
    help="Draw the map of class K where every class has its own. [default: the most likely class]",
)
@options.overwrite_option
@options.json_option
def command(
    file: Path,
    images: tuple[Path, ...],
    target: str | None,
    top: int,
    labels: Path | None,
    heatmap: Path | None,
    heatmap_class: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run an engine of FILE.pcn on images and show the most likely classes, or what other outputs hold."""
    pictures = picture_paths(heatmap, images, overwrite=overwrite) if heatmap else None
    with load(file, target) as engine:
        logits = engine.spec.output_of(LOGITS)
        names = read_names(labels, int(logits.shape[-1])) if labels and logits else list(engine.class_names) or None
        predictions = classify(
            engine, images, top=top, class_names=names, heatmaps=pictures, heatmap_class=heatmap_class
        )
        used = engine.target
        notes = survey([ImageFile(path, str(path), None) for path in images], engine.transform, sizes_too=False)
    for text in notes:
        display.note(text, quiet=as_json)
    if as_json:
        display.print_json({"target": used, "predictions": [prediction.to_json() for prediction in predictions]})
    else:
        _show(predictions, names, used)
    errors = [prediction.error for prediction in predictions if prediction.error]
    if errors:
        worst = next((error for error in errors if isinstance(error, ParityError)), errors[0])
        raise type(worst)("\n".join(map(str, errors)))


def _show(predictions: list[Prediction], names: list[str] | None, used: str) -> None:
    rows = []
    for prediction in predictions:
        for rank, name in enumerate(prediction.names):
            shown = prediction.image if rank == 0 else ""
            rows.append([shown, str(rank + 1), name, f"{100 * prediction.probabilities[rank]:.2f}"])
    if rows:
        display.print_table(f"Most likely classes, by {used}", ["image", "rank", "class", "probability %"], rows)
    others = [
        [prediction.image, name, answer["role"], _words({key: answer[key] for key in answer if key != "role"})]
        for prediction in predictions
        for name, answer in prediction.outputs.items()
    ]
    if others:
        display.print_table(f"Outputs, by {used}", ["image", "output", "role", "answer"], others)
    for prediction in predictions:
        _tell_picture(prediction, names)


def _words(answer: dict[str, Any]) -> str:
    """What a role tells of an output, as text: a list of numbers is a shape."""
    shapes = {key: "x".join(map(str, value)) for key, value in answer.items() if isinstance(value, list)}
    numbers = {key: f"{value:.4g}" for key, value in answer.items() if isinstance(value, float)}
    return ", ".join(f"{key} {text}" for key, text in {**answer, **shapes, **numbers}.items())


def _tell_picture(prediction: Prediction, names: list[str] | None) -> None:
    seen = prediction.attention
    if seen is None:
        return
    whose = "all classes" if seen.class_index is None else f"class {seen.class_index}"
    if names and seen.class_index is not None:
        whose += f" ({names[seen.class_index]})"
    weights = f"weights {seen.smallest:.2g} to {seen.largest:.2g}, {seen.uniform:.2g} if all were equal"
    display.tell(f"Wrote {prediction.heatmap}: the map of {whose}, {weights}.")
    if seen.nearly_flat:
        display.note(f"the map of {prediction.image} is nearly flat: it singles out no place.", quiet=False)

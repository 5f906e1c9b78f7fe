"""What each process of `test_processes.py` runs; not a test itself.

Usage: python -m torch.distributed.run --nproc-per-node 4 shared_run.py OUT TASK...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spoiled_network import spoiled_network, units

import pcn_deploy
from pcn_deploy import ImageSource, Transform
from pcn_deploy.calibration.calibrators import CALIBRATORS
from pcn_deploy.calibration.collect import calibrate, recalibrate
from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.calibration.search.ledger import Ledger
from pcn_deploy.calibration.search.search import Search
from pcn_deploy.calibration.search.sensitivity import measure_sensitivity, rank
from pcn_deploy.data.passes import each_batch
from pcn_deploy.data.processes import current, join
from pcn_deploy.errors import PcnDeployError
from pcn_deploy.network.deploy import to_deploy
from pcn_deploy.progress import silent
from pcn_deploy.tasks.classification import LogitsMeter
from pcn_deploy.verbs.verify import of_all_processes

LAYERS = ["patch_embed.proj.2.0", "blocks.1.attn.qkv_pos.5", "head"]
IMAGES = 45
"""Six batches: two processes of four take two each, the others one."""


def network() -> torch.nn.Module:
    net = pcn_deploy.create_model(
        "patchconvnet", random_weights=True, width=32, depth=2, patch=4, num_classes=5, layer_scale=0.5
    )
    return to_deploy(net.eval(), torch.rand(1, 3, 32, 32))[0]


def source(count: int = IMAGES) -> ImageSource:
    images = np.random.default_rng(0).standard_normal((count, 3, 32, 32), dtype=np.float32)
    images *= np.linspace(0.1, 3, count, dtype=np.float32)[:, None, None, None]  # so that ranges grow on the way
    return ImageSource(images, Transform(resolution=(32, 32)))


def ranges(out: Path) -> dict[str, object]:
    """Calibrations by every calibrator, and with a cache."""
    net = network()
    found = {name: calibrate(net, LAYERS, source(), name).to_json() for name in CALIBRATORS}
    cache = out / f"cache_{current().count}.json"
    written = calibrate(net, LAYERS, source(), "max", cache=cache)
    again = calibrate(net, LAYERS, source(), "mse", cache=cache)
    assert recalibrate(written, "mse") == again
    return {**found, "cached": again.to_json()}


def parity(_out: Path) -> dict[str, object]:
    random = np.random.default_rng(0)
    reference = random.standard_normal((IMAGES, 1000)) * np.logspace(-8, 8, IMAGES)[:, None]
    engine = reference + random.standard_normal(reference.shape) * 1e-3 * np.abs(reference)
    labels = reference.argmax(1)
    labels[::3] = 7
    meter, index = LogitsMeter(), np.arange(IMAGES, dtype=np.float32)[:, None, None, None]
    rows = ImageSource(np.broadcast_to(index, (IMAGES, 3, 2, 2)).copy(), Transform(resolution=(2, 2)))
    for images, _ in each_batch(rows, 4, "", silent, shared=True):
        part = images[:, 0, 0, 0].astype(int)
        meter.update(reference[part], engine[part], labels[part])
    return {"metrics": of_all_processes(meter).metrics()}


def search(out: Path) -> dict[str, object]:
    """A search that gives layers up, an analysis, and how often this process has run the network for them."""
    simulation, kinds, images = spoiled_network()
    real, runs = simulation.logits, [0]

    def counted(*given: Any, **named: Any) -> Any:
        runs[0] += 1
        return real(*given, **named)

    simulation.logits = counted  # type: ignore[method-assign]
    answers = Answers.of(simulation.logits, images)
    record = out / f"search_{current().count}" if current().first else None
    ledger = Ledger.of_all(record, {"budget": 5.0})
    by = Search(simulation, units(simulation), answers, 5.0, ledger)
    found = by.run(lambda: rank(simulation, units(simulation), answers.spread(32), ledger))
    searched = runs[0]
    again = Ledger.of_all(record, {"budget": 5.0})
    by = Search(simulation, units(simulation), answers, 5.0, again)
    assert by.run(lambda: rank(simulation, units(simulation), answers.spread(32), again)) == found
    assert runs[0] == searched, "what one process has kept, all know"
    sensitivity = measure_sensitivity(simulation, kinds, answers.spread(32), Ledger.of_all(None, {}))
    plan = {**found.to_json(), "expected": answers.expected.tolist(), "sensitivity": sensitivity.to_json()}
    return {"found": plan, "runs": [searched, runs[0] - searched]}


def bad_image(_out: Path) -> dict[str, object]:
    """An image of the second batch, which process 1 reads, is not a number."""
    images = np.zeros((IMAGES, 3, 32, 32), np.float32)
    images[9] = np.nan
    calibrate(network(), LAYERS, ImageSource(images, Transform(resolution=(32, 32))), "max")
    return {}


def bug(_out: Path) -> dict[str, object]:
    if current().rank == 2:
        msg = "a bug"
        raise TypeError(msg)
    return ranges(_out)


def other_images(_out: Path) -> dict[str, object]:
    calibrate(network(), LAYERS, source(IMAGES - (current().rank == 3)), "max")
    return {}


def unreadable(out: Path) -> dict[str, object]:
    """A folder in which one file of the third batch is no image."""
    from PIL import Image

    folder = out / "images"
    if current().first:
        folder.mkdir()
        for index in range(24):
            Image.effect_noise((40, 40), 4.0 * index + 5).save(folder / f"{index:02}.png")
        (folder / "17.png").write_bytes(b"no image")
    current().gather(b"")
    return calibrate(network(), LAYERS, ImageSource(folder, Transform(resolution=(32, 32))), "entropy").to_json()


def dies(_out: Path) -> dict[str, object]:
    if current().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return ranges(_out)


def main() -> None:
    out, found = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    for task in sys.argv[2:]:
        try:
            with join():
                found[task] = globals()[task](out)
        except (PcnDeployError, TypeError) as error:
            found[task] = [type(error).__name__, str(error)]
    (out / f"{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

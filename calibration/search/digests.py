"""What a measurement is bound to."""

from __future__ import annotations

import hashlib

from torch import nn

from pcn_deploy.calibration.cache import digest_weights
from pcn_deploy.calibration.quantized import Quantization
from pcn_deploy.calibration.search.evaluation import Answers


def run_digests(deployed: nn.Module, scales: dict[str, Quantization], judges: list[Answers]) -> dict[str, str]:
    """Digests of all that decides a measurement: weights, scales, images and expected answers."""
    scaled, images, answers = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for path, own in scales.items():
        scaled.update(f"{path}{own.input!r}".encode() + own.weight.tobytes())
    for judge in judges:
        images.update(judge.source.digest.encode())
        answers.update(judge.expected.tobytes() + judge.reference.tobytes())
    return {
        "weights": digest_weights(deployed),
        "scales": scaled.hexdigest(),
        "images to judge by": images.hexdigest(),
        "expected answers": answers.hexdigest(),
    }

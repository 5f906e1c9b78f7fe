"""The calibration cache: what is kept, when it is used, and when it is refused."""

from __future__ import annotations

import base64
import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pcn_deploy.artefact.bundle import read_calibration
from pcn_deploy.calibration.cache import digest_weights
from pcn_deploy.calibration.calibrators import CALIBRATORS
from pcn_deploy.calibration.collect import calibrate, recalibrate
from pcn_deploy.calibration.record import Calibration, _digest, from_json, pack, unpack
from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import Transform
from pcn_deploy.errors import BundleError, DataError, OptionError, OutputError

IMAGES = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
LAYERS = ["0", "2"]


class Counting(nn.Sequential):
    """Counts the images it runs on."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += len(x)
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call] # torch leaves it without annotations
        return y


@pytest.fixture
def net() -> Counting:
    torch.manual_seed(0)
    return Counting(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()


def source(images: Any = IMAGES, **given: Any) -> ImageSource:
    return ImageSource(images, Transform(resolution=(8, 8), **given))


@pytest.fixture
def cache(net: Counting, tmp_path: Path) -> Path:
    path = tmp_path / "cache.json"
    calibrate(net, LAYERS, source(), "entropy", cache=path)
    net.runs = 0
    return path


def same(one: Calibration, other: Calibration) -> bool:
    return one.to_json() == other.to_json()


@pytest.mark.parametrize("made_with", CALIBRATORS)
def test_one_pass_serves_every_calibrator(net: Counting, tmp_path: Path, made_with: str) -> None:
    path = tmp_path / "cache.json"
    written = calibrate(net, LAYERS, source(), made_with, cache=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.json"], "nothing temporary is left"
    assert net.runs == 40
    before = path.read_bytes()
    for name in CALIBRATORS:
        direct = calibrate(net, LAYERS, source(), name)
        net.runs = 0
        seen: list[str] = []
        kept = calibrate(net, LAYERS, source(), name, lambda step, *_, seen=seen: seen.append(step), cache=path)
        assert net.runs == 0
        assert set(seen) == {"Reading images"}
        assert kept.ranges == direct.ranges
        assert recalibrate(written, name).ranges == direct.ranges
        assert (kept.calibrator, kept.images, kept.dataset_sha256) == (name, 40, direct.dataset_sha256)
    assert path.read_bytes() == before


def test_the_json_is_what_was_seen(net: Counting, cache: Path) -> None:
    seen = calibrate(net, LAYERS, source(), "percentile", percentile=99.0)
    data = json.loads(cache.read_text())
    assert data["histograms"]["2"]["bin_width"] == seen.statistics["2"].width
    np.testing.assert_array_equal(unpack(data["histograms"]["2"]["counts"]), seen.statistics["2"].counts)
    assert seen.statistics["2"].counts.sum() == 40 * 16 * 6 * 6
    again = from_json(json.dumps(seen.to_json()).encode(), "here")
    assert (again, same(again, seen)) == (seen, True)
    assert (again.percentile, again.calibrator) == (99.0, "percentile")


def changed_weight(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].bias[1] += 1e-7  # type: ignore[index]


def unchanged(net: nn.Module) -> None:
    pass


REFUSALS: dict[str, tuple[Callable[[Any], object], dict[str, Any], str]] = {
    "weights": (changed_weight, {}, r"weights [0-9a-f]{12}… instead of"),
    "one pixel": (
        unchanged,
        {"images": np.where(IMAGES[7, 1, 2, 3] == IMAGES, 0.5, IMAGES).astype(np.float32)},
        "images",
    ),
    "order": (unchanged, {"images": IMAGES[::-1]}, r"images [0-9a-f]{12}… \(40 readable\) instead of"),
    "number": (unchanged, {"images": IMAGES[:39]}, "39 images instead of 40"),
    "transform": (unchanged, {"mean": (0.5, 0.5, 0.5)}, r"mean \(0\.5, 0\.5, 0\.5\) instead of \(0\.485"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_cache_of_something_else_is_refused(net: Counting, cache: Path, case: str) -> None:
    change, arguments, words = REFUSALS[case]
    change(net)
    with pytest.raises(DataError, match=rf"cache\.json was made for something else: .*{words}.*Delete it"):
        calibrate(net, LAYERS, source(**arguments), "entropy", cache=cache)
    assert net.runs == 0


def test_everything_that_differs_is_named(net: Counting, cache: Path) -> None:
    changed_weight(net)
    words = r"weights .*; crop_pct 0\.5 instead of 0\.875; 1 images instead of 40; 1 layers .* such as 1\."
    with pytest.raises(DataError, match=words):
        calibrate(net, [*LAYERS, "1"], source(IMAGES[:1], crop_pct=0.5), "entropy", cache=cache)


def test_fewer_layers_are_served(net: Counting, cache: Path) -> None:
    """What a layer sees does not depend on which others are observed."""
    assert calibrate(net, ["2"], source(), "mse", cache=cache) == calibrate(net, ["2"], source(), "mse")


def test_largest_magnitudes_alone_serve_max_alone(net: Counting, tmp_path: Path) -> None:
    """Such a record is in a bundle built with max and without a cache."""
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(calibrate(net, LAYERS, source(), "max").to_json()))
    assert calibrate(net, LAYERS, source(), "max", cache=path).ranges
    with pytest.raises(DataError, match="no histograms; calibrator entropy needs them"):
        calibrate(net, LAYERS, source(), "entropy", cache=path)


def edited(data: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Changed by someone who signed it anew."""
    data = copy.deepcopy(data)
    change(data)
    data.pop("sha256")
    return {**data, "sha256": _digest(data)}


def histogram(counts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["histograms"]["2"].update(counts=counts)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda data: data.update(format="trt-8000-EntropyCalibration2"),
    "missing": lambda data: data.pop("weights_sha256"),
    "images of text": lambda data: data.update(images="40"),
    "true images": lambda data: data.update(images=True),
    "no images": lambda data: data.update(images=0),
    "negative amax": lambda data: data["amax"].update({"2": -1.0}),
    "amax of text": lambda data: data["amax"].update({"2": "1.0"}),
    "endless amax": lambda data: data["amax"].update({"2": 10**400}),
    "other amax": lambda data: data["amax"].update({"2": data["amax"]["2"] * 1.5}),
    "range beyond amax": lambda data: data["ranges"].update({"2": data["amax"]["2"] * 1.5}),
    "no range": lambda data: data["ranges"].pop("2"),
    "range of text": lambda data: data["ranges"].update({"2": "x"}),
    "width": lambda data: data["histograms"]["2"].update(bin_width=1e-3),
    "width of text": lambda data: data["histograms"]["2"].update(bin_width="x"),
    "negative counts": histogram(pack(np.full(4096, -1, np.int64))),
    "huge counts": histogram(pack(np.full(4096, 2**62, np.int64))),
    "empty counts": histogram(pack(np.zeros(4096, np.int64))),
    "few counts": histogram(pack(np.ones(4095, np.int64))),
    "a bomb": histogram(base64.b64encode(zlib.compress(bytes(10**7))).decode()),
    "counts of numbers": histogram([1, 2, 3]),
    "no base64": histogram("?"),
    "no zlib": histogram("AAAA"),
    "no histogram": lambda data: data["histograms"].update({"2": 7}),
    "resolution": lambda data: data["transform"].update(resolution=[]),
    "transform": lambda data: data.update(transform={}),
    "notes": lambda data: data.update(notes="none"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_impossible_record_is_refused(net: Counting, cache: Path, case: str) -> None:
    cache.write_text(json.dumps(edited(json.loads(cache.read_text()), EDITS[case])))
    with pytest.raises(DataError, match=r"is not a calibration, or was altered or cut off \(.*delete that one"):
        calibrate(net, LAYERS, source(), "entropy", cache=cache)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": NaN}',
        "\x00",
        "\ud800",
        "trt-8000-EntropyCalibration2\nx: 3f80",
    ],
    ids=lambda text: ascii(text)[:12],
)
def test_what_is_no_record_is_refused(net: Counting, cache: Path, text: str) -> None:
    cache.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"cache\.json is not a calibration"):
        calibrate(net, LAYERS, source(), "entropy", cache=cache)


def test_a_number_edited_by_hand_is_noticed(cache: Path) -> None:
    text = cache.read_text()
    other = text.replace('"images": 40', '"images": 41')
    assert other != text
    with pytest.raises(DataError, match="do not have the SHA-256 it states"):
        from_json(other.encode(), "cache.json")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_noticed_in_words(data: st.DataObject) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    seen = calibrate(net, ["0"], source(IMAGES[:2]), "entropy")
    text = bytearray(json.dumps(seen.to_json()).encode())
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text) - 1))]
    else:
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = from_json(bytes(text), "cache.json")
    except DataError:
        return
    assert found == seen


def test_places_that_cannot_be(net: Counting, tmp_path: Path) -> None:
    for place in (tmp_path / "missing" / "cache.json", tmp_path / ("x" * 300)):
        with pytest.raises((OutputError, DataError), match=r"calibration cache .* cannot be"):
            calibrate(net, LAYERS, source(), "max", cache=place)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        calibrate(net, LAYERS, source(), "max", cache=tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        calibrate(net, LAYERS, source(), "max", cache=tmp_path / "absent.pcn", read=read_calibration)
    assert net.runs == 0, "found out before the work"


@pytest.mark.parametrize("percentile", [50.0, 100.1, -1.0, float("nan"), float("inf")])
def test_percentiles_out_of_range(net: Counting, percentile: float) -> None:
    with pytest.raises(OptionError, match="above 50 and at most 100"):
        calibrate(net, LAYERS, source(), "percentile", percentile=percentile)
    assert net.runs == 0


def test_the_digest_of_weights_covers_names_shapes_types_and_buffers() -> None:
    def digest(**tensors: Tensor) -> str:
        net = nn.Module()
        for name, tensor in tensors.items():
            net.register_buffer(name, tensor, persistent=False)
        return digest_weights(net)

    ones = torch.ones(2, 3)
    every = [
        digest(a=ones),
        digest(b=ones),
        digest(a=ones.reshape(3, 2)),
        digest(a=ones.to(torch.int32)),
        digest(a=ones.to(torch.bfloat16)),
        digest(a=ones * -0.0),
        digest(a=ones * 0.0),
        digest(a=ones, b=torch.zeros(0)),
        digest(a=ones, b=torch.tensor(1)),
    ]
    assert len(set(every)) == len(every)
    assert digest(a=torch.ones(3, 2).t()) == digest(a=ones), "strides do not count"
    assert digest(a=ones, b=-ones) == digest(b=-ones, a=ones)

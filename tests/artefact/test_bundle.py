"""The bundle: written whole or not at all, and nothing of it believed unchecked."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_bundle

from pcn_deploy.artefact.bundle import Bundle
from pcn_deploy.artefact.manifest import SCHEMA
from pcn_deploy.errors import BundleError, OutputError

MEMBERS = {"golden.bin": bytes(range(256)) * 4, "plan.json": b'{"layers": [1, 2]}', "engines/cpu.engine": b"engine"}


def make(members: dict[str, bytes] | None = None) -> Bundle:
    bundle = small_bundle(MEMBERS if members is None else members)
    bundle.add_engine("cpu", "engines/cpu.engine", b"engine", {"version": "1"})
    return bundle


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    bundle = make()
    path = bundle.save(tmp_path / "a.pcn")
    opened = Bundle.open(str(path))
    for name, data in MEMBERS.items():
        assert opened.read(name) == bundle.read(name) == data
        assert name in opened
    assert opened.manifest == bundle.manifest
    assert opened.manifest.to_json()["schema"] == SCHEMA
    assert opened.read_json("plan.json") == {"layers": [1, 2]}
    assert opened.engine("cpu").built_with == {"version": "1"}
    assert opened.engine("cpu").bytes == len(b"engine")
    assert names_in(tmp_path) == ["a.pcn"]


def test_members_are_readable_before_saving_and_the_last_value_wins(tmp_path: Path) -> None:
    bundle = make()
    bundle.add("plan.json", b"[]")
    bundle.add("late.bin", b"late")
    assert bundle.read_json("plan.json") == []
    opened = Bundle.open(bundle.save(tmp_path / "a.pcn"))
    assert opened.read_json("plan.json") == []
    assert opened.read("late.bin") == b"late"
    assert opened.read("golden.bin") == MEMBERS["golden.bin"]


def test_an_opened_bundle_can_be_extended_in_place(tmp_path: Path) -> None:
    path = make().save(tmp_path / "a.pcn")
    opened = Bundle.open(path)
    opened.add_engine("torchscript", "model.ts", b"module", {})
    opened.add_engine("cpu", "engines/cpu.engine", b"newer", {"version": "2"})
    opened.save(path, overwrite=True)
    again = Bundle.open(path)
    assert [entry.target for entry in again.engines] == ["torchscript", "cpu"]
    assert again.read(again.engine("cpu").member) == b"newer"
    assert again.read("golden.bin") == MEMBERS["golden.bin"]


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    first, second = make().save(tmp_path / "a.pcn"), make().save(tmp_path / "b.pcn")
    os.utime(first, (0, 0))
    assert first.read_bytes() == second.read_bytes()
    other = make({**MEMBERS, "golden.bin": b"other"}).save(tmp_path / "c.pcn")
    assert other.read_bytes() != first.read_bytes()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        path = make().save(tmp_path / "a.pcn")
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("existing", [None, b"precious"])
@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_failing_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bytes | None
) -> None:
    path = tmp_path / "a.pcn"
    if existing is not None:
        path.write_bytes(existing)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "write": (Bundle, "read")}[step]
    bundle = make()
    with monkeypatch.context() as patch:
        patch.setattr(*owner, full)
        with pytest.raises(OutputError, match=r"No space left on device.*-o"):
            bundle.save(path, overwrite=True)
    assert names_in(tmp_path) == ([] if existing is None else ["a.pcn"])
    if existing is not None:
        assert path.read_bytes() == existing
    bundle.save(path, overwrite=True)  # and the bundle is still whole
    assert Bundle.open(path).read("golden.bin") == MEMBERS["golden.bin"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make().save(tmp_path / "a.pcn")
    assert names_in(tmp_path) == []


def test_an_altered_source_is_not_copied_into_a_new_bundle(tmp_path: Path) -> None:
    path = make().save(tmp_path / "a.pcn")
    opened = Bundle.open(path)
    path.write_bytes(path.read_bytes().replace(MEMBERS["golden.bin"][:64], bytes(64), 1))
    with pytest.raises(BundleError):
        opened.save(tmp_path / "b.pcn")
    assert names_in(tmp_path) == ["a.pcn"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.pcn"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"exists. Give --overwrite"):
        make().save(path)
    assert path.read_bytes() == b"precious"
    make().save(path, overwrite=True)
    assert Bundle.open(path).read("plan.json") == MEMBERS["plan.json"]


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"folder .* does not exist. Create it"):
        make().save(tmp_path / "missing" / "a.pcn")
    with pytest.raises(OutputError, match=r"is a folder; -o takes a file name such as .*model\.pcn"):
        make().save(tmp_path, overwrite=True)
    assert names_in(tmp_path) == []


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode == os.W_OK))
    with pytest.raises(OutputError, match=r"is not writable. Choose another path with -o"):
        make().save(tmp_path / "a.pcn")
    assert names_in(tmp_path) == []


def test_what_is_not_there(tmp_path: Path) -> None:
    opened = Bundle.open(make().save(tmp_path / "a.pcn"))
    with pytest.raises(BundleError, match=r"holds no model\.onnx"):
        opened.read("model.onnx")
    with pytest.raises(BundleError, match=r"no engine for 'tensorrt'; it holds: cpu.*pcn-compile engine .*a\.pcn"):
        opened.engine("tensorrt")
    with pytest.raises(BundleError, match=r"does not exist. Build one with: pcn-compile build"):
        Bundle.open(tmp_path / "b.pcn")


def test_json_that_is_none(tmp_path: Path) -> None:
    opened = Bundle.open(make({**MEMBERS, "plan.json": b"{"}).save(tmp_path / "a.pcn"))
    with pytest.raises(BundleError, match=r"plan\.json in .* is not JSON"):
        opened.read_json("plan.json")


def arrays(**given: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **given)
    return buffer.getvalue()


def single(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_arrays_come_back(tmp_path: Path) -> None:
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    opened = Bundle.open(make({"golden.npz": arrays(images=images)}).save(tmp_path / "a.pcn"))
    found = opened.read_arrays("golden.npz")
    assert list(found) == ["images"]
    np.testing.assert_array_equal(found["images"], images)


@pytest.mark.parametrize(
    "data",
    [
        arrays(images=np.array([print, 1], dtype=object)),
        single(np.zeros(3)),
        b"",
        b"no archive",
        arrays(images=np.zeros(64))[:-40],
    ],
    ids=["pickled", "one array", "empty", "text", "truncated"],
)
def test_arrays_that_are_none(tmp_path: Path, data: bytes) -> None:
    opened = Bundle.open(make({"golden.npz": data}).save(tmp_path / "a.pcn"))
    with pytest.raises(BundleError, match=r"golden\.npz in .* holds no plain arrays"):
        opened.read_arrays("golden.npz")


def test_a_member_of_several_engines_waits_once(tmp_path: Path) -> None:
    bundle, graph = small_bundle(MEMBERS), b"graph" * 1000
    for target in ("cpu", "torchscript"):
        bundle.add_engine(target, "model.onnx", graph, {})
    assert bundle._spool is not None
    assert bundle._spool.tell() == sum(map(len, MEMBERS.values())) + len(graph)
    bundle.add("model.onnx", b"another")
    assert bundle.read("model.onnx") == b"another"
    bundle.add("model.onnx", graph)
    bundle.save(tmp_path / "a.pcn")
    assert Bundle.open(tmp_path / "a.pcn").read("model.onnx") == graph

"""Every command that a document shows is executed, with the digits in place of the files that a reader has.

`make test-all` runs it. The page that a new user follows is executed as it stands, in every run: test_quick_start.py.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import invoke
from test_docs import DOCUMENTS, calls

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "examples" / "digits" / "digits.safetensors"
DIGITS = f"patchconvnet --weights {WEIGHTS} --resolution 32x32 --crop-pct 1"

STAND_INS = (
    (r"patchconvnet_s60 --weights s60_224_1k\.pth", DIGITS),
    (r"patchconvnet --weights (examples/digits/)?digits\.safetensors --resolution 32x32 --crop-pct 1", DIGITS),
    (r"(package\.module|file\.py):factory", "file.py:factory"),
    (r"(file\.py:\w+)", r"\1 --resolution 32x32"),
    (r"(timm|torchvision)(:\w+) --weights \S+ --precision int8", r"\1\2 --random-weights --resolution 32x32"),
    (r"imagenet/[\w-]+|images/|digits/(train|test)\b(?!/)", "digits"),
    (r"digits/test/3/\*\.png", "photo.jpg"),
    (r"--images \d+", "--images 32"),
    (r"--max-drop [\d.]+", "--max-drop 10"),
    (r"(-o|--picture|--changed) ", r"\1 written/"),
)
"""What a reader has, and what stands for it here."""

NOT_HERE = {
    "a placeholder of the reader's": r"…|\.\.\. |FILE|MODEL|COMMAND|^(build|run|engine|verify)$|^build --changed",
    "TensorRT is not on every machine": r"--target tensorrt( |$)",
}

FACTORY = """
import torch
from torch import nn

class Several(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.conv, self.head, self.names = nn.Conv2d(3, 16, 3), nn.Linear(16, 10), names
    def forward(self, x):
        x = self.conv(x).relu()
        scores = self.head(x.mean((2, 3)))
        return {"scores": scores, "features": x.mean((2, 3))} if self.names else {"out": x, "aux": scores}

def factory():
    torch.manual_seed(0)
    return Several(True)

def segmenter():
    torch.manual_seed(0)
    return Several(False)
"""


def shown() -> list[str]:
    """The commands of all documents, each once."""
    texts = (shlex.join(words) for path in DOCUMENTS for words in calls(path))
    return [text for text in dict.fromkeys(texts) if not text.startswith("-")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read."""
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("documents")
    digits = load_digits()
    for index in range(200):
        path = folder / "digits" / str(digits.target[index]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15.9).astype("uint8")).save(path)
    Image.open(path).convert("RGB").save(folder / "photo.jpg")
    (folder / "file.py").write_text(FACTORY)
    scope: dict[str, object] = {}
    exec(FACTORY, scope)
    torch.save(scope["factory"]().state_dict(), folder / "net.pth")  # type: ignore[operator]
    (folder / "written").mkdir()
    bundle = folder / "s60.pcn"
    words = f"build {DIGITS} --precision int8 --batch 1:8:32 --calibration {folder / 'digits'}"
    words += " --target cpu --target tensorrt-rtx"
    result = invoke(*words.split(), "-o", bundle)
    assert result.exit_code == 0, result.output
    (folder / "digits.pcn").write_bytes(bundle.read_bytes())
    (folder / "plan.toml").write_text(invoke("inspect", bundle, "--recipe").stdout)
    assert invoke("slim", bundle, "--target", "tensorrt-rtx", "-o", folder / "s60-field.pcn").exit_code == 0
    return folder


@pytest.mark.documents
@pytest.mark.parametrize("command", shown())
def test_a_command_that_is_shown_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, pattern in NOT_HERE.items():
        if re.search(pattern, command):
            pytest.skip(reason)
    library = re.search(r"(timm|torchvision):", command)
    if library:
        pytest.importorskip(library[1])
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    text = command.partition(" '>' ")[0]
    for there, here in STAND_INS:
        text = re.sub(there, here, text)
    words = shlex.split(text) + (["--overwrite"] if "written/" in text else [])
    result = invoke(*words)
    sys.modules.pop("file", None)
    cannot_run = "s60-field.pcn" in command and words[0] != "slim" and result.exit_code == 7  # without a GPU
    assert result.exit_code == 0 or cannot_run, f"{shlex.join(words)}\n{result.output}"

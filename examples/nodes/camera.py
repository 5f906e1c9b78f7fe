"""A camera loop: the newest frame is classified, and frames that came meanwhile are dropped.

Usage: python examples/nodes/camera.py FILE.pcn --camera 0        (needs OpenCV: pip install opencv-python-headless)
       python examples/nodes/camera.py FILE.pcn --images FOLDER   (plays a folder instead, at --rate frames per second)
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pcn_deploy


def camera(index: int) -> Iterator[Any]:
    """Frames of a camera, uint8 `(H, W, 3)`, in OpenCV's order: blue, green, red."""
    import cv2

    capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        message = f"There is no camera {index}."
        raise SystemExit(message)
    try:
        while True:
            read, frame = capture.read()
            if not read:
                return
            yield frame
    finally:
        capture.release()


def folder(path: Path, rate: float) -> Iterator[Any]:
    """The images of a folder at a steady rate, as a camera would give them: blue, green, red."""
    for file in sorted(path.iterdir()):
        with Image.open(file) as image:
            yield np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        time.sleep(1 / rate)


class Newest:
    """Reads frames in a thread of its own and keeps the newest, so that the network never lags behind the camera.

    Args:
        frames: What the camera gives.

    Attributes:
        count: Frames read so far.
    """

    def __init__(self, frames: Iterable[Any]) -> None:
        self.count = 0
        self._frame: Any = None
        self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._read, args=(frames,), daemon=True).start()

    def _read(self, frames: Iterable[Any]) -> None:
        try:
            for frame in frames:
                with self._changed:
                    self._frame, self.count = frame, self.count + 1
                    self._changed.notify()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def __iter__(self) -> Iterator[Any]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._frame is not None or self._ended)
                frame, self._frame = self._frame, None
            if frame is None:
                return
            yield frame


def main() -> None:
    """Print the class of each frame that was looked at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--camera", type=int)
    source.add_argument("--images", type=Path)
    parser.add_argument("--rate", type=float, default=30.0)
    options = parser.parse_args()
    frames = Newest(folder(options.images, options.rate) if options.images else camera(options.camera))
    with pcn_deploy.load(options.bundle) as engine:
        looked_at = 0
        for frame in frames:
            started = time.perf_counter()
            ((best,),) = engine.classify(frame, k=1, color="bgr")
            looked_at += 1
            print(f"{best.name}  {best.probability:.0%}  {1000 * (time.perf_counter() - started):.1f} ms", flush=True)
    print(f"{looked_at} of {frames.count} frames were looked at.")


if __name__ == "__main__":
    main()

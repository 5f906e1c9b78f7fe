"""Classify images with an extracted engine and without pcn-deploy: numpy, Pillow and the engine's library suffice.

    pcn-compile extract digits.pcn --target cpu -o model.onnx     # where pcn-deploy is; writes model.onnx.json too
    python plan_only.py model.onnx.json photo.jpg                 # anywhere

An ONNX graph is run by onnxruntime: a test holds its answers against those of pcn-deploy. A plan is run by tensorrt or
tensorrt_rtx: that half has not been executed, for want of a GPU. A test finds the names that it uses in tensorrt_rtx.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""From images float32 (N, C, H, W) to the outputs by name."""


def preprocess(path: str, how: dict[str, Any]) -> np.ndarray:
    """Do what the steps under `preprocessing` say: one image file as float32 (1, C, H, W)."""
    with Image.open(path) as image:
        pixels = cropped(eight_bits(image, how), how)
    ordered = pixels[..., ::-1] if how["channel_order"] == "bgr" else pixels
    unit = ordered.astype(np.float32) / np.float32(255)
    normal = (unit - np.array(how["mean"], np.float32)) / np.array(how["std"], np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], dtype=np.float32)


def eight_bits(image: Image.Image, how: dict[str, Any]) -> Image.Image:
    """Grey or RGB of 8 bits."""
    if how["channels"] not in (1, 3):
        sys.exit(f"The network takes {how['channels']} channels, which no image file has.")
    if how["exif"] == "apply":
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits
        white = how["white"] or 65535
        image = Image.fromarray((np.asarray(image).astype(np.float64) * (255 / white)).round().astype(np.uint8))
    if how["alpha"] != "drop" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, how["alpha"]), image)
    return image.convert("RGB" if how["channels"] == 3 else "L")


def cropped(image: Image.Image, how: dict[str, Any]) -> np.ndarray:
    """Resize and cut out the middle: uint8 (H, W, C)."""
    width, height = how["width"], how["height"]
    wide, high = how["resize_to"]["width"], how["resize_to"]["height"]
    w, h = image.size
    if how["crop_mode"] == "squash":
        size = (wide, high)
    elif how["crop_mode"] == "border":
        ratio = max(w / wide, h / high)
        size = (max(1, round(w / ratio)), max(1, round(h / ratio)))
    elif high * w >= wide * h:
        size = (max(width, int(high * w / h)), high)
    else:
        size = (wide, max(height, int(wide * h / w)))
    if size != image.size:
        image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
    if size[0] < width or size[1] < height:  # only with a border
        image = on_mean_colour(image, how)
        size = image.size
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).reshape(height, width, -1)


def on_mean_colour(image: Image.Image, how: dict[str, Any]) -> Image.Image:
    """In the middle of the mean colour, at least as large as the crop."""
    mean = how["mean"][::-1] if how["channel_order"] == "bgr" else how["mean"]
    colour = tuple(round(255 * value) for value in mean)
    size = max(image.width, how["width"]), max(image.height, how["height"])
    whole = Image.new(image.mode, size, colour if len(colour) > 1 else colour[0])
    whole.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return whole


def open_engine(data: bytes, about: dict[str, Any]) -> Run:
    """A function that runs the engine, whose bytes were checked."""
    if about["target"] == "cpu":
        return open_graph(data)
    if about["target"] in ("tensorrt", "tensorrt-rtx"):
        return open_plan(data, about)
    sys.exit(f"This program runs ONNX graphs and plans, not engines of {about['target']}. {about['runs_with']}")


def open_graph(data: bytes) -> Run:
    """By onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (taken,) = session.get_inputs()
    return lambda images: dict(zip(names, session.run(names, {taken.name: images}), strict=True))


def open_plan(data: bytes, about: dict[str, Any]) -> Run:
    """By tensorrt or tensorrt_rtx, on the current GPU; copies with the CUDA runtime through ctypes. Not executed."""
    if about["target"] == "tensorrt":
        import tensorrt as trt
    else:
        import tensorrt_rtx as trt
    library = next(filter(None, map(loaded, ("libcudart.so.13", "libcudart.so.12", "libcudart.so"))), None)
    if library is None:
        sys.exit("The CUDA runtime is missing: libcudart.so.13 or libcudart.so.12 was not found.")
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        built, gpus = about["library"], ", ".join(about["compute_capabilities"])
        sys.exit(f"The plan does not run here. It was built with {built['name']} {built['version']} for {gpus}.")
    context = engine.create_execution_context()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        taken, outputs, pointers = about["inputs"][0]["name"], dict[str, np.ndarray](), dict[str, ctypes.c_void_p]()
        context.set_input_shape(taken, images.shape)
        arrays = {taken: images}

        def address(name: str) -> int:
            return pointers[name].value or 0

        for tensor in about["outputs"]:
            shape = tuple(context.get_tensor_shape(tensor["name"]))
            outputs[tensor["name"]] = arrays[tensor["name"]] = np.empty(shape, tensor["dtype"])
        try:
            for name, array in arrays.items():
                pointers[name] = ctypes.c_void_p()
                check(library.cudaMalloc(ctypes.byref(pointers[name]), ctypes.c_size_t(array.nbytes)))
                context.set_tensor_address(name, address(name))
            copy(library, address(taken), images.ctypes.data, images.nbytes, 1)  # 1: host to device
            if not context.execute_async_v3(0):  # stream 0: the copies below wait for it
                sys.exit("TensorRT failed to execute the plan.")
            for name, array in outputs.items():
                copy(library, array.ctypes.data, address(name), array.nbytes, 2)  # 2: device to host
        finally:
            for pointer in pointers.values():
                library.cudaFree(pointer)
        return outputs

    run.kept = (logger, runtime, engine)  # type: ignore[attr-defined] # the context needs them
    return run


def loaded(name: str) -> Any:
    """A shared library, or None."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def copy(library: Any, to: int, source: int, size: int, kind: int) -> None:
    """Copy `size` bytes from one address to another with the CUDA runtime."""
    check(library.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind))


def check(status: int) -> None:
    """Stop where CUDA reports an error."""
    if status:
        sys.exit(f"CUDA failed with error {status}.")


def tell(outputs: dict[str, np.ndarray], about: dict[str, Any], top: int = 5) -> None:
    """Print the most likely classes, and the range of every other output."""
    for tensor in about["outputs"]:
        values = outputs[tensor["name"]][0]
        if tensor["role"] != "logits":
            print(f"  {tensor['name']} {values.shape}: {values.min():.4g} to {values.max():.4g}")
            continue
        weights = np.exp(values.astype(np.float64) - values.max())
        for index in np.argsort(-values, kind="stable")[:top]:
            name = about["class_names"][index] if about["class_names"] else str(index)
            print(f"  {100 * weights[index] / weights.sum():6.2f} %  {name}")


def main() -> None:
    """Read the description, check the engine, run it on every image."""
    parser = argparse.ArgumentParser(description="Classify images with an engine that `pcn-compile extract` wrote.")
    parser.add_argument("description", type=Path, help="the JSON file beside the engine")
    parser.add_argument("images", nargs="+", help="image files")
    asked = parser.parse_args()
    about = json.loads(asked.description.read_text(encoding="utf-8"))
    if about["schema"] != 1:
        sys.exit(f"{asked.description} has schema {about['schema']}; this program reads schema 1.")
    data = (asked.description.parent / about["file"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        sys.exit(f"{about['file']} is not the engine that {asked.description} describes. Do not use it.")
    run = open_engine(data, about)
    smallest = about["batch"]["min"]
    for path in asked.images:
        images = preprocess(path, about["preprocessing"])
        print(path)
        tell(run(np.repeat(images, smallest, axis=0)), about)


if __name__ == "__main__":
    main()

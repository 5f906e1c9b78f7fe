"""The smallest variant of 67 families of timm, FP16 and INT8, beside `torch.onnx.export` and ModelOpt.

Usage: make timm-families, or
       .venv-timm/bin/python benchmarks/timm_families.py [--only NAME ...] [--side ours|public] [--again]
                                                         [--markdown FILE] [--limit SECONDS] [--jobs N]

Random weights, every scale drawn, BatchNorm with statistics of images (timm_network.py); the smallest images that each
network takes, so that it is affordable. SQNR is that of what the images change in the logits, against the eager
network, on crops of parts of the photographs that did not calibrate. Products are counted in the graphs; those with one
row, as in squeeze-and-excitation or for a class token, stay in floating point here, and are named beside them.

Each network runs in processes of its own with a limit of time, on as many cores as OMP_NUM_THREADS says; --jobs N runs
N at a time. Results are kept as lines of JSON, so that a killed run goes on where it was; --again forgets those of the
networks at hand.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "out" / "timm_families.jsonl"
PUBLIC_PYTHON = HERE.parent / ".venv-public" / "bin" / "python"

NETWORKS = {
    "resnet10t": 96,
    "resnext26ts": 96,
    "seresnet18": 96,
    "resnest14d": 96,
    "res2net50_26w_4s": 96,
    "skresnet18": 96,
    "regnetx_002": 96,
    "densenet121": 96,
    "efficientnet_b0": 96,
    "tf_efficientnet_b0": 96,
    "mobilenetv2_035": 96,
    "mobilenetv3_small_050": 96,
    "mobilenetv4_conv_small_035": 96,
    "mnasnet_small": 96,
    "ghostnet_050": 96,
    "repvgg_a0": 96,
    "mobileone_s0": 96,
    "convnext_atto": 96,
    "convnextv2_atto": 96,
    "nf_regnet_b0": 96,
    "resnetv2_50x1_bit": 64,
    "vit_tiny_patch16_224": 96,
    "deit_tiny_distilled_patch16_224": 96,
    "beit_base_patch16_224": 96,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_cr_tiny_224": 224,
    "levit_128s": 224,
    "xcit_nano_12_p16_224": 96,
    "cait_xxs24_224": 96,
    "coat_tiny": 128,
    "coatnet_pico_rw_224": 128,
    "maxvit_pico_rw_256": 256,
    "mobilevit_xxs": 128,
    "mobilevitv2_050": 128,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "edgenext_xx_small": 128,
    "fastvit_t8": 128,
    "poolformer_s12": 96,
    "hrnet_w18_small": 96,
    "inception_v3": 96,
    "legacy_xception": 96,
    "dla46x_c": 96,
    "vgg11_bn": 64,
    "dpn48b": 96,
    "cspresnet50": 96,
    "darknet17": 96,
    "gernet_s": 96,
    "hardcorenas_b": 96,
    "lcnet_035": 96,
    "tinynet_e": 96,
    "visformer_tiny": 224,
    "twins_svt_small": 224,
    "pvt_v2_b0": 128,
    "pit_ti_224": 224,
    "crossvit_tiny_240": 240,
    "convmixer_768_32": 64,
    "mixer_s32_224": 224,
    "resmlp_12_224": 96,
    "gmlp_ti16_224": 96,
    "volo_d1_224": 96,
    "sequencer2d_s": 96,
    "focalnet_tiny_srf": 96,
    "davit_tiny": 224,
    "tiny_vit_5m_224": 224,
    "eva02_tiny_patch14_224": 112,
    "repvit_m0_9": 128,
}
"""Resolution in pixels of each network."""

Result = dict[str, Any]
Key = tuple[str, str, str]
"""Network, side, precision."""


def load() -> dict[Key, Result]:
    """The results so far; of several of one kind, the last."""
    if not RESULTS.exists():
        return {}
    rows = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {(row["name"], row["side"], row["precision"]): row for row in rows}


def keep(name: str, side: str, jobs: int, result: Result) -> None:
    """Append a result, which was measured with so many networks at a time."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, "side": side, "jobs": jobs, **result}) + "\n")


def execute(command: list[str], limit: float, log: Path) -> Iterator[Result]:
    """The results that a child prints; one without precision tells how it ended, if not well."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=limit)
            output, ended = done.stdout, f"exit {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            ended = f"not finished after {time.monotonic() - started:.0f} s"
    yield from (json.loads(line) for line in output.splitlines() if line.startswith('{"precision"'))
    if ended != "exit 0":
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        yield {"failure": " ".join([ended, *last])[:300]}


def run_side(name: str, resolution: int, side: str, limit: float, jobs: int) -> None:
    """Run one side of one network, and keep a result for each precision whatever happens."""
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, str(HERE / "timm_build.py"), "ours", name, str(resolution), folder]
        commands = [own]
        if side == "public":
            own[2] = "export"
            commands.append([str(PUBLIC_PYTHON), str(HERE / "timm_rival.py"), folder])
        exported, missing, ended = 0.0, ["fp16", "int8"], "no result"
        for command in commands:
            for result in execute(command, limit, Path(folder, "log.txt")):
                ended = result.get("refusal") or result.get("failure") or ended
                if result.get("precision") == "fp32":
                    exported = result.get("seconds", 0.0)
                elif "precision" in result:
                    missing.remove(result["precision"])
                    if "seconds" in result:
                        result["seconds"] = round(result["seconds"] + exported, 1)
                    keep(name, side, jobs, result)
            if side == "public" and not exported:
                break
        for precision in missing:
            keep(name, side, jobs, {"precision": precision, "refusal" if side == "public" else "failure": ended})


def cell(result: Result | None, precision: str) -> str:
    """Seconds, SQNR, products; or the refusal."""
    if result is None:
        return "not run"
    wrong = result.get("refusal") or result.get("failure")
    if wrong:
        wrong = re.sub(r"\S*/site-packages/", "", wrong)  # where this machine keeps its packages
        return f"{'refused' if 'refusal' in result else 'FAILED'}: {wrong[:110]}".replace("|", "\\|")
    verdict = "" if result.get("passed", True) else ", parity failed"
    numbers = f"{result['seconds']:.0f} s{'†' if result.get('jobs', 1) > 1 else ''}, {result['db']:.1f} dB"
    if precision == "int8":
        numbers += f", {result['int8']} of {result['products']}"
        if result["int8_depthwise"]:
            numbers += f" ({result['int8_depthwise']} depthwise)"
        if result.get("vectors"):
            numbers += f" ({result['vectors']} of one row)"
    return numbers + verdict


def table(results: dict[Key, Result]) -> str:
    """Markdown: one row for each network, and what is wanted below."""
    sides = [(side, precision) for side in ("ours", "public") for precision in ("fp16", "int8")]
    lines = [
        "| network | pixels | FP16 | INT8: seconds, SQNR, products | ModelOpt FP16 | ModelOpt INT8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, resolution in NETWORKS.items():
        cells = [cell(results.get((name, side, precision)), precision) for side, precision in sides]
        lines.append(f"| {name} | {resolution} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *summary(results)]) + "\n"


def summary(results: dict[Key, Result]) -> list[str]:
    """How many networks build in both precisions, and have no fewer products in INT8 than the rival."""
    both, passed, fewer, compared = 0, 0, [], 0
    for name in NETWORKS:
        found = [results.get((name, "ours", precision), {}) for precision in ("fp16", "int8")]
        both += all("db" in result for result in found)
        passed += all(result.get("passed", False) for result in found)
        rival = results.get((name, "public", "int8"), {})
        if "db" in found[1] and "db" in rival:
            compared += 1
            if dense(found[1]) + found[1].get("vectors", 0) < dense(rival):
                fewer.append(f"{name} ({dense(found[1])} and {found[1].get('vectors', 0)} of one row, {dense(rival)})")
    return [
        f"{both} of {len(NETWORKS)} networks build in both precisions ({100 * both / len(NETWORKS):.0f} %), "
        f"{passed} with parity passed in both: random weights enlarge rounding more than trained ones.",
        "",
        f"Both sides have an INT8 graph of {compared} networks. Fewer products in INT8 than ModelOpt there, depthwise "
        f"convolutions and products of one row apart: {', '.join(fewer) or 'none'}.",
        "",
        "† Several networks at a time on another machine (16 cores): these seconds compare with nothing.",
    ]


def dense(result: Result) -> int:
    """Products in INT8 that are no depthwise convolutions."""
    return int(result["int8"] - result["int8_depthwise"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FP16 and INT8 of timm's families, beside ModelOpt.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks")
    parser.add_argument("--side", choices=("ours", "public"), help="one side only")
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of all results so far")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="networks at a time (default 1)")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="of each process (default 900)")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(NETWORKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(NETWORKS)}")
    return options


def main() -> None:
    options = parse()
    sides = [options.side] if options.side else ["ours", "public"]
    if "public" in sides and not PUBLIC_PYTHON.exists():
        sys.exit(f"There is no {PUBLIC_PYTHON}: make .venv-public/.done, or --side ours")
    done = {} if options.again else load()

    def run(name: str, side: str) -> None:
        run_side(name, NETWORKS[name], side, options.limit, options.jobs)
        cells = [cell(load().get((name, side, precision)), precision) for precision in ("fp16", "int8")]
        print(f"{name} {side}: {' | '.join(cells)}", flush=True)

    wanted = [(name, side) for name in options.only or NETWORKS for side in sides]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(run, *which) for which in wanted if (*which, "int8") not in done]
    for finished in runs:
        finished.result()
    if options.markdown:
        options.markdown.write_text(table(load()), encoding="utf-8")


if __name__ == "__main__":
    main()

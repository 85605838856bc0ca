"""Peak memory and time of importing networks of ViT-L's size, beside read + hash + write alone.

    python -m benchmarks.convert_clip_l14
    python -m benchmarks.convert_clip_l14 --styles=timm_vit,hf_dinov3 --dtype=bfloat16

The first writes a synthetic `ViT-L-14.pt` with the real structure and size (0.93 GB, TorchScript,
float16) into a temporary folder, the second a float32 safetensors file of ViT-L's width and depth
in the names of each style (`all` for all; Swin-L and ConvNeXt-L where they have stages). Measured
in new processes, one after the other and as often as `--repeats` says: (a) the Python imports
alone; (b) the import command; (c) reading the file, computing its SHA-256, and writing the same
tensors with Orbax. Time is that of the clock and of the processor (user + system), since the
machine may have other work. Memory is the peak resident set, which includes mapped pages of the
file, and its anonymous part. `--together` measures (b) and (c) in one process, and time alone.
"""

import argparse
import json
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import textwrap
from typing import Any, NamedTuple

SOURCE = "openai_clip_vit_l14"

WRITE = """
from tests.convert import synthetic
from pathlib import Path
given = synthetic.structure({source!r}, small=False)
synthetic.write(given, synthetic.values(given), Path({folder!r}))
"""
WRITE_STYLE = (
    "from benchmarks import convert_clip_l14; convert_clip_l14.write({style!r}, {folder!r})"
)

# Runs the code below it and prints seconds, seconds of the processor, highest resident bytes and
# highest anonymous bytes.
MEASURED = """
import json, re, resource, threading, time
from fd_jax.convert import cli, importing
from fd_jax.convert.containers import opening
from fd_jax import checkpoint
from etils import epath
import jax
jax.config.update("jax_platforms", "cpu")
jax.devices()
anonymous, done = 0, threading.Event()
def watch():
    global anonymous
    while not done.wait(0.01):
        text = open("/proc/self/status").read()
        anonymous = max(anonymous, int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024)
def processor():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
thread = threading.Thread(target=watch, daemon=True)
thread.start()
{setup}
start, before = time.perf_counter(), processor()
{code}
seconds, cpu = time.perf_counter() - start, processor() - before
time.sleep(0.05)
done.set(); thread.join()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([seconds, cpu, peak, anonymous]))
"""

IMPORT = "importing.import_file({source!r}, {path!r}, {output!r}, facts={facts!r}, dtype={dtype!r})"
# For the yardstick, converting the tensors is not timed; reading, hashing and writing are.
YARDSTICK_SETUP = (
    "params = importing.read({source!r}, {path!r}, facts={facts!r}, dtype={dtype!r}).params"
)
YARDSTICK = """
with open({path!r}, "rb") as stream:
    while stream.read(1 << 22):
        pass
opening.open_container({path!r}).sha256()
checkpoint.save_tree(epath.Path({output!r}), params)
"""

# The same pairs in one process, without memory: it saves what Python and JAX take to start.
PAIRS = """
import json, resource, shutil, time
from fd_jax.convert import importing
from fd_jax.convert.containers import opening
from fd_jax import checkpoint
from etils import epath
import jax
jax.config.update("jax_platforms", "cpu")
{setup}
def bare():
{yardstick}
def whole():
    {code}
def timed(call):
    used = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree({output!r})
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return time.perf_counter() - start, cpu
timed(bare)  # starts what Orbax starts once
print(json.dumps([[timed(whole), timed(bare)] for _ in range({repeats})]))
"""


class Cost(NamedTuple):
    """What code took: seconds of the clock and of the processor, peak bytes."""

    seconds: float
    cpu: float
    resident: int
    anonymous: int


def measure(code: str, setup: str = "") -> Cost:
    """Runs code in a new process."""
    script = MEASURED.format(setup=setup, code=code)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return Cost(*json.loads(run.stdout.splitlines()[-1]))


# --- files of ViT-L's size in the names of a style

_L: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "mlp_width": 4096,
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "layer_scale": None,
    "qkv_bias": "qkv",
    "patch_bias": True,
}
_SCALED = {"layer_scale": 1.0}
_BEIT = {"position": "rpb", "qkv_bias": "qv", **_SCALED}
_ROTARY = {"position": "rope", "rope_theta": 100.0, "registers": 4, "qkv_bias": "qv"}
_DINOV3 = {**_ROTARY, **_SCALED, "norm_eps": 1e-5}
_GATED = {"gated_mlp": True, "activation": "silu", "mlp_width": 2736}
_SWIN: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 4,
    "embed_width": 192,
    "depths": [2, 2, 18, 2],
    "heads": [6, 12, 24, 48],
    "window": 7,
    "mlp_ratio": 4,
    "activation": "gelu_erf",
    "norm_eps": 1e-5,
    "final_norm": True,
}
_V2 = {"position": "rpb", "pretrained_windows": [0] * 4, "residual_scale": 0, "extra_norm_every": 0}
_CONVNEXT: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 4,
    "widths": [192, 384, 768, 1536],
    "depths": [3, 3, 27, 3],
    "kernel_size": 7,
    "grn": False,
    "layer_scale": 1e-6,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "final_norm": False,
    "final_norm_eps": None,
}
_CONVNEXT_V2 = {**_CONVNEXT, "grn": True, "layer_scale": None}
# style, with the variant of its names after a colon -> architecture
STYLES: dict[str, dict[str, Any]] = {
    "openai_clip": {**_L, "ln_pre": True, "patch_bias": False, "norm_eps": 1e-5},
    "hf_clip": {**_L, "ln_pre": True, "patch_bias": False, "norm_eps": 1e-5},
    "hf_siglip": {**_L, "cls_token": False},
    "timm_vit": _L,
    "timm_vit:packed": {**_L, **_GATED, **_SCALED},
    "hf_vit": _L,
    "dinov2_hub": {**_L, **_SCALED},
    "dinov2_hub:packed": {**_L, **_SCALED, **_GATED},
    "hf_dinov2": {**_L, **_SCALED},
    "dinov3_hub": {**_L, **_DINOV3},
    "hf_dinov3": {**_L, **_DINOV3},
    "timm_eva": {**_L, **_DINOV3},
    "timm_eva:split+gated": {**_L, **_DINOV3, **_GATED, "mlp_norm": True},
    "timm_beit": {**_L, **_BEIT},
    "hf_beit": {**_L, **_BEIT},
    "timm_swin": _SWIN,
    "microsoft_swin": _SWIN,
    "hf_swin": _SWIN,
    "timm_swin_v2": {**_SWIN, **_V2},
    "microsoft_swin_v2": {**_SWIN, **_V2},
    "hf_swinv2": {**_SWIN, **_V2},
    "timm_convnext": _CONVNEXT,
    "timm_convnext:convolved": _CONVNEXT,
    "hf_convnext": _CONVNEXT,
    "hf_convnextv2": _CONVNEXT_V2,
    "hf_dinov3_convnext": {**_CONVNEXT, "final_norm": True},
    "meta_convnext": _CONVNEXT,
}
# Tensors that a style is recognised by and no network here has.
_MARKS = {"dinov2_hub": {"mask_token": (1, 1024)}, "dinov3_hub": {"mask_token": (1, 1024)}}


def write(style: str, folder: str) -> None:
    """Writes model.safetensors in the names of a style; tensors are views of the same noise."""
    import numpy as np

    from fd_jax.convert import families
    from fd_jax.convert.containers import safetensors_io
    from fd_jax.convert.layout import held
    from fd_jax.convert.networks import shapes
    from fd_jax.convert.rules.matching import invert
    from fd_jax.models.spec import ModelSpec

    name, _, variant = style.partition(":")
    spec = ModelSpec(families.STYLES[name].network, STYLES[style])
    sizes = {k: v for k, v in shapes(spec).items() if k.startswith("encoder/")}
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    params = {path: noise[: np.prod(size)].reshape(size) for path, size in sizes.items()}
    table = held(families.STYLES[name].tables[variant], spec, set(params))
    tensors = dict(invert(table, params, spec.arch, derived=name == "dinov3_hub"))
    tensors |= {mark: np.zeros(shape, np.float32) for mark, shape in _MARKS.get(name, {}).items()}
    safetensors_io.write(Path(folder) / "weights.safetensors", tensors, {"format": "pt"})


def facts(style: str) -> list[str]:
    """What no tensor tells of the file of a style, as `--fact` takes it."""
    from fd_jax.convert.facts import STATED

    values = {name: value for name, value in STYLES[style].items() if value is not None}
    values |= {"mean": [0.5] * 3, "std": [0.5] * 3, "position_resize": "antialias"}
    values |= {
        "rope_pairs": "halves",
        "rope_offset": 0.0,
        "rope_axes": "yx",
        "rope_reference": None,
    }
    if style.startswith("dinov2_hub"):
        values["position_resize"] = "offset_0.1"  # as its code has it
    return [
        f"{name}={_text(values[name])}"
        for name in STATED
        if name in values
        and (not name.startswith("rope_") or "rope_theta" in values)
        and not (name == "activation" and style.startswith(("dinov2_hub", "dinov3_hub", "meta_")))
    ]


def _text(value: Any) -> str:
    """The value of a fact, as `--fact` takes it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# --- the comparison


def compare(names: dict[str, Any], base: Cost, folder: Path, repeats: int) -> None:
    """Imports and writes by turns, and prints the medians and the ratios of the pairs."""
    size = Path(names["path"]).stat().st_size
    rows: dict[str, list[Cost]] = {"import": [], "yardstick": []}
    for _ in range(repeats):
        for name, code, setup in (
            ("import", IMPORT, ""),
            ("yardstick", YARDSTICK, YARDSTICK_SETUP),
        ):
            output = folder / "output"
            given = {**names, "output": str(output)}
            rows[name].append(measure(code.format(**given), setup.format(**given)))
            written = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
            shutil.rmtree(output)
    for name, costs in rows.items():
        peak = max(cost.resident for cost in costs) - base.resident
        anonymous = max(cost.anonymous for cost in costs) - base.anonymous
        print(
            f"  {name}: median {_median([c.seconds for c in costs]):.1f} s, processor "
            f"{_median([c.cpu for c in costs]):.1f} s; above the imports: resident "
            f"{peak / size:.2f} x file, anonymous {anonymous / size:.2f} x file"
        )
    pairs = list(zip(*rows.values(), strict=True))
    seconds = sorted(one.seconds / other.seconds for one, other in pairs)
    cpu = sorted(one.cpu / other.cpu for one, other in pairs)
    print(
        f"  import / yardstick: {_spread(seconds)} of the clock, {_spread(cpu)} of the processor; "
        f"written {written / size:.2f} x file",
        flush=True,
    )


def together(names: dict[str, Any], folder: Path, repeats: int) -> None:
    """Imports and writes by turns in one process, and prints the medians and the ratios."""
    given = {**names, "output": str(folder / "output")}
    yardstick = textwrap.indent(YARDSTICK.format(**given).strip(), "    ")
    code, setup = IMPORT.format(**given), YARDSTICK_SETUP.format(**given)
    parts = {"setup": setup, "yardstick": yardstick, "code": code, "repeats": repeats}
    script = PAIRS.format(**parts, output=given["output"])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    pairs = json.loads(run.stdout.splitlines()[-1])
    for column, what in enumerate(("the clock", "the processor")):
        ours, bare = ([pair[i][column] for pair in pairs] for i in (0, 1))
        ratios = sorted(one / other for one, other in zip(ours, bare, strict=True))
        print(
            f"  {what}: import {_median(ours):.1f} s, read + hash + write {_median(bare):.1f} s, "
            f"ratio {_spread(ratios)}",
            flush=True,
        )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: list[float]) -> str:
    return f"{_median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def main() -> None:
    """Measures and prints the figures in the docs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--styles", default="", help="names with commas, or all; default: CLIP")
    parser.add_argument("--dtype", default="float32", help="to store")
    parser.add_argument("--together", action="store_true", help="time alone, in one process")
    arguments = parser.parse_args()
    chosen = list(STYLES) if arguments.styles == "all" else arguments.styles.split(",")
    base = Cost(0, 0, 0, 0) if arguments.together else measure("pass")
    if not arguments.together:
        print(f"imports alone: {base.resident:,} bytes resident, {base.anonymous:,} anonymous")
    for style in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            path = folder / ("weights.safetensors" if style else "model.pt")
            script = WRITE_STYLE if style else WRITE
            script = script.format(style=style, source=SOURCE, folder=name)
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
            print(f"{style or SOURCE}: {path.stat().st_size:,} bytes")
            names = {
                "source": style.partition(":")[0] or SOURCE,
                "path": str(path),
                "facts": facts(style) if style else (),
                "dtype": arguments.dtype,
            }
            if arguments.together:
                together(names, folder, arguments.repeats)
            else:
                compare(names, base, folder, arguments.repeats)


if __name__ == "__main__":
    main()

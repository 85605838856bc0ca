"""One measurement of benchmarks.gpu in its own process; prints rows of JSON on standard output.

A separate process has the GPU's memory to itself, reports its own peak memory, and does not take
the other measurements down if a kernel crashes. It is called by benchmarks.gpu, not by hand.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROUNDS = 5
WARM_UP = 3  # steps: allocation, caches, clocks
ACCURACY_BATCH = 16
ACCURACY_DEPTH = 2  # blocks: enough to show rounding errors, and compiles in a sixth of the time
KERNELS_SHOWN = 40
TRACED_STEPS = 3

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
      part: "device", "accuracy", "fd_jax", "torch" or "flags".
      model: "b" or "l".
      batch: images per step.
      choice: fd_jax's implementation of attention; for PyTorch "eager" or "compile".
      xla_flags: flags to measure, in addition to those of every run; "" for none.
      toy: shrinks networks and pictures so that a CPU takes seconds.
      round_seconds: duration of each timed round.
      profile: folder for a trace; "" for none.
    """

    part: str
    model: str
    batch: int
    choice: str = ""
    xla_flags: str = ""
    toy: bool = False
    round_seconds: float = 1.0
    profile: str = ""


def main() -> None:
    """Runs the job that the only argument describes, and prints its rows as they are ready."""
    job = Job(**json.loads(sys.argv[1]))
    parts = {
        "device": device,
        "accuracy": accuracy,
        "fd_jax": fd_jax_step,
        "flags": fd_jax_step,
        "torch": torch_step,
    }
    for row in refusals_as_rows(parts[job.part](job)):
        print("ROW " + json.dumps(row), flush=True)


def refusals_as_rows(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; a setting that this machine does not support is a row as well, not a failure."""
    try:
        yield from rows
    except ValueError as error:
        if not type(error).__module__.startswith("fd_jax"):
            raise
        yield {"status": f"refused: {error}"}


def device(job: Job) -> Iterator[dict[str, Any]]:
    """The platform and the device that jax computes on."""
    del job
    import jax

    first = jax.devices()[0]
    yield {"platform": first.platform, "device": first.device_kind}


def accuracy(job: Job) -> Iterator[dict[str, Any]]:
    """Loss and gradients of each implementation in bfloat16 against XLA's in float32."""
    import jax

    from fd_jax.errors import ConfigError
    from fd_jax.models import kernels

    images = pictures(job, job.batch)
    with jax.default_matmul_precision("highest"):
        loss, grads = _loss_and_gradients(job, images, "xla", "float32")
    for choice in kernels.IMPLEMENTATIONS:
        row = {"choice": choice, "dtype": "bfloat16"}
        try:
            got_loss, got = _loss_and_gradients(job, images, choice, "bfloat16")
        except ConfigError as error:
            yield {**row, "status": f"refused: {error}"}
            continue
        except Exception as error:  # any error of a library that has never run on this GPU
            yield {**row, "status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
            continue
        table = "encoder/rel_pos_bias/table"
        yield {
            **row,
            "status": "ok",
            "loss_error": abs(got_loss - loss) / abs(loss),
            "gradient_error": _distance(got, grads),
            "bias_gradient_error": _distance({0: got[table]}, {0: grads[table]}),
        }


def _loss_and_gradients(job, images, choice, dtype) -> tuple[float, dict[str, np.ndarray]]:
    import jax

    from benchmarks import jax_step

    task, _ = define(job, choice, dtype=dtype, depth=ACCURACY_DEPTH)
    params, extra = jax.jit(task.init)(jax.random.key(1))
    # Tables start at zero, where leaving the bias out would not be noticed.
    table = params["encoder"]["rel_pos_bias"]["table"]
    params["encoder"]["rel_pos_bias"]["table"] = jax.random.normal(jax.random.key(2), table.shape)
    frozen = jax.tree.map(jax.numpy.asarray, jax_step.random_weights(task.abstract_frozen()))
    host_batch = jax_step.host_batch(images)
    del host_batch["stop"]  # the loop's own
    batch = jax.jit(task.prepare)(host_batch, jax.random.key(3))
    (loss, _), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, extra, frozen, batch
    )
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return float(loss), dict(zip(names, (np.asarray(leaf) for _, leaf in leaves), strict=True))


def _distance(got: dict, want: dict) -> float:
    """Norm of the difference divided by the norm of the expected values, over all arrays."""
    off = sum(float(np.sum(np.square(got[k].astype(np.float64) - want[k]))) for k in want)
    return (off / sum(float(np.sum(np.square(want[k].astype(np.float64)))) for k in want)) ** 0.5


def fd_jax_step(job: Job) -> Iterator[dict[str, Any]]:
    """Images per second, MFU, memory and compile time of the train step."""
    import jax

    from benchmarks import jax_step
    from fd_jax.cost import hardware

    task, config = define(job, job.choice, dtype="float32" if job.toy else "bfloat16")
    step = jax_step.distillation(task, config, pictures(job, job.batch))
    device = jax.devices()[0]
    measured = timed(lambda count: _run(step, count, jax.block_until_ready), job)
    chip = hardware.find_chip(device.device_kind)
    memory = step.compiled.memory_analysis()
    stats = device.memory_stats() or {}
    work = task.flops().model
    yield {
        "device": device.device_kind,
        "compile_seconds": step.compile_seconds,
        "flops_per_image": work,
        "mfu": measured["images_per_second"] * work / chip.bf16_flops if chip else None,
        "peak_gib": stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None,
        "program_gib": (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        / GIB,
        **measured,
    }
    if job.profile:
        yield {"profile": profile(step, pathlib.Path(job.profile), f"{job.model}_{job.choice}")}


def torch_step(job: Job) -> Iterator[dict[str, Any]]:
    """The same measurements of PyTorch's step, eager or compiled."""
    import torch

    from benchmarks import torch_step as steps

    device = "cpu" if job.toy else "cuda"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    shape = steps.VIT_B16 if job.model == "b" else steps.VIT_L14
    if job.toy:
        shape = steps.Shape(image=32, patch=8, width=48, depth=2, heads=4, drop_path=0.2)
    step = steps.Step(shape, device=device, compiled=job.choice == "compile")
    images = torch.from_numpy(pictures(job, job.batch)).to(device)
    began = time.monotonic()
    step(images).item()
    compile_seconds = time.monotonic() - began
    if not job.toy:
        torch.cuda.reset_peak_memory_stats()
    measured = timed(lambda count: _run(lambda: step(images), count, torch.Tensor.item), job)
    yield {
        "device": "cpu" if job.toy else torch.cuda.get_device_name(),
        "compile_seconds": compile_seconds,
        "peak_gib": None if job.toy else torch.cuda.max_memory_allocated() / GIB,
        **measured,
    }


def define(job: Job, choice: str, *, dtype: str, depth: int = 0):
    """The distillation of the paper's ViT-B/16 or ViT-L/14, and its config.

    Args:
      job: gives the model and the batch size.
      choice: implementation of attention.
      dtype: dtype of the computation.
      depth: number of blocks in both networks; 0 for the real number.
    """
    from configs import distill_clip_vit_b16, distill_clip_vit_l14
    from fd_jax.convert import families
    from fd_jax.tasks.distill import DistillTask

    config = {"b": distill_clip_vit_b16, "l": distill_clip_vit_l14}[job.model].get_config()
    config.update(batch_size=job.batch, dtype=dtype, attention=choice)
    source = families.get(config.teacher.source)
    spec = source.parts[source.default_part].spec
    changes: dict[str, Any] = {"depth": depth} if depth else {}
    if job.toy:
        changes |= {"image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 4}
        changes["mlp_width"] = 192
        config.data.image_size = 32
    config.student.arch.update(changes)
    spec = dataclasses.replace(spec, arch=spec.arch | changes)
    return DistillTask(config, teacher_spec=spec), config


def pictures(job: Job, batch: int) -> np.ndarray:
    """Random pictures. -> [B, H, W, 3] uint8"""
    side = 32 if job.toy else 224
    return np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)


def _run(step: Callable[[], Any], count: int, wait: Callable[[Any], Any]) -> None:
    """Starts `count` updates one after the other and waits for the last one."""
    result = None
    for _ in range(count):
        result = step()
    wait(result)


def timed(run: Callable[[int], None], job: Job) -> dict[str, Any]:
    """Images per second over rounds of about `round_seconds`: median, least and most."""
    run(WARM_UP)
    began = time.monotonic()
    run(WARM_UP)
    one = (time.monotonic() - began) / WARM_UP
    steps = max(1, round(job.round_seconds / one))
    rates = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        run(steps)
        rates.append(steps * job.batch / (time.monotonic() - began))
    return {
        "images_per_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "steps": ROUNDS * steps,
    }


def profile(step: Callable[[], Any], folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """Traces some steps into `folder` and lists the kernels that take the most time.

    Returns:
      [{"kernel", "ms" per step, "calls" per step}], the longest first.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as trace:
        jax.block_until_ready(step())
        jax.profiler.start_trace(trace, profiler_options=options)
        _run(step, TRACED_STEPS, jax.block_until_ready)
        jax.profiler.stop_trace()
        written = sorted(pathlib.Path(trace).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(written[0]))
        folder.mkdir(parents=True, exist_ok=True)
        for file in pathlib.Path(trace).rglob("*.trace.json.gz"):
            (folder / f"{name}.trace.json.gz").write_bytes(file.read_bytes())
    return longest_kernels(data)


def longest_kernels(data: Any) -> list[dict[str, Any]]:
    """Sums the events of the device's lines, or of the host's lines if there is no device."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    totals: dict[str, list[float]] = {}
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # other lines group the same kernels by module and operation
            for event in line.events:
                total = totals.setdefault(event.name, [0.0, 0.0])
                total[0] += event.duration_ns / 1e6 / TRACED_STEPS
                total[1] += 1 / TRACED_STEPS
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])[:KERNELS_SHOWN]
    return [{"kernel": name, "ms": ms, "calls": calls} for name, (ms, calls) in ordered]


if __name__ == "__main__":
    main()

"""A plan as lines for a terminal and as JSON."""

from collections.abc import Iterable
import math
from typing import Any

import jax

from fd_jax.plan import hlo
from fd_jax.plan.bounds import Bounds
from fd_jax.plan.compiled import Compiled, DoesNotFitError
from fd_jax.plan.experiment import Experiment
from fd_jax.plan.topology import Slice

GIB = 2**30
_WIDTH = len("compiler's estimate") + 2


def run_facts(experiment: Experiment, target: Slice, mesh_shape: dict[str, int]) -> dict[str, Any]:
    """The facts of a plan that are known before anything is compiled."""
    config = experiment.config
    work = experiment.work
    params, _ = jax.eval_shape(experiment.task.init, jax.random.key(0))
    return {
        "topology": target.name,
        "chips": target.chips,
        "devices": len(target.devices),
        "mesh": mesh_shape,
        "batch_size": config.batch_size,
        "image_sizes": list(experiment.resolutions.every),
        "accumulation": config.accumulation,
        "dtype": config.dtype,
        "remat": config.remat,
        "moments": config.optim.moments,
        "epochs": config.epochs,
        "total_steps": experiment.total_steps,
        "images_per_epoch": experiment.examples,
        "networks": dict(experiment.networks),
        "parameters": {
            "trained": _count(params),
            "frozen": _count(experiment.task.abstract_frozen()),
        },
        "flops_per_image": {
            "forward": work.forward,
            "backward": work.backward,
            "recomputed": work.recomputed,
            "narrow": dict(work.narrow),
            "closed_form": work.executed,
        },
    }


def fitting_facts(
    experiment: Experiment,
    target: Slice,
    compiled: Compiled,
    limits: Bounds,
    kernel_cycles: int = 0,
) -> dict[str, Any]:
    """The facts of a plan whose step compiled and fits into memory.

    Args:
      experiment: experiment that was planned.
      target: slice that it was planned for.
      compiled: its step.
      limits: bounds of the step.
      kernel_cycles: see `bounds.step_bounds`.
    """
    batch, devices = experiment.config.batch_size, len(target.devices)
    work = experiment.work
    by_compiler = compiled.flops * devices / batch
    matmuls, repeated = (f * devices / batch for f in compiled.module.matmul_flops())
    capacity = target.chip.hbm_bytes / target.devices_per_chip
    in_loops = bool(compiled.module.loops)
    return {
        "fits": True,
        "compile": {"seconds": round(compiled.seconds, 1), "effort": compiled.effort},
        "hbm_bytes_per_device": {
            "arguments": compiled.arguments,
            "outputs_not_aliased": compiled.outputs - compiled.aliased,
            "temporaries": compiled.temporaries,
            "code": compiled.code,
            "total": compiled.hbm,
            "capacity": capacity,
        },
        "compiler": {
            "loops": compiled.module.loops,
            "matmul_flops_per_image": matmuls,
            "repeated_matmul_flops_per_image": repeated,
            "matmuls_over_closed_form": (matmuls - repeated) / work.executed,
            "flops_per_image": None if in_loops else by_compiler,
            "flops_over_closed_form": None if in_loops else by_compiler / work.executed,
            "bytes_accessed_per_image": (
                None if in_loops else compiled.bytes_accessed * devices / batch
            ),
            "hbm_bytes_per_image": None if in_loops else compiled.hbm_traffic * devices / batch,
            "estimated_cycles": compiled.module.cycles() if compiled.effort == 0 else None,
            "kernels": {kernel.name: kernel.calls for kernel in compiled.module.kernels},
            "kernel_cycles": kernel_cycles,
        },
        "collectives": [hlo.to_json(c) for c in compiled.collectives],
        "bounds": {
            "compute_seconds": limits.compute,
            "hbm_seconds": limits.hbm,
            "interconnect_seconds": limits.interconnect,
            "limit": limits.limit,
            "images_per_second_at_most": limits.images_per_second,
            "images_per_second_per_chip_at_most": limits.images_per_second / target.chips,
            "mfu_at_most": limits.mfu,
            "chip_hours_at_least": limits.chip_hours,
        },
        "estimate": {
            "step_seconds": limits.estimated_seconds,
            "images_per_second_per_chip": (
                batch / limits.estimated_seconds / target.chips
                if limits.estimated_seconds
                else None
            ),
            "mfu": limits.estimated_mfu,
        },
    }


def not_fitting_facts(lacking: DoesNotFitError) -> dict[str, Any]:
    """The facts of a plan whose step does not fit, before anything else is tried."""
    return {
        "fits": False,
        "hbm_bytes_per_device": {
            "total": lacking.needed,
            "available": lacking.available,
            "temporaries_only": lacking.temporaries_only,
        },
        "over_by_bytes": lacking.needed - lacking.available,
        "tried": [],
        "remedy": None,
    }


def facts(plan: dict[str, Any]) -> str:
    """What a plan knows before anything is compiled, as lines for a terminal."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    counts, work = plan["parameters"], plan["flops_per_image"]
    rows = [
        ("slice", f"{plan['topology']}, {plan['chips']} chips, mesh {mesh}"),
        *((role, origin) for role, origin in plan["networks"].items()),
        (
            "run",
            f"{plan['total_steps']} steps of {plan['batch_size']} images, {plan['dtype']}"
            + (f", {plan['accumulation']} micro-batches" if plan["accumulation"] > 1 else "")
            + (f", remat {plan['remat']}" if plan["remat"] else ""),
        ),
        *_sizes_row(plan),
        ("parameters", f"{counts['trained']:,} trained, {counts['frozen']:,} frozen"),
        (
            "FLOPs per image",
            f"{work['closed_form'] / 1e9:.2f} G by closed form"
            + "".join(f", {f / 1e9:.2f} G of it in {kind}" for kind, f in work["narrow"].items()),
        ),
    ]
    return _lines(rows)


def _sizes_row(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Which of several image sizes is planned; nothing where there is one."""
    *smaller, largest = plan["image_sizes"]
    listed = ", ".join(map(str, smaller))
    text = f"{largest} px, the largest size, is planned; steps of {listed} px take less"
    return [("images", text)] if smaller else []


def outcome(plan: dict[str, Any]) -> str:
    """What the compiler says about the step of a plan, as lines for a terminal."""
    return _lines(_fitting_rows(plan) if plan["fits"] else _not_fitting_rows(plan))


def attempt(tried: dict[str, Any]) -> str:
    """One of the plan's attempts as a line for a terminal."""
    given = flags(tried["changes"])
    if tried["refused"]:
        return f"{given}: not possible, {tried['refused']}"
    verdict = "fits" if tried["fits"] else "helps" if tried["kept"] else "does not help"
    return f"{given}: {verdict}, {_gib(tried['hbm'])} per device"


def flags(changes: dict[str, Any]) -> str:
    """Changes of a config as command-line flags."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def _lines(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<{_WIDTH}}{value}".rstrip() for name, value in rows)


def _fitting_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    memory, compiler = plan["hbm_bytes_per_device"], plan["compiler"]
    bound, estimate = plan["bounds"], plan["estimate"]
    rows = [
        (
            "",
            f"{_once(compiler) / 1e9:.2f} G in the matmuls of the compiled step "
            f"({compiler['matmuls_over_closed_form']:.4f} of the closed form)"
            + _repeated(compiler),
        )
    ]
    if compiler["flops_per_image"] is None:
        trips = ", ".join(str(count) for count in compiler["loops"])
        rows.append(
            ("", f"no compiler counts: it counts loop bodies once, but they run {trips} times")
        )
    else:
        rows += [
            (
                "",
                f"{compiler['flops_per_image'] / 1e9:.2f} G by the compiler's count "
                f"({compiler['flops_over_closed_form']:.3f}), which includes norms, softmax and so "
                "on",
            ),
            (
                "bytes per image",
                f"{compiler['bytes_accessed_per_image'] / 1e6:.0f} MB accessed, of which "
                f"{compiler['hbm_bytes_per_image'] / 1e6:.0f} MB outside VMEM (compiler's count)",
            ),
        ]
    rows.append(
        (
            "HBM per device",
            f"{_gib(memory['total'])} of {_gib(memory['capacity'])}: arguments "
            f"{_gib(memory['arguments'])}, temporaries {_gib(memory['temporaries'])}, outputs "
            f"{_gib(memory['outputs_not_aliased'])}, code {_gib(memory['code'])}",
        )
    )
    for index, row in enumerate(plan["collectives"]):
        rows.append(
            (
                "" if index else "collectives",
                f"{row['count']} {row['kind']} over {row['axis'] or 'no axis'}, "
                f"{row['bytes'] / 1e6:.3g} MB {'+'.join(row['dtypes'])}",
            )
        )
    rows += [
        (
            "bounds of a step",
            f"compute {_ms(bound['compute_seconds'])}, HBM {_ms(bound['hbm_seconds'])}, "
            f"interconnect {_ms(bound['interconnect_seconds'])}: {bound['limit']} limits",
        ),
        (
            "at most",
            f"{bound['images_per_second_at_most']:,.0f} images/s, "
            f"{bound['images_per_second_per_chip_at_most']:,.0f} per chip, "
            f"MFU {bound['mfu_at_most']:.2f}",
        ),
        (
            "at least",
            f"{bound['chip_hours_at_least']:,.1f} chip-hours"
            + (" in matmuls, over all sizes" if len(plan["image_sizes"]) > 1 else ""),
        ),
    ]
    if estimate["step_seconds"]:
        rows.append(
            (
                "compiler's estimate",
                f"{_ms(estimate['step_seconds'])} a step, "
                f"{estimate['images_per_second_per_chip']:,.0f} images/s per chip, "
                f"MFU {estimate['mfu']:.2f} (not a measurement)",
            )
        )
        if plan["compiler"].get("kernel_cycles"):
            counted = f"{plan['compiler']['kernel_cycles'] / 1e6:.1f} M cycles"
            rows.append(("of which kernels", f"{counted}, the bundles of their code"))
    else:
        rows.append(("compiler's estimate", "none: cycles are only meaningful at full effort"))
    seconds, effort = plan["compile"]["seconds"], plan["compile"]["effort"]
    rows.append(("compiled in", f"{seconds} s at effort {effort:g}"))
    return rows


def _not_fitting_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    memory = plan["hbm_bytes_per_device"]
    counted = " in temporaries alone" if memory["temporaries_only"] else ""
    return [
        (
            "does not fit",
            f"{_gib(memory['total'])}{counted} of {_gib(memory['available'])} per device, "
            f"{_gib(plan['over_by_bytes'])} too much",
        )
    ]


def _once(compiler: dict[str, Any]) -> float:
    """FLOPs of the matmuls without repetitions."""
    return compiler["matmul_flops_per_image"] - compiler["repeated_matmul_flops_per_image"]


def _repeated(compiler: dict[str, Any]) -> str:
    repeated = compiler["repeated_matmul_flops_per_image"]
    if not repeated:
        return ""
    return f"; memory is short, so that the compiler repeats {repeated / 1e9:.2f} G"


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

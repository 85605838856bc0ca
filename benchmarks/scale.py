r"""Compiles the step of every run for TPU slices: what it needs and can reach (docs/scale.md).

    python -m benchmarks.scale                      # every row that has no result yet, in order
    python -m benchmarks.scale --rows distill_b,finetune_l@v4 --list
    python -m benchmarks.scale --table              # the table of docs/scale.md
    python -m benchmarks.scale --attention=pallas_tpu --rows distill_b@v5e    # another attention
    python -m benchmarks.scale --baseline           # both attentions side by side

Each row is planned in its own process (`python -m fd_jax.plan`) and saved as one JSON file in
benchmarks/scale/, so the command can be stopped and resumed. To plan a row again, delete its file.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent / "scale"
PLAN_SCRIPT = ("-m", "fd_jax.plan")

B16, L14 = "configs/distill_clip_vit_b16.py", "configs/distill_clip_vit_l14.py"
TWO = "configs/distill_clip_dinov2_vit_b16.py"  # teachers
STORED = "benchmarks/scale/targets_clip_b"  # benchmarks/offline_targets.py describes it
MASKED = "configs/distill_maskalign_vit_b16.py"
ESVIT, GIANT = "configs/distill_esvit_swin_b.py", "configs/distill_swinv2_g.py"

# The smallest slices that hold the published batch of 2,048 with margin, by the student's size,
# which is the last letter of a run's name.
SLICES = {
    "b": {"v5e": "v5e:4x4", "v4": "v4:2x2x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"},
    "l": {"v5e": "v5e:8x8", "v4": "v4:4x4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x8"},
    "g": {"v5p": "v5p:4x4x4"},
}
_OF_SEGMENTATION = {"v5e": "v5e:2x4"}  # for the batch of 16

# Rows that need more: linear probes' batch of 16,384, Swins, 577 tokens per image. And MaskAlign's
# batch of 1,024, on half the chips.
OTHER_SLICES = {
    **dict.fromkeys(
        (
            "ft_clip_384_b@v5e",
            "linear_b@v5e",
            "linear_l@v5e",
            "distill_esvit_vit_b@v5e",
            "distill_esvit_swin_b@v5e",
            "finetune_esvit_swin_b@v5e",
            "linear_esvit_swin_b@v5e",
        ),
        "v5e:8x8",
    ),
    "finetune_336_l@v5e": "v5e:8x16",
    "distill_maskalign_b@v5e": "v5e:2x4",
}
_SHARDED = ("--config.mesh.fsdp=16",)
_QUICK = ("--effort=-1",)  # three billion parameters in fifty blocks

# name: (config, origin of the weights in init_from, further flags)
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "distill_b": (B16, "", ()),
    "distill_l": (L14, "", _SHARDED),
    "finetune_b": ("configs/finetune_clip_vit_b16.py", B16, ()),
    "finetune_l": ("configs/finetune_clip_vit_l14.py", L14, _SHARDED),
    "distill_100ep_b": ("configs/distill_clip_vit_b16_100ep.py", "", ()),
    "distill_dino_b": ("configs/distill_dino_vit_b16.py", "", ()),
    "distill_deit_b": ("configs/distill_deit_vit_b16.py", "", ()),
    "distill_mae_b": ("configs/distill_mae_vit_b16.py", "", ()),
    "finetune_100ep_b": ("configs/finetune_clip_vit_b16_100ep.py", B16, ()),
    "finetune_dino_b": (
        "configs/finetune_dino_vit_b16.py",
        "configs/distill_dino_vit_b16.py",
        (),
    ),
    "finetune_deit_b": (
        "configs/finetune_deit_vit_b16.py",
        "configs/distill_deit_vit_b16.py",
        (),
    ),
    "finetune_mae_b": ("configs/finetune_mae_vit_b16.py", "configs/distill_mae_vit_b16.py", ()),
    "finetune_teacher_b": (
        "configs/finetune_teacher.py:teacher=clip_b",
        "openai_clip_vit_b16",
        (),
    ),
    "ablation_logits_b": ("configs/ablations.py:table=2,row=logits,teacher=deit", "", ()),
    "ablation_rpb_b": ("configs/ablations.py:table=4,row=rpb,teacher=clip", "", ()),
    "finetune_22k_l": (
        "configs/finetune_clip_vit_l14_336.py:stage=22k",
        L14,
        (*_SHARDED, "--examples=14197122"),  # of ImageNet-22K's 21,841 classes
    ),
    "finetune_336_l": ("configs/finetune_clip_vit_l14_336.py:stage=1k", L14, _SHARDED),
    "ft_clip_b": ("configs/ft_clip_vit_b16.py", "openai_clip_vit_b16", ()),
    "ft_clip_384_b": ("configs/ft_clip_vit_b16_384.py", "openai_clip_vit_b16", ()),
    "ft_clip_l": ("configs/ft_clip_vit_l14.py", "openai_clip_vit_l14", _SHARDED),
    "ft_clip_336_l": ("configs/ft_clip_vit_l14_336.py", "openai_clip_vit_l14_336", _SHARDED),
    "linear_b": ("configs/linear_vit_b16.py", B16, ()),
    "linear_l": ("configs/linear_vit_l14.py", L14, _SHARDED),
    "segment_b": ("configs/segment_clip_vit_b16.py", B16, ()),
    "segment_l": ("configs/segment_clip_vit_l14.py", L14, ("--config.mesh.fsdp=8",)),
    "distill_esvit_vit_b": ("configs/distill_esvit_vit_b16.py", "", ()),
    "distill_esvit_swin_b": (ESVIT, "", ()),
    "finetune_esvit_swin_b": ("configs/finetune_esvit_swin_b.py", ESVIT, ()),
    "linear_esvit_swin_b": ("configs/linear_swin_b.py", ESVIT, ()),
    "distill_two_b": (TWO, "", ()),
    "distill_stored_b": (B16, "", (f"--config.teacher.targets={STORED}",)),
    "distill_int8_b": (B16, "", ("--config.teacher.matmuls=int8",)),
    "distill_maskalign_b": (MASKED, "", ()),
    "distill_swin_g": (GIANT, "", _QUICK),
    "finetune_swin_g": ("configs/finetune_swinv2_g.py", GIANT, _QUICK),
}

# Runs whose step equals another run's, except for its weights and for numbers in it such as
# learning rates. They are not compiled again; tests/plan/test_scale.py compares the programs.
SAME_STEP = {
    "distill_100ep_b": "distill_b",
    "distill_deit_b": "distill_dino_b",
    "distill_mae_b": "distill_dino_b",
    "finetune_100ep_b": "finetune_b",
    "finetune_dino_b": "finetune_b",
    "finetune_deit_b": "finetune_b",
    "finetune_mae_b": "finetune_b",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a run on a slice, with an attention other than XLA's if it has one."""

    run: str
    chip: str
    attention: str = ""

    @property
    def name(self) -> str:
        """The name that --rows accepts."""
        return f"{self.run}@{self.chip}"

    @property
    def file(self) -> pathlib.Path:
        """The file of its result."""
        parts = (self.run, self.chip, *filter(None, [self.attention]))
        return FOLDER / f"{'_'.join(parts)}.json"

    @property
    def slice(self) -> str:
        """The topology that it is compiled for."""
        if self.run.startswith("segment_"):
            return _OF_SEGMENTATION[self.chip]
        return OTHER_SLICES.get(self.name) or SLICES[self.run[-1]][self.chip]

    @property
    def command(self) -> list[str]:
        """The plan command, without --output."""
        config, start, further = RUNS[self.run]
        flags = [f"--config={config}", f"--topology={self.slice}", *further]
        flags += [f"--config.attention={self.attention}"] if self.attention else []
        return [*PLAN_SCRIPT, *flags, *([f"--start={start}"] if start else [])]


# Rows that are also compiled with the fused kernel: 128 images per chip for ViT-B, 64 for ViT-L.
BASELINE = "distill_b@v5e,distill_b@v6e,distill_l@v6e"
FUSED = "pallas_tpu"

MAIN = ("distill_b", "distill_l", "finetune_b", "finetune_l")
ROWS = [
    *(Row(run, chip) for chip in SLICES["b"] for run in MAIN),
    *(
        Row(run, "v5p" if run.endswith("g") else "v5e")
        for run in RUNS
        if run not in MAIN and run not in SAME_STEP
    ),
    Row("distill_int8_b", "v6e"),
]


def select(names: str) -> list[Row]:
    """Rows by names, runs or chips, separated by commas; "" selects all.

    Raises:
      SystemExit: if a name matches no row.
    """
    if not names:
        return ROWS
    chosen = []
    for name in names.split(","):
        found = [row for row in ROWS if name in (row.name, row.run, row.chip)]
        if not found:
            sys.exit(f"error: no row is named {name!r}; there are {[r.name for r in ROWS]}")
        chosen += found
    return list(dict.fromkeys(chosen))


def plan(row: Row) -> None:
    """Compiles one row and writes its file, completely or not at all."""
    FOLDER.mkdir(exist_ok=True)
    unfinished = row.file.with_suffix(".unfinished")
    command = [sys.executable, *row.command, f"--output={unfinished}"]
    print(f"== {row.name}: python {' '.join(row.command)}", flush=True)
    status = subprocess.run(command).returncode
    if status not in (0, 1) or not unfinished.exists():
        sys.exit(f"error: {row.name} ended with status {status}; see its message above")
    record = json.loads(unfinished.read_text())
    unfinished.write_text(json.dumps({"command": row.command, **record}, indent=2) + "\n")
    unfinished.rename(row.file)


def table(rows: list[Row]) -> str:
    """The table as Markdown; rows without a result say "not yet run"."""
    lines = [
        "| run | slice | batch | mesh | HBM GiB per device | MB per image | FLOPs / closed form: "
        "matmuls, repeated, all | bounds ms: compute, HBM, interconnect | images/s per chip at "
        "most | MFU at most | "
        "compiler's estimate: images/s per chip, MFU | chip-hours at least |",
        "|" + "---|" * 12,
    ]
    lines += [_line(row) for row in rows]
    compiled = {row.run for row in rows if row.chip == "v5e"}
    lines += [
        f"| {run} | {Row(run, 'v5e').slice} | as {other} |" + " |" * 9
        for run, other in SAME_STEP.items()
        if other in compiled
    ]
    return "\n".join(lines)


def baseline() -> str:
    """The rows of BASELINE, with XLA's attention and with the fused kernel, as Markdown."""
    lines = [
        "| run | slice | attention | images per chip | MB per image | temporaries GiB | cycles, M: "
        "instructions, kernels | estimate: ms per step, images/s per chip, MFU |",
        "|" + "---|" * 8,
    ]
    for row in select(BASELINE):
        lines += [_compared(row), _compared(dataclasses.replace(row, attention=FUSED))]
    return "\n".join(lines)


def _compared(row: Row) -> str:
    start = f"| {row.run} | {row.slice} | {row.attention or 'xla'} |"
    if not row.file.exists():
        return f"{start} not yet run |" + " |" * 4
    plan = json.loads(row.file.read_text())
    compiler, estimate = plan["compiler"], plan["estimate"]
    return (
        f"{start} {plan['batch_size'] // plan['chips']} | "
        f"{compiler['hbm_bytes_per_image'] / 1e6:.0f} | "
        f"{plan['hbm_bytes_per_device']['temporaries'] / 2**30:.2f} | "
        f"{compiler['estimated_cycles'] / 1e6:.1f}, {compiler.get('kernel_cycles', 0) / 1e6:.1f} | "
        f"{estimate['step_seconds'] * 1e3:.0f}, {estimate['images_per_second_per_chip']:.0f}, "
        f"{estimate['mfu']:.2f} |"
    )


def _line(row: Row) -> str:
    slice_name = row.slice
    if not row.file.exists():
        return f"| {row.run} | {slice_name} | not yet run |" + " |" * 9
    plan = json.loads(row.file.read_text())
    mesh = " ".join(f"{a}={n}" for a, n in plan["mesh"].items() if n > 1)
    remat = f", remat {plan['remat']}" if plan["remat"] else ""
    start = f"| {row.run} | {slice_name} | {plan['batch_size']} | {mesh}{remat} |"
    memory = plan["hbm_bytes_per_device"]
    if not plan["fits"]:
        needed, available = memory["total"] / 2**30, memory["available"] / 2**30
        fitting = [a["changes"] for a in plan["tried"] if a["fits"]]
        advice = "; or ".join(", ".join(f"{k}={v}" for k, v in c.items()) for c in fitting)
        verdict = (
            f"does not fit: {needed:.2f} of {available:.2f}; fits with {advice or 'nothing tried'}"
        )
        return f"{start} {verdict} |" + " |" * 7
    compiler, bound, estimate = plan["compiler"], plan["bounds"], plan["estimate"]
    repeated = compiler["repeated_matmul_flops_per_image"] / plan["flops_per_image"]["closed_form"]
    matmuls = f"{compiler['matmuls_over_closed_form']:.4f}, {repeated:.3f}"
    if compiler["flops_per_image"] is None:
        counts = f"loops | {matmuls}, loops"
    else:
        counts = (
            f"{compiler['hbm_bytes_per_image'] / 1e6:.0f} | "
            f"{matmuls}, {compiler['flops_over_closed_form']:.3f}"
        )
    times = ", ".join(
        f"{bound[f'{name}_seconds'] * 1e3:.1f}" for name in ("compute", "hbm", "interconnect")
    )
    guess = "none"
    if estimate["step_seconds"]:
        guess = f"{estimate['images_per_second_per_chip']:.0f}, {estimate['mfu']:.2f}"
    return (
        f"{start} {memory['total'] / 2**30:.2f} | {counts} | {times} | "
        f"{bound['images_per_second_per_chip_at_most']:.0f} | {bound['mfu_at_most']:.2f} | "
        f"{guess} | {bound['chip_hours_at_least']:.0f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="", help="comma-separated names, runs or chips; default: all"
    )
    parser.add_argument("--list", action="store_true", help="print the rows and whether they ran")
    parser.add_argument("--table", action="store_true", help="print the table and plan nothing")
    parser.add_argument("--attention", default="", help="compile with this one instead of XLA's")
    parser.add_argument("--baseline", action="store_true", help="print both attentions' rows")
    args = parser.parse_args()
    if args.baseline:
        print(baseline())
        return
    rows = [dataclasses.replace(row, attention=args.attention) for row in select(args.rows)]
    if args.table:
        print(table(rows))
        return
    for row in rows:
        if args.list:
            print(f"{row.name:<28}{'done' if row.file.exists() else 'not yet run'}")
        elif not row.file.exists():
            plan(row)


if __name__ == "__main__":
    main()

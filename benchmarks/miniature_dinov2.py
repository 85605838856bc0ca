r"""The quickstart's DINOv2 teacher, its distilled student and a random student on the digits.

    python -m benchmarks.miniature_dinov2 --seeds 3

Runs the linear probe and nearest neighbours for all seeds, and fine-tuning for the first. It reads
the model folders that `make quickstart` wrote. Finished stages are not repeated.
"""

import argparse
import pathlib
import sys
import time

from benchmarks import miniature
from configs import base, quickstart

SIZE = 98
# Fewer epochs than in configs/miniature.py: a ViT-S at 98 pixels takes minutes where 28 are cheap.
FIELDS = {
    "probe": {"data.image_size": SIZE, "epochs": 10.0},
    "finetune": {"data.image_size": SIZE, "epochs": 8.0, "optim.peak_lr": 5e-4},
}


# row of the table: its folder in the workdir of a seed
ROWS = {
    "teacher (DINOv2 ViT-S/14)": "teacher",
    "same student, random weights": "random",
    "FD student": "student",
}


def one_seed(
    teacher: str, student: str, seed: int, workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
    """All rows of one seed, with fine-tuning for the first seed only."""
    stage = miniature.run_stage(workdir, "digits", seed)

    def run(name: str, where: str, **fields) -> dict[str, float]:
        return stage(name, where, **{**FIELDS[name], **fields})

    arch = base.student(quickstart.STUDENT, image_size=SIZE)
    random = miniature.save_random(workdir / "random/model", arch, seed)
    return {
        row: miniature.measure(start, name, run, tune=seed == 0)
        for (row, name), start in zip(ROWS.items(), (teacher, random, student), strict=True)
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", default="teachers/dinov2_vits14_onnx")
    parser.add_argument("--student", default="runs/quickstart/model")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/miniature_dinov2")
    args = parser.parse_args()
    folders = (args.teacher, args.student)
    missing = [folder for folder in folders if not pathlib.Path(folder).exists()]
    if missing:
        print(f"error: no {' and no '.join(missing)}; run make quickstart first", file=sys.stderr)
        return 2
    miniature.set_up(args.workdir)
    figures: dict[str, miniature.Figures] = {}
    began = time.monotonic()
    for seed in range(args.seeds):
        found = one_seed(*folders, seed, args.workdir.absolute() / str(seed))
        miniature.collect(figures, "digits", found)
    miniature.finish(figures, args.workdir, began=began)
    return 0


if __name__ == "__main__":
    sys.exit(main())

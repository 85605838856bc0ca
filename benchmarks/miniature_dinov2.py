r"""The quickstart's DINOv2 teacher and its distilled student on the digits, beside a random one.

    python -m benchmarks.miniature_dinov2 --seeds 3

Linear probe and nearest neighbours over the seeds, fine-tuning for the first. Reads what
`make quickstart` left; stages that are done are not done again.
"""

import argparse
import pathlib
import sys
import time

from benchmarks import miniature
from configs import base, quickstart

SIZE = 98
# What is cheap for miniatures takes minutes here; ViT-S sees 98 pixels instead of 28.
FIELDS = {
    "probe": {"data.image_size": SIZE, "epochs": 10.0},
    "finetune": {"data.image_size": SIZE, "epochs": 8.0, "optim.peak_lr": 5e-4},
}


def one_seed(
    folders: dict[str, str], seed: int, workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
    """All rows of one seed; fine-tuning with the first only."""
    stage = miniature.run_stage(workdir, "digits", seed)

    def run(name: str, where: str, **fields) -> dict[str, float]:
        return stage(name, where, **{**FIELDS[name], **fields})

    arch = base.student(quickstart.STUDENT, image_size=SIZE)
    random = miniature.save_random(workdir / "random/model", arch, seed)
    starts = {**folders, "same student, random weights": random}
    return {
        row: miniature.measure(start, row.split(",")[0].replace(" ", "_"), run, tune=seed == 0)
        for row, start in starts.items()
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", default="teachers/dinov2_vits14_onnx")
    parser.add_argument("--student", default="runs/quickstart/model")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/miniature_dinov2")
    args = parser.parse_args()
    folders = {"teacher (DINOv2 ViT-S/14)": args.teacher, "FD student": args.student}
    missing = [folder for folder in folders.values() if not pathlib.Path(folder).exists()]
    if missing:
        print(f"error: no {' and no '.join(missing)}; make quickstart first", file=sys.stderr)
        return 2
    miniature.set_up(args.workdir)
    figures: dict[str, miniature.Figures] = {}
    began = time.monotonic()
    for seed in range(args.seeds):
        found = one_seed(folders, seed, args.workdir.absolute() / str(seed))
        miniature.collect(figures, "digits", found)
    miniature.finish(figures, args.workdir, began=began)
    return 0


if __name__ == "__main__":
    sys.exit(main())

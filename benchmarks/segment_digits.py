r"""A distilled encoder and the same one with random weights, fine-tuned to segment digits.

    python -m benchmarks.segment_digits --student=runs/quickstart/model --workdir=runs/segment

Both are trained by finetune.py's code with configs/segment_digit_scenes.py and differ only in
`init_from`. A finished run is not repeated. WORKDIR/table.md has the figures of both over the
held-out pictures, WORKDIR/table.json the same per seed, and WORKDIR/NAME.html shows pictures with
their labels and predictions.
"""

import argparse
import io
import json
import pathlib
import statistics
import time

from absl import logging
from etils import epath
import numpy as np
from PIL import Image

from benchmarks import miniature
from configs import segment_digit_scenes
import fd_jax
from fd_jax import files, model_folder
from fd_jax.data.base import IGNORED
from fd_jax.data.builders import digit_scenes
from fd_jax.show import overlays
from fd_jax.tasks import registry
from fd_jax.training.feeds import open_data
from fd_jax.typing import Config

FIGURES = {
    "cards": "IoU of cards, whatever the digit",
    "miou": "mean IoU",
    "macc": "mean accuracy",
    "aacc": "pixel accuracy",
}
STUDENT, RANDOM = "distilled student", "the same network, random weights"
SHOWN = 6  # pictures of a page
DRAWN = 4  # rows of --picture
Runs = dict[str, list[dict[str, float]]]  # row of the table -> figures of each seed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="runs/quickstart/model", help="model folder")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/segment"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--picture", type=pathlib.Path, help="also draw some pictures, as PNG")
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    began = time.monotonic()
    runs: Runs = {STUDENT: [], RANDOM: []}
    for seed in range(args.seeds):
        folder = args.workdir / str(seed)
        arch = model_folder.load_spec(args.student).arch
        random = miniature.save_random(folder / "start", arch, seed)
        starts = {STUDENT: args.student, RANDOM: random}
        for name, start in starts.items():
            runs[name].append(train(start, folder / _folder(name), seed))
    text = table(runs)
    files.write_text(epath.Path(args.workdir / "table.json"), json.dumps(runs, indent=2) + "\n")
    files.write_text(epath.Path(args.workdir / "table.md"), text)
    show(args.workdir, args.picture)
    print(f"\n{text}\n{(time.monotonic() - began) / 60:.1f} minutes; pages in {args.workdir}")


def train(start: str, workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Fine-tunes a model folder, unless an earlier run did; returns its held-out FIGURES."""
    config = segment_digit_scenes.get_config()
    config.update(init_from=str(start), seed=seed)
    figures = miniature.train(config, workdir, figure="eval_miou")
    return figures | {"cards": iou_of_cards(config, workdir / "model")}


def iou_of_cards(config: Config, folder: pathlib.Path) -> float:
    """IoU of the pixels of all cards, whichever digit they are taken for, over all pictures."""
    data, model = open_data(config, registry.make(config)), fd_jax.load_model(folder)
    both = either = 0
    for scene in data.pictures("eval", range(digit_scenes.PICTURES["test"])):
        counts = scene.mask != IGNORED
        found, card = model.segment([scene.image])[0] > 0, scene.mask > 0
        both += int((found & card & counts).sum())
        either += int(((found | card) & counts).sum())
    return both / either


def table(runs: Runs) -> str:
    """Markdown: the mean over the seeds, and its spread where there are several."""
    lines = [f"| | {' | '.join(FIGURES.values())} |", "|---|---|---|---|"]
    for name, found in runs.items():
        cells = [_cell([100 * figures[figure] for figures in found]) for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def show(workdir: pathlib.Path, picture: pathlib.Path | None) -> None:
    """Writes a page for each network of the first seed, and the PNG if one is asked for."""
    config = segment_digit_scenes.get_config()
    config.init_from = str(workdir / "0" / "start")
    data = open_data(config, registry.make(config))
    scenes = list(data.pictures("eval", range(SHOWN)))
    rows = []
    for name in (STUDENT, RANDOM):
        model = fd_jax.load_model(workdir / "0" / _folder(name) / "model")
        predicted = model.segment([scene.image for scene in scenes])
        samples = [
            overlays.Sample(scene.name, scene.image, scene.mask, classes)
            for scene, classes in zip(scenes, predicted, strict=True)
        ]
        page = overlays.page(samples, data.class_names, title=name)
        files.write_text(epath.Path(workdir / f"{_folder(name)}.html"), page)
        rows.append(predicted)
    if picture is not None:
        files.write_bytes(epath.Path(picture), draw(scenes, rows, len(data.class_names)))


def draw(scenes, predictions, classes: int) -> bytes:
    """PNG of some pictures: picture, label, and what each network predicts, side by side."""
    colours = overlays.palette(classes)
    side, gap = 160, 4
    columns = 2 + len(predictions)
    sheet = np.full((DRAWN * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for row, scene in enumerate(scenes[:DRAWN]):
        painted = [scene.mask, *(predicted[row] for predicted in predictions)]
        panels = [scene.image, *(overlays.overlay(scene.image, mask, colours) for mask in painted)]
        for column, panel in enumerate(panels):
            fitted = Image.fromarray(panel)
            fitted.thumbnail((side, side))
            top, left = row * (side + gap), column * (side + gap)
            sheet[top : top + fitted.height, left : left + fitted.width] = np.asarray(fitted)
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, "PNG")
    return content.getvalue()


def _folder(name: str) -> str:
    return {STUDENT: "student", RANDOM: "random"}[name]


if __name__ == "__main__":
    main()

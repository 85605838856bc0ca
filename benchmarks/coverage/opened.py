"""What timm makes of our folders: tests/convert/opened.

Every network of `tests.convert.exported` is written by `export --format=timm`, opened by
`create_model("local-dir:FOLDER")` and by the call that the export prints, and run on a picture. The
names and shapes of the model's own state_dict, the config and the outputs are stored; the tests
repeat the export and compare, without timm.
"""

import json
from pathlib import Path
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.coverage import making
from fd_jax.convert.formats import FORMATS
from fd_jax.models import sizes
from tests.convert import exported, seeded

OUTPUT = Path("tests/convert/opened")
_OR = "or with timm.create_model("


def write() -> None:
    """Writes all of them; fails where the two ways of opening a folder differ."""
    import timm

    OUTPUT.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    made: dict[str, Any] = {"library": f"timm {timm.__version__}", "networks": {}}
    for name in exported.CASES:
        found, about = _opened(name)
        made["networks"][name] = about
        arrays |= {f"{name}/{key}": value for key, value in found.items()}
    (OUTPUT / "timm.json").write_text(json.dumps(made, indent=1) + "\n")
    np.savez_compressed(OUTPUT / "timm.npz", **arrays)
    total = sum(path.stat().st_size for path in OUTPUT.iterdir())
    print(f"{len(exported.CASES)} networks, {total / 1000:.0f} kB")


def _opened(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    spec = exported.spec(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timm"
        written = FORMATS["timm"].write(spec, exported.params(spec), path)
        model = open_folder(path)
        other = _as_printed(written.remarks)
        config = json.loads((path / "config.json").read_text())
        expects = {key: model.pretrained_cfg[key] for key in ("mean", "std", "input_size")}
        for key, value in expects.items():
            given = config["pretrained_cfg"][key]
            assert list(value) == given == list(other.pretrained_cfg[key]), (name, key)
        found = _outputs(model, spec)
        for key, value in _outputs(other, spec).items():
            assert np.array_equal(value, found[key]), (name, key)
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    print(name, config["architecture"], written.left, flush=True)
    return found, {"class": type(model).__name__, "config": config, "state": state}


def open_folder(path: Path) -> Any:
    """What timm makes of a folder, its weights loaded strictly."""
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def _as_printed(remarks: list[str]) -> Any:
    import timm

    call = next(remark for remark in remarks if remark.startswith(_OR))
    return eval(call.removeprefix("or with "), {"timm": timm}).eval()


def _outputs(model: Any, spec: Any) -> dict[str, np.ndarray]:
    height, width = sizes.sides(spec.arch["image_size"])
    pixels = making.pixels(seeded.images(height, width), spec.mean, spec.std)
    with torch.no_grad():
        found = model.forward_features(pixels)
        outputs = {"tokens": making.tokens(found, channels_first=making.is_map(model))}
        if spec.classes:
            outputs["logits"] = model.forward_head(found).numpy()
        elif spec.pool is not None:
            outputs["pooled"] = model.forward_head(found).numpy()
    return outputs

"""Runs on pictures of one's own: what follows from them, what is refused, and the page about it."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from configs import base, own, own_distill, own_finetune, own_probe
from fd_jax import settings, sharding
from fd_jax.data.feed import Feed
from fd_jax.errors import ConfigError, DataError, ModelFolderError
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import account, loop
from tests import tiny, xla
from tests.models import convnexts

ROOT = pathlib.Path(__file__).parent.parent


def fill(root, count=3):
    for name in ("ant", "bee", "cow"):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (40, 40), (50 * k, 0, 0)).save(root / name / f"{k}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of 24 training pictures and 9 held-out ones, and one of loose pictures."""
    root = tmp_path_factory.mktemp("own")
    fill(root / "divided" / "train", 8)
    fill(root / "divided" / "val")
    return root / "divided"


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    return tiny.save_swin(tmp_path_factory.mktemp("teachers") / "swin")


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    return convnexts.save(tmp_path_factory.mktemp("teachers") / "convnext", "v1", image_size=64)


def made(module, **given):
    config = module.get_config(",".join(f"{name}={value}" for name, value in given.items()))
    settings.check(config)
    return config


def test_fine_tuning_follows_from_the_folder_and_the_network(folder, teacher):
    config = made(own_finetune, data=folder, init_from=teacher)
    data = config.data
    assert data.name == f"folder:{folder}/{{split}}"
    assert (data.split, data.eval_split) == ("train", "val")
    assert (config.model.classes, data.image_size, config.batch_size) == (3, 32, 8)
    assert (config.epochs, config.optim.warmup_epochs) == (100, 10)
    # The paper's 1.25e-3 per 512, of a batch of 2,048, times sqrt(8 / 2048)
    np.testing.assert_allclose(config.optim.peak_lr, 1.25e-3 * 4 * 0.0625, rtol=0.05)
    assert config.optim.lr_batch == config.batch_size
    assert (config.eval.every, config.checkpoint.every, config.log_every) == (15, 30, 6)
    assert (config.mixing.mixup, config.optim.layer_decay) == (0, 0.65)
    assert ClassifyTask(config).spec.classes == 3


def test_arguments_replace_rules_and_the_rest_follows(folder, teacher):
    arguments = {"data": folder, "init_from": teacher, "size": 16, "batch": 4, "epochs": 2.5}
    config = made(own_probe, **arguments)
    assert (config.data.image_size, config.batch_size, config.epochs) == (16, 4, 2.5)
    assert (config.optim.warmup_epochs, config.optim.lr_batch) == (0.25, 4)
    assert (config.eval.every, config.checkpoint.every) == (6, 1)  # an epoch; a tenth of 15 steps


@pytest.mark.parametrize("family,pooling", [("vit", "cls"), ("swin", "mean")])
def test_a_probe_reads_what_the_network_has(folder, teacher, swin, family, pooling):
    config = made(own_probe, data=folder, init_from={"vit": teacher, "swin": swin}[family])
    assert config.model.pooling == pooling
    assert ClassifyTask(config).probe


def test_a_swin_keeps_its_norm(folder, swin):
    config = made(own_finetune, data=folder, init_from=swin)
    assert (config.model.final_norm, config.optim.layer_decay) == (True, 0.8)


def test_a_convnext_is_probed_tuned_and_distilled_into_a_vit(folder, convnext):
    probe = made(own_probe, data=folder, init_from=convnext)
    assert (probe.model.pooling, probe.model.final_norm) == ("mean", False)
    assert ClassifyTask(probe).probe
    tuned = made(own_finetune, data=folder, init_from=convnext)
    assert (tuned.model.pooling, tuned.model.final_norm) == ("mean_norm", False)
    assert tuned.optim.layer_decay == 0.8
    assert ClassifyTask(tuned).spec.head_norm_eps == 1e-12
    task = DistillTask(made(own_distill, data=folder, teacher=convnext, student="tiny"))
    assert task.student.grid == task.goal.teacher.grid == (2, 2)
    with pytest.raises(ConfigError, match="student=same.*'convnext'.*name one of"):
        made(own_distill, data=folder, teacher=convnext)


def test_a_lifted_network_is_tuned_with_the_norm_before_its_lift(folder, tmp_path):
    path = tiny.save_teacher(tmp_path / "lifted", lift=80)
    config = made(own_finetune, data=folder, init_from=path)
    assert (config.model.final_norm, config.model.pooling) == (True, "mean")
    assert ClassifyTask(config).encoder.width == 80


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("student", ["same", "tiny"])
def test_a_student_has_the_grid_of_its_teacher(folder, teacher, swin, family, student):
    path = {"vit": teacher, "swin": swin}[family]
    task = DistillTask(made(own_distill, data=folder, teacher=path, student=student))
    assert task.student.grid == task.goal.teacher.grid == {"vit": (4, 4), "swin": (2, 2)}[family]
    width = {"vit": 48, "swin": 64}[family]
    assert task.student.width == (192 if student == "tiny" else width)


def test_a_student_starts_from_a_folder_on_a_grid_of_its_own(folder, teacher, tmp_path):
    """Patches of 4 pixels in pictures of 24 are the teacher's of 8 in pictures of 48."""
    start = tiny.save_teacher(tmp_path / "start", image_size=24, patch_size=4, width=32)
    config = made(own_distill, data=folder, teacher=teacher, student=start)
    task = DistillTask(config)
    assert (config.data.image_size, config.teacher.image_size) == (24, 48)
    assert task.student.width == 32 and task.student.grid == task.goal.teacher.grid == (6, 6)
    assert task.load_initial()["encoder"].keys() == task.load_frozen()["encoder"].keys()


@pytest.mark.parametrize(
    "side,patch,expected", [(224, 16, 224), (518, 14, 224), (300, 75, 150), (480, 240, 240)]
)
def test_images_have_at_most_224_pixels(folder, tmp_path, side, patch, expected):
    path = tiny.save_teacher(tmp_path / "net", image_size=side, patch_size=patch)
    config = made(own_distill, data=folder, teacher=path)
    assert config.data.image_size == expected
    assert config.student.arch.image_size == config.teacher.image_size == expected


@pytest.mark.parametrize(
    "count,expected", [(1, 1), (5, 4), (8, 8), (60, 8), (127, 8), (128, 16), (2047, 128)]
)
def test_a_batch_is_an_eighth_of_the_pictures(count, expected):
    assert own.batch_size(count, 256) == expected
    assert own.batch_size(100_000, 256) == 256
    assert own.batch_size(100_000, 1024) == 1024


@pytest.mark.parametrize("count", [1, 3, 10, 40, 1000, 20_000, 100_000, 1_281_167])
def test_runs_of_any_size_have_a_sensible_length(count):
    given = own.arguments("data=somewhere")
    fields = {"name": "x", "split": "train", "eval_split": "test", "data_dir": ""}
    config = own.fit(
        base.fine_tuning(drop_path=0.1, layer_decay=0.65, peak_lr=1.0, floor_lr=0.0),
        given,
        own.Pictures(fields, count, 5),
        size=224,
        rate=5e-4,
        epochs=100,
        steps=20_000,
    )
    settings.check(config)
    per_epoch = count // config.batch_size
    total = settings.total_steps(config, per_epoch)
    assert total <= 20_100 and config.epochs <= 100
    assert config.epochs == 100 or total >= 19_900
    assert round(config.optim.warmup_epochs * per_epoch) == pytest.approx(total / 10, abs=1)
    assert total // config.eval.every <= 21 and config.eval.every >= per_epoch
    assert config.checkpoint.every <= 1000


def test_where_splits_are_found(folder, teacher, embedded_data):
    def splits(**given):
        data = made(own_distill, teacher=teacher, **given).data
        return data.name.removeprefix("folder:"), data.split, data.eval_split

    assert splits(data=folder)[1:] == ("train", "val")
    assert splits(data=f"{folder}/{{split}}")[1:] == ("train", "val")
    assert splits(data=folder / "train") == (f"{folder}/train", "train", "")
    by_name = {"data": "digits", "data_dir": embedded_data}
    assert splits(**by_name) == ("digits", "train", "test")
    sliced = splits(**by_name, split="train[:50%]", eval_split="train[50%:]")
    assert sliced[1:] == ("train[:50%]", "train[50%:]")


class OnlyTrain(tfds.core.GeneratorBasedBuilder):
    """Twenty grey pictures in a single split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3))}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(20):
            yield k, {"image": np.full((8, 8, 3), k, np.uint8)}


def test_the_last_tenth_is_held_out_of_a_tfds_dataset_with_one_split(teacher, tmp_path):
    OnlyTrain(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    config = made(own_distill, data="only_train", data_dir=tmp_path, teacher=teacher)
    feed = Feed(**config.data)
    assert (feed.examples("train"), feed.examples("eval")) == (18, 2)
    assert config.eval.keep_best == "loss"


@pytest.mark.parametrize(
    "given,error,message",
    [
        ({"data": "{folder}/train"}, DataError, "no held-out pictures.*\n.*hold_out --input="),
        ({"data": "{folder}/train/ant"}, DataError, "has no classes.*sub-folder of pictures"),
        ({"data": "/nowhere"}, DataError, "no folder of images at /nowhere"),
        ({"data": "nowhere"}, DataError, "TFDS has no dataset 'nowhere'.*folder:/path"),
        ({"data": "{folder}", "init_from": "{folder}"}, ModelFolderError, "no model.json"),
        ({"data": "{folder}", "colour": "red"}, ValueError, "argument 'colour' is unknown"),
        ({"data": "{folder}", "size": "big"}, ConfigError, "size=big: expected a whole number"),
        ({"data": "{folder}", "batch": "1.5"}, ConfigError, "batch=1.5: expected a whole number"),
        ({"data": "{folder}", "epochs": "-1"}, ConfigError, "epochs=-1: expected a number above"),
        ({}, ConfigError, "needs data="),
        ({"data": "{folder}", "init_from": ""}, ConfigError, "needs init_from="),
    ],
)
def test_bad_input_is_one_clear_error(folder, teacher, given, error, message):
    given = {"init_from": teacher, **{k: v.format(folder=folder) for k, v in given.items()}}
    with pytest.raises(error, match=message):
        made(own_finetune, **given)


def test_a_single_class_and_an_unknown_student_are_refused(folder, teacher, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "ant").symlink_to(folder / "train" / "ant")
    with pytest.raises(DataError, match="has 1 class, but a classifier needs two"):
        made(own_finetune, data=tmp_path / "all", init_from=teacher)
    with pytest.raises(ConfigError, match="student=huge: expected one of"):
        made(own_distill, data=folder, teacher=teacher, student="huge")


def test_fewer_pictures_than_devices_are_refused_before_anything_is_written(
    folder, teacher, tmp_path
):
    fill(tmp_path / "few", 1)
    few = made(own_distill, data=tmp_path / "few", teacher=teacher)
    with pytest.raises(ConfigError, match="3 training pictures, fewer than the 8 devices"):
        loop.fit(DistillTask(few), few, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sharding.check_examples(8, sharding.make_mesh(**few.mesh))


def test_the_start_of_a_run_prints_its_intervals(folder, teacher):
    config = made(own_finetune, data=folder, init_from=teacher)
    text = "evaluated every 15 steps, saved every 30, logged every 6"
    assert account._intervals(config, 3) == text
    config.data.eval_split = ""
    assert account._intervals(config, 3) == "saved every 30, logged every 6"


def run(script, config, workdir):
    command = [sys.executable, script, f"--config={config}", f"--workdir={workdir}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_errors_of_a_config_reach_the_terminal_as_one_message(folder, tmp_path):
    config = f"configs/own_finetune.py:data={folder},init_from={folder},colour=red"
    done = run("finetune.py", config, tmp_path / "run")
    assert done.returncode == 2
    assert "argument 'colour' is unknown" in done.stderr and "Traceback" not in done.stderr


def test_errors_of_the_project_in_a_config_are_said_as_everywhere(tmp_path):
    """ml_collections puts them into a traceback, with the flag, a type and words of its own."""
    config = f"configs/own_finetune.py:data=/nowhere,init_from={tmp_path / 'none'}"
    done = run("finetune.py", config, tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith(("error: no model folder at", "error: no folder of images"))
    assert "Error" not in done.stderr


# The blocks of the page; those of Python say so.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN = re.compile(r"(--config=configs/own_\w+\.py:[^\s]+)")


def blocks_of(page):
    """The blocks of a page: language, and text with `smoke` added to the configs of own data."""
    blocks = BLOCK.findall(page.read_text("utf-8"))
    return [(language, OWN.sub(r"\1,smoke", block)) for language, block in blocks]


def test_the_page_uses_all_configs_and_each_argument():
    page = ROOT / "docs" / "your_own_data.md"
    commands = "\n".join(block for language, block in blocks_of(page) if not language)
    for name in ("own_probe", "own_distill", "own_finetune", "features", "diagnose", "export"):
        assert name in commands
    assert commands.count(",smoke") == 4
    listed = page.read_text("utf-8").partition("## Arguments")[2].partition("## Rules")[0]
    known = own.arguments("data=x,teacher=x,init_from=x", teacher="", init_from="", student="")
    assert set(re.findall(r"`(\w+)`", listed)) >= set(known)


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_order(tmp_path):
    """And its lines of Python, after the commands whose results they read."""
    for name in ("configs", "train.py", "finetune.py", "convert_checkpoints.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = xla.UNOPTIMIZED
    shells = {"": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    printed = []
    for language, block in blocks_of(ROOT / "docs" / "your_own_data.md"):
        done = subprocess.run(
            [*shells[language], block], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        printed.append(done.stdout)
    classes = sorted(re.findall(r"^(\w+): 0\.\d{3}$", "".join(printed), re.MULTILINE))
    assert classes == ["brick", "grass", "gravel"]
    results = tmp_path / "runs" / "own"
    features = np.load(results / "features.npz")
    assert features["cls"].shape == (60, 384)
    assert features["class_names"].tolist() == ["brick", "grass", "gravel"]
    for made_file in (
        "probe/model/model.json",
        "student/report/report.html",
        "finetuned/evaluation.json",
        "finetuned/report/confusion.png",
        "classifier.stablehlo",
        "figures/report.html",
        "huggingface/model.safetensors",
    ):
        assert (results / made_file).exists(), made_file

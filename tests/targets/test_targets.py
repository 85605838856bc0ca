"""Stored targets, against the teacher run by hand, plain numpy, and runs with a live teacher."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scale
from configs import base, distill_clip_vit_b16
from fd_jax import report, settings, sharding
from fd_jax.data import datasets, randomness, transforms
from fd_jax.data.stored import description, replay
from fd_jax.errors import CheckpointError, ConfigError, DataError
from fd_jax.evaluation import evaluators
from fd_jax.metrics import Mean
from fd_jax.plan import experiment
from fd_jax.tasks import registry, stored
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import feeds, loop, metric_writer
from fd_jax.training import workdir as workdirs
from tests import programs, tiny
from tests.targets.making import COUNT, SEED, SHARD, SPLIT, VIEWS, fields, make

KINDS = ("float32", "bfloat16", "int8", "pca_int8")
COMPONENTS = 12


@pytest.fixture(scope="module")
def statistics(teacher, embedded_data, tmp_path_factory):
    """The principal directions of the same teacher, on other pictures."""
    from fd_jax import target_stats

    path = tmp_path_factory.mktemp("statistics") / "stats.npz"
    flags = (f"--teacher={teacher}", "--data=digits", f"--data_dir={embedded_data}")
    assert (
        target_stats.main([*flags, "--split=test[:64]", "--batch_size=16", f"--output={path}"]) == 0
    )
    return path


@pytest.fixture(scope="module")
def folders(teacher, embedded_data, statistics, tmp_path_factory):
    """A folder of targets for each kind of storage."""
    root, found = tmp_path_factory.mktemp("targets"), {}
    more = {"pca_int8": (f"--statistics={statistics}", f"--components={COMPONENTS}")}
    for kind in KINDS:
        found[kind] = root / kind
        flags = (f"--quantization={kind}", *more.get(kind, ()))
        assert make(teacher, embedded_data, found[kind], *flags) == 0
    return found


@pytest.fixture(scope="module")
def held_out(teacher, embedded_data, tmp_path_factory):
    """A folder of targets of held-out pictures, as an evaluation sees them."""
    folder = tmp_path_factory.mktemp("held_out") / "targets"
    flags = ("--held_out", "--views=1", "--split=test[:20]", "--quantization=float32")
    assert make(teacher, embedded_data, folder, *flags) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(embedded_data):
    """The views as a live run with the same seed draws them: uint8 [COUNT, VIEWS, 32, 32, 3]."""
    dataset = datasets.open_dataset("digits", SPLIT, data_dir=embedded_data)
    draw = transforms.TrainTransform(32, min_area=0.3, interpolation="bilinear", flip=True)

    def view(index, epoch):
        rng = randomness.generator(randomness.AUGMENT, SEED, epoch, index)
        return draw(dataset[index].image, rng)

    return np.stack([[view(i, v) for v in range(VIEWS)] for i in range(COUNT)])


@pytest.fixture(scope="module")
def live(teacher, pictures):
    """The live teacher's maps of these views, float32 [COUNT, VIEWS, 17, 48]."""
    network = DistillTask(tiny.config(teacher)).goal.teacher
    weights, split = network.load(), sharding.batch_sharding(sharding.make_mesh())

    @jax.jit
    def run(images):
        return network.features(weights, images, final_norm=True, drops=None).full

    # As many pictures on each device as in the command, so that sums have the same order.
    batches = np.resize(pictures, (96, 32, 32, 3)).reshape(6, 16, 32, 32, 3)
    maps = np.concatenate([run(jax.device_put(batch, split)) for batch in batches])
    return maps[: COUNT * VIEWS].reshape(COUNT, VIEWS, 17, 48)


def everything(folder):
    """All records of a folder: views, and arrays by name [COUNT, VIEWS, ...]."""
    store = replay.Store(folder)
    read = [[store.read(i, v) for v in range(VIEWS)] for i in range(COUNT)]
    names = read[0][0][1]
    arrays = {n: np.array([[arrays[n] for _, arrays in row] for row in read]) for n in names}
    return store, [[view for view, _ in row] for row in read], arrays


def test_stored_maps_are_those_of_the_live_teacher_on_the_same_views(folders, live):
    """The same bits after rounding; the other view of a picture has another map."""
    _, views, arrays = everything(folders["float32"])
    np.testing.assert_allclose(arrays["values"], live, atol=1e-5)
    rounded = everything(folders["bfloat16"])[2]["values"].view(jnp.bfloat16)
    np.testing.assert_array_equal(rounded, live.astype(jnp.bfloat16))
    differ = np.abs(live[:, 0] - live[:, 1]).max(axis=(1, 2)) > 1e-2
    assert differ.mean() > 0.9  # some crops of 8 x 8 pixels are the same
    flips = [view.flipped for row in views for view in row]
    assert 0.2 < np.mean(flips) < 0.8


def quantized(maps):
    """Whole numbers and factors of int8 tokens, in numpy."""
    scale = np.abs(maps).max(axis=-1) / 127
    return np.round(maps / scale[..., None]), scale


def test_int8_is_that_of_numpy(folders):
    maps = everything(folders["float32"])[2]["values"]
    found = everything(folders["int8"])[2]
    assert found["values"].dtype == np.int8 and found["values"].max() == 127
    np.testing.assert_allclose(found["scale"], quantized(maps)[1], rtol=2e-7)
    np.testing.assert_array_equal(found["values"], np.round(maps / found["scale"][..., None]))


def principal(statistics):
    with np.load(statistics) as found:
        groups = {"cls": slice(0, 1), "patch": slice(1, None)}
        return {
            at: tuple(found[f"{group}/{name}"] for name in ("mean", "values", "vectors"))
            for group, at in ((g, (s.start, s.stop)) for g, s in groups.items())
        }


def test_coordinates_along_principal_directions_are_those_of_numpy(folders, statistics):
    """In float64; a rounding error of the projection may move a number to its neighbour."""
    maps = everything(folders["float32"])[2]["values"].astype(np.float64)
    found = everything(folders["pca_int8"])[2]
    assert found["values"].shape == (COUNT, VIEWS, 17, COMPONENTS)
    for (start, stop), (mean, variances, vectors) in principal(statistics).items():
        tokens = slice(start, stop)
        deviations = np.sqrt(variances[:COMPONENTS])
        values, scale = quantized(
            (maps[:, :, tokens] - mean) @ vectors[:, :COMPONENTS] / deviations
        )
        np.testing.assert_allclose(found["scale"][:, :, tokens], scale, rtol=1e-4)
        apart = np.abs(found["values"][:, :, tokens] - values)
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def whitened(tokens):
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def restored(kind, arrays, statistics):
    """The float64 maps of stored arrays, in numpy."""
    if kind in ("float32", "bfloat16"):
        values = arrays["values"]
        return (values.view(jnp.bfloat16) if kind == "bfloat16" else values).astype(np.float64)
    maps = arrays["values"].astype(np.float64) * arrays["scale"][..., None]
    if kind == "int8":
        return maps
    parts = []
    for (start, stop), (mean, variances, vectors) in principal(statistics).items():
        matrix = vectors[:, :COMPONENTS] * np.sqrt(variances[:COMPONENTS])
        parts.append(maps[:, :, start:stop] @ matrix.T + mean)
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_error_is_that_of_all_maps(kind, folders, statistics):
    maps = everything(folders["float32"])[2]["values"].astype(np.float64)
    store, _, arrays = everything(folders[kind])
    found = restored(kind, arrays, statistics)
    for name, change in {"map": lambda x: x, "whitened": whitened}.items():
        want, got = change(maps), change(found)
        lengths = np.linalg.norm(want, axis=-1) * np.linalg.norm(got, axis=-1)
        error = store.description.error[name]
        assert error["relative_rms"] == pytest.approx(
            np.sqrt(((got - want) ** 2).sum() / (want**2).sum()), rel=1e-4
        )
        assert error["max"] == pytest.approx(np.abs(got - want).max(), rel=1e-3, abs=1e-6)
        assert error["cosine"] == pytest.approx(((got * want).sum(-1) / lengths).mean(), abs=1e-6)
    largest = {"float32": 0, "bfloat16": 2e-3, "int8": 2e-2, "pca_int8": 0.9}[kind]
    assert store.description.error["map"]["relative_rms"] <= largest


def test_the_description_names_the_teacher_the_pictures_and_the_bytes(folders, teacher):
    """Shards hold all views of whole pictures, in order; nothing else is left in the folder."""
    content = json.loads((folders["int8"] / "targets.json").read_text())
    assert content["version"] == 1 and content["teacher"]["source"] == "tiny"
    assert content["data"]["examples"] == COUNT and content["views"]["number"] == VIEWS
    assert [shard["records"] for shard in content["shards"]] == [SHARD * 2, SHARD * 2, 8]
    names = sorted(path.name for path in folders["int8"].iterdir())
    shards = [f"maps-0000{number}-of-00003.array_record" for number in range(3)]
    assert names == [*shards, "targets.json"]
    of_map = description.read(folders["int8"]).codec.bytes_per_map
    assert of_map == 17 * 48 + 17 * 4
    stored_bytes = sum(shard["bytes"] for shard in content["shards"])
    blocks = 3 * 2 * 2**16  # ArrayRecord fills each of three files up to whole blocks of 64 KiB
    assert 0.5 * of_map * COUNT * VIEWS < stored_bytes < of_map * COUNT * VIEWS + blocks


# --- runs ------------------------------------------------------------------------------------


def task_of(data, folder, **changes):
    config = tiny.config(**fields(data, folder, **changes))
    settings.check(config)
    return config, DistillTask(config)


def losses(config, workdir):
    loop.fit(DistillTask(config), config, workdir)
    return [row["loss"] for row in metric_writer.read(workdir) if "loss" in row]


@pytest.mark.parametrize(
    "kind,keep,apart",
    [
        ("float32", 1.0, 2e-6),
        pytest.param("float32", 0.5, 2e-6, marks=pytest.mark.slow),
        pytest.param("int8", 1.0, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_a_run_has_the_losses_of_one_with_the_live_teacher(
    kind, keep, apart, folders, teacher, embedded_data, tmp_path, capsys
):
    """Two epochs of two steps, of a view each. Other kinds differ as little as their maps.

    `keep` is the share of the patches that the student sees.
    """
    shape = {"student.mask.keep": keep, "steps": 4, "eval.every": 4, "student.arch.depth": 1}
    alone = {"teacher.path": teacher, "data.eval_split": "", **shape}
    want = losses(tiny.config(**fields(embedded_data, **alone)), tmp_path / "live")
    config = tiny.config(**fields(embedded_data, folders[kind], **shape))
    got = losses(config, tmp_path / "stored")
    np.testing.assert_allclose(got, want, rtol=apart)
    rows = metric_writer.read(tmp_path / "stored")
    assert not any("eval_loss" in row for row in rows)
    said = capsys.readouterr().out
    assert f"{folders[kind]}: {kind} maps of tiny, 2 views of each picture" in said
    assert "loss and similarity on held-out pictures are left out" in said


def batches(config, steps, start=0):
    feed = feeds.open_data(config, None)
    loader = feed.train(batch_size=16, seed=config.seed, rows=np.arange(16), start_step=start)
    found = [{name: value.copy() for name, value in next(loader).items()} for _ in range(steps)]
    loader.close()
    return found


def test_epochs_take_the_views_in_turn_and_a_restart_goes_on_with_them(
    folders, pictures, embedded_data
):
    config, _ = task_of(embedded_data, folders["bfloat16"], **{"data.workers": 0})
    maps = everything(folders["bfloat16"])[2]["values"]
    found = batches(config, 6)  # 44 // 16 = 2 steps an epoch
    for step, batch in enumerate(found):
        view = step // 2 % VIEWS
        np.testing.assert_array_equal(batch["image"], pictures[batch["index"], view])
        np.testing.assert_array_equal(batch["stored"], maps[batch["index"], view])
    assert any((a["index"] != b["index"]).any() for a, b in zip(found[:2], found[4:], strict=True))
    again = batches(config, 3, start=3)
    for one, other in zip(found[3:], again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_held_out_figures_are_those_of_the_live_teacher(folders, held_out, teacher, embedded_data):
    """Over a split that no batch divides; without such targets there are none."""
    changes = {"data.eval_split": "test[:20]", "teacher.eval_targets": str(held_out)}
    config, task = task_of(embedded_data, folders["float32"], **changes)
    (evaluator,) = task.evaluators()
    assert isinstance(evaluator, evaluators.HeldOut)
    alone = {"data.eval_split": "test[:20]", "teacher.path": teacher}
    live_config, running = task_of(embedded_data, "", **alone)
    params = tiny.randomize(jax.device_get(task.init(jax.random.key(0))[0]), 3, scale=0.1)

    def figures(config, task):
        feed, frozen, total = feeds.open_data(config, task), task.load_frozen(), Mean()
        step = jax.jit(task.evaluate)
        for batch in feed.sequential("eval", batch_size=16):
            assert batch.keys() == feed.elements.keys()
            total.add(step(params, {}, frozen, batch))
        return total.result()

    got, want = figures(config, task), figures(live_config, running)
    assert got.keys() == want.keys() == {"loss", "cosine"}
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    # The bank of nearest neighbours is made of training pictures, which have no such maps.
    bank = next(feeds.open_data(config, task).sequential("train", batch_size=16))
    assert "stored" not in bank
    config.teacher.eval_targets = ""
    assert DistillTask(config).evaluators() == []


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"teacher.targets": "int8"}, "kind: stored 'float32', here 'int8'"),
        ({"data.eval_resize": 1.5}, "eval_resize: stored 1.14.*, here 1.5"),
        ({"data.eval_split": "test[:21]"}, "examples: stored 20, here 21"),
        ({"data.eval_split": ""}, "are the maps of the pictures in data.eval_split"),
        ({"teacher.targets": ""}, "are the maps of the pictures in data.eval_split"),
        (
            {"teacher.eval_targets": "float32", "data.eval_split": SPLIT},
            "held_out: stored False, here True",
        ),
        ({"teacher.targets": "held_out", "data.split": "test[:20]"}, "held_out: stored True, here"),
    ],
)
def test_targets_of_held_out_pictures_that_do_not_fit_are_refused(
    changes, message, folders, held_out, embedded_data
):
    known = {**folders, "held_out": held_out}
    given = {"data.eval_split": "test[:20]", "teacher.eval_targets": str(held_out), **changes}
    given = {n: str(known.get(v, v)) if "targets" in n else v for n, v in given.items()}
    config = tiny.config(**{**fields(embedded_data, folders["float32"]), **given})
    with pytest.raises(ConfigError, match=message):
        settings.check(config)
        feeds.open_data(config, DistillTask(config))


def test_a_run_that_resumes_notices_other_targets(folders, teacher, embedded_data, tmp_path):
    """They are remembered like its data."""

    def contents(folder):
        return feeds.open_data(tiny.config(**fields(embedded_data, folder)), None).contents()

    workdir = workdirs.epath.Path(tmp_path / "run")
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    before = contents(folders["bfloat16"])
    workdirs.claim_data(workdir, before)
    workdirs.check_data(workdir, contents(folders["bfloat16"]), accept=False)
    with pytest.raises(CheckpointError, match="targets: the same number(.|\n)*Later batches"):
        workdirs.check_data(workdir, contents(folders["int8"]), accept=False)
    assert before.keys() == {"train", "eval", "targets"}


@pytest.mark.slow
def test_a_report_of_a_run_without_its_teacher_has_no_agreement(folders, embedded_data, tmp_path):
    shape = {"steps": 2, "data.eval_split": ""}
    losses(tiny.config(**fields(embedded_data, folders["int8"], **shape)), tmp_path)
    folder = report.write_report(tmp_path)
    assert (folder / "report.html").exists() and not (folder / "agreement.json").exists()
    assert report.summary(folder)


@pytest.mark.slow
def test_worker_processes_read_the_same_rows(folders, embedded_data):
    config, _ = task_of(embedded_data, folders["int8"])
    want = batches(config, 4)
    config.data.workers = 2
    jax.tree.map(np.testing.assert_array_equal, batches(config, 4), want)


@pytest.mark.parametrize(
    "kind,changes",
    [
        ("float32", {"target.kind": "cls"}),
        ("bfloat16", {"target.kind": "gap", "target.normalize": "l2"}),
        ("int8", {}),
        ("pca_int8", {"target.normalize": "none"}),
        ("float32", {"student.arch.patch_size": 16, "target.resample": "bilinear"}),
        ("float32", {"student.arch.cls_token": False}),
    ],
)
def test_targets_are_made_of_stored_maps_as_of_live_ones(
    kind, changes, folders, teacher, embedded_data
):
    """Selected, resized and normalised alike, within the error of the storage."""
    config, task = task_of(embedded_data, folders[kind], **changes)
    _, running = task_of(embedded_data, "", **{**changes, "teacher.path": teacher})
    (batch,) = batches(config, 1)
    stored_targets, frozen = jax.jit(task.targets), task.load_frozen()
    got = stored_targets(frozen, batch)[""]
    want = np.asarray(jax.jit(running.targets)(running.load_frozen(), batch)[""])
    assert got.shape == want.shape
    allowed = {"float32": 1e-5, "bfloat16": 5e-3, "int8": 2e-2, "pca_int8": 0.9}[kind]
    assert np.linalg.norm(got - want) < allowed * np.linalg.norm(want)
    # Negative control: the maps of other pictures are further away.
    others = {
        n: np.roll(v, 1, axis=0) if n[:5] in ("store", "scale") else v for n, v in batch.items()
    }
    apart = np.linalg.norm(stored_targets(frozen, others)[""] - want)
    assert apart > max(0.05, allowed) * np.linalg.norm(want)
    shapes = jax.tree.map(lambda leaf: leaf.shape, task.abstract_frozen())
    assert shapes == jax.tree.map(np.shape, task.load_frozen())


def several(folders, first="", second=""):
    sections = [("one", base.teacher("tiny", path="nowhere", targets=first))]
    sections += [("two", base.teacher("tiny", path="nowhere", targets=second, weight=0.5))]
    return tiny.several(sections)


def test_one_teacher_may_run_beside_one_whose_maps_are_stored(folders, embedded_data, teacher):
    made = several(folders, second=str(folders["int8"]))
    made.update_from_flattened_dict(
        {n: v for n, v in fields(embedded_data).items() if not n.startswith("teacher.")}
    )
    made.teachers.one.path = teacher
    settings.check(made)
    task = DistillTask(made)
    (batch,) = batches(made, 1)
    frozen = task.load_frozen()
    assert frozen["two"] == {} and frozen["one"]
    found = jax.jit(task.targets)(frozen, batch)
    apart = np.asarray(found["one"] - found["two"])
    assert 0 < np.linalg.norm(apart) < 2e-2 * np.linalg.norm(found["one"])
    assert task.attention.keys() == {"student", "teacher one"}
    assert [network.role for network in registry.kind_of(made).networks(made)] == ["teacher one"]
    assert task.evaluators() == []


def lowered(config):
    run, task = programs.built(config, teacher_spec=tiny.teacher_spec())
    return programs.text(run), task


def test_a_run_without_stored_targets_keeps_its_program(folders, embedded_data):
    """Also without the field, as in configs of earlier versions; one with them has no teacher."""
    plain, live_task = lowered(tiny.config())
    older = tiny.config()
    del older.teacher.targets, older.teacher.eval_targets
    assert lowered(older)[0] == plain
    config = tiny.config(**fields(embedded_data, folders["bfloat16"]))
    run, task = programs.built(config)
    assert run.batch["stored"].shape == (16, 17, 48) and jax.tree.leaves(run.frozen) == []
    work = live_task.goal.teacher.flops(32).forward
    assert task.flops().forward == pytest.approx(live_task.flops().forward - work)


def test_a_run_is_planned_from_a_description_alone():
    """The row of benchmarks/scale: the batch has maps, and no network but the student is needed."""
    (flag,) = scale.RUNS["distill_stored_b"][2]
    config = distill_clip_vit_b16.get_config()
    config.teacher.targets = flag.partition("=")[2]
    planned = experiment.define(config)
    assert planned.networks == () and planned.examples == 1_281_167
    elements = registry.kind_of(planned.config).elements(planned.config)
    assert (elements["stored"].shape, elements["stored"].dtype) == ((197, 768), "uint16")
    assert planned.task.abstract_frozen() == {}


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"teacher.source": "x"}, "source: stored 'tiny', here 'x'"),
        ({"target.after_norm": False}, "after_norm: stored True, here False"),
        ({"teacher.image_size": 24}, "image_size: stored 32, here 24"),
        ({"teacher.matmuls": "int8"}, "matmuls: stored '', here 'int8'"),
        ({"data.flip": False}, "flip: stored True, here False(.|\n)*mirrored map is not the map"),
        ({"data.min_area": 0.5}, "min_area: stored 0.3, here 0.5"),
        ({"data.interpolation": "bicubic"}, "interpolation: stored 'bilinear', here 'bicubic'"),
        ({"data.split": "train[:45]"}, r"of digits, split 'train\[:44\]', and this run reads dig"),
        ({"data.split": "test[:44]"}, "digest: stored '.*', here '.*'"),
        ({"target.kind": "logits"}, "no logits follow without the teacher's head"),
        ({"student.mask.keep": 0.5, "student.mask.by": "attention"}, "which does not run, since"),
        ({"target.blocks": (1,), "target.after_norm": False}, "holds that of its last one"),
        ({"teacher.drop_path": 0.1}, "the teacher does not run; set its drop_path=0"),
        ({"teacher.follow": True}, "the teacher does not run; set its drop_path=0"),
        ({"data.rand_augment": "rand-m9"}, "RandAugment also turns and shifts pictures"),
        ({"data.sizes": (24, 32)}, "the stored views have one size"),
        ({"eval.keep_best": "loss"}, "eval.keep_best='loss'"),
    ],
)
def test_targets_that_do_not_fit_a_run_are_refused_before_work(
    changes, message, folders, embedded_data, tmp_path
):
    config = tiny.config(**fields(embedded_data, folders["bfloat16"], **changes))
    with pytest.raises(ConfigError, match=message):
        settings.check(config)
        loop.fit(DistillTask(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_targets_of_a_quantised_teacher_are_for_runs_that_say_so(
    folders, teacher, embedded_data, tmp_path
):
    folder = tmp_path / "int8"
    flags = ("--matmuls=int8", "--quantization=float32")
    assert make(teacher, embedded_data, folder, *flags) == 0
    task_of(embedded_data, folder, **{"teacher.matmuls": "int8"})
    with pytest.raises(ConfigError, match="matmuls: stored 'int8', here ''"):
        task_of(embedded_data, folder)
    maps, exact = (everything(each)[2]["values"] for each in (folder, folders["float32"]))
    assert 1e-3 < np.linalg.norm(maps - exact) / np.linalg.norm(exact) < 0.03


def test_targets_of_other_weights_are_refused(folders, embedded_data, tmp_path):
    other = tiny.save_teacher(tmp_path / "other", norm_eps=1e-5)
    with pytest.raises(ConfigError, match="weights: stored [0-9]+, here [0-9]+"):
        task_of(embedded_data, folders["int8"], **{"teacher.path": tiny_with_other(other)})


def tiny_with_other(folder):
    """The folder with weights of its own."""
    from fd_jax import model_folder

    spec, parts = model_folder.load(folder)
    model_folder.save(folder, spec, tiny.randomize(parts, 9), overwrite=True)
    return folder


def damaged(folder, output, change):
    shutil.copytree(folder, output)
    path = output / "targets.json"
    content = json.loads(path.read_text())
    change(content, output)
    path.write_text(json.dumps(content))
    return output


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c, _: c.update(version=2), "has version 2, and this fd_jax reads 1"),
        (lambda c, _: c.update(normalize="whiten"), "by 'whiten' .* of the normalisation 'none'"),
        (lambda c, _: c.update(error=None, shards=None), "are not complete"),
        (lambda c, _: c.pop("views"), "is damaged"),
        (lambda c, _: c["shards"].pop(), "is damaged"),
        (lambda _, f: (f / "maps-00001-of-00003.array_record").unlink(), "00003.* is missing"),
        (lambda _, f: cut(f / "maps-00001-of-00003.array_record"), "is cut off or damaged"),
        (lambda _, f: swap(f), "is view 0 of picture 20"),
    ],
)
def test_damaged_folders_are_refused(change, message, folders, embedded_data, tmp_path):
    folder = damaged(folders["bfloat16"], tmp_path / "copy", change)
    with pytest.raises(DataError, match=message):
        replay.Store(folder).read(0, 0)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap(folder):
    first, second = (folder / f"maps-0000{n}-of-00003.array_record" for n in range(2))
    shutil.copy(second, first)


def test_two_folders_of_different_views_are_refused(folders, teacher, embedded_data, tmp_path):
    other = tmp_path / "other"
    assert make(teacher, embedded_data, other, "--seed=9", "--shard_size=100") == 0
    made = several(folders, str(folders["int8"]), str(other))
    made.update_from_flattened_dict(
        {n: v for n, v in fields(embedded_data).items() if not n.startswith("teacher.")}
    )
    with pytest.raises(ConfigError, match="seed: stored 3, here 9"):
        feeds.open_data(made, None)


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--seed=4",), "views.seed: 3 -> 4"),
        (("--quantization=int8",), "maps.kind: 'bfloat16' -> 'int8'"),
        (("--before_norm",), "teacher.after_norm: True -> False"),
        (("--split=train[:43]",), "data.examples: 44 -> 43"),
        (("--matmuls=int8",), "teacher.matmuls: (absent) -> 'int8'"),
    ],
)
def test_a_folder_is_not_gone_on_with_by_another_command(
    flags, message, folders, teacher, embedded_data, capsys
):
    before = {path.name: path.read_bytes() for path in folders["bfloat16"].iterdir()}
    assert make(teacher, embedded_data, folders["bfloat16"], *flags) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folders["bfloat16"].iterdir()} == before


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--teacher=nowhere",), "no model folder at nowhere"),
        (("--batch_size=12",), "not divisible by 8 batch shards"),
        (("--held_out",), "--views=2: a held-out picture has one view"),
        (("--quantization=pca_int8",), "has the principal directions of pca_int8"),
        (("--statistics=x.npz",), "has the principal directions of pca_int8"),
        (("--output=gs://bucket/targets",), "local or mounted folder"),
    ],
)
def test_what_cannot_be_made_is_refused(flags, message, teacher, embedded_data, tmp_path, capsys):
    assert make(teacher, embedded_data, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_not_touched(teacher, embedded_data, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert make(teacher, embedded_data, tmp_path) == 2
    assert "holds other files (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_lost_shard_is_made_again_and_nothing_else(folders, teacher, embedded_data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders["bfloat16"], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make(teacher, embedded_data, folder) == 0  # complete: nothing happens
    assert times == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    lost = "maps-00001-of-00003.array_record"
    (folder / lost).unlink()
    assert make(teacher, embedded_data, folder) == 0
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = "maps-00000-of-00003.array_record"
    assert (folder / kept).stat().st_mtime_ns == times[kept]


def test_a_picture_that_cannot_be_read_has_no_map_and_is_replaced(teacher, tmp_path, capsys):
    """In a run, too: by the next one of the epoch, as without stored targets."""
    from PIL import Image

    from fd_jax.targets import cli

    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(16):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number:02d}.png")
    path = tmp_path / "pictures" / "05.png"
    path.write_bytes(path.read_bytes()[:60])
    flags = [f"--teacher={teacher}", f"--data={tmp_path / 'pictures'}", "--batch_size=16"]
    flags += [f"--output={tmp_path / 'targets'}"]
    assert cli.main(flags) == 2
    assert "1 pictures of" in capsys.readouterr().err
    assert cli.main([*flags, "--max_broken=1"]) == 0
    assert "1 pictures could not be read" in capsys.readouterr().out
    changes = {"data.name": f"folder:{tmp_path / 'pictures'}", "data.eval_split": ""}
    changes |= {"data.min_area": 0.08, "data.split": "train"}
    config = tiny.config(**fields("", tmp_path / "targets", **changes))
    (batch,) = batches(config, 1)
    assert 5 not in batch["index"] and len(set(batch["index"].tolist())) == 15
    store = replay.Store(tmp_path / "targets")
    assert sum(shard.unreadable for shard in store.description.shards) == 1
    # A picture that has changed since is noticed by its size.
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "pictures" / "07.png")
    config.teacher.targets = str(
        damaged(tmp_path / "targets", tmp_path / "copy", lambda c, _: accept(c, config))
    )
    with pytest.raises(DataError, match=r"picture 7 has \(30, 30\) pixels, .* it had \(40, 50\)"):
        batches(config, 1)


def accept(content, config):
    """Gives a description the digest of the pictures as they are now."""
    dataset = datasets.open_dataset(config.data.name, "train")
    content["data"].update(replay.known_contents(dataset))


def test_stored_targets_have_no_features_of_other_pictures(folders, embedded_data):
    _, task = task_of(embedded_data, folders["int8"])
    assert isinstance(task.goal.teacher, stored.StoredTeacher)
    with pytest.raises(ConfigError, match="no features of other pictures or views"):
        task.goal.tokens({}, tiny.batch()["image"], None)

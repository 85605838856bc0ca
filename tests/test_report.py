"""Agreement against plain numpy, and the files of a report."""

import base64
from html.parser import HTMLParser
import json
import shutil

from flax import nnx
import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

from configs import base
from fd_jax import model_folder, report
from fd_jax.data.feed import Feed
from fd_jax.errors import ModelFolderError, UserError
from fd_jax.evaluation import agreement
from fd_jax.report import classes, distillation, training
from fd_jax.show import pictures, tables
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop, metric_writer
from tests import tiny


def agree(task, params, frozen, batches, mean):
    return agreement.scores(agreement.measure(task, {"a": params}, frozen, batches), "a", mean)


def mean_target(task, params, frozen, batches):
    totals = agreement.measure(task, {"a": params}, frozen, batches)
    return {kind: total.mean for kind, total in totals.items()}


@pytest.fixture(scope="module")
def scores(teacher):
    """A task, its inputs (with padding) and the `agreement` for them."""
    task = DistillTask(tiny.config(teacher))
    params = tiny.randomize(task.init(jax.random.key(0))[0], 5, scale=0.05)
    frozen = task.load_frozen()
    train = [tiny.batch(seed=1), tiny.batch(seed=2)]
    held_out = [tiny.batch(seed=3), {**tiny.batch(seed=4), "weight": (np.arange(16) < 5) * 1.0}]
    mean = mean_target(task, params, frozen, train)
    result = agree(task, params, frozen, held_out, mean)
    return task, params, frozen, train, held_out, result


def test_agreement_equals_its_formula_in_numpy(scores):
    task, params, frozen, train, held_out, result = scores

    def targets(batches):
        keep = [batch["weight"] > 0 for batch in batches]
        tokens = [np.asarray(task.teacher_target(frozen, batch)) for batch in batches]
        return np.concatenate([t[k] for t, k in zip(tokens, keep, strict=True)]).astype(float)

    keep = np.concatenate([batch["weight"] > 0 for batch in held_out])
    p = np.concatenate([np.asarray(task.predict(params, batch)) for batch in held_out])[keep]
    t, m = targets(held_out), targets(train)
    for kind, at in {"cls": slice(0, 1), "patch": slice(1, None)}.items():
        tk, pk = t[:, at], p[:, at]
        mk = m[:, at].mean((0, 1))
        r2 = 1 - ((tk - pk) ** 2).sum() / ((tk - mk) ** 2).sum()

        def cosine(a, b):
            return (
                (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            ).mean()

        assert result[kind]["r2"] == pytest.approx(r2, rel=1e-4)
        assert result[kind]["cosine"] == pytest.approx(cosine(tk, pk), rel=1e-3, abs=1e-5)
        constant = np.broadcast_to(mk, tk.shape)
        assert result[kind]["cosine_of_mean"] == pytest.approx(cosine(tk, constant), rel=1e-4)


def test_predicting_the_mean_has_r2_zero(scores, tmp_path):
    """The student's projector ignores its input and outputs the mean target."""
    task, params, frozen, train, _, _ = scores
    mean = mean_target(task, params, frozen, train)
    kernel = np.zeros_like(params["projector"]["kernel"])
    constant = {**params, "projector": {"kernel": kernel, "bias": mean["patch"]}}
    result = agree(task, constant, frozen, train, mean)
    assert result["patch"]["r2"] == pytest.approx(0, abs=1e-5)
    assert result["patch"]["cosine"] == pytest.approx(result["patch"]["cosine_of_mean"], abs=1e-6)


def test_colours_are_the_principal_components():
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 3.0, 2.0] + [0.1] * 13)
    tokens = rng.normal(size=(10, 20, 16)) * scales
    colours = pictures.principal_colours(tokens)(tokens)
    assert colours.shape == (10, 20, 3)
    for channel in range(3):
        flat = colours[..., channel].reshape(-1)
        assert abs(np.corrcoef(flat, tokens[..., channel].reshape(-1))[0, 1]) > 0.9


def test_several_students_are_measured_in_one_pass(scores):
    """Each has the figures that it has alone, and another student's are others."""
    task, params, frozen, train, held_out, alone = scores
    other = tiny.randomize(params, 9)
    mean = mean_target(task, params, frozen, train)
    both = agreement.measure(task, {"a": params, "b": other}, frozen, held_out)
    for kind, values in alone.items():
        assert agreement.scores(both, "a", mean)[kind] == pytest.approx(values, rel=1e-5)
        assert agreement.scores(both, "b", mean)[kind]["r2"] != pytest.approx(values["r2"])


@pytest.fixture(scope="module")
def written(finished):
    """The folder of the report of a finished distillation."""
    return report.write_report(finished[0])


class Page(HTMLParser):
    """Pictures, texts of cells and addresses of an HTML file."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.cells, self.addresses = [], [], []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._cell = tag in ("td", "th")
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.pictures.append(base64.b64decode(attrs["src"].split(",")[1]))

    def handle_data(self, data):
        if self._cell and data.strip():
            self.cells.append(data)


def test_the_report_has_plots_and_an_improved_agreement(written):
    text = (written / "report.md").read_text()
    for name in ("loss.png", "maps.png"):
        assert f"({name})" in text
        assert np.asarray(Image.open(written / name)).std() > 10
    scores = json.loads((written / "agreement.json").read_text())
    assert scores["after"]["patch"]["r2"] > scores["before"]["patch"]["r2"]
    assert str(written) in report.summary(written)


def test_the_html_report_opens_offline_and_has_the_same_content(written):
    page = Page((written / "report.html").read_text())
    text = (written / "report.md").read_text()
    assert all(address.startswith("data:") for address in page.addresses)
    names = [line.split("(")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert page.pictures == [(written / name).read_bytes() for name in names]
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert page.cells == [cell for row in rows for cell in row.strip("| ").split(" | ") if cell]


def test_maps_have_16_patches_a_side_although_training_had_4(finished, written):
    config = ml_collections.ConfigDict(json.loads((finished[0] / "config.json").read_text()))
    assert DistillTask(config).student.grid == (4, 4)
    assert DistillTask(distillation.enlarged(config)).student.grid == (16, 16)
    assert "16 x 16 patches; in training they had 4 x 4" in (written / "report.md").read_text()


@pytest.mark.parametrize(
    "size,window,trained,shown",
    [
        (32, 4, 2, 16),
        (48, 3, 3, 3),  # windows of 3 do not divide maps of 16
    ],
)
def test_maps_of_a_swin_keep_a_size_that_its_windows_allow(size, window, trained, shown, tmp_path):
    arch = {"image_size": size, "window": window}
    config = tiny.swin_config(tiny.save_swin(tmp_path / "swin", version=2, **arch))
    config.student.arch.update(arch)
    config.data.image_size = config.teacher.image_size = size
    config.teacher.source = "tiny"
    grids = [DistillTask(c).student.grid for c in (config, distillation.enlarged(config))]
    assert grids == [(trained, trained), (shown, shown)]


@pytest.mark.slow
def test_training_and_held_out_agreement_use_their_own_split(finished, written):
    workdir, _ = finished
    scores = json.loads((written / "agreement.json").read_text())
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    task = DistillTask(config)
    params, _ = distillation.load_trained(task, report.writing.epath.Path(workdir))
    feed, frozen = Feed(**config.data), task.load_frozen()

    def batches(split):
        chosen = np.arange(256) * feed.examples(split) // 256
        images = np.stack([feed.image(split, i, 32) for i in chosen])
        for part in np.split(images, 8):
            yield {**tiny.batch(32), "image": part}

    mean = mean_target(task, params, frozen, batches("train"))
    for name, split in (("training", "train"), ("after", "eval")):
        result = agree(task, params, frozen, batches(split), mean)
        assert scores[name]["patch"]["r2"] == pytest.approx(result["patch"]["r2"], abs=1e-5)
    assert scores["training"]["patch"]["r2"] != pytest.approx(result["patch"]["r2"], abs=1e-4)


@pytest.mark.slow
def test_a_run_of_two_teachers_resumes_bit_for_bit_and_reports_each(
    teacher, embedded_data, tmp_path
):
    """With all that a run measures itself, which checkpoints and the model folder hold."""
    second = tiny.save_teacher(tmp_path / "teacher", width=40, image_size=24)
    fields = {"target__normalize": "standardize", "target__resample": "bilinear"}
    sections = [
        ("first", base.teacher("tiny", path=teacher)),
        ("second", base.teacher("tiny", path=second, target__freeze_after=5, **fields)),
    ]
    config = tiny.several(sections, **{"data.data_dir": embedded_data, "dropping.rate": 0.5})
    config.dropping.by = "running"

    def fit(name):
        loop.fit(DistillTask(config), config, tmp_path / name)
        rows = metric_writer.read(tmp_path / name)
        kept = ("loss", "loss/first", "loss/second", "kept/first", "kept/second")
        figures = [{n: row[n] for n in kept} for row in rows if "loss" in row]
        return model_folder.load(tmp_path / name / "model")[1], figures

    whole, losses = fit("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    resumed, again = fit("cut")
    assert again == losses and len(losses) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert whole.keys() == {"encoder", "projector", "target_statistics"}
    folder = report.write_report(tmp_path / "whole")
    scores = json.loads((folder / "agreement.json").read_text())["teachers"]
    assert scores.keys() == {"first", "second"}
    text = (folder / "report.md").read_text()
    for name in scores:
        assert scores[name]["after"]["patch"].keys() == {"r2", "cosine", "cosine_of_mean"}
        assert f"## Agreement with the teacher {name}" in text and f"(maps_{name}.png)" in text
        assert f"| teachers.{name}.source | tiny |" in text
    assert "held-out agreement with second" in report.summary(folder)


ROWS = [
    {"step": 1, "loss": 2.0, "images_per_second": 10.0},
    {"step": 2, "loss": 1.0, "images_per_second": 30.0},
    {"step": 2, "eval_loss": 1.5, "eval_top1": 0.7},
    {"step": 3, "loss": 0.5, "images_per_second": 20.0},
    {"step": 3, "eval_loss": 1.6, "eval_top1": 0.6},
]


@pytest.fixture
def tuned(tmp_path):
    """A finished workdir of fine-tuning, without its data."""
    config = tiny.fine_tuning("somewhere")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tiny.save_student(tmp_path / "model")
    return tmp_path


def test_the_report_of_fine_tuning_has_curves_rates_and_a_final_table(tuned):
    folder = report.write_report(tuned)
    text = (folder / "report.md").read_text()
    assert "| init_from | somewhere |" in text and "| images/s | 20 |" in text
    assert "| top1 | 0.60000 | 0.70000 | 2 |" in text  # best is the highest
    assert "| loss | 1.60000 | 1.50000 | 2 |" in text  # best is the lowest
    assert "(evaluation.png)" in text and "maps.png" not in text
    assert "step 3: loss 1.60000  top1 0.60000" in report.summary(folder)
    assert "## Classes" in text and "--per_class" in text and "confusion.png" not in text


def test_the_report_shows_the_classes_that_were_measured(tuned):
    matrix = np.array([[3, 1, 0], [0, 4, 0], [1, 1, 2]])
    text = tables.confusion(matrix, ["cat", "a|b", "rocket"])
    (tuned / tables.CONFUSION).write_text(text)
    folder = report.write_report(tuned)
    text = (folder / "report.md").read_text()
    assert (folder / "confusion.png").exists() and "(confusion.png)" in text
    assert "| cat | 4 | 0.7500 | a\\|b (1) |" in text
    assert "| a\\|b | 4 | 1.0000 |  |" in text
    assert "One picture of 12 is 8.3 points" in text
    assert "<td>a|b</td>" in (folder / "report.html").read_text()
    (tuned / tables.CONFUSION).write_text("label,cat\ndog,1\n")
    with pytest.raises(UserError, match=r"confusion.csv is no table.*--per_class"):
        report.write_report(tuned)


def test_of_many_classes_the_report_lists_the_worst(tmp_path):
    right = np.arange(1, 121)
    names = [f"class{k}" for k in range(120)]
    matrix = np.diag(right)
    matrix[:, 0] += 1  # every class is mistaken once for the first, which has most of its own
    matrix[0, 0] = 0
    (tmp_path / tables.CONFUSION).write_text(tables.confusion(matrix, names))
    *_, table = classes.blocks(tmp_path, report.writing.epath.Path(tmp_path))
    assert [row[0] for row in table.rows[:3]] == ["class1", "class2", "class3"]
    assert len(table.rows) == 100


def test_of_equal_accuracies_the_one_with_the_lower_loss_is_the_best(tuned):
    rows = [
        {"step": step, "loss": 1.0, "eval_loss": loss, "eval_top1": 1.0}
        for step, loss in ((1, 1.5), (2, 1.2), (3, 1.3))
    ]
    text = str(training.blocks(tiny.fine_tuning(), rows, report.writing.epath.Path(tuned)))
    assert "('top1', '1.00000', '1.00000', '2')" in text


def test_one_evaluation_is_a_table_without_a_curve(tuned):
    rows = ROWS[:3]
    text = str(training.blocks(tiny.fine_tuning(), rows, report.writing.epath.Path(tuned)))
    assert "evaluation.png" not in text and "'top1', '0.70000'" in text


def test_a_run_that_is_not_finished_is_refused(tuned):
    (tuned / "model").rename(tuned / "elsewhere")
    with pytest.raises(ModelFolderError, match="no model folder"):
        report.write_report(tuned)


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        report.write_report(tmp_path)


def test_the_untrained_student_is_the_initial_state_of_the_run(finished):
    """The report's untrained student has the parameters with which step 0 began."""
    workdir, _ = finished
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    task = DistillTask(config)
    untrained = distillation.initial(task, config.seed)
    spec, parts = model_folder.load(workdir / "model")
    assert spec.arch == task.student_spec.arch
    network = nnx.merge(task.student_def, untrained["encoder"])
    assert network(spec.normalize(tiny.batch(2)["image"])).tokens.shape == (2, 17, 32)
    moved = np.abs(parts["encoder"]["cls_token"] - np.asarray(untrained["encoder"]["cls_token"]))
    # A few small steps away, not another random initialization.
    assert 0 < moved.max() < 0.02

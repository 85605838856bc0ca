"""The table of settings: a row for every field of every config, and what it refuses."""

import importlib
import inspect
import math
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from configs import ablations, ablations_cpu, base, finetune_teacher, miniature
from fd_jax import fields, settings
from fd_jax.data import transforms
from fd_jax.errors import ConfigError
from fd_jax.models import spec as specs
from fd_jax.tasks import registry
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("[!_]*.py")
    if path.stem != "base" and not path.stem.startswith("own")  # those: tests/test_own_data.py
)
# Arguments of the files that describe several experiments.
ARGUMENTS = {
    "ablations": [
        f"table={table},row={row},teacher={teacher}"
        for teacher in ablations.TEACHERS
        for table, rows in ablations.TABLES.items()
        for row in rows
    ],
    "ablations_cpu": [
        *(f"stage={stage}" for stage in ablations_cpu.STAGES),
        "stage=contrastive,network=student",
        "stage=distill,pictures=dinov2",
    ],
    "finetune_clip_vit_l14_336": ["stage=22k", "stage=1k"],
    "finetune_teacher": [f"teacher={name}" for name in finetune_teacher.TEACHERS],
    "linear_vit_b16": ["", "official"],
    "linear_vit_l14": ["", "official"],
    "several": ["stage=contrast", *(f"teachers={name}" for name in ("both", "dinov2", "contrast"))],
    "miniature": [
        f"stage={stage},data={data}" for stage in miniature.STAGES for data in miniature.DATA
    ],
}
# The start of each kind of run, and a student of each family.
DISTILLATION = {
    family: base.distillation(teacher="x", shape=shape, family=family, drop_path=0.1)
    for family, shape in (("vit", base.VIT_B16), ("swin_v2", base.SWIN_B_W14))
}
SEVERAL = base.several_teachers(
    [("clip", base.teacher("x")), ("dino", base.teacher("y"))], drop_path=0.1
)
CLASSIFICATION = base.fine_tuning(drop_path=0.1, layer_decay=0.7, peak_lr=1e-3, floor_lr=1e-6)
SEGMENTATION = base.segmentation(peak_lr=4e-4, layer_decay=0.65, drop_path=0.2, channels=768)
CONTRAST = ablations_cpu.get_config("stage=contrastive")
NOT_FINITE = (math.nan, math.inf, -math.inf)


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def copy_of(config, **changes):
    """A copy with other values, which a ConfigDict may not convert to the type of the old ones."""
    values = config.to_dict()
    for name, value in changes.items():
        *sections, field = name.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[field] = value
    return ml_collections.ConfigDict(values)


def every_row():
    """(config, field, rule) of every row of the table."""
    swin = copy_of(CLASSIFICATION, **{"model.family": "swin"})
    swin.model.arch = base.swin_v1(base.SWIN_B_W14, image_size=224)
    seen = set()
    for config in (*DISTILLATION.values(), SEVERAL, CLASSIFICATION, SEGMENTATION, CONTRAST, swin):
        (network,) = (config[name] for name in settings.NETWORKS if name in config)
        family = network.family
        for name, rule in settings.rules(config).items():
            key = (family if ".arch." in name else "", name)
            if key not in seen:
                seen.add(key)
                yield pytest.param(config, name, rule, id="-".join(filter(None, key)))


ROWS = list(every_row())


@pytest.mark.parametrize("name", FILES)
def test_every_published_config_and_its_smoke_version_pass(name):
    for arg in ARGUMENTS.get(name, [""]):
        for given in (arg, ",".join(filter(None, (arg, "smoke")))):
            settings.check(load(name, given))


@pytest.mark.parametrize(
    "config", [*DISTILLATION.values(), SEVERAL, CLASSIFICATION, SEGMENTATION, CONTRAST]
)
def test_a_field_without_a_row_and_a_row_without_a_field_are_refused(config):
    assert settings.problems(config) == []
    more = copy_of(config)
    more.optim.peek_lr = 1.0
    assert settings.problems(more) == [
        "optim.peek_lr: there is no such field; did you mean optim.peak_lr?"
    ]
    less = copy_of(config)
    del less.optim.peak_lr
    (line,) = settings.problems(less)
    assert line.startswith("optim.peak_lr is missing")


def test_every_task_has_rows():
    assert settings.TASKS.keys() == {kind.section for kind in registry.KINDS}
    assert settings.ARCHITECTURES.keys() == specs.FAMILIES.keys()


@pytest.mark.parametrize("family", specs.FAMILIES)
def test_the_rows_of_an_architecture_are_the_arguments_of_its_class(family):
    runtime = {"self", "drop_path", "init", "dtype", "grad_dtype", "attention", "remat", "rngs"}
    arguments = {
        name
        for made in specs.FAMILIES[family].__mro__
        if "__init__" in vars(made) and made.__module__.startswith("fd_jax.models")
        for name, parameter in inspect.signature(made.__init__).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    of_any = {"lift"}  # which `ModelSpec.build` adds to a finished network
    assert settings.ARCHITECTURES[family].keys() == arguments - runtime | of_any


def test_the_names_of_filters_and_crops_are_those_that_exist():
    rows = settings.rules(CLASSIFICATION)
    assert rows["data.interpolation"].names == tuple(transforms._FILTERS)
    assert rows["data.crop"].names == tuple(transforms._CROPS)


def wrong_values(rule):
    """Values that the rule has to refuse, whatever the field means."""
    if isinstance(rule, fields.OrNone):
        return [value for value in wrong_values(rule.rule) if value is not None]
    if isinstance(rule, fields.Several):
        inner = wrong_values(rule.each)
        lengths = [(), (1,) * 3] if rule.length else [() for _ in range(not rule.optional)]
        return [*lengths, *((value,) * (rule.length or 1) for value in inner)]
    if isinstance(rule, fields.Flag):
        return [0, 1, "yes", None, *NOT_FINITE]
    if isinstance(rule, fields.Choice):
        return ["nonsense", 0, None, *NOT_FINITE]
    if isinstance(rule, fields.Text):
        return [0, None, True, " ", *([] if rule.optional else [""]), *NOT_FINITE]
    assert isinstance(rule, fields.Number)
    beyond = [2**31 if rule.most is None else rule.most + 1] if rule.whole else [1e39, 10**400]
    values = [*NOT_FINITE, "1", True, False, None, (1,), *beyond]
    values += [] if rule.least is None else [rule.least - 1]
    values += [] if rule.above is None else [rule.above, rule.above - 1]
    values += [] if rule.most is None else [rule.most + 1]
    values += [] if rule.below is None else [rule.below, rule.below + 0.5]
    values += [1.0, 1.5] if rule.whole else []
    return [value for value in values if value != rule.special or value is True]


@pytest.mark.parametrize("config,name,rule", ROWS)
def test_each_row_refuses_wrong_values_by_name(config, name, rule):
    for value in wrong_values(rule):
        found = settings.problems(copy_of(config, **{name: value}))
        assert any(line.startswith(f"{name}={value!r}") for line in found), (value, found)


def test_bounds_are_compared_as_devices_hold_them():
    """0.99999999 is 1 in float32, and 1e-60 is 0: both would leave weights as they are."""
    for name, value in (("ema_decay", 0.99999999), ("optim.peak_lr", 1e-60)):
        (line,) = settings.problems(
            copy_of(
                DISTILLATION["vit"], **{name: value, "optim.min_lr": 0.0, "optim.start_lr": 0.0}
            )
        )
        assert line.startswith(f"{name}={value!r}: expected a finite number")
    assert settings.problems(copy_of(DISTILLATION["vit"], ema_decay=0.9999)) == []


# Settings that once began a run, and ended in a traceback, in a run with status 0 that had trained
# nothing, or in one that trained in another way than was asked for.
DISTILL_CASES = [
    {"epochs": math.nan},
    {"epochs": math.inf},
    {"epochs": 0.0},
    {"steps": -5},
    {"teacher.matmuls": "int4"},
    {"checkpoint.keep": -1},
    {"checkpoint.keep": 0},
    {"data.threads": -1},
    {"data.max_broken": -1},
    {"data.eval_resize": 100.0},
    {"optim.lr_batch": 0},
    {"student.arch.width": 0},
    {"student.arch.heads": 0},
    {"student.arch.depth": 0},
    {"student.arch.norm_eps": -1.0},
    {"max_nonfinite": 0},
    {"ema_decay": 1.0},
    {"ema_decay": 1.5},
    {"ema_decay": math.nan},
    {"optim.peak_lr": math.nan},
    {"optim.peak_lr": -1.0},
    {"optim.weight_decay": math.nan},
    {"optim.betas": (1, 1)},
    {"optim.betas": (0.9, 1.0)},
    {"optim.betas": (1.5, 0.999)},
    {"optim.betas": (0.9,)},
    {"optim.betas": "abc"},
    {"student.drop_path": math.nan},
    {"student.drop_path": 1.0},
    {"teacher.drop_path": -0.1},
    {"loss_beta": 0.0},
    {"optim.clip_norm": -1.0},
    {"optim.eps": -1.0},
    {"optim.momentum": 2.0},
    {"optim.min_lr": 1.0},
    {"optim.start_lr": 1.0},
    {"optim.layer_decay": 0.0},
    {"optim.layer_decay": 0.5},
    {"optim.warmup_epochs": 1e6},
    {"optim.lag": -1},
    {"optim.weight_decay": 1e6},
    {"log_every": -1},
    {"eval.batches": -1},
    {"attention": "flash"},
    {"attention": "dot_product"},
    {"grad_reduce_dtype": "int8"},
    {"optim.moments": "bf16"},
    {"optim.name": "sgd"},
    {"seed": -1},
    {"batch_size": 0},
    {"student.freeze_blocks": 1},  # of random weights
    {"student.freeze_blocks": -1, "student.init_from": "x"},
    {"lora.rank": 4},
    {"lora.alpha": 0.0},
    {"lora.targets": ("qkv", "head")},
    {"lora.targets": ()},
    {"student.init_from": "x", "init_from": "y"},
    {"data.sizes": (0, 32)},
    {"data.sizes": 112},
    {"data.sizes": (112, 224), "data.phases": ((0, 112),)},
    {"data.phases": (0, 112)},
    {"data.phases": ((1, 112),)},
    {"data.phases": ((0, 112), (0, 224))},
    {"data.phases": ((0, 112), (5, 224), (3, 112))},
    {"data.phases": ((0, 0),)},
    {"teacher.follow": 1},
    {"teacher.follow": True, "target.normalize": "zca"},  # statistics of one input size
    {"student.mask.keep": 0.0},
    {"student.mask.keep": 1.5},
    {"student.mask.keep": math.nan},
    {"student.mask.by": "block"},
    {"student.mask.teacher": "clip"},  # of random patches
    {"target.blocks": 11, "target.after_norm": False},
    {"target.blocks": (-1,), "target.after_norm": False},
    {"target.blocks": (11, 7), "target.after_norm": False},
    {"target.blocks": (11, 11), "target.after_norm": False},
    {"target.blocks": (11,)},  # after the final norm
    {"target.blocks": (11,), "target.after_norm": False, "target.kind": "logits"},
    {"target.blocks": (11,), "target.after_norm": False, "target.normalize": "standardize"},
]
SEVERAL_CASES = [
    {"teachers.clip.weight": 0.0},
    {"teachers.clip.matmuls": "bfloat16"},
    {"teachers.clip.weight": math.nan},
    {"teachers.dino.parts": 0},
    {"teachers.dino.parts": 3},  # of a batch of 2048
    {"teachers.dino.parts": 64, "accumulation": 64},
    {"teachers.clip.target.normalize": "batch"},
    {"teachers.clip.target.normalize": "standardize", "accumulation": 2},
    {"teachers.clip.target.freeze_after": 0},
    {"teachers.clip.target.resample": "teacher"},
    {"teachers.clip.loss.smooth_l1": 0.0},  # and no other one has a weight
    {"teachers.clip.loss.smooth_l1": -1.0},
    {"teachers.clip.loss.class_share": 1.0},
    {"teachers.clip.loss.class_share": 0.5, "teachers.clip.target.kind": "gap"},
    {"teachers.clip.loss.relation": 1.0, "teachers.clip.target.kind": "cls"},
    {"teachers.clip.projector.separate": True, "teachers.clip.target.kind": "cls"},
    {"teachers.clip.projector.kind": "cnn"},
    {"teachers.clip.projector.hidden": -1},
    {"teachers.clip.follow": 1},
    {"teachers.clip.target.blocks": (7, 11)},  # after the final norm
    {"teachers.clip.follow": True, "teachers.clip.target.normalize": "phi_s"},
    {"dropping.rate": 1.0},
    {"dropping.rate": 0.5, "accumulation": 2},
    {"dropping.by": "loss"},
    {"dropping.decay": 1.0},
    {"eval.keep_best": "loss/dinov2"},
]
CLASSIFY_CASES = [
    {"model.head_scale": math.nan},
    {"model.drop_path": 1.5},
    {"mixing.smoothing": 1.5},
    {"mixing.switch": 2.0},
    {"mixing.mixup": -1.0},
    {"model.trains": "neck"},
    {"model.classes": 1},
    {"model.trains": "head", "accumulation": 2},
    {"model.trains": "head", "model.head": "keep"},
    {"optim.name": "lars", "optim.decay_vectors": True, "optim.layer_decay": 1.0},
    {"optim.name": "lars", "optim.layer_decay": 0.7},
    {"eval.knn": 5, "data.eval_split": ""},
    {"model.trains": "head", "model.freeze_blocks": 1},
    {"model.trains": "head", "lora.rank": 2},
    {"model.trains": "head", "data.sizes": (112, 224)},
]


SEGMENT_CASES = [
    {"segment.classes": 256},
    {"segment.classes": 1},
    {"segment.dropout": 1.0},
    {"segment.decoder": "fcn"},
    {"segment.decoder": "linear"},  # with an auxiliary head
    {"segment.trains": "neck"},
    {"segment.auxiliary_weight": -0.4},
    {"accumulation": 2},
    {"data.name": "ade20k", "data.root": ""},
    {"data.name": "folders", "data.root": ""},
    {"data.scale": (512, 2048)},
    {"data.scale": (2048,)},
    {"data.ratio": (2.0, 0.5)},
    {"data.ratio": (0.0, 2.0)},
    {"data.max_share": 0.0},
    {"eval.stride": 513},
    {"eval.scales": ()},
    {"eval.mode": "crop"},
    {"optim.polynomial": "torch"},
    {"optim.warmup_factor": 0.0},
    {"optim.warmup_steps": 160_000},
]


@pytest.mark.parametrize(
    "config,changes",
    [(DISTILLATION["vit"], case) for case in DISTILL_CASES]
    + [(SEVERAL, case) for case in SEVERAL_CASES]
    + [(CLASSIFICATION, case) for case in CLASSIFY_CASES]
    + [(SEGMENTATION, case) for case in SEGMENT_CASES],
    ids=str,
)
def test_settings_that_ruined_runs_are_refused_by_name(config, changes):
    found = settings.problems(copy_of(config, **changes))
    assert len(found) == 1
    name, value = list(changes.items())[0]
    assert f"{name}={value!r}" in found[0]


def test_the_fields_of_one_teacher_are_not_those_of_several():
    both = copy_of(SEVERAL, teacher={"path": "x"}, loss_beta=2.0)
    assert settings.problems(both) == [
        "the config has teachers (clip, dino), and also teacher, loss_beta, which are the fields "
        "of a single teacher: leave out one of the two"
    ]
    assert settings.problems(copy_of(SEVERAL, **{"eval.keep_best": "ema_cosine/dino"})) != []
    averaged = {"eval.keep_best": "ema_cosine/dino", "ema_decay": 0.9}
    assert settings.problems(copy_of(SEVERAL, **averaged)) == []


@pytest.mark.parametrize(
    "names,message",
    [
        (["clip", "Clip"], "teachers.Clip and teachers.clip have one name but for capital letters"),
        (["clip", "2"], "teachers.2: a name consists of letters, digits and _, and begins with"),
        (["clip", "a/b"], "teachers.a/b: a name consists of letters"),
        (["clip", "twin"], "teachers.clip and teachers.twin are the same teacher with the same"),
        (["clip", "student"], "teachers.student: this name is taken, since the frozen weights"),
        ([], "teachers has no teacher"),
    ],
)
def test_names_of_teachers_that_cannot_be_told_apart_are_refused(names, message):
    fields = {name: base.teacher(name.lower()) for name in names}
    if "twin" in fields:
        fields["twin"] = fields["clip"]
    (line,) = settings.problems(copy_of(SEVERAL, teachers=fields))
    assert line.startswith(message)


def test_one_teacher_cannot_be_dropped_and_two_need_two_names():
    one = {"teachers": {"clip": base.teacher("x")}, "dropping.rate": 0.5}
    assert settings.problems(copy_of(SEVERAL, **one)) == [
        "dropping.rate=0.5, but teachers.clip is the only teacher; set it to 0"
    ]
    with pytest.raises(ValueError, match="clip occurs more than once"):
        base.several_teachers([("clip", {}), ("clip", {})], drop_path=0.1)
    with pytest.raises(ValueError, match="a teacher has no field target.normalise"):
        base.teacher("x", target__normalise="l2")


def test_all_problems_are_reported_at_once():
    config = copy_of(DISTILLATION["vit"], **{"steps": -5, "optim.eps": -1.0, "optim.min_lr": 1.0})
    with pytest.raises(ConfigError) as caught:
        settings.check(config)
    first, *lines = str(caught.value).splitlines()
    assert first == "3 settings are wrong:"
    assert [line.split("=")[0].strip() for line in lines] == ["optim.eps", "steps", "optim.min_lr"]


def test_messages_name_the_value_the_range_the_unit_and_the_remedy():
    problems = settings.problems(
        copy_of(DISTILLATION["vit"], **{"checkpoint.keep": 0, "data.min_area": 2.0, "mesh.fsdp": 0})
    )
    assert problems == [
        "checkpoint.keep=0: expected a whole number of at least 1 (checkpoints); a run cannot "
        "resume without one",
        "data.min_area=2.0: expected a finite number above 0 and of at most 1 (share of the "
        "picture)",
        "mesh.fsdp=0: expected a whole number of at least 1, or -1 (devices); -1 takes all devices "
        "that remain",
    ]


def test_an_unknown_family_is_one_problem():
    (line,) = settings.problems(copy_of(DISTILLATION["vit"], **{"student.family": "hiera"}))
    assert line.startswith("student.family='hiera' is unknown; expected one of '', 'vit'")


@pytest.mark.parametrize("part", [{"model.freeze_blocks": 1}, {"lora.rank": 2}], ids=str)
def test_a_part_of_a_random_network_does_not_train_alone(part):
    random = {"model.family": "vit", "model.arch": base.student(base.VIT_B16, image_size=224)}
    (line,) = settings.problems(copy_of(CLASSIFICATION, **random, **part))
    assert "set init_from to a model folder" in line
    assert settings.problems(copy_of(CLASSIFICATION, **random)) == []


def test_a_student_of_a_folder_needs_no_description():
    config = base.distillation(teacher="x", drop_path=0.1, init_from="y", position="rpb")
    assert settings.problems(config) == []
    wrong = {"student.arch.position": "sine", "student.arch.depht": 3}
    found = settings.problems(copy_of(config, **wrong))
    assert [line.partition(":")[0].partition("=")[0] for line in found] == [
        "student.arch.depht",
        "student.arch.position",
    ]
    (line,) = settings.problems(copy_of(config, **{"student.init_from": "", "student.arch": {}}))
    assert line.endswith("or student.init_from to a model folder that has both")


def test_a_config_without_a_task_is_refused():
    with pytest.raises(ConfigError, match="neither a teacher nor a model"):
        settings.check(base.common())


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"epochs": 0.001}, r"epochs=0.001 are 0 steps, since an epoch has 100 steps"),
        ({"epochs": 1e30}, "expected 1 to 2147483647"),
        ({"steps": 20}, r"warmup_epochs=10.0 are 1000 steps.*but the run has 20"),
        ({"eval.every": 0, "eval.epochs": 0.001}, "eval.epochs=0.001 is less than a step"),
    ],
)
def test_lengths_that_do_not_fit_the_data_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings.total_steps(copy_of(DISTILLATION["vit"], **changes), steps_per_epoch=100)


def test_a_warm_up_in_steps_has_to_end_before_the_run_does():
    config = copy_of(SEGMENTATION, **{"steps": 0, "epochs": 2.0})
    with pytest.raises(ConfigError, match="optim.warmup_steps=1500, but the run has 200"):
        settings.total_steps(config, steps_per_epoch=100)
    assert settings.total_steps(SEGMENTATION, steps_per_epoch=1263) == 160_000
    settings.check_neighbours(SEGMENTATION, 1)


def test_fields_of_other_tasks_are_refused_in_a_segmentation():
    names = ("optim.start_lr", "data.crop", "eval.knn")
    changed = copy_of(SEGMENTATION, **dict.fromkeys(names, 0))
    found = settings.problems(changed)
    assert [line.partition(":")[0] for line in found] == sorted(names)
    assert all("there is no such field" in line for line in found)


def test_lengths_that_fit_the_data_are_counted():
    assert settings.total_steps(DISTILLATION["vit"], steps_per_epoch=625) == 300 * 625
    short = copy_of(DISTILLATION["vit"], **{"steps": 20, "optim.warmup_epochs": 0.01})
    assert settings.total_steps(short, steps_per_epoch=100) == 20
    assert settings.eval_every(CLASSIFICATION, 625) == 625
    assert settings.eval_every(DISTILLATION["vit"], 625) == 5000


def test_more_neighbours_than_images_are_refused():
    config = tiny.config(**{"eval.knn": 100})
    settings.check_neighbours(config, 100)
    with pytest.raises(ConfigError, match="eval.knn=100, but photos/train has only 99 images"):
        settings.check_neighbours(config, 99)


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--config=configs/quickstart.py", "--config.optim.betas=(0.9,1.0)"],
        ["finetune.py", "--config=configs/linear_vit_b16.py", "--config.data.threads=-1"],
        [
            "finetune.py",
            "--config=configs/linear_vit_b16.py",
            "--config.eval.batches=-1",
            "--eval_only",
        ],
        [
            "-m",
            "fd_jax.plan",
            "--config=configs/quickstart.py",
            "--config.epochs=nan",
            "--topology=v5e:2x2",
        ],
    ],
    ids=lambda command: " ".join(command),
)
def test_every_command_refuses_a_wrong_setting_and_leaves_no_workdir(command, tmp_path):
    (wrong,) = [flag for flag in command if flag.startswith("--config.")]
    folder = [] if "-m" in command else [f"--workdir={tmp_path / 'run'}"]
    result = subprocess.run(
        [sys.executable, *command, *folder], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    name = wrong.removeprefix("--config.").partition("=")[0]
    assert result.stderr.splitlines()[-1].startswith(f"error: {name}="), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["top5", "ema_top5"])
def test_the_best_of_five_classes_is_not_chosen_by_top5(name):
    config = tiny.fine_tuning(**{"eval.keep_best": name, "ema_decay": 0.5, "model.classes": 6})
    settings.check(config)
    config.model.classes = 5
    with pytest.raises(ConfigError, match="no top-5 accuracy of five classes or fewer"):
        settings.check(config)

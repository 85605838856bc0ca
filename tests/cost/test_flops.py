"""Closed-form FLOPs against the matmuls of the traced step and against the compiler's count."""

import functools
import math

import jax
import jax.extend.core as jex
import pytest

from configs import base, distill_clip_vit_b16, distill_maskalign_vit_b16
from fd_jax import sharding
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks import registry
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.segment import SegmentTask
from fd_jax.training import program
from tests import tiny
from tests.models import evas, resnets

ROWS = 4
SWIN = {"embed_width": 16, "depths": (2, 2), "heads": (2, 4), "window": 4}


def matmul_flops(jaxpr, *, narrow=True):
    """Two FLOPs per multiply-add of every dot_general, also inside calls; there are no loops.

    Those of numbers of eight bits are left out without `narrow`.
    """
    total = 0
    for equation in jaxpr.eqns:
        wide = equation.invars and equation.invars[0].aval.dtype.itemsize > 1
        if equation.primitive.name == "dot_general" and (narrow or wide):
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            total += convolution_flops(equation)
        if equation.primitive.name == "cond":  # one branch for each platform
            branches = equation.params["branches"]
            total += max(matmul_flops(branch.jaxpr, narrow=narrow) for branch in branches)
        for value in equation.params.values():
            if isinstance(value, jex.ClosedJaxpr):
                total += matmul_flops(value.jaxpr, narrow=narrow)
            elif isinstance(value, jex.Jaxpr):
                total += matmul_flops(value, narrow=narrow)
    return total


def convolution_flops(equation):
    """Two FLOPs per multiply-add, those with the zeros around the image included.

    Zeros between its pixels, of the gradient of a stride, are not: each pixel meets each place.
    """
    image, kernel = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    places = equation.params["dimension_numbers"].rhs_spec  # (out, in, height, width)
    if max(equation.params["lhs_dilation"]) > 1:
        return 2 * math.prod(image) * math.prod(kernel) // kernel[places[1]]
    return 2 * math.prod(out) * math.prod(kernel) // kernel[places[0]]


def traced(task):
    """Matmul FLOPs per image of loss and gradient, after dead code elimination."""
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, *element.shape), element.dtype)
        for name, element in registry.kind_of(task.config).elements(task.config).items()
    }
    batch = jax.eval_shape(task.prepare, batch, jax.random.key(0))
    step = functools.partial(jax.value_and_grad(task.loss, has_aux=True))
    closed = jax.make_jaxpr(step)(params, extra, task.abstract_frozen(), batch)
    jaxpr, _ = jax.interpreters.partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    return matmul_flops(jaxpr) / ROWS


def distillation(**fields):
    return DistillTask(tiny.config(**fields), teacher_spec=tiny.teacher_spec())


def swin(family):
    arch = base.swin_v1 if family == "swin" else base.swin_v2
    return arch(SWIN, image_size=32)


def gated(remat):
    return ClassifyTask(tiny.fine_tuning(remat=remat), init_spec=evas.spec("EVA-02-CLIP"))


def convnext(**arch):
    """A spec whose sides neither the patches nor the halvings divide."""
    fields = {
        "image_size": 32,
        "patch_size": 3,
        "widths": (8, 12, 16),
        "depths": (1, 2, 1),
        "kernel_size": 5,
        "grn": False,
        "layer_scale": 1e-6,
        "activation": "gelu_erf",
        "norm_eps": 1e-6,
        "final_norm": False,
        "final_norm_eps": None,
    }
    return ModelSpec("convnext", {**fields, **arch}, source="tiny")


def resnet(kind, remat):
    """A ResNet student whose sides no stride divides."""
    config = tiny.config(**{"student.family": "resnet", "remat": remat, "target.kind": "gap"})
    config.student.arch = resnets.spec(kind, image_size=37, depths=[1, 2]).arch
    config.data.image_size = 37
    return DistillTask(config, teacher_spec=tiny.teacher_spec())


def part(spec, **fields):
    """A fine-tuned network of which a part trains."""
    return ClassifyTask(tiny.fine_tuning(**fields), init_spec=spec)


def several():
    """Each kind of projector, resampling and loss, and a target that a matrix normalises."""
    matrix = {"target__normalize": "phi_s", "target__statistics": "stats.npz"}
    mlp = {"projector__kind": "mlp", "projector__hidden": 20, "projector__separate": True}
    relation = {"loss__relation": 1.0, "loss__class_share": 0.3}
    made = {
        "a": base.teacher("", path="a", target__resample="bilinear", **matrix),
        "b": base.teacher("", path="b", target__resample="student", **mlp, **relation),
    }
    specs = {"a": tiny.teacher_spec(image_size=24), "b": tiny.teacher_spec(patch_size=4)}
    return DistillTask(tiny.several(list(made.items())), teacher_specs=specs)


def masked(*blocks, **fields):
    """A student that sees five of sixteen patches, and predicts the maps of several blocks."""
    changes = {"student.mask.keep": 0.32, "target.blocks": blocks, "target.after_norm": not blocks}
    spec = tiny.teacher_spec(depth=3)
    return DistillTask(tiny.config(**{**changes, **fields}), teacher_spec=spec)


WIDE = {"depth": 3, "last_width": 72, "layer_scale": 0.1}
RESPONSES = {"grn": True, "layer_scale": None}

CASES = {
    "full": lambda: distillation(),
    "two teachers": several,
    "masked": masked,
    "masked, two levels, remat full": lambda: masked(0, 1, remat="full"),
    "masked, two levels, remat dots": lambda: masked(0, 1, remat="dots"),
    "levels of all patches": lambda: masked(1, 2, **{"student.mask.keep": 1.0}),
    "teacher in int8": lambda: distillation(**{"teacher.matmuls": "int8"}),
    "cls": lambda: distillation(**{"target.kind": "cls"}),
    "gap": lambda: distillation(**{"target.kind": "gap"}),
    "remat dots": lambda: distillation(remat="dots"),
    "remat full": lambda: distillation(remat="full"),
    "logits": lambda: DistillTask(
        tiny.config(**{"target.kind": "logits"}),
        teacher_spec=ModelSpec("vit", tiny.TEACHER, classes=10),
    ),
    "teacher's size": lambda: DistillTask(
        tiny.config(**{"target.kind": "cls"}), teacher_spec=tiny.teacher_spec(image_size=24)
    ),
    "fine-tune": lambda: ClassifyTask(tiny.fine_tuning(), init_spec=tiny.teacher_spec()),
    "fine-tune remat full": lambda: ClassifyTask(
        tiny.fine_tuning(remat="full"), init_spec=tiny.teacher_spec()
    ),
    **{
        f"a gate and norms, remat {remat or 'off'}": functools.partial(gated, remat)
        for remat in ("", "full", "dots")
    },
    "a teacher with rotations": lambda: DistillTask(
        tiny.config(), teacher_spec=evas.spec("Perception Encoder")
    ),
    "partial patches": lambda: ClassifyTask(
        tiny.fine_tuning(),
        init_spec=tiny.teacher_spec(patch_size=7, partial_patches="crop"),
    ),
    "probe": lambda: ClassifyTask(
        tiny.fine_tuning(**{"model.trains": "head", "model.final_norm": True}),
        init_spec=tiny.teacher_spec(),
    ),
    "swin": lambda: ClassifyTask(
        tiny.fine_tuning(), init_spec=ModelSpec("swin", swin("swin"), source="tiny")
    ),
    "segmentation": lambda: SegmentTask(tiny.segmentation(), init_spec=tiny.teacher_spec(depth=3)),
    "segmentation remat full": lambda: SegmentTask(
        tiny.segmentation(remat="full"), init_spec=tiny.teacher_spec(depth=3)
    ),
    "segmentation on a swin": lambda: SegmentTask(
        tiny.segmentation(**{"data.image_size": 64}),
        init_spec=tiny.swin_spec(1, depths=[1, 1, 1, 2], heads=[2, 2, 2, 2]),
    ),
    "linear segmentation": lambda: SegmentTask(
        tiny.segmentation(
            **{
                "segment.decoder": "linear",
                "segment.auxiliary_channels": 0,
                "segment.trains": "head",
            }
        ),
        init_spec=tiny.teacher_spec(),
    ),
    "convnext": lambda: ClassifyTask(tiny.fine_tuning(), init_spec=convnext()),
    "convnext v2 remat full": lambda: ClassifyTask(
        tiny.fine_tuning(remat="full"), init_spec=convnext(**RESPONSES)
    ),
    "convnext remat dots": lambda: ClassifyTask(
        tiny.fine_tuning(remat="dots"), init_spec=convnext()
    ),
    "convnext teacher": lambda: DistillTask(
        tiny.config(**{"target.kind": "gap"}), teacher_spec=convnext()
    ),
    "segmentation on a convnext": lambda: SegmentTask(
        tiny.segmentation(**{"data.image_size": 64}),
        init_spec=convnext(patch_size=4, depths=[1, 1, 1, 2], widths=[8, 8, 12, 16]),
    ),
    **{
        f"resnet {kind}, remat {remat or 'off'}": functools.partial(resnet, kind, remat)
        for kind, remat in (("v1.5", ""), ("D", "full"), ("basic", "dots"), ("v1", "full"))
    },
    "resnet teacher": lambda: DistillTask(
        tiny.config(**{"target.kind": "gap"}), teacher_spec=resnets.spec("D", image_size=37)
    ),
    "segmentation on a resnet": lambda: SegmentTask(
        tiny.segmentation(**{"data.image_size": 64}), init_spec=resnets.spec(image_size=64)
    ),
    **{
        name: functools.partial(part, tiny.teacher_spec(**arch), **{"model.final_norm": True}, **f)
        for name, arch, f in (
            ("a wide last block", WIDE, {}),
            ("a wide last block alone", WIDE, {"model.freeze_blocks": 2}),
            ("a wide last block, remat full", WIDE, {"remat": "full"}),
            ("a lift", {"lift": 80}, {}),
            ("updates before a lift", {"lift": 80}, {"lora.rank": 2}),
        )
    },
    "a resnet without half a stage": lambda: part(resnets.spec(), **{"model.freeze_blocks": 2}),
    "a resnet without its first stage": lambda: part(resnets.spec(), **{"model.freeze_blocks": 1}),
    "swin remat full": lambda: ClassifyTask(
        tiny.fine_tuning(remat="full"), init_spec=ModelSpec("swin", swin("swin"), source="tiny")
    ),
    **{
        f"{what}, remat {remat or 'off'}": functools.partial(
            part, tiny.teacher_spec(depth=3, layer_scale=0.1), remat=remat, **fields
        )
        for remat in ("", "full", "dots")
        for what, fields in (
            ("frozen blocks", {"model.freeze_blocks": 2}),
            ("updates", {"lora.rank": 2}),
        )
    },
    "updates after frozen blocks": lambda: part(
        tiny.teacher_spec(depth=3), **{"lora.rank": 2, "model.freeze_blocks": 1}
    ),
    "updates of the MLPs": lambda: part(
        tiny.teacher_spec(), **{"lora.rank": 2, "lora.targets": ("fc1", "fc2")}
    ),
    "updates of attention and a gate": lambda: part(
        evas.spec("EVA-02-CLIP"), **{"lora.rank": 2, "lora.targets": ("qkv", "gate")}
    ),
    "frozen blocks of a swin": lambda: part(
        tiny.swin_spec(1), **{"model.freeze_blocks": 3, "model.pooling": "mean"}
    ),
    "updates of a swin": lambda: part(tiny.swin_spec(1), **{"lora.rank": 2}),
    "a convnext without its first stage": lambda: part(convnext(), **{"model.freeze_blocks": 1}),
    "a convnext without half a stage": lambda: part(convnext(), **{"model.freeze_blocks": 2}),
    "updates of a convnext": lambda: part(
        convnext(**RESPONSES), **{"lora.rank": 2, "lora.targets": ("fc1", "fc2")}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_equals_the_traced_matmuls(name):
    task = CASES[name]()
    assert task.flops().executed == pytest.approx(traced(task), rel=1e-9)


def test_closed_form_of_a_mask_by_attention_leaves_out_what_the_compiler_removes():
    """The class token's attention is traced from queries and keys that the block has as well."""
    task = masked(1, 2, **{"student.mask.by": "attention"})
    again = 2 * 2 * 17 * 48**2
    assert task.flops().executed + again == pytest.approx(traced(task), rel=1e-9)
    drawn = masked(1, 2).flops().executed
    assert task.flops().executed - drawn == 2 * 17 * 48  # logits of a row of 17 tokens
    images = jax.ShapeDtypeStruct((ROWS, 32, 32, 3), "uint8")
    compiled = [
        jax.jit(functools.partial(task.goal.view, attends=attends))
        .lower(task.abstract_frozen(), images, None)
        .compile()
        .cost_analysis()["flops"]
        for attends in (False, True)
    ]
    assert 0 < compiled[1] - compiled[0] < 0.2 * ROWS * again


def test_a_masked_student_has_half_the_flops():
    """59 of 197 tokens in the student, the teacher as before, and four projectors more."""
    clip = ModelSpec("vit", base.student(base.VIT_B16, image_size=224), source="clip")
    whole, part = (
        DistillTask(made.get_config(), teacher_spec=clip).flops()
        for made in (distill_clip_vit_b16, distill_maskalign_vit_b16)
    )
    assert part.executed / whole.executed == pytest.approx(0.476, abs=5e-4)


def test_closed_form_of_swin_v2_leaves_out_only_the_bias_networks():
    """The bias networks run once per step, whatever the batch size."""
    spec = ModelSpec("swin_v2", swin("swin_v2"), source="tiny")
    task = ClassifyTask(tiny.fine_tuning(), init_spec=spec)
    assert task.flops().executed < traced(task)
    bias = 0.0
    for stage, heads in enumerate(SWIN["heads"]):
        window = min(SWIN["window"], 8 // 2**stage)
        offsets, hidden = (2 * window - 1) ** 2, 512
        # One network per block after untying; the offsets get no gradient.
        bias += SWIN["depths"][stage] * 2 * offsets * hidden * (2 * 2 + 3 * heads)
    assert task.flops().executed + bias / ROWS == pytest.approx(traced(task), rel=1e-9)


def test_closed_form_of_a_swin_v2_whose_first_blocks_are_frozen():
    """With V2's norm after attention, nothing needs the gradient of the first block's input."""
    spec = ModelSpec("swin_v2", swin("swin_v2"), source="tiny")
    whole, frozen = part(spec), part(spec, **{"model.freeze_blocks": 2})
    saved = whole.flops().executed - frozen.flops().executed
    # The bias networks of frozen blocks run forward only.
    offsets = (2 * SWIN["window"] - 1) ** 2
    bias = 2 * 2 * offsets * 512 * (2 + 2 * SWIN["heads"][0]) / ROWS
    assert saved + bias == pytest.approx(traced(whole) - traced(frozen), rel=1e-9)


def test_remat_adds_recomputed_flops_but_no_model_flops():
    plain, remat = distillation().flops(), distillation(remat="full").flops()
    assert remat.model == plain.model
    assert remat.recomputed > 0 == plain.recomputed


@pytest.mark.parametrize("name", ["distillation", "fine-tune", "probe"])
def test_the_compilers_count_is_within_three_percent(name):
    """Two blocks of ViT-B at 224 pixels, so that matmuls weigh as they do in a real run."""
    student = ModelSpec("vit", base.student({**base.VIT_B16, "depth": 2}, image_size=224))
    config = base.distillation(teacher="", drop_path=0.2)
    if name == "distillation":
        config.student.arch.depth = 2
    elif name == "fine-tune":
        config = base.fine_tuning(drop_path=0.1, layer_decay=0.65, peak_lr=1e-3, floor_lr=1e-6)
    else:
        config = base.linear_probe(epochs=90)
    config.update(batch_size=16, dtype="float32")
    if name == "distillation":
        task = DistillTask(config, teacher_spec=student)
    else:
        task = ClassifyTask(config, init_spec=student)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = program.build(task, config, mesh, steps_per_epoch=10, total_steps=10)
    # The unoptimized program: the compiler's passes would change the count.
    cost = run.train_step.lower(run.state, run.frozen, run.batch, run.seed).cost_analysis()
    assert cost["flops"] / config.batch_size == pytest.approx(task.flops().executed, rel=0.03)

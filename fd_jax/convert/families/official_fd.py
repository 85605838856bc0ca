"""Checkpoints of the original Feature Distillation repository, distilled and fine-tuned."""

from fd_jax.convert.families import beit, clip, swin, timm_vit
from fd_jax.convert.families.beit import PER_BLOCK, SHARED
from fd_jax.convert.rules.tables import Drop, Rule, Table, as_glob, as_tuple, prefixed
from fd_jax.convert.rules.transforms import CONV_1X1
from fd_jax.convert.source import Part, Source
from fd_jax.models.spec import ModelSpec

# The distillation module: student `encoder`, projector `decoder`, frozen teacher `feature_model`.
# Our export and files stripped for fine-tuning have the encoder alone.
_PROJECTOR = Table(
    (
        Rule("decoder.0.weight", "projector/kernel", CONV_1X1, optional=True),
        Rule("decoder.0.bias", "projector/bias", optional=True),
    )
)


def _left_behind(teacher: Table) -> Table:
    """Drops of everything in a teacher; another teacher's tensors stay unexpected."""
    why = "the frozen teacher (take it with --part=teacher)"
    names = [name for rule in teacher.rules for name in as_tuple(rule.sources)]
    names += [drop.names for drop in teacher.drops] + [item.name for item in teacher.derived]
    return Table((), tuple(Drop(f"feature_model.{as_glob(n)}", why) for n in names))


_UNDER_TEACHER = ("model/feature_model.",)


def _distilled(name: str, student: Table, spec: ModelSpec, teacher: Part, oracle: str) -> Source:
    table = prefixed(student, "encoder.") + _PROJECTOR + _left_behind(teacher.table)
    return Source(
        f"fd_official_distilled_{name}",
        "ckpt_epoch_299.pth of main_fd.py",
        {
            "student": Part(table, spec, ("model/",)),
            "teacher": Part(teacher.table, teacher.spec, _UNDER_TEACHER),
        },
        oracle,
        "the projector is kept; the teacher inside can be taken instead",
    )


def _distilled_vit(teacher_name: str, size: str, patch_size: int, teacher: Part) -> Source:
    return _distilled(
        f"{teacher_name}_vit_{size.lower()}",
        SHARED,
        ModelSpec("vit", beit.arch(size, patch_size, shared=True)),
        teacher,
        "transformers BeitModel with a shared table",
    )


def _finetuned(name: str, table: Table, spec: ModelSpec, oracle: str) -> Source:
    return Source(
        f"fd_official_finetuned_{name}",
        "ckpt_epoch_<last>.pth of main_finetune.py",
        {"classifier": Part(table, spec, ("model/",))},
        oracle,
        "trained with ImageNet statistics (kept here), evaluated by its authors with CLIP's",
    )


def _finetuned_vit(size: str, patch_size: int) -> Source:
    return _finetuned(
        f"clip_vit_{size.lower()}",
        PER_BLOCK,
        ModelSpec("vit", beit.arch(size, patch_size, shared=False), pooling="mean_norm"),
        "transformers BeitForImageClassification",
    )


_DINO = Part(timm_vit.TABLE, timm_vit.DINO)
_DEIT = Part(timm_vit.TABLE, timm_vit.DEIT)

_SWIN_B = swin.arch_v2("B", 224, 14, residual_scale=1e-5)

SOURCES = (
    _distilled_vit("clip", "B", 16, clip.VIT_B16),
    _distilled_vit("clip", "L", 14, clip.VIT_L14),
    _distilled_vit("dino", "B", 16, _DINO),
    _distilled_vit("deit", "B", 16, _DEIT),
    _distilled(
        "esvit_swin_b",
        swin.OFFICIAL_V2,
        ModelSpec("swin_v2", _SWIN_B),
        Part(swin.V1, swin.ESVIT.spec),
        "transformers Swinv2Model",
    ),
    _finetuned_vit("B", 16),
    _finetuned_vit("L", 14),
    _finetuned(
        "swin_b",
        swin.OFFICIAL_V2 + swin.HEAD,
        ModelSpec("swin_v2", _SWIN_B, pooling="mean"),
        "transformers Swinv2ForImageClassification",
    ),
)

"""Checkpoints of the original Feature Distillation repository: distilled and fine-tuned ViTs."""

from fd_jax.convert import beit, clip, timm_vit
from fd_jax.convert.beit import PER_BLOCK, SHARED, prefixed
from fd_jax.convert.rules import Drop, Rule, Table, as_tuple
from fd_jax.convert.source import Part, Source
from fd_jax.convert.transforms import CONV_1X1
from fd_jax.models.spec import ModelSpec

# The distillation module: student `encoder`, projector `decoder`, frozen teacher `feature_model`.
# Our export and files stripped for fine-tuning have the encoder alone.
_STUDENT = prefixed(SHARED, "encoder.") + Table(
    (
        Rule("decoder.0.weight", "projector/kernel", CONV_1X1, optional=True),
        Rule("decoder.0.bias", "projector/bias", optional=True),
    )
)


def _left_behind(teacher: Table) -> Table:
    """Drops of everything in a teacher; another teacher's tensors stay unexpected."""
    why = "the frozen teacher (take it with --part=teacher)"
    names = [name for rule in teacher.rules for name in as_tuple(rule.sources)]
    names += [drop.names for drop in teacher.drops]
    return Table((), tuple(Drop(f"feature_model.{n.replace('{i}', '*')}", why) for n in names))


_UNDER_TEACHER = ("model/feature_model.",)


def _distilled(teacher_name: str, size: str, patch_size: int, teacher: Part) -> Source:
    return Source(
        f"fd_official_distilled_{teacher_name}_vit_{size.lower()}",
        "ckpt_epoch_299.pth of main_fd.py",
        {
            "student": Part(
                _STUDENT + _left_behind(teacher.table),
                ModelSpec("vit", beit.arch(size, patch_size, shared=True)),
                ("model/",),
            ),
            "teacher": Part(teacher.table, teacher.spec, _UNDER_TEACHER),
        },
        "transformers BeitModel with a shared table",
        "the projector is kept; the teacher inside can be taken instead",
    )


def _finetuned(size: str, patch_size: int) -> Source:
    return Source(
        f"fd_official_finetuned_clip_vit_{size.lower()}",
        "ckpt_epoch_<last>.pth of main_finetune.py",
        {
            "classifier": Part(
                PER_BLOCK,
                ModelSpec("vit", beit.arch(size, patch_size, shared=False), pooling="mean_norm"),
                ("model/",),
            )
        },
        "transformers BeitForImageClassification",
        "trained with ImageNet statistics (kept here), evaluated by its authors with CLIP's",
    )


_DINO = Part(timm_vit.TABLE, timm_vit.DINO)
_DEIT = Part(timm_vit.TABLE, timm_vit.DEIT)

SOURCES = (
    _distilled("clip", "B", 16, clip.VIT_B16),
    _distilled("clip", "L", 14, clip.VIT_L14),
    _distilled("dino", "B", 16, _DINO),
    _distilled("deit", "B", 16, _DEIT),
    _finetuned("B", 16),
    _finetuned("L", 14),
)

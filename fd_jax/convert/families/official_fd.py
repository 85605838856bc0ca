"""Checkpoints of the original Feature Distillation repository, distilled and fine-tuned."""

from pathlib import Path

import numpy as np

from fd_jax.convert.families import beit, clip, swin, swin_v2, timm_vit
from fd_jax.convert.families.beit import PER_BLOCK, SHARED
from fd_jax.convert.family import Family, Format, Written
from fd_jax.convert.layout import EPSILON_1E5, EPSILON_1E6, EXACT_GELU, FINAL_NORM, Layout, best
from fd_jax.convert.networks.swin import BIAS_PER_BLOCK, FREE_WINDOWS, OWN_WINDOWS
from fd_jax.convert.networks.vit import BIASES_QV, CLASS_TOKEN, PATCH_BIAS, SHARED_TABLE
from fd_jax.convert.rules.matching import invert
from fd_jax.convert.rules.tables import Drop, Rule, Table, as_glob, as_tuple, prefixed
from fd_jax.convert.rules.transforms import CONV_1X1
from fd_jax.convert.source import Part, Source
from fd_jax.errors import ConversionError
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
    names = [name for rule in teacher.rules for name in as_tuple(rule.names)]
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
        certain=True,
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
        certain=True,
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

_SWIN_B = swin_v2.arch("B", 224, 14, residual_scale=1e-5)

SOURCES = (
    _distilled_vit("clip", "B", 16, clip.VIT_B16),
    _distilled_vit("clip", "L", 14, clip.VIT_L14),
    _distilled_vit("dino", "B", 16, _DINO),
    _distilled_vit("deit", "B", 16, _DEIT),
    _distilled(
        "esvit_swin_b",
        swin_v2.OFFICIAL,
        ModelSpec("swin_v2", _SWIN_B),
        Part(swin.TABLE, swin.ESVIT.spec),
        "transformers Swinv2Model",
    ),
    _finetuned_vit("B", 16),
    _finetuned_vit("L", 14),
    _finetuned(
        "swin_b",
        swin_v2.OFFICIAL + swin.HEAD,
        ModelSpec("swin_v2", _SWIN_B, pooling="mean"),
        "transformers Swinv2ForImageClassification",
    ),
)


def _layout(network: str, table: Table, *needs) -> Layout:
    return Layout("the layout official", network, prefixed(table, "encoder."), needs)


LAYOUTS = (
    _layout(
        "vit",
        SHARED,
        CLASS_TOKEN,
        FINAL_NORM,
        PATCH_BIAS,
        SHARED_TABLE,
        BIASES_QV,
        EXACT_GELU,
        EPSILON_1E6,
    ),
    _layout("swin", swin.TABLE, FINAL_NORM, EXACT_GELU, EPSILON_1E5),
    _layout(
        "swin_v2",
        swin_v2.OFFICIAL,
        FINAL_NORM,
        BIAS_PER_BLOCK,
        OWN_WINDOWS,
        FREE_WINDOWS,
        EXACT_GELU,
        EPSILON_1E5,
    ),
)


def _write(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    """What the original's main_finetune.py reads: {"model": {"encoder.*"}}."""
    _, fit = best(LAYOUTS, spec, set(params), format="official")
    try:
        import torch
    except ImportError as error:
        raise ConversionError("writing a .pth file needs torch; pip install torch") from error
    tensors = {
        name: torch.from_numpy(np.array(array))
        for name, array in invert(fit.table, params, spec.arch, derived=True)
    }
    try:
        torch.save({"model": tensors}, path)
    except RuntimeError as error:  # its words for a full disk
        raise ConversionError(f"the .pth file cannot be written ({error!s:.80})") from error
    return Written(fit.left)


FAMILY = Family(
    "official_fd",
    SOURCES,
    LAYOUTS,
    {
        "official": Format(
            _write,
            "a `.pth` with exactly the `encoder.*` keys under `model` that the original's "
            "`main_finetune.py` reads, index buffers included (needs `torch`)",
        )
    },
)

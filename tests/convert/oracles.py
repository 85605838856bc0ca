"""Independent references: transformers' own classes, filled through files in their public names.

Every function takes the arrays of a file by their names in that file and returns the features of
the torch model: [B, N, D] after the final norm, class token first.
"""

import json

import numpy as np
from safetensors.numpy import save_file
import torch
import transformers

from fd_jax.convert.families import FAMILIES

VIT_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def config_fields(arch):
    """What all vision configs call alike."""
    return {
        "hidden_size": arch["width"],
        "num_hidden_layers": arch["depth"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["mlp_width"],
        "image_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "layer_norm_eps": arch["norm_eps"],
        "hidden_act": {
            "quick_gelu": "quick_gelu",
            "gelu_erf": "gelu",
            "gelu_tanh": "gelu_pytorch_tanh",
        }[arch["activation"]],
    }


def pretrained(model_class, config, tensors, folder, **options):
    """`from_pretrained` on a folder with these tensors; no key may be missing or left over."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.require(v, np.float32, "C") for k, v in tensors.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    model, info = model_class.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **options
    )
    wrong = {key: sorted(names) for key, names in info.items() if names}
    assert not wrong, wrong
    return model.eval()


def run(function, images):
    """Runs a torch function on [B, H, W, 3] float arrays."""
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
        return function(pixels).numpy()


def vit(tensors, arch, images, folder, **call):
    """timm's names -> ViTModel."""
    config = transformers.ViTConfig(**config_fields(arch))
    model = pretrained(
        transformers.ViTModel, config, timm_to_hf(tensors), folder, add_pooling_layer=False
    )
    return run(lambda x: model(x, **call).last_hidden_state, images)


def vit_logits(tensors, arch, images, folder):
    """timm's names with a head -> ViTForImageClassification. Returns [B, K]."""
    classes = len(tensors["head.bias"])
    config = transformers.ViTConfig(**config_fields(arch), num_labels=classes)
    renamed = {f"vit.{name}": value for name, value in timm_to_hf(tensors).items()}
    renamed |= {f"classifier.{p}": tensors[f"head.{p}"] for p in ("weight", "bias")}
    model = pretrained(transformers.ViTForImageClassification, config, renamed, folder)
    return run(lambda x: model(x).logits, images)


def timm_to_hf(tensors):
    out = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.position_embeddings": tensors["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": tensors["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": tensors["patch_embed.proj.bias"],
        "layernorm.weight": tensors["norm.weight"],
        "layernorm.bias": tensors["norm.bias"],
    }
    renames = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for i in blocks(tensors, "blocks."):
        for kind in ("weight", "bias"):
            for old, new in renames.items():
                out[f"encoder.layer.{i}.{new}.{kind}"] = tensors[f"blocks.{i}.{old}.{kind}"]
            rows = np.split(tensors[f"blocks.{i}.attn.qkv.{kind}"], 3)
            for name, value in zip(("query", "key", "value"), rows, strict=True):
                out[f"encoder.layer.{i}.attention.attention.{name}.{kind}"] = value
    return out


def blocks(tensors, prefix):
    """Block numbers that occur below a prefix."""
    return sorted({int(n[len(prefix) :].split(".")[0]) for n in tensors if n.startswith(prefix)})


def clip_openai(tensors, arch, images, folder, **call):
    """OpenAI's names -> CLIPVisionModel."""
    visual = {n.removeprefix("visual."): v for n, v in tensors.items() if n.startswith("visual.")}
    out = {
        "vision_model.embeddings.class_embedding": visual["class_embedding"],
        "vision_model.embeddings.position_embedding.weight": visual["positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": visual["conv1.weight"],
    }
    renames = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    renames |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        out[f"vision_model.pre_layrnorm.{kind}"] = visual[f"ln_pre.{kind}"]
        out[f"vision_model.post_layernorm.{kind}"] = visual[f"ln_post.{kind}"]
        for i in blocks(visual, "transformer.resblocks."):
            old, new = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
            for a, b in renames.items():
                out[f"{new}.{b}.{kind}"] = visual[f"{old}.{a}.{kind}"]
            rows = np.split(visual[f"{old}.attn.in_proj_{kind}"], 3)
            for name, value in zip("qkv", rows, strict=True):
                out[f"{new}.self_attn.{name}_proj.{kind}"] = value
    return clip(out, arch, images, folder, **call)


def clip(tensors, arch, images, folder, **call):
    """Hugging Face names (text tower ignored) -> CLIPVisionModel, post_layernorm on all tokens."""
    vision = {n: v for n, v in tensors.items() if n.startswith("vision_model.")}
    vision.pop("vision_model.embeddings.position_ids", None)
    config = transformers.CLIPVisionConfig(**config_fields(arch))
    model = pretrained(transformers.CLIPVisionModel, config, vision, folder)
    inner = getattr(model, "vision_model", model)
    return run(lambda x: inner.post_layernorm(model(x, **call).last_hidden_state), images)


def dinov2(tensors, arch, images, folder, **call):
    """Hugging Face names -> Dinov2Model or Dinov2WithRegistersModel."""
    fields = config_fields(arch) | {"mlp_ratio": arch["mlp_width"] // arch["width"]}
    del fields["intermediate_size"]
    if arch["registers"]:
        model_class = transformers.Dinov2WithRegistersModel
        config = transformers.Dinov2WithRegistersConfig(
            **fields, num_register_tokens=arch["registers"]
        )
    else:
        model_class, config = transformers.Dinov2Model, transformers.Dinov2Config(**fields)
    model = pretrained(model_class, config, tensors, folder)
    return run(lambda x: model(x, **call).last_hidden_state, images)


def dinov2_hub(tensors, arch, images, folder, **call):
    """The hub's names -> the same classes."""
    return dinov2(dinov2_hub_to_hf(tensors), arch, images, folder, **call)


def dinov2_hub_to_hf(tensors):
    out = timm_to_hf(tensors)
    swaps = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
    }
    renamed = {"embeddings.mask_token": tensors["mask_token"]}
    for name, value in out.items():
        if "attention.output" not in name:
            for old, new in swaps.items():
                name = name.replace(old, new)
        renamed[name] = value
    if "register_tokens" in tensors:
        renamed["embeddings.register_tokens"] = tensors["register_tokens"]
    for i in blocks(tensors, "blocks."):
        for k in (1, 2):
            renamed[f"encoder.layer.{i}.layer_scale{k}.lambda1"] = tensors[
                f"blocks.{i}.ls{k}.gamma"
            ]
    return renamed


def dinov3(tensors, arch, images, folder):
    """Hugging Face names -> DINOv3ViTModel."""
    config = transformers.DINOv3ViTConfig(
        **config_fields(arch),
        num_register_tokens=arch["registers"],
        rope_theta=arch["rope_theta"],
        key_bias=False,
    )
    model = pretrained(transformers.DINOv3ViTModel, config, tensors, folder)
    return run(lambda x: model(x).last_hidden_state, images)


def dinov3_hub(tensors, arch, images, folder):
    """The hub's names -> DINOv3ViTModel; the k part of the bias is masked out."""
    out = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.mask_token": tensors["mask_token"][None],
        "embeddings.register_tokens": tensors["storage_tokens"],
    }
    renames = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
    renames |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    for kind in ("weight", "bias"):
        out[f"norm.{kind}"] = tensors[f"norm.{kind}"]
        out[f"embeddings.patch_embeddings.{kind}"] = tensors[f"patch_embed.proj.{kind}"]
        for i in blocks(tensors, "blocks."):
            for a, b in renames.items():
                out[f"layer.{i}.{b}.{kind}"] = tensors[f"blocks.{i}.{a}.{kind}"]
            rows = np.split(tensors[f"blocks.{i}.attn.qkv.{kind}"], 3)
            for name, value in zip("qkv", rows, strict=True):
                if (name, kind) != ("k", "bias"):
                    out[f"layer.{i}.attention.{name}_proj.{kind}"] = value
            for k in (1, 2):
                out[f"layer.{i}.layer_scale{k}.lambda1"] = tensors[f"blocks.{i}.ls{k}.gamma"]
    return dinov3(out, arch, images, folder)


def siglip(tensors, arch, images, folder):
    """Hugging Face names (text tower and pooling head ignored) -> SiglipVisionModel."""
    vision = {
        n: v
        for n, v in tensors.items()
        if n.startswith("vision_model.") and not n.startswith("vision_model.head.")
    }
    config = transformers.SiglipVisionConfig(**config_fields(arch), vision_use_head=False)
    model = pretrained(transformers.SiglipVisionModel, config, vision, folder)
    return run(lambda x: model(x).last_hidden_state, images)


def siglip_big_vision(tensors, arch, images, folder):
    """big_vision's names, one block after the other -> SiglipVisionModel."""
    get = {n.removeprefix("params/img/"): np.asarray(v) for n, v in tensors.items()}.__getitem__
    width = arch["width"]
    out = {
        "vision_model.embeddings.patch_embedding.weight": get("embedding/kernel").transpose(
            3, 2, 0, 1
        ),
        "vision_model.embeddings.patch_embedding.bias": get("embedding/bias"),
        "vision_model.embeddings.position_embedding.weight": get("pos_embedding")[0],
        "vision_model.post_layernorm.weight": get("Transformer/encoder_norm/scale"),
        "vision_model.post_layernorm.bias": get("Transformer/encoder_norm/bias"),
    }
    for i in range(arch["depth"]):
        old, new = f"Transformer/encoderblock_{i}", f"vision_model.encoder.layers.{i}"
        for k in (0, 1):
            out[f"{new}.layer_norm{k + 1}.weight"] = get(f"{old}/LayerNorm_{k}/scale")
            out[f"{new}.layer_norm{k + 1}.bias"] = get(f"{old}/LayerNorm_{k}/bias")
            out[f"{new}.mlp.fc{k + 1}.weight"] = get(f"{old}/MlpBlock_0/Dense_{k}/kernel").T
            out[f"{new}.mlp.fc{k + 1}.bias"] = get(f"{old}/MlpBlock_0/Dense_{k}/bias")
        for word in ("query", "key", "value", "out"):
            kernel = get(f"{old}/MultiHeadDotProductAttention_0/{word}/kernel")
            name = f"{new}.self_attn.{'out' if word == 'out' else word[0]}_proj"
            out[f"{name}.weight"] = kernel.reshape(width, width).T
            bias = get(f"{old}/MultiHeadDotProductAttention_0/{word}/bias")
            out[f"{name}.bias"] = bias.reshape(width)
    return siglip(out, arch, images, folder)


def beit(tensors, arch, images, folder):
    """timm's names with one shared table -> BeitModel with its final norm on all tokens."""
    out = beit_to_hf(tensors)
    out["encoder.relative_position_bias.relative_position_bias_table"] = tensors[
        "rel_pos_bias.relative_position_bias_table"
    ]
    out |= {f"layernorm.{p}": tensors[f"norm.{p}"] for p in ("weight", "bias")}
    config = transformers.BeitConfig(
        **config_fields(arch), use_shared_relative_position_bias=True, use_mean_pooling=False
    )
    model = pretrained(transformers.BeitModel, config, out, folder, add_pooling_layer=False)
    return run(lambda x: model(x).last_hidden_state, images)


def beit_logits(tensors, arch, images, folder):
    """timm's names with a table per block and a head -> BeitForImageClassification. [B, K]."""
    out = {f"beit.{name}": value for name, value in beit_to_hf(tensors).items()}
    for i in blocks(tensors, "blocks."):
        new = f"beit.encoder.layer.{i}.attention.attention.relative_position_bias"
        out[f"{new}.relative_position_bias_table"] = tensors[
            f"blocks.{i}.attn.relative_position_bias_table"
        ]
    for p in ("weight", "bias"):
        out[f"beit.pooler.layernorm.{p}"] = tensors[f"fc_norm.{p}"]
        out[f"classifier.{p}"] = tensors[f"head.{p}"]
    config = transformers.BeitConfig(
        **config_fields(arch),
        use_relative_position_bias=True,
        use_mean_pooling=True,
        num_labels=len(tensors["head.bias"]),
    )
    model = pretrained(transformers.BeitForImageClassification, config, out, folder)
    return run(lambda x: model(x).logits, images)


def beit_to_hf(tensors):
    out = {"embeddings.cls_token": tensors["cls_token"]}
    renames = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for kind in ("weight", "bias"):
        out[f"embeddings.patch_embeddings.projection.{kind}"] = tensors[f"patch_embed.proj.{kind}"]
    for i in blocks(tensors, "blocks."):
        old, new = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for a, b in renames.items():
                out[f"{new}.{b}.{kind}"] = tensors[f"{old}.{a}.{kind}"]
        rows = np.split(tensors[f"{old}.attn.qkv.weight"], 3)
        for name, value in zip(("query", "key", "value"), rows, strict=True):
            out[f"{new}.attention.attention.{name}.weight"] = value
        out[f"{new}.attention.attention.query.bias"] = tensors[f"{old}.attn.q_bias"]
        out[f"{new}.attention.attention.value.bias"] = tensors[f"{old}.attn.v_bias"]
        out[f"{new}.lambda_1"] = tensors[f"{old}.gamma_1"]
        out[f"{new}.lambda_2"] = tensors[f"{old}.gamma_2"]
    return out


SWIN_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")


def swin(tensors, arch, images, folder):
    """Microsoft's names -> Swin(v2)Model, or its classifier where there is a head. [B, K]"""
    from tests.models import swins

    renamed = swins.to_hf(
        {
            name.replace(".cpb_mlp.", ".rpe_mlp."): value
            for name, value in tensors.items()
            if not name.startswith("head.") and not name.endswith(SWIN_BUFFERS)
        }
    )
    head = {p: tensors[f"head.{p}"] for p in ("weight", "bias") if f"head.{p}" in tensors}
    prefix = ("swinv2." if "position" in arch else "swin.") if head else ""
    renamed = {f"{prefix}{name}": value for name, value in renamed.items()}
    renamed |= {f"classifier.{p}": value for p, value in head.items()}
    return swin_hf(renamed, arch, images, folder)


def swin_hf(tensors, arch, images, folder):
    """Hugging Face names -> the same."""
    from tests.models import swins

    kept = {n: v for n, v in tensors.items() if not n.endswith(SWIN_BUFFERS)}
    config = swins.hf_config(arch)
    v2 = "position" in arch
    if "classifier.bias" not in kept:
        network = transformers.Swinv2Model if v2 else transformers.SwinModel
        model = pretrained(network, config, kept, folder, add_pooling_layer=False)
        return run(lambda x: model(x).last_hidden_state, images)
    config.num_labels = len(kept["classifier.bias"])
    network = (
        transformers.Swinv2ForImageClassification if v2 else transformers.SwinForImageClassification
    )
    model = pretrained(network, config, kept, folder)
    return run(lambda x: model(x).logits, images)


def swin_timm(tensors, arch, images, folder):
    """timm's names -> the same; a merging stands in the stage that begins with it."""

    def microsoft(name):
        stage, merging = name.partition(".downsample.")[0], ".downsample." in name
        if merging:
            return name.replace(stage, f"layers.{int(stage.removeprefix('layers.')) - 1}")
        return name.replace("head.fc.", "head.")

    return swin({microsoft(n): v for n, v in tensors.items()}, arch, images, folder)


def swin_plain(tensors, arch, images, folder):
    """Microsoft's names -> plain torch, for what transformers has no class for. [B, N, D]"""
    from tests.reference import swin as reference

    del folder
    torched = {n: torch.from_numpy(np.array(v)) for n, v in tensors.items()}
    version = 2 if "position" in arch else 1
    return run(lambda x: reference.forward(torched, arch, x, version=version)[1], images)


def stripped(tensors, *prefixes):
    """Only the tensors that begin with the prefixes (one after the other), without them."""
    for prefix in prefixes:
        tensors = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    return tensors


def unstack(tensors):
    """big_vision's stacked blocks, one after the other."""
    out = {}
    for name, value in tensors.items():
        if "/img/Transformer/encoderblock/" in name:
            for i, row in enumerate(value):
                out[name.replace("encoderblock", f"encoderblock_{i}")] = row
        else:
            out[name] = value
    return out


def reference(source, part, trees):
    """The oracle of a file with these trees and the tensors to give it."""
    (family,) = (f.name for f in FAMILIES if source in {known.name for known in f.sources})
    return REFERENCES[family](source, part, trees)


def _clip(source, part, trees):
    return (clip if source.startswith("hf_") else clip_openai), _only_tree(trees)


def _timm_vit(source, part, trees):
    if source == "dino_vitb16_full_checkpoint":
        inside = ("module.", "backbone.") if part == "student" else ("backbone.",)
        return vit, stripped(trees[part], *inside)
    return vit, {n: v for n, v in _only_tree(trees).items() if not n.startswith("head.")}


def _dinov2(source, part, trees):
    return (dinov2 if source.endswith("_hf") else dinov2_hub), _only_tree(trees)


def _dinov3(source, part, trees):
    return (dinov3 if source.endswith("_hf") else dinov3_hub), _only_tree(trees)


def _siglip2(source, part, trees):
    if source.endswith("_bigvision"):
        return siglip_big_vision, unstack(_only_tree(trees))
    return siglip, _only_tree(trees)


def _beit(source, part, trees):
    return beit_logits, _only_tree(trees)


def _swin(source, part, trees):
    if source == "esvit_swin_base_w14":
        return swin_plain, {n.removeprefix("module."): v for n, v in trees[part].items()}
    return (swin_timm if source.startswith("timm_") else swin_hf), _only_tree(trees)


def _swin_v2(source, part, trees):
    if source == "swinv2_giant":
        return swin_plain, _only_tree(trees)
    if source.startswith("timm_"):
        return swin_timm, _only_tree(trees)
    return (swin_hf if source.endswith("_hf") else swin), _only_tree(trees)


def _official_fd(source, part, trees):
    tensors = _only_tree(trees)
    of_swin = "swin" in source
    if source.startswith("fd_official_finetuned"):
        return (swin if of_swin else beit_logits), tensors
    if part == "student":
        return (swin if of_swin else beit), stripped(tensors, "encoder.")
    teacher = stripped(tensors, "feature_model.")
    if of_swin:
        return swin_plain, teacher
    return (clip_openai if "clip" in source else vit), teacher


def _only_tree(trees):
    return trees.get("", trees.get("model", {}))


# By family: (source, part, trees) -> (oracle, the tensors it is given).
REFERENCES = {
    "clip": _clip,
    "timm_vit": _timm_vit,
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "siglip2": _siglip2,
    "beit": _beit,
    "swin": _swin,
    "swin_v2": _swin_v2,
    "official_fd": _official_fd,
}

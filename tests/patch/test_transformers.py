"""Models of the library transformers: patched, they give what timm's give with the same weights."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import patch
from patch.families import models_within
from patch.families.transformers_vit import BLOCKS, stack_of
from tests.helpers import METHOD_OPTIONS, few_and_all

transformers = pytest.importorskip("transformers")

SIDE, PATCH, WIDTH, DEPTH, HEADS = 48, 8, 32, 4, 2
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
SIZES |= {"image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6}
KINDS = {  # of transformers -> of timm
    "ViT": ("vit_tiny_patch16_224", {}),
    "DeiT": ("deit_tiny_distilled_patch16_224", {}),
    "DPT": ("vit_tiny_patch16_224", {}),
    "Dinov2": ("vit_small_patch14_dinov2", {}),
    "Dinov2WithRegisters": ("vit_small_patch14_reg4_dinov2", {"num_register_tokens": 4}),
    "DINOv3ViT": ("vit_small_patch16_dinov3_qkvb", {"num_register_tokens": 4, "layer_norm_eps": 1e-5}),
    "SiglipVision": ("vit_base_patch16_siglip_224", {"vision_use_head": False, "hidden_act": "gelu"}),
}
WEIGHTS = Path(__file__).parents[3] / "shared/weights/dinov2_vits14.safetensors"


def build(kind, attention="sdpa", **more):
    """A tiny model of transformers with weights so large that every part matters."""
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind][1] | more)
    config._attn_implementation = attention
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and ("weight" in name or "lambda" in name)
            parameter.normal_(1.0 if scale else 0.0, 0.3)
        for name, parameter in model.named_parameters():
            if "k_proj.bias" in name:
                parameter.zero_()  # timm's Eva has none
    return model


def build_timm(kind, hf):
    """timm's model with the weights of another's."""
    name, _ = KINDS[kind]
    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = timm.create_model(name, num_classes=0, **size).eval()
    exchange(hf, model, to_timm=True)
    return model


@torch.no_grad()
def exchange(hf, model, to_timm):
    """Copy the weights of a model of transformers into timm's of the same kind, or back."""
    for ours, theirs in pairs(hf, model):
        width = theirs.shape[0] // len(ours)
        for index, one in enumerate(ours):
            part = theirs[index * width : (index + 1) * width] if len(ours) > 1 else theirs
            new, old = (part, one) if to_timm else (one, part)
            new.copy_(old.reshape(new.shape))


def pairs(hf, model):
    """(parameters of transformers, one after the other; parameter of timm)."""
    embeddings, blocks = hf.embeddings, stack_of(hf)
    convolution = next(module for module in embeddings.modules() if isinstance(module, nn.Conv2d))
    yield from both(convolution, model.patch_embed.proj)
    for name in ("cls_token", "register_tokens", "distillation_token"):
        own = {"register_tokens": "reg_token", "distillation_token": "dist_token"}.get(name, name)
        if getattr(embeddings, name, None) is not None:
            yield [getattr(embeddings, name)], getattr(model, own)
    position = getattr(embeddings, "position_embeddings", None)
    position = embeddings.position_embedding.weight[None] if hasattr(embeddings, "position_embedding") else position
    if position is not None:
        n = model.pos_embed.shape[1]
        yield [position[:, -n:]], model.pos_embed
        if n < position.shape[1]:  # timm's CLS token has its position in it
            model.cls_token.add_(position[:, :1])
    for block, own in zip(blocks, model.blocks, strict=True):
        names = BLOCKS[type(block).__name__]
        *projections, out, first, second = linears(block, getattr(block, names.attention))
        yield [one.weight for one in projections], own.attn.qkv.weight
        if own.attn.qkv.bias is not None:
            yield [one.bias for one in projections], own.attn.qkv.bias
        elif getattr(own.attn, "q_bias", None) is not None:
            yield [projections[0].bias], own.attn.q_bias
            yield [projections[2].bias], own.attn.v_bias
        yield from both(out, own.attn.proj)
        for norm, other in ((names.norm1, own.norm1), (names.norm2, own.norm2)):
            yield from both(getattr(block, norm), other)
        yield from both(first, own.mlp.fc1)
        yield from both(second, own.mlp.fc2)
        if names.scale1 is not None:
            scales = (own.gamma_1, own.gamma_2) if hasattr(own, "gamma_1") else (own.ls1.gamma, own.ls2.gamma)
            yield [block.layer_scale1.lambda1], scales[0]
            yield [block.layer_scale2.lambda1], scales[1]
    last = next(getattr(hf, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(hf, name))
    yield from both(last, model.norm)


def linears(block, attn):
    """Queries, keys, values and output of the attention, and both layers of the MLP."""
    if hasattr(attn, "attention"):  # DPT's
        inner = attn.attention
        return inner.query, inner.key, inner.value, attn.output.dense, block.intermediate.dense, block.output.dense
    out = attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj
    up, down = ("up_proj", "down_proj") if hasattr(block.mlp, "up_proj") else ("fc1", "fc2")
    return attn.q_proj, attn.k_proj, attn.v_proj, out, getattr(block.mlp, up), getattr(block.mlp, down)


def both(one, other):
    yield [one.weight], other.weight
    if other.bias is not None:
        yield [one.bias], other.bias


def blocky(n):
    """Images of flat squares with noise: some neighbors are alike."""
    coarse = torch.randn(n, 3, 3, 3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return coarse + 0.3 * torch.randn(n, 3, SIDE, SIDE)


OPTIONS = {name: options for name, options in METHOD_OPTIONS.items() if name not in ("dtem", "clustvit")} | {
    "diffrate": {"r": 4}
}


@pytest.mark.parametrize("methods", few_and_all(OPTIONS))
@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_gives_what_timms_model_gives(kind, methods):
    images = blocky(3)
    for attention in ("sdpa", "eager"):
        model = build(kind, attention)
        other = build_timm(kind, model)
        expected, plain = other.forward_features(images), model(images).last_hidden_state
        torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
        for method, options in ((name, OPTIONS[name]) for name in methods):
            if method == "diffrate" and kind == "SiglipVision":
                continue
            for mode in ("none", "proportional"):
                own, theirs = copy.deepcopy(model), copy.deepcopy(other)
                for one in (own, theirs):
                    patch.apply(one, method, **options, attention=mode)
                # Transforms are undone before the last norm here: what follows sees all patches.
                norm, theirs.norm = theirs.norm, nn.Identity()
                found, expected = own(images).last_hidden_state, norm(theirs.forward_features(images))
                assert torch.equal(patch.reduction(own).counts, patch.reduction(theirs).counts), (kind, method)
                assert patch.reduction(own).counts.max() < 36 and found.shape == plain.shape
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
                patch.remove(own)
                assert torch.equal(own(images).last_hidden_state, plain)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_state_has_all_patches(kind):
    """They are those of the tokens that carry the patches; asking for them changes nothing."""
    model, images = build(kind), blocky(2)
    patch.apply(model, "tome", r=4)
    alone = model(images).last_hidden_state
    found = model(images, output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, alone, atol=1e-5, rtol=1e-5)
    assert {state.shape for state in found.hidden_states} == {alone.shape} and len(found.hidden_states) == DEPTH + 1
    prefix = alone.shape[1] - 36
    for layer, state in enumerate(found.hidden_states[1:], start=1):
        steps = patch.reductions(model)
        groups = steps[layer].assignment[0]
        for group in groups.unique():
            members = state[0, prefix:][groups == group]
            assert (members == members[0]).all()
    assert len(groups.unique()) == 36 - 4 * DEPTH


@torch.inference_mode()
def test_models_that_hold_a_vit():
    images = blocky(2)
    sizes = SIZES | {"out_indices": [1, 2, 4]}
    backbone = transformers.Dinov2Config(**sizes, reshape_hidden_states=False)
    config = transformers.DPTConfig(
        backbone_config=backbone, hidden_size=WIDTH, neck_hidden_sizes=[8, 8, 8], fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1], num_labels=5, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, use_auxiliary_head=False,
    )  # fmt: skip
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5))
    upernet = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=transformers.Dinov2Config(**SIZES | {"out_indices": [1, 2, 3, 4]}),
            hidden_size=8, num_labels=5, use_auxiliary_head=False,
        )
    )  # fmt: skip
    for model in (transformers.DPTForDepthEstimation(config), classifier, upernet):
        model.eval()
        plain = model(images)[0]
        patch.apply(model, "graph", layers=[2], threshold=1.0)
        unit = plain.abs().max()
        torch.testing.assert_close(model(images)[0] / unit, plain / unit, atol=1e-4, rtol=1e-4)
        assert patch.method(model) == "graph" and patch.reduction(model).counts.tolist() == [36, 36]
        patch.remove(model)
        patch.apply(model, "graph", layers=[2], tokens=20)
        merged = model(images)[0]
        assert merged.shape == plain.shape and patch.reduction(model).counts.tolist() == [20, 20]
        assert not torch.allclose(merged / unit, plain / unit, atol=1e-3) and torch.equal(model(images)[0], merged)
        patch.remove(model)
        assert torch.equal(model(images)[0], plain) and not patch.is_patched(model)


@torch.inference_mode()
def test_an_error_inside_of_a_pass_leaves_nothing_behind():
    model, images = build("ViT"), blocky(2)
    patch.apply(model, "tome", r=4)
    expected = model(images).last_hidden_state
    block = stack_of(model)[2]

    def fail(*_):
        raise RuntimeError("stop")

    handle = block.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(images)
    handle.remove()
    assert torch.equal(model(images).last_hidden_state, expected)
    again = copy.deepcopy(model)
    assert torch.equal(again(images).last_hidden_state, expected)


def test_training_reaches_all_weights():
    model = build("Dinov2").train()
    patch.apply(model, "graph", layers=[2], threshold=0.9)
    model(blocky(3)).last_hidden_state.square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == ["embeddings.mask_token"] or not missing
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(blocky(1))


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(ValueError, match="flash_attention_2 attention: load it with sdpa or eager"):
        model = build("ViT")
        model.config._attn_implementation = "flash_attention_2"
        patch.apply(model, "graph")
    with pytest.raises(ValueError, match="which this model lacks"):
        patch.apply(build("SiglipVision"), "diffrate", r=4)
    with pytest.raises(ValueError, match="timm alone"):
        patch.add_modules(build("ViT"), "dtem")
    text = transformers.BertModel(transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert not models_within(text)
    with pytest.raises(ValueError, match="cannot patch a BertModel"):
        patch.apply(text, "graph")


def test_apply_looks_at_the_parts_that_it_will_use():
    """Older versions of the library name them otherwise, and would fail in the first pass."""
    for kind in ("ViT", "Dinov2"):
        for name in ("q_proj", "head_dim"):
            model = build(kind)
            attn = getattr(stack_of(model)[1], BLOCKS[type(stack_of(model)[1]).__name__].attention)
            delattr(attn, name)
            with pytest.raises(ValueError, match=f"lacks {name}: install transformers 5.18 or newer"):
                patch.apply(model, "graph")
            assert not patch.is_patched(model)


@pytest.mark.nightly
@pytest.mark.skipif(not WEIGHTS.exists(), reason="no weights of DINOv2 here")
@torch.inference_mode()
def test_real_weights_give_what_timm_gives():
    other = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518).eval()
    other.load_state_dict({name: values.float() for name, values in load_file(WEIGHTS).items()})
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    exchange(model, other, to_timm=False)
    images = torch.nn.functional.interpolate(blocky(1), (518, 518), mode="bicubic")
    expected = other.forward_features(images)
    torch.testing.assert_close(model(images).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    for method, options in (("graph", {"threshold": 0.9}), ("algm", {"threshold": 0.9}), ("tome", {"r": 40})):
        for one in (model, other):
            patch.apply(one, method, **options)
        found, expected = model(images).last_hidden_state, other.forward_features(images)
        assert torch.equal(patch.reduction(model).assignment, patch.reduction(other).assignment)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for one in (model, other):
            patch.remove(one)


def build_eomt(attention="sdpa"):
    """A tiny EoMT whose queries join the tokens of the last two of four blocks."""
    sizes = SIZES | {"num_blocks": 2, "num_queries": 5, "num_labels": 3, "num_upscale_blocks": 1, "mlp_ratio": 4}
    config = transformers.EomtConfig(**sizes, num_register_tokens=2)
    config._attn_implementation = attention
    model = transformers.EomtForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "criterion" not in name:
                parameter.normal_(float(parameter.ndim == 1 and ("weight" in name or "lambda" in name)), 0.3)
        model.attn_mask_probs.zero_()
    return model


@torch.inference_mode()
def test_queries_join_merged_tokens_and_masks_have_all_patches():
    images = blocky(3)
    for attention in ("sdpa", "eager"):
        model = build_eomt(attention)
        plain = model(images)
        for options in ({"layers": [2], "threshold": 1.0}, {"layers": [2, 3], "tokens": [36, 36]}):
            patch.apply(model, "graph" if "threshold" in options else "algm", **options)
            torch.testing.assert_close(
                model(images).masks_queries_logits, plain.masks_queries_logits, atol=1e-3, rtol=1e-4
            )
            patch.remove(model)
        for method, options in (
            ("graph", {"threshold": 0.5}),
            ("algm", {"threshold": 0.5, "layers": [1, 4]}),
            ("tome", {"r": 3}),
        ):
            patch.apply(model, method, **options)
            together = model(images)
            counts = patch.reduction(model).counts
            assert counts.max() < 36 and together.masks_queries_logits.shape == plain.masks_queries_logits.shape
            alone = [model(image[None]).masks_queries_logits[0] for image in images]  # neither padding nor packing
            torch.testing.assert_close(together.masks_queries_logits, torch.stack(alone), atol=1e-3, rtol=1e-3)
            patch.remove(model)
        assert torch.equal(model(images).masks_queries_logits, plain.masks_queries_logits)


def test_equal_patches_merge_without_a_trace_of_it():
    """Where all that merges is equal, and sizes count, the masks are those without merging."""
    model = build_eomt().double()
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
    images = torch.randn(1, 3, 3, 3).double().repeat_interleave(16, 2).repeat_interleave(16, 3)
    with torch.inference_mode():
        plain = model(images)
        patch.apply(model, "graph", layers=[1], threshold=1 - 1e-7, attention="proportional")
        merged = model(images)
    assert patch.reduction(model).counts.item() == 9
    torch.testing.assert_close(merged.masks_queries_logits, plain.masks_queries_logits, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(merged.class_queries_logits, plain.class_queries_logits, atol=1e-7, rtol=1e-7)


def test_eomt_with_masked_attention_is_refused():
    model = build_eomt()
    model.attn_mask_probs.fill_(0.5)
    with pytest.raises(ValueError, match="attn_mask_probs with zeros"):
        patch.apply(model, "graph")
    model.attn_mask_probs.zero_()
    with pytest.raises(ValueError, match="which this model lacks"):
        patch.apply(model, "diffrate", r=4)


@torch.inference_mode()
@pytest.mark.parametrize("cls", ["ForSemanticSegmentation", "ForDepthEstimation"])
def test_dpt_with_a_vit_of_its_own(cls):
    """Its neck reads hidden states of patched blocks; `merged` is near `plain`, and equal where nothing merges."""
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    model = getattr(transformers, f"DPT{cls}")(transformers.DPTConfig(**SIZES, **sizes, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    images, answer = blocky(2), {"ForSemanticSegmentation": "logits"}.get(cls, "predicted_depth")
    plain = model(images)[answer]
    patch.apply(model, "graph", layers=[2], threshold=1.0)
    torch.testing.assert_close(model(images)[answer], plain, atol=1e-4, rtol=1e-4)
    patch.remove(model)
    patch.apply(model, "keymatch", layers=[1, 2], tokens=0.5)
    merged = model(images)[answer]
    assert merged.shape == plain.shape and 0 < (merged - plain).std() < plain.std()
    assert patch.reduction(model).lengths == (18, 18)
    assert torch.equal(patch.remove(model)(images)[answer], plain)


def test_another_form_of_dpts_attention_is_refused():
    model = build("DPT")
    del model.encoder.layer[1].attention.attention.query
    with pytest.raises(ValueError, match="lacks query: install transformers"):
        patch.apply(model, "tome")
    assert not patch.is_patched(model)

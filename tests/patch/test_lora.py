"""Adapters of peft: they are patched before or after, and act as their weights would if they were merged."""

import pytest
import torch

import patch
from tests.families import FAMILIES
from tests.helpers import by_speed, different_images

peft = pytest.importorskip("peft")

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
TARGETS = {
    "vit": ["qkv", "proj", "fc1"],
    "eva": ["qkv", "fc1"],
    "Dinov2": ["q_proj", "k_proj", "fc1"],
    "DPT": ["query", "key", "intermediate.dense"],
    "DINOv3ViT": ["q_proj", "k_proj"],
    "mmseg": ["attn.attn", "ffn.layers.1"],
    "segmenter": ["qkv"],
}
METHODS = {"tome": {"r": 2}, "keymatch": {"layers": [1, 2], "tokens": 0.5}, "graph": {"layers": [1], "threshold": 0.3}}


def adapted(model, name):
    """The model with adapters that change what it gives."""
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


@pytest.mark.parametrize("name", by_speed(TARGETS, slow=["DPT", "mmseg"]))
def test_both_orders_give_what_the_merged_weights_give(name, tmp_path):
    family, images = FAMILIES[name], different_images(3)
    for method, options in METHODS.items():
        if name == "mmseg" and method != "graph":
            continue
        merged = patch.apply(adapted(family.build(), name).merge_and_unload(), method, **options)
        expected = family.run(merged, images)
        plain = family.run(patch.apply(family.build(), method, **options), images)
        assert not torch.allclose(expected, plain, atol=1e-2)
        after = adapted(patch.apply(family.build(), method, **options), name)
        before = patch.apply(adapted(family.build(), name), method, **options)
        after.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(patch.apply(family.build(), method, **options), tmp_path).eval()
        for one in (after, before, loaded):
            torch.testing.assert_close(family.run(one.get_base_model(), images), expected, **CLOSE)
            assert patch.reduction(one).lengths == patch.reduction(merged).lengths
        family.run(after.get_base_model(), images).square().mean().backward()
        learning = {n: p.grad for n, p in after.named_parameters() if p.requires_grad}
        assert learning and all("lora" in n and g is not None and g.abs().sum() > 0 for n, g in learning.items())
        assert not patch.is_patched(patch.remove(after))
        unpatched = after.merge_and_unload()
        torch.testing.assert_close(
            family.run(unpatched, images), family.run(adapted(family.build(), name).get_base_model(), images), **CLOSE
        )


def test_keys_that_an_adapter_hides_are_not_merged_by():
    """peft's `MultiheadAttention` adds to the weights of mmsegmentation's attention while it runs."""
    model = adapted(FAMILIES["mmseg"].build(), "mmseg")
    patch.apply(model, "tome", r=2)
    with pytest.raises(ValueError, match="merge_and_unload first, or take a method"):
        model(different_images(2))


@pytest.mark.parametrize("patch_first", [True, False])
def test_learned_parts_train_and_are_saved_as_modules_to_save(patch_first, tmp_path):
    def base():
        return patch.add_modules(FAMILIES["vit"].build(), "ltmp")

    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["merge_masker", "prune_masker"])
    images, model = different_images(3), base()
    if patch_first:
        patch.apply(model, "ltmp", learned=True)
    tuned = peft.get_peft_model(model, settings)
    if not patch_first:
        patch.apply(tuned, "ltmp", learned=True)
    tuned.train()
    (tuned(images).square().mean() + patch.loss(tuned)).backward()
    thresholds = patch.learned_parameters(model, "ltmp")
    assert len(thresholds) == 6 and all(p.requires_grad and p.grad is not None for p in thresholds)
    with torch.no_grad():
        for parameter in thresholds:
            parameter.fill_(0.5)
    tuned.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(patch.apply(base(), "ltmp", learned=True), tmp_path).eval()
    torch.testing.assert_close(loaded(images), tuned(images))
    assert not torch.allclose(patch.apply(base(), "ltmp", learned=True)(images), tuned(images), atol=1e-3)

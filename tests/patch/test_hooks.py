"""Hooks on blocks: what a hook returns is what goes on, and a hook that changes nothing changes nothing."""

import pytest
import torch
from torch import nn

import patch
from g2tm import Grouping
from patch import track
from tests.families import EXPOSED, FAMILIES, hugging, states
from tests.helpers import METHOD_OPTIONS, by_speed, different_images

CLOSE = {"atol": 5e-5, "rtol": 1e-5}  # outputs of EoMT are about 30
QUICK = ("graph", "tome", "dct")  # packed, padded by nothing, no groups of patches
LINEAR = ("Dinov2", "ViT", "DINOv3ViT", "mmseg", "vit", "eva", "segmenter")


def equal_new(block, arguments, output):
    return output.clone()


def same(block, arguments, output):
    return output


def nothing(block, arguments, output):
    return None


def in_place(block, arguments, output):
    output.mul_(2.0).mul_(0.5)  # exact


def equal_inputs(block, inputs):
    return inputs[0].clone(), *inputs[1:]


def view(block, arguments, output):
    return output.view_as(output)


HOOKS = [equal_new, same, nothing, in_place, view]


def check_hooks(name, method, hooks):
    family, images = FAMILIES[name], different_images(3)
    for block in range(3):
        for hook in hooks:
            model = family.patched(method)
            expected, lengths = family.run(model, images), patch.reduction(model).lengths
            handle = list(family.blocks(model))[block].register_forward_hook(hook)
            found = family.run(model, images)
            torch.testing.assert_close(found, expected, **CLOSE, msg=f"{name} {method} {block} {hook.__name__}")
            assert patch.reduction(model).lengths == lengths
            handle.remove()
            torch.testing.assert_close(family.run(model, images), expected, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("name", by_speed(FAMILIES, slow=["vit", "Dinov2", "segmenter"]))
def test_a_hook_that_changes_nothing_changes_nothing(name):
    """Before the merging block, on it, and after it; a hook on the last block sees what leaves the stack."""
    for method in QUICK:
        check_hooks(name, method, [equal_new] if method == "dct" else HOOKS)


@pytest.mark.nightly
@torch.inference_mode()
@pytest.mark.parametrize("name", by_speed(FAMILIES, slow=["vit", "Dinov2", "segmenter"]))
def test_a_hook_that_changes_nothing_changes_nothing_in_any_method(name):
    for method in FAMILIES[name].methods:
        check_hooks(name, method, [equal_new, in_place])


@torch.inference_mode()
@pytest.mark.parametrize("name", EXPOSED)
def test_nor_does_it_where_all_hidden_states_are_asked_for(name):
    family, images = FAMILIES[name], different_images(3)
    for method in family.methods:
        model = family.patched(method)
        expected = states(model, images)
        blocks = list(family.blocks(model))
        for handles in (
            [block.register_forward_hook(equal_new) for block in blocks],
            [blocks[1].register_forward_hook(in_place)],
            [
                block.register_forward_pre_hook(lambda block, inputs: (inputs[0].clone(), *inputs[1:]))
                for block in blocks
            ],
        ):
            torch.testing.assert_close(states(model, images), expected, **CLOSE, msg=f"{name} {method}")
            for handle in handles:
                handle.remove()


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_where_nothing_merges_a_change_is_that_of_the_unpatched_model(name):
    family, images = FAMILIES[name], different_images(2)

    def double(block, arguments, output):
        return 2 * output

    def blank(block, arguments, output):
        return output.index_fill(1, torch.tensor([output.shape[1] - 3]), 0.0)

    def shift(block, arguments, output):
        output.mul_(-0.5).add_(0.1)

    for block in range(3):
        for hook in (double, blank, shift):
            plain, patched = family.build(), family.patched("graph", threshold=1.0)
            for model in (plain, patched):
                list(family.blocks(model))[block].register_forward_hook(hook)
            torch.testing.assert_close(family.run(patched, images), family.run(plain, images), atol=2e-5, rtol=1e-4)
            assert patch.reduction(patched).lengths == (16, 16)


@torch.inference_mode()
@pytest.mark.parametrize("name", LINEAR)
def test_a_change_goes_on_through_merged_tokens(name):
    """A hook that adds a vector to all tokens does what a bias at the end of the block does."""
    family, images, vector = FAMILIES[name], different_images(3), 0.5 * torch.randn(32)
    for method in ("graph", "tome", "algm"):
        for block in range(3):
            hooked, biased = family.patched(method), family.patched(method)
            list(family.blocks(hooked))[block].register_forward_hook(lambda block, arguments, output: output + vector)
            add_at_the_end(list(family.blocks(biased))[block], vector)
            expected = family.run(biased, images)
            torch.testing.assert_close(family.run(hooked, images), expected, atol=2e-5, rtol=1e-4)
            assert torch.equal(patch.reduction(hooked).counts, patch.reduction(biased).counts)


def add_at_the_end(block, vector):
    """Make a block's output larger by a vector: through the bias of its last linear layer."""
    scale = 1.0
    for name, part in block.named_parameters():
        if name in ("gamma_2", "ls2.gamma", "layer_scale2.lambda1"):
            scale = part
    linears = [m for name, m in block.named_modules() if isinstance(m, nn.Linear) and "attn" not in name]
    last = [linear for linear in linears if linear.out_features == 32 and linear.in_features > 32][-1]
    last.bias.add_(vector / scale)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["Dinov2", "ViT", "DINOv3ViT", "SiglipVision"])
def test_a_change_of_one_patch_is_its_share_of_its_token(name):
    """Where a hook sees all patches, what it returns is merged again: a token is the mean of its patches."""
    family, images, vector = FAMILIES[name], different_images(2), torch.randn(32)
    first = family.n_prefix
    outputs = []
    for whole in (False, True):
        model = family.patched("graph", layers=[1], tokens=5)
        family.run(model, images)
        groups = patch.reduction(model).assignment
        members = (groups == groups.mode(1, keepdim=True).values).float()  # of the largest group

        def change(block, arguments, output, members=members, whole=whole):
            change = torch.zeros_like(output)
            share = members / members.sum(1, keepdim=True) if whole else nn.functional.one_hot(members.argmax(1), 16)
            change[:, first:] = share.unsqueeze(-1) * vector
            return output + change

        list(family.blocks(model))[1].register_forward_hook(change)
        outputs.append(family.run(model, images))
    assert members.sum(1).min() > 1
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


def gradients(family, model, images):
    model.zero_grad()
    family.run(model, images).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(name, method):
    family, images = FAMILIES[name], different_images(3)
    model = family.patched(method)
    expected = gradients(family, model, images)
    calls, blocks = [], list(family.blocks(model))
    handles = [block.register_full_backward_hook(lambda *_: calls.append(1)) for block in blocks]
    handles.append(blocks[1].register_forward_hook(equal_new))
    found = gradients(family, model, images)
    assert len(calls) == 3 and found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())  # of a key's bias it is 0 but for rounding
    for key, value in expected.items():
        torch.testing.assert_close(found[key] / largest, value / largest, atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Eomt"])
def test_gradients_with_a_backward_hook_are_those_without(name):
    for method in ("graph", "tome"):
        check_gradients(name, method)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Eomt"])
def test_gradients_with_a_backward_hook_are_those_without_in_every_method(name):
    for method in FAMILIES[name].methods:
        check_gradients(name, method)


@pytest.mark.parametrize("name", EXPOSED)
def test_what_a_hook_sees_of_a_block_gets_a_gradient(name):
    """All patches in models of transformers and of mmsegmentation, the tokens themselves in those of timm."""
    family, images = FAMILIES[name], different_images(2)
    for method in ("graph", "tome"):
        model, seen, grads = family.patched(method), [], []

        def keep(block, arguments, output, seen=seen, grads=grads):
            seen.append(output)
            output.register_hook(grads.append)

        handles = [block.register_forward_hook(keep) for block in family.blocks(model)]
        family.run(model, images).square().mean().backward()
        steps, n_tokens = patch.reductions(model), 16
        for index, (x, gradient) in enumerate(zip(seen, reversed(grads), strict=True), start=1):
            if index in steps and name in ("vit", "eva"):
                n_tokens = steps[index].width
            assert tuple(x.shape) == tuple(gradient.shape) == (2, family.n_prefix + n_tokens, 32), (name, method)
            assert gradient.abs().sum() > 0
        for handle in handles:
            handle.remove()


def test_every_method_has_its_turn():
    assert {name for family in FAMILIES.values() for name in family.methods} == METHOD_OPTIONS.keys()


@torch.inference_mode()
def test_hooks_of_transformers_cost_only_what_is_asked_for(monkeypatch):
    """They stay installed; images stay concatenated, and only the chosen states get all patches back."""
    model, images = FAMILIES["Dinov2"].patched("graph", layers=[1], threshold=0.3), different_images(3)
    plain = model(images).last_hidden_state
    every = model(images, output_hidden_states=True).hidden_states
    packed, unmerged = [], []
    pack, unmerge = track.Packed.__init__, Grouping.unmerge
    monkeypatch.setattr(track.Packed, "__init__", lambda *given: (packed.append(1), pack(*given))[1])
    monkeypatch.setattr(Grouping, "unmerge", lambda *given, **more: (unmerged.append(1), unmerge(*given, **more))[1])
    counts = []
    for asked in (None, [1], [-2], True):
        found = model(images, output_hidden_states=asked)
        torch.testing.assert_close(found.last_hidden_state, plain, atol=1e-5, rtol=1e-4)
        counts.append((bool(packed), len(unmerged)))
        if isinstance(asked, list):
            chosen = [state for state in found.hidden_states if state is not None]
            torch.testing.assert_close(chosen, [every[asked[0]]], atol=1e-5, rtol=1e-4)
        packed.clear()
        unmerged.clear()
    assert counts == [(True, 1), (True, 3), (True, 3), (True, 5)]  # and once more where a shown state goes on
    eager = FAMILIES["Dinov2"].patched("graph", model=hugging(attention="eager"), layers=[1], threshold=0.3)
    shapes = [tuple(a.shape) for a in eager(images, output_attentions=True).attentions]
    assert shapes[0] == (3, 2, 17, 17) and shapes[1] == (3, 2, *[1 + patch.reduction(eager).width] * 2)


@pytest.mark.parametrize("name", LINEAR)
@torch.inference_mode()
def test_hooks_see_what_the_page_on_hooks_says(name):
    """All patches around a block of transformers and mmsegmentation, tokens around one of timm and inside of any."""
    family, images = FAMILIES[name], different_images(2)
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        model, around, inside = family.patched("tome", r=3), [], []
        block = list(family.blocks(model))[1]
        getattr(block, register)(lambda block, *seen, around=around: around.extend(seen))
        for norm in block.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.register_forward_hook(lambda norm, given, x, inside=inside: inside.append(tuple(x.shape)))
        family.run(model, images)
        shapes = [tuple((x[0] if isinstance(x, tuple) else x).shape) for x in around]
        shown = (13, 10) if name in ("vit", "eva", "segmenter") else (16, 16)
        assert shapes == [(2, family.n_prefix + n, 32) for n in shown[: len(around)]]
        assert inside == [(2, family.n_prefix + n, 32) for n in (13, 10)]

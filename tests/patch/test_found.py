"""Models that were changed, asked or left in ways that once went wrong without a word: right, or one sentence."""

import gc
import threading
import types
import weakref

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import patch
from tests.families import FAMILIES, eomt, hugging, segmenter, strengthen, vit
from tests.helpers import METHOD_OPTIONS, different_images, right_or_refused, with_parts

RAGGED = {"threshold": 0.2, "layers": [1]}
LABELS = torch.arange(3 * 32 * 32).view(3, 32, 32) % 5


def attend_to_all(self: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention as it is often set on an instance: the mask is passed by."""
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT * self.scale).softmax(-1)
    return self.proj((weights @ value).transpose(1, 2).flatten(2))


class AddFirst(nn.Module):
    """A wrapper around a block that adds the CLS token of an image to all of its tokens."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x[:, :1]


def own_attention(model):
    model.blocks[1].attn.forward = types.MethodType(attend_to_all, model.blocks[1].attn)


def own_block(model):
    model.blocks[1].forward = types.MethodType(Block.forward, model.blocks[1])


def own_last_block(model):
    model.blocks[2].forward = types.MethodType(Block.forward, model.blocks[2])


def wrapped(model):
    model.blocks[1] = AddFirst(model.blocks[1])


def wrapped_last(model):
    model.blocks[2] = AddFirst(model.blocks[2])


@torch.no_grad()
@pytest.mark.parametrize("change", [own_attention, own_block, own_last_block, wrapped, wrapped_last])
def test_packed_images_do_not_mix(change):
    """The image that keeps most tokens, which is never padded, comes out as it does alone."""
    model, images = patch.apply(vit(), "graph", **RAGGED), different_images()
    model(images)
    *others, most = patch.reduction(model).lengths
    assert max(others) < most
    change(model)
    right_or_refused(lambda: model(images)[-1:] - model(images[-1:]), torch.zeros(1, 5), atol=1e-4)


@torch.no_grad()
def test_attention_of_the_instance_before_the_patch():
    model, images = vit(), different_images()
    own_attention(model)

    def action():
        patch.apply(model, "graph", **RAGGED)
        return model(images)[-1:] - model(images[-1:])

    right_or_refused(action, torch.zeros(1, 5), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("build", [vit, hugging])
def test_blocks_in_another_order(build):
    """They are right as if they had been patched in that order, or refused."""
    images = different_images()

    def swap(model):
        blocks = model.blocks if hasattr(model, "blocks") else model.encoder.layer
        blocks[1], blocks[2] = blocks[2], blocks[1]
        return model

    def run(model):
        found = model(images)
        return getattr(found, "last_hidden_state", found)

    expected = run(patch.apply(swap(build()), "graph", **RAGGED))
    right_or_refused(lambda: run(swap(patch.apply(build(), "graph", **RAGGED))), expected)


def test_the_loss_of_a_training_pass_survives_an_evaluation():
    model, images = FAMILIES["segmenter"].patched("clustvit").train(), different_images()
    output = model(images)
    expected = patch.loss(model, LABELS)
    with torch.no_grad():
        model.eval()(images[:1])
    right_or_refused(lambda: torch.as_tensor(patch.loss(model.train(), LABELS)), expected)
    assert output.requires_grad


def test_the_loss_of_another_thread_is_no_silent_0():
    """As with DataParallel on several devices."""
    model, outputs = FAMILIES["segmenter"].patched("clustvit").train(), []
    thread = threading.Thread(target=lambda: outputs.append(model(different_images())))
    thread.start()
    thread.join()
    with pytest.raises(ValueError, match="pass"):
        patch.loss(model, LABELS)


class Made(TorchFunctionMode):
    """Tensors that were made while it was open."""

    def __init__(self) -> None:
        super().__init__()
        self.references = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.references += [weakref.ref(one) for one in tree_leaves(made) if isinstance(one, Tensor)]
        return made

    def in_graph(self):
        gc.collect()
        alive = [one() for one in self.references]
        return sum(one is not None and one.grad_fn is not None for one in alive)


def upernet(method):
    model = segmenter(decoder={"name": "upernet"})
    with_parts(model.encoder, method)
    return patch.apply(model, method, **METHOD_OPTIONS[method])


@pytest.mark.parametrize(
    ("method", "name"), [("dtem", "upernet"), ("clustvit", "upernet"), ("fpet", "Dinov2"), ("fpet", "mmseg")]
)
def test_the_graph_of_a_training_pass_goes_with_its_output(method, name):
    model = upernet(method) if name == "upernet" else FAMILIES[name].patched(method)
    model.train()
    with Made() as made:
        output = model(different_images())
    assert made.in_graph()
    del output
    assert made.in_graph() == 0


def test_the_graph_goes_with_intermediate_outputs():
    model = FAMILIES["vit"].patched("dtem").train()
    with Made() as made:
        output = model.forward_intermediates(different_images(), [1])
    del output
    assert made.in_graph() == 0


@pytest.mark.parametrize("change", [lambda m: m.train(), lambda m: m.attn_mask_probs.fill_(1.0)])
def test_eomt_that_masks_its_attention_is_refused(change):
    model = patch.apply(eomt(), "graph", threshold=0.2)
    change(model)
    with pytest.raises(ValueError, match="mask"):
        model(different_images())


@torch.no_grad()
@pytest.mark.parametrize("indices", [[0, 1, 1], [0, 0, 0], [0, 1, 0]])
def test_a_block_that_occurs_twice(indices):
    """Nothing merges: so the output is the one before. A refusal leaves nothing behind."""
    model, images = vit(), different_images()
    model.blocks = nn.Sequential(*[model.blocks[index] for index in indices])
    classes, expected = [type(module) for module in model.modules()], model(images)
    if right_or_refused(lambda: patch.apply(model, "graph", threshold=1.0, layers=[1])(images), expected):
        assert [type(module) for module in model.modules()] == classes
        assert not any("_patch" in vars(module) for module in model.modules())


def test_a_shared_part_is_called_patched():
    first, second = vit(), vit()
    second.blocks = first.blocks
    patch.apply(first, "tome", r=2)
    with pytest.raises(ValueError, match="patched"):
        patch.apply(second, "tome", r=2)
    assert not patch.is_patched(second)


class Prompted(VisionTransformer):
    """Learned prompts stand between CLS and the patches."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], x[:, 1:6].detach().flip(1), x[:, 1:]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("method", ["graph", "tome", "random", "mpm", "dct"])
def test_tokens_that_are_no_patches_are_not_taken_for_patches(method):
    model = strengthen(Prompted(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5))
    patch.apply(model, method, **METHOD_OPTIONS[method])
    with pytest.raises(ValueError, match="tokens"):
        model(different_images())

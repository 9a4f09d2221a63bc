"""timm's `Block` with merging, and the state that the blocks of one model share."""

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from g2tm import attention_bias
from patch.flash import KeyBias, carries
from patch.packing import Packing, can_pack
from patch.registry import Step


class Merging:
    """What happened to the tokens of the current forward pass.

    Attributes:
        method, settings: from `patch.registry.resolve`.
        encoder: what new settings are checked against.
        prefix: number of prefix tokens of the encoder.
        grid: (gh, gw) of the current images.
        reduction: from all patches to the current tokens; None while nothing was merged.
        keys: (B, L, head dim) of the current attention, if the method wants them.
        on_merge: called with (layer, reduction) after every merge; None: nobody looks.
        bucket: merged tokens are padded to a multiple of this number, but not beyond what they were before, so that
            shapes repeat; None: they are not.
        packing: how the tokens of all images stand behind each other at the moment; None: each image has its row.
        watchers: the hooks inside the blocks.
    """

    def __init__(self, name, method, settings, encoder, prefix):
        self.name = name
        self.method = method
        self.settings = settings
        self.encoder = encoder
        self.prefix = prefix
        self.grid = None
        self.reduction = None
        self.keys = None
        self.on_merge = None
        self.bucket = None
        self.key_bias = None
        self.packing = None
        self.watchers = Watchers(())

    def begin(self, grid, bucket=None):
        """Forget the last forward pass."""
        self.grid, self.bucket = tuple(grid), bucket
        self.reduction, self.keys, self.key_bias, self.packing = None, None, None, None

    def reduce(self, x, layer, training):
        """One merge step; x: (B, P + N, D) -> (B, P + M, D)."""
        sizes, padded = (None, False) if self.reduction is None else (self.reduction.sizes, self.reduction.padded)
        batch = self.settings["batch"] or ("uniform" if training else "ragged")
        depth = self.encoder.depth
        step = Step(x, self.keys, self.prefix, self.grid, sizes, padded, layer, depth, batch, self.settings)
        merged, self.keys = self.method.merge(step), None
        if self.bucket is not None:
            width = self.bucket * math.ceil(merged.width / self.bucket)
            merged = merged.widened(min(width, step.x.shape[1]))
        self.reduction = merged if self.reduction is None else self.reduction.then(merged)
        self.key_bias = attention_bias(self.reduction.sizes, self.settings["attention"], self.reduction.padding)
        if self.on_merge is not None:
            self.on_merge(layer, self.reduction)
        return torch.cat([x[:, : self.prefix], merged.merge(step.x)], dim=1)

    def pack(self, x, before, after):
        """Put the tokens of all images behind each other, (B, before + M + after, D) -> (1, T, D), if they differ in
        number and nobody looks on."""
        if self.packing is not None or not self._differ():
            return x
        bias = attention_bias(self.reduction.sizes, self.settings["attention"])
        self.packing = Packing(self.reduction, before, after, bias)
        return self.packing.pack(x)

    def unpack(self, x):
        """Undo `pack`, if it was done."""
        packing, self.packing = self.packing, None
        return x if packing is None else packing.unpack(x)

    def _differ(self):
        if self.reduction is None or not self.reduction.padded or self.bucket is not None:
            return False
        # A trace, in which operations are counted, puts hooks on all modules, but does not look at tokens.
        return torch.jit.is_tracing() or not self.watchers.present()

    def bias(self, before, after, x, alone):
        """Mask of the next attention: an additive bias (B, 1, 1, before + M + after), the mask of packed tokens, or
        None.

        Args:
            before, after: tokens in front of and behind the patch tokens, which count as one patch each.
            x: the tokens that attend.
            alone: whether it is all that `scaled_dot_product_attention` is given as `attn_mask`.
        """
        if self.packing is not None:
            return self.packing.mask
        if self.key_bias is None:
            return None
        bias = F.pad(self.key_bias, (before, after))
        return bias.as_subclass(KeyBias) if alone and carries(x) else bias.to(x.dtype)


class PatchedBlock(Block):
    """timm's `Block` after a patch: the bias of merged tokens goes into the attention, and in the layers of the
    method the tokens merge between attention and MLP."""

    def forward(self, x, attn_mask=None, is_causal=False):
        """x: (B, L, D) -> (B, L', D), with L' ≤ L where tokens merge. Between the blocks of a stack, the tokens of
        all images may stand behind each other, (1, T, D)."""
        x = self._arrange(x, attn_mask, is_causal)
        x = self.attend(x, attn_mask, is_causal)
        if self.merge_layer is not None:
            x = self.merging.reduce(self.merging.unpack(x), self.merge_layer, self.training)
            x = self._arrange(x, attn_mask, is_causal)
        x = self.feed(x)
        return self.merging.unpack(x) if self.last else x

    def attend(self, x, attn_mask=None, is_causal=False):
        """The half before the merge; x: (B, L, D)."""
        alone = attn_mask is None and self.attn.fused_attn
        bias = self.merging.bias(*self.neighbours, x, alone)
        mask = attn_mask if bias is None else bias if attn_mask is None else attn_mask + bias
        return x + self._drop(self.drop_path1, self.ls1(self.attn(self.norm1(x), attn_mask=mask, is_causal=is_causal)))

    def feed(self, x):
        """The half after the merge; x: (B, L', D)."""
        return x + self._drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))))

    def _arrange(self, x, attn_mask, is_causal):
        """Tokens packed where this block can work on them so, else padded."""
        alone = attn_mask is None and not is_causal and self.attn.fused_attn
        if alone and can_pack(x, self.attn.attn_drop.p if self.training else 0):
            return self.merging.pack(x, *self.neighbours)
        return self.merging.unpack(x)

    def _drop(self, drop_path, x):
        packing = self.merging.packing
        return drop_path(x) if packing is None else packing.drop(drop_path, x)


class Watchers:
    """The hooks through which somebody may look into modules.

    Args:
        modules: where to count them; what is put in their place later is not looked at.
        own: how many of them belong to the patch.
    """

    def __init__(self, modules, own=0):
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self.hooks = [getattr(module, kind) for module in modules for kind in kinds]
        self.own = own

    def present(self):
        """Whether there is any besides those of the patch."""
        return sum(map(len, self.hooks)) > self.own


def patch_block(block, merging, *, before=0, after=0, merge_layer=None, last=False):
    """Turn a timm block into a `PatchedBlock`; its parameters stay the objects they are.

    Args:
        block: an unpatched `Block`.
        merging: the shared state.
        before, after: number of tokens in front of and behind the patch tokens.
        merge_layer: 1-based layer if tokens merge here, else None.
        last: whether it is the last of its stack, behind which every image has its row again.
    """
    block.merging, block.neighbours, block.merge_layer, block.last = merging, (before, after), merge_layer, last
    if merge_layer is not None and merging.method.needs_keys:
        block.keys_hook = block.attn.k_norm.register_forward_hook(KeepKeys(merging))
    block.__class__ = PatchedBlock


def unpatch_block(block):
    """Undo `patch_block`."""
    if hasattr(block, "keys_hook"):
        block.keys_hook.remove()
        del block.keys_hook
    del block.merging, block.neighbours, block.merge_layer, block.last
    block.__class__ = Block


def check_block(block):
    """Raise a ValueError if a block is not exactly timm's `Block`."""
    if type(block) is not Block:
        raise ValueError(f"cannot patch a {type(block).__name__}: only timm's Block is known")


def check_checkpointing(encoder):
    """Raise a ValueError if an encoder would run its blocks twice."""
    if getattr(encoder, "grad_checkpointing", False):
        raise ValueError("a patched model cannot run with gradient checkpointing, it would merge twice: turn that off")


class Unmerge(nn.Module):
    """Stands in for the submodule that puts tokens on the grid, and undoes the merge before it."""

    def __init__(self, to_grid, merging):
        super().__init__()
        self.to_grid = to_grid
        self.merging = merging

    def forward(self, scores, grid):
        """scores: (B, M, C) -> (B, C, gh, gw)."""
        if self.merging.reduction is not None:
            scores = self.merging.reduction.unmerge(scores)
        return self.to_grid(scores, grid)


class BeginPass:
    """Forward hook of the patch embedding, where every pass begins: notes the grid and forgets the last pass."""

    def __init__(self, merging, encoder):
        self.merging = merging
        self.encoder = encoder

    def __call__(self, patch_embed, inputs, output):
        check_checkpointing(self.encoder)
        self.merging.begin(output.shape[1:3] if output.ndim == 4 else patch_embed.grid_size)


class KeepKeys:
    """Forward hook of an attention's `k_norm`, through which its keys pass: keeps their mean over the heads."""

    def __init__(self, merging):
        self.merging = merging

    def __call__(self, k_norm, inputs, keys):
        keys, packing = keys.detach().float().mean(1), self.merging.packing
        self.merging.keys = keys if packing is None else packing.unpack(keys)

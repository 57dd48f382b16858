"""Layers of an image tower: attention with its projections apart, so that LoRA wraps each, and names of its parts."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diva_lab.machine import SHORT


class SplitAttention(nn.Module):
    """An `nn.MultiheadAttention` whose packed projection is four `nn.Linear`s, which LoRA can wrap; equal to 1e-6.

    `packed` gives the original back. Takes and returns what open_clip's blocks exchange with the original.
    """

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        self.heads, self.batch_first = packed.num_heads, packed.batch_first
        weights, biases = packed.in_proj_weight.detach().chunk(3), packed.in_proj_bias.detach().chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            linear = nn.Linear(packed.embed_dim, packed.embed_dim, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.add_module(name, linear)
        self.out_proj = nn.Linear(packed.embed_dim, packed.embed_dim, device="meta")
        self.out_proj.weight, self.out_proj.bias = packed.out_proj.weight, packed.out_proj.bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None):
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, heads, n, d / heads]
            for layer, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        if q.device.type == "cpu" and q.shape[-2] <= SHORT:
            scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            x = (scores if attn_mask is None else scores + attn_mask).softmax(-1).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask)
        x = self.out_proj(x.transpose(1, 2).flatten(2))  # [b, n, d]
        return (x if self.batch_first else x.transpose(0, 1)), None

    def packed(self) -> nn.MultiheadAttention:
        """The same attention with its projections packed again."""
        out = nn.MultiheadAttention(self.out_proj.in_features, self.heads, batch_first=self.batch_first)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        out.in_proj_weight.data = torch.cat([part.weight.detach() for part in parts])
        out.in_proj_bias.data = torch.cat([part.bias.detach() for part in parts])
        out.out_proj.weight.data, out.out_proj.bias.data = self.out_proj.weight.data, self.out_proj.bias.data
        return out


class SplitLinear(nn.Module):
    """A timm tower's packed projection (`qkv`, or attention pooling's `kv`) as one `nn.Linear` for each letter.

    LoRA of rank r then adapts each of them, as in the towers that have them apart.
    """

    def __init__(self, packed: nn.Linear, letters: str):
        super().__init__()
        for i, letter in enumerate(letters):
            linear = nn.Linear(packed.in_features, packed.out_features // len(letters), device="meta")
            for name in ("weight", "bias"):
                part = getattr(packed, name)
                part = None if part is None else nn.Parameter(part.detach().chunk(len(letters))[i].clone())
                setattr(linear, name, part)
            self.add_module(letter, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def packed(self) -> nn.Linear:
        """The same projection in one again."""
        parts = list(self.children())
        out = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), device="meta")
        out.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        bias = parts[0].bias is not None
        out.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts])) if bias else None
        return out


def _replace(tower: nn.Module, kind: type | tuple[type, ...], build) -> nn.Module:
    for module in list(tower.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, build(child))
    return tower


def split_attention(tower: nn.Module) -> nn.Module:
    """Give q, k and v of every attention of `tower` an `nn.Linear` each, in place, with the same weights."""
    for module in list(tower.modules()):
        for letters in ("qkv", "kv"):
            if type(packed := getattr(module, letters, None)) is nn.Linear:
                setattr(module, letters, SplitLinear(packed, letters))
                if hasattr(module, "qkv_bias_separate"):  # EVA, BEiT: else they read `qkv.weight`, past any LoRA
                    module.qkv_bias_separate = True
    return _replace(tower, nn.MultiheadAttention, SplitAttention)


def fuse_attention(tower: nn.Module) -> nn.Module:
    """Undo `split_attention`, in place; a bias that timm adds apart stays apart, which changes no weight."""
    return _replace(tower, (SplitAttention, SplitLinear), lambda module: module.packed())


def block_name(name: str) -> str:
    """The part that a parameter belongs to: stem, block0, block1, ..., head, or the conditioner's projector."""
    if name.startswith("conditioner."):
        return "projector"
    if found := re.search(r"blocks\.(\d+)\.", name):
        return f"block{found.group(1)}"
    head = r"ln_post|trunk\.(fc_)?norm\b|(?<!patch_embed\.)proj\b|head|attn_pool"
    return "head" if re.search(head, name) else "stem"


LAYER_KINDS = {  # of layers: name -> pattern of their parameters' names, open_clip's and timm's; the first that fits
    "norm": r"\.ln_|norm",
    "embedding": r"conv1|class_embedding|pos|patch_embed|cls_token|latent",
    "q": r"\.q(_proj)?\.",
    "k": r"\.k(_proj)?\.",
    "v": r"\.v(_proj)?\.",
    "out": r"out_proj|attn(_pool)?\.proj",
    "fc1": r"c_fc|fc1",
    "fc2": r"c_proj|fc2",
}


def layer_kind(name: str) -> str:
    """The kind of layer that a parameter belongs to: a key of `LAYER_KINDS`, or `projection` for the last one."""
    return next((kind for kind, pattern in LAYER_KINDS.items() if re.search(pattern, name)), "projection")

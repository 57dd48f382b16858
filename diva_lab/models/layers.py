"""Layers of an image tower: attention whose projections LoRA can adapt one by one, and names for its parts."""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = 128  # up to so many tokens plain softmax attention has a faster backward pass on a CPU than the fused kernel


class SplitAttention(nn.Module):
    """An `nn.MultiheadAttention` with four `nn.Linear`s in place of its packed projections, so that LoRA can wrap them.

    Its output is that of the original to 1e-6; inputs and outputs are those that open_clip's blocks use. `pack` makes
    the original again.
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

    def pack(self) -> nn.MultiheadAttention:
        """The same weights as an `nn.MultiheadAttention`."""
        out = nn.MultiheadAttention(self.out_proj.in_features, self.heads, batch_first=self.batch_first)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        out.in_proj_weight.data = torch.cat([part.weight.detach() for part in parts])
        out.in_proj_bias.data = torch.cat([part.bias.detach() for part in parts])
        out.out_proj.weight.data, out.out_proj.bias.data = self.out_proj.weight.data, self.out_proj.bias.data
        return out


class SplitLinear(nn.Module):
    """A timm tower's packed projection (`qkv`, or `kv` in attention pooling) as one `nn.Linear` per letter.

    LoRA of rank r then adapts each of them, as it does in towers that have separate projections.
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

    def pack(self) -> nn.Linear:
        """The same weights as one `nn.Linear`."""
        parts = list(self.children())
        out = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), device="meta")
        out.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        bias = parts[0].bias is not None
        out.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts])) if bias else None
        return out


def replace_layers(model: nn.Module, kinds: tuple[type, ...], build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every layer of these kinds in `model` by `build(layer)`, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, build(child))
    return model


def split_attention(tower: nn.Module) -> nn.Module:
    """Give q, k and v of every attention of `tower` an `nn.Linear` each, in place, with the same weights."""
    names = [(module, name) for module in tower.modules() for name in ("qkv", "kv")]
    for module, name in [pair for pair in names if type(getattr(*pair, None)) is nn.Linear]:
        setattr(module, name, SplitLinear(getattr(module, name), name))
        if hasattr(module, "qkv_bias_separate"):  # EVA and BEiT would otherwise read `qkv.weight` and miss any LoRA
            module.qkv_bias_separate = True
    return replace_layers(tower, (nn.MultiheadAttention,), SplitAttention)


def fuse_attention(tower: nn.Module) -> nn.Module:
    """Undo `split_attention`, in place; a bias that timm adds separately stays separate, which changes no weight."""
    return replace_layers(tower, (SplitAttention, SplitLinear), lambda module: module.pack())


def block_name(name: str) -> str:
    """The part of the model that a parameter belongs to: stem, block0, block1, ..., head or projector."""
    if name.startswith("conditioner."):
        return "projector"
    if block := re.search(r"blocks\.(\d+)\.", name):
        return f"block{block[1]}"
    head = r"ln_post|trunk\.(fc_)?norm\b|(?<!patch_embed\.)proj\b|head|attn_pool"
    return "head" if re.search(head, name) else "stem"


LAYER_KINDS = {  # kind of layer -> pattern of parameter names in open_clip and timm; the first match counts
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
    """The kind of layer that a parameter belongs to: a key of `LAYER_KINDS`, or `projection` for the final one."""
    return next((kind for kind, pattern in LAYER_KINDS.items() if re.search(pattern, name)), "projection")

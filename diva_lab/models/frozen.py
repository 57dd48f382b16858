"""LEVERS: changes to a frozen UNet that save time and memory and leave predictions and gradients as they are.

A frozen UNet computes constant or equal values again and again, and keeps values that its backward pass does not need.
Each lever changes a diffusers UNet in place, and each can be left out; `LEVERS`, at the end of the file, lists them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

CACHED = 1 << 22  # attention scores at a time on a CPU, few enough to stay in its cache from one product to the next


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, [b, heads, n, d]; on a CPU by plain products, whose backward pass is faster.

    Args:
        q: [b, heads, n, d].
        k, v: [b, heads, l, d].
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    rows = max(1, CACHED // (q.shape[1] * q.shape[2] * k.shape[2]))
    return _attend(q, k, v) if rows >= len(q) else lean(_attend, q, k, v, rows=rows)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [b, n, heads d] -> [b, heads, n, d]


class BiasedAttention:
    """A diffusers attention processor whose cross-attention is cheaper for a context of one token.

    A context of one token v stands for the empty prompt u with v added to each of its tokens. The keys W_k (u_i + v)
    differ from W_k u_i by a vector that is the same for all i, so the softmax does not change; every value grows by
    W_v v. The attention is therefore softmax(q K_u^T / sqrt(d)) V_u + W_v v, exactly (docs/method.md). K_u and V_u are
    constants, computed once. Self-attention and longer contexts are computed as usual.

    Args:
        empty: () -> the context u of the empty prompt, [l, c].
        repeats: () -> the number of consecutive rows with equal queries; more than 1 only in the first cross-attention.

    Attributes:
        attend: the function of (q, k, v) that it calls.
    """

    def __init__(self, empty: Callable[[], Tensor], repeats: Callable[[], int] = lambda: 1):
        self.empty, self.repeats, self._constants = empty, repeats, None
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend

    def constants(self, attn: Attention, like: Tensor) -> tuple[Tensor, Tensor]:
        """K_u and V_u, [1, heads, l, d] each, with the dtype and on the device of `like`."""
        stored = None if self._constants is None else (self._constants[0].dtype, self._constants[0].device)
        if stored != (like.dtype, like.device):
            with torch.no_grad():
                u = self.empty().to(attn.to_k.weight)[None]  # [1, l, c]
                self._constants = tuple(_heads(layer(u), attn.heads).to(like) for layer in (attn.to_k, attn.to_v))
        return self._constants

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_, **__):
        one = encoder_hidden_states is not None and encoder_hidden_states.shape[1] == 1
        n = self.repeats() if one else 1
        x = hidden_states[::n]
        q = _heads(attn.to_q(x), attn.heads)  # [b, heads, n, d]
        if one:
            k, v = (part.expand(len(q), -1, -1, -1) for part in self.constants(attn, q))  # [b, heads, l, d]
        else:
            context = x if encoder_hidden_states is None else encoder_hidden_states
            k, v = (_heads(layer(context), attn.heads) for layer in (attn.to_k, attn.to_v))  # [b, heads, l, d]
        x = self.attend(q, k, v).transpose(1, 2).flatten(2)  # [b, n, c]
        if one:
            x = x.repeat_interleave(n, 0) + attn.to_v(encoder_hidden_states)
        return attn.to_out[0](x)


def _bias(unet: UNet2DConditionModel, empty: Callable[[], Tensor], repeats: Callable[[], int]) -> None:
    """Make every attention a `BiasedAttention`; only the first cross-attention uses `repeats`."""
    first = next(name for name, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention)
    processors = {name: BiasedAttention(empty) for name in unet.attn_processors}
    unet.set_attn_processor(processors | {f"{first}.processor": BiasedAttention(empty, repeats)})


def modules_before_context(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The modules that run before the first cross-attention, so that their output does not depend on the context."""
    block = unet.down_blocks[0]
    if not getattr(block, "has_cross_attention", False):
        return [unet.time_embedding, unet.conv_in, block]
    transformer = block.attentions[0]
    first = transformer.transformer_blocks[0]
    modules = [unet.time_embedding, unet.conv_in, block.resnets[0], transformer.norm, transformer.proj_in]
    return [*modules, first.norm1, first.attn1, first.norm2]


def _share(unet: UNet2DConditionModel, empty: Callable[[], Tensor], repeats: Callable[[], int]) -> None:
    """Where `repeats()` consecutive rows are equal, compute one of them before the first cross-attention; repeat it."""

    def keep_one(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if (n := repeats()) == 1:
            return None  # the arguments stay as they are

        def take(value: object) -> object:
            return value[::n] if isinstance(value, Tensor) else value

        return tuple(map(take, args)), {name: take(value) for name, value in kwargs.items()}

    def repeat(module: nn.Module, args: tuple, out: object) -> object:
        if (n := repeats()) == 1:
            return out
        if isinstance(out, Tensor):
            return out.repeat_interleave(n, 0)
        return tuple(repeat(module, args, part) for part in out)

    for module in modules_before_context(unet):
        module.register_forward_pre_hook(keep_one, with_kwargs=True)
        module.register_forward_hook(repeat)


def lean(function: Callable[..., Tensor], *inputs: Tensor, rows: int | None = None) -> Tensor:
    """function(*inputs), keeping only the inputs for the backward pass, which computes the function again.

    For cheap functions. torch.utils.checkpoint does the same for any function, but its hooks cost more time than these
    functions. Under a compiler the function is called as it is, because the compiler decides what to keep.

    Args:
        function: of inputs with independent rows.
        rows: rows to compute at a time; all if None.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)
    return _Lean.apply(function, rows or len(inputs[0]), *inputs)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, rows, *inputs):
        ctx.save_for_backward(*inputs)
        kind = inputs[0].device.type
        ctx.function, ctx.rows = function, rows
        ctx.cast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        parts = [function(*part) for part in zip(*(x.split(rows) for x in inputs), strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        needed, parts = ctx.needs_input_grad[2:], []
        for g, *part in zip(*(x.split(ctx.rows) for x in (gradient, *ctx.saved_tensors)), strict=True):
            part = [x.detach().requires_grad_(need) for x, need in zip(part, needed, strict=True)]
            with torch.enable_grad(), torch.autocast(*ctx.cast):
                out = ctx.function(*part)
            gradients = iter(torch.autograd.grad(out, [x for x in part if x.requires_grad], g))
            parts.append([next(gradients) if need else None for need in needed])
        return None, None, *(torch.cat(x) if x[0] is not None else None for x in zip(*parts, strict=True))


def frozen_inputs(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """x, weight and bias of a frozen layer, in the dtype that autocast would use.

    None where the layer runs as usual: its weight needs a gradient, x needs none, or a compiler is at work.
    """
    if module.weight.requires_grad or not (torch.is_grad_enabled() and x.requires_grad):
        return None
    if torch.compiler.is_compiling():
        return None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype), module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)


class FrozenConv2d(nn.Conv2d):
    """A convolution that does not keep its input: autograd would, though a frozen weight needs no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if (inputs := frozen_inputs(self, x)) is None:
            return super().forward(x)
        return _Convolve.apply(*inputs, self.stride, self.padding, self.dilation, self.groups)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *geometry):
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = x.shape[2:], geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, gradient):
        # torch.nn.grad.conv2d_input computes the same sum, and takes half as long again on a CPU
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.geometry
        reached = (
            (out - 1) * s - 2 * p + d * (k - 1) + 1
            for out, s, p, d, k in zip(gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
        )
        rest = [size - up_to for size, up_to in zip(ctx.size, reached, strict=True)]  # beyond the last stride
        return F.conv_transpose2d(gradient, weight, None, stride, padding, rest, groups, dilation), *(None,) * 6


def _forget(unet: UNet2DConditionModel, *_: object) -> None:
    """Make every convolution a `FrozenConv2d`."""
    for module in unet.modules():
        if type(module) is nn.Conv2d and not isinstance(module.padding, str):
            module.__class__ = FrozenConv2d


class _NormAct(nn.GroupNorm):
    """Group norm and SiLU together, keeping only the input for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return lean(self._both, x)

    def _both(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class _TimeAct(nn.SiLU):
    """A residual block's activation of the time embedding; the activation of its feature maps is in `_NormAct`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 2 else x


class _Gated(GEGLU):
    """A feed-forward layer's gate, keeping only the input for the backward pass; the projection is 8 times as wide."""

    def forward(self, x: Tensor) -> Tensor:
        if (inputs := frozen_inputs(self.proj, x)) is None:
            return super().forward(x)
        return _Gate.apply(*inputs)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, bias = ctx.saved_tensors
        both = F.linear(x, weight, bias)
        value, gate = both.chunk(2, dim=-1)
        to_gate = gradient * value
        torch.mul(gradient, F.gelu(gate), out=value)
        torch.ops.aten.gelu_backward.grad_input(to_gate, gate, grad_input=gate)
        return both @ weight, None, None


def _recompute(unet: UNet2DConditionModel, *_: object) -> None:
    """Make norm and activation of residual blocks one `_NormAct`, and every gate a `_Gated`."""
    for module in unet.modules():
        if type(module) is GEGLU:
            module.__class__ = _Gated
        plain = isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default"
        if plain and type(module.nonlinearity) is nn.SiLU and type(module.norm1) is type(module.norm2) is nn.GroupNorm:
            module.norm1.__class__ = module.norm2.__class__ = _NormAct
            module.nonlinearity = _TimeAct()


def _layout(unet: UNet2DConditionModel, *_: object) -> None:
    """Store channels last on a GPU, where convolutions are then faster; on a CPU group norm would lose more time."""
    if unet.device.type != "cpu":
        unet.to(memory_format=torch.channels_last)


LEVERS: dict[str, Callable] = {  # name -> function of (UNet, () -> empty prompt, () -> rows that share a latent)
    "bias": _bias,  # a context of one token is one additive bias in each cross-attention
    "share": _share,  # the layers before the first cross-attention run once per latent
    "forget": _forget,  # convolutions do not keep their input, which only a weight's gradient would need
    "recompute": _recompute,  # norms, activations and gates keep their input and compute the rest again
    "layout": _layout,  # channels last, on a GPU
}

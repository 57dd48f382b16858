"""The weights that are trained in an encoder: LoRA (peft) on every linear layer of the visual tower, or all weights."""

import re

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diva_lab.models.layers import replace_layers


def make_trainable(
    encoder: nn.Module,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.1,
    seed: int = 0,
    bias: bool = True,
    targets: str = "all",
) -> None:
    """Open the visual tower for training, in place; the text tower stays frozen. The defaults are DCR's.

    Args:
        encoder: an `Encoder`.
        rank, alpha, dropout: of LoRA on q, k, v, out, both layers of each MLP and the final projection; rank 0 trains
            all weights of the tower instead.
        seed: of LoRA's initial weights.
        bias: whether to train the biases of the adapted layers too (peft's `lora_only`).
        targets: `all`, or `released` for DCR's released code: in SigLIP's attention pooling no projection is adapted;
            of the output's, only the bias is trained.
    """
    if rank == 0:
        encoder.model.visual.requires_grad_(True)
        encoder.proj.requires_grad_(True)
        return
    adapted = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and (name == "proj" or name.startswith("model.visual."))
    ]
    pooling = r"\.attn_pool\.(q|kv|proj)\b"
    if targets == "released":
        adapted = [name for name in adapted if not re.search(pooling, name)]
    kind = "lora_only" if bias else "none"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=adapted, bias=kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # LoRA's A is drawn from the global generator
        inject_adapter_in_model(config, encoder)
    encoder.eval()  # peft's new layers are in training mode
    own = r"base_layer\.bias$" + (r"|\.attn_pool\.proj\.bias$" if targets == "released" else "")
    for name, p in encoder.named_parameters():
        p.requires_grad_("lora_" in name or (bias and re.search(own, name) is not None))


def merge_lora(encoder: nn.Module) -> nn.Module:
    """Add every LoRA product to the weight that it adapts and remove LoRA, in place; without LoRA nothing changes."""
    for layer in encoder.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return replace_layers(encoder, (BaseTunerLayer,), lambda layer: layer.get_base_layer())


def visual_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """The visual tower's parameters by name, without LoRA's; the tensors themselves, no copies."""
    named = dict(encoder.named_parameters())
    return {n: p for n, p in named.items() if n.startswith(("model.visual.", "proj.")) and "lora_" not in n}


@torch.no_grad()
def mix_weights(encoder: nn.Module, original: nn.Module, mix: float) -> nn.Module:
    """Move the visual tower's weights to original + mix (tuned - original), in place (WiSE-FT, arXiv 2109.01903).

    Args:
        encoder: tuned, its LoRA merged; is changed and returned.
        original: the encoder that it was tuned from.
        mix: 0 for the original, 1 for the tuned encoder.

    Raises:
        ValueError: for a `mix` outside [0, 1].
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"mix {mix}: expected a part from 0 (the original encoder) to 1 (the tuned one)")
    weights = visual_weights(original)
    for name, weight in visual_weights(encoder).items():
        weight.lerp_(weights[name], 1 - mix)
    return encoder

"""What is trained in an encoder: LoRA (peft) on every linear layer of the image tower, or all of its weights."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def make_trainable(
    encoder: nn.Module, rank: int = 16, alpha: float = 16, dropout: float = 0.1, seed: int = 0, bias: bool = True
) -> None:
    """Open the visual tower for training, in place: LoRA of `rank` on every linear layer, or all weights if 0.

    LoRA as DCR has it (r = 16, alpha = 16, dropout = .1): q, k, v, out, both MLP layers and the final projection; with
    `bias` the biases of these layers too (peft's `lora_only`). The text tower stays frozen.
    """
    if rank == 0:
        encoder.model.visual.requires_grad_(True)
        encoder.proj.requires_grad_(True)
        return
    targets = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and (name == "proj" or name.startswith("model.visual."))
    ]
    kind = "lora_only" if bias else "none"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias=kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # LoRA's A is drawn from the global generator
        inject_adapter_in_model(config, encoder)
    encoder.eval()  # new layers come in training mode
    for name, p in encoder.named_parameters():
        p.requires_grad_("lora_" in name or (bias and name.endswith("base_layer.bias")))


def merge_lora(encoder: nn.Module) -> nn.Module:
    """Fold every LoRA pair into the weight it adapts and remove it, in place; nothing happens without LoRA."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    return encoder


def visual_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """The visual tower's own parameters by name, LoRA left out; the tensors themselves, not copies."""
    named = dict(encoder.named_parameters())
    return {n: p for n, p in named.items() if n.startswith(("model.visual.", "proj.")) and "lora_" not in n}

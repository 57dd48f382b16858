"""A step of GenHancer's released recipe against a reference that shares with it only weights and library modules.

The reference is written from the facts: x_t = (1 - sigma) x0 + sigma eps; the target v = eps - x0; patches of 2 x 2
latents with their row and column; one token `text` and one vector `vec`, each from its own projector; guidance 4.
"""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from one_step import open_lora
from small_models import HUGE, timm_tower, write_clip_of, write_flux_vae
from torch import Tensor, nn

from diva_lab.machine import generator
from diva_lab.training import stages
from diva_lab.training.batches import Batches
from diva_lab.training.loop import Trainer
from diva_lab.training.presets import preset
from diva_lab.training.runs import Run

SIGLIP = timm_tower("vit_small_patch8_siglip_32")
SIGLIP = SIGLIP | {"embed_dim": 48, "vision_cfg": SIGLIP["vision_cfg"] | {"timm_pool": "map", "timm_proj": "none"}}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
FAMILIES = {  # backbone -> small model of its family, with its normalisation
    "openai-l14": (HUGE, {}),
    "siglip-so400m-384": (SIGLIP, HALF),
}


@dataclass
class Step:
    """A step that was taken, and what it started from.

    Attributes:
        before, after: the trained weights by name.
        images: the micro-batches, uint8.
        network: a copy of the transformer before the step.
        fixed: the projectors' weights before the step.
    """

    trainer: Trainer
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    images: list[Tensor]
    network: nn.Module
    fixed: dict[str, Tensor]


def take(
    stage: int, backbone: str, encoder: Path, denoiser: str, root: Path, projector: str = "new"
) -> tuple[Run, Step]:
    """One step of a stage as `align` or `tune` takes it, with the recipe's own numbers except sizes and dropout."""
    small = {"encoder": str(encoder), "denoiser": denoiser, "images": "world", "steps": 1, "batch": 3, "accumulate": 2}
    small |= {"vae_px": 0, "precision": "no", "lora_dropout": 0.0, "projector": projector}
    taken, images, read = [], [], Batches.__next__

    def keep(batches: Batches) -> tuple[Tensor, list[str]]:
        images.append(read(batches)[0])
        return images[-1], []

    def train(trainer: Trainer, *_: object) -> Run:
        open_lora(trainer.work.encoder)  # LoRA's B is zero at first, and A would have no gradient
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        network = copy.deepcopy(trainer.work.denoiser.network)
        fixed = {name: p.detach().clone() for name, p in trainer.work.conditioner.projector.named_parameters()}
        trainer.take_step(0)
        after = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        taken.append(Step(trainer, before, after, images, network, fixed))
        trainer.save(1)
        return trainer.run.finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__next__", keep)
        patch.setattr(stages, "train", train)
        settings = replace(preset(f"{backbone}-genhancer-released", stage), **small)
        run = (stages.align if stage == 1 else stages.tune)(settings, root)
    return run, taken[0]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory) -> tuple[Path, dict, Step, Step]:
    """Folder and preprocessing of an encoder, a step of stage 1, and one of stage 2 that starts from it."""
    root = tmp_path_factory.mktemp("models")
    config, preprocess = FAMILIES[request.param]
    encoder = write_clip_of(root / "clip", config, **preprocess)
    denoiser = f"light-flux-tiny@{write_flux_vae(root / 'flux')}"
    stage1, first = take(1, request.param, encoder, denoiser, root / "runs")
    _, second = take(2, request.param, encoder, denoiser, root / "runs", projector=str(stage1.folder))
    return encoder, preprocess, first, second


# --- the reference ----------------------------------------------------------------------------------------------


def packed_place(layer: str) -> tuple[str, int, int]:
    """Where open_clip keeps a layer: how its parameters' names begin, and which of how many parts of the rows."""
    head, _, last = layer.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj"):
        return f"{head}.in_proj_", "qkv".index(last[0]), 3
    whole = head.rpartition(".")[2]
    if whole in ("qkv", "kv"):
        return f"{head}.", whole.index(last), len(whole)
    return f"{layer}.", 0, 1


def adapted(visual: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights of an image tower with LoRA of alpha = rank = 16 added and the trained biases in place."""
    weights = {name: p.detach() for name, p in visual.named_parameters()}
    for name in (name for name in trained if name.startswith("encoder.") and "lora_B" not in name):
        layer = re.split(r"\.lora_A|\.base_layer|\.bias", name)[0]
        start, i, n = packed_place(layer.removeprefix("encoder.model.visual."))
        if name.endswith("bias"):
            parts = list(weights[f"{start}bias"].chunk(n))
            parts[i], key = trained[name], f"{start}bias"
        else:
            change = trained[name.replace("lora_A", "lora_B")] @ trained[name]
            key, turned = (f"{start}weight", change) if layer != "encoder.proj" else ("proj", change.T)
            parts = list(weights[key].chunk(n))
            parts[i] = parts[i] + turned
        weights[key] = torch.cat(parts)
    return weights


def project(embedding: Tensor, part: str, weights: dict[str, Tensor]) -> Tensor:
    """LayerNorm, linear, GELU, linear."""
    norm, first, second = ((weights[f"{part}.{i}.weight"], weights[f"{part}.{i}.bias"]) for i in (0, 1, 3))
    x = (embedding - embedding.mean(-1, keepdim=True)) / (embedding.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return F.linear(F.gelu(F.linear(x * norm[0] + norm[1], *first)), *second)


def patches(x: Tensor) -> Tensor:
    """[b, c, 2 rows, 2 columns] -> [b, rows columns, 4 c], a channel's four values side by side."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def flow_loss(step: Step, micro: int, embedding: Tensor, projectors: dict, network: dict) -> Tensor:
    vae, draws = step.trainer.work.denoiser.vae, generator("step", step.trainer.settings.seed, 0, micro)
    with torch.no_grad():
        posterior = vae.encode(step.images[micro].float() / 127.5 - 1).latent_dist
    drawn = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draws)
    x0 = (drawn - 0.1159) * 0.3611  # [b, 16, 8, 8]
    torch.rand(len(x0), generator=draws)  # of a uniform timestep, which this recipe does not use
    t = (1000 * torch.randn(len(x0), generator=draws).sigmoid()).floor()  # [b]
    noise, sigma = torch.randn(x0.shape, generator=draws), (t + 1) / 1000
    level = sigma[:, None, None, None]
    places = [[0, row, column] for row in range(x0.shape[2] // 2) for column in range(x0.shape[3] // 2)]
    out = torch.func.functional_call(
        step.network,
        network,
        (patches((1 - level) * x0 + level * noise),),
        {
            "encoder_hidden_states": project(embedding, "text", projectors)[:, None],
            "pooled_projections": project(embedding, "vec", projectors),
            "timestep": sigma,
            "guidance": torch.tensor([4.0] * len(x0)),
            "img_ids": torch.tensor(places).float(),
            "txt_ids": torch.zeros(1, 3),
        },
    ).sample
    return (out - patches(noise - x0)).square().mean()


def reference(step: Step, encoder: Path, preprocess: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, the mean over its micro-batches, and the gradient of every trained weight."""
    leaves = {name: w.clone().requires_grad_() for name, w in step.before.items()}
    visual = open_clip.create_model(f"local-dir:{encoder}").visual.eval()
    weights = adapted(visual, leaves)
    start = "conditioner.projector."
    projectors = step.fixed | {n.removeprefix(start): w for n, w in leaves.items() if n.startswith(start)}
    network = {n.removeprefix("network."): w for n, w in leaves.items() if n.startswith("network.")}
    means = preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN), preprocess.get("std", open_clip.OPENAI_DATASET_STD)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in means)
    losses = []
    for micro, images in enumerate(step.images):
        embedding = torch.func.functional_call(visual, weights, ((images.float() / 255 - mean) / std,))
        losses.append(flow_loss(step, micro, embedding, projectors, network))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def distance(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; 0 where both vanish, as the gradient of a key's bias, which no softmax sees."""
    gap, size = (found - wanted).norm().item(), wanted.norm().item()
    return gap / size if size > 1e-9 else float(gap > 1e-9)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_is_that_of_the_released_recipe(both, stage):
    encoder, preprocess, *steps = both
    step, lr = steps[stage - 1], (1e-4, 1e-5)[stage - 1]
    loss, gradients = reference(step, encoder, preprocess)
    line = step.trainer.run.metrics().iloc[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt().item()
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients.items():
        clipped = min(1.0, 1 / norm) * gradient
        assert distance(step.trainer.parameters[name].grad, clipped) < 1e-5, name
        moved = step.before[name] * (1 - 0.01 * lr) - lr * clipped / (clipped.abs() + 1e-8)  # AdamW's first step
        clear = clipped.abs() > max(1e-2 * clipped.square().mean().sqrt(), 1e-10)  # else rounding decides its sign
        torch.testing.assert_close(step.after[name][clear], moved[clear], atol=2e-7, rtol=2e-7)


def test_stage_1_trains_the_denoiser_and_both_projectors_and_stage_2_the_encoder_alone(both):
    *_, first, second = both
    for step, wanted in (
        (first, {"conditioner.projector.vec", "conditioner.projector.text", "network"}),
        (second, {"encoder"}),
    ):
        gradients = {name: p.grad for name, p in step.trainer.parameters.items()}
        assert {name.split(".")[0] for name in gradients} == {part.split(".")[0] for part in wanted}
        assert all(any(name.startswith(part) for name in gradients) for part in wanted)
        still = [name for name, g in gradients.items() if g.norm() < 1e-9]
        assert all(re.search(r"\.k(_proj)?\.base_layer\.bias$", name) for name in still)
    assert first.after.keys() == first.trainer.run.weights().keys()
    for name, weight in second.fixed.items():
        assert torch.equal(weight, first.after[f"conditioner.projector.{name}"])
    for name, weight in second.network.state_dict().items():
        assert torch.equal(weight, first.after[f"network.{name}"])

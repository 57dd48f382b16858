"""What each setting of the released code does to a gradient, on the tiny world: data/results/released.csv.

    python -m tools.released

The gradient of the encoder's LoRA weights over `BATCHES` batches, at the untouched encoder through the anchored
projector, with a setting as the paper has it and as the released code has it: cosine and ratio of norms. Images,
timesteps and noise are equal. The row `other draws` has the paper's settings with other timesteps and noise: what
chance alone does. Settings that change no gradient of one process on images of the encoder's own size are not here.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from diva_lab.machine import generator
from diva_lab.objectives import OBJECTIVES
from diva_lab.paths import DATA
from diva_lab.provenance import environment
from diva_lab.training.batches import Batches
from diva_lab.training.build import build_conditioner, build_denoiser, build_encoder, make_step
from diva_lab.training.settings import Settings

BATCHES = 8
BASES = {
    "diva": Settings(objective="diva", projector="anchored", batch=16, lora_dropout=0.0),
    "diva, recap": Settings(objective="diva", condition="recap", batch=16, lora_dropout=0.0),
    "dcr": Settings(objective="dcr", projector="anchored", batch=8, lora_dropout=0.0, draws=1),
}
INPUTS = {"loader_crop": True, "normalise": "openai", "vae_input": "imagenet", "noise_precision": "bf16",
          "prompt_mask": True}  # fmt: skip
CHANGES = {  # base -> settings of the released code
    "diva": {"draw_weights": "5,1"} | INPUTS,
    "diva, recap": {"token_draws": "each"},
    "dcr": {"target": "velocity", "augment_normalised": True} | INPUTS,
}


def lora_gradient(settings: Settings, batches: int = BATCHES, draws: int = 0) -> Tensor:
    """The mean gradient of all LoRA weights, flattened; `draws` names its timesteps and noise."""
    encoder, denoiser = build_encoder(settings), build_denoiser(settings)
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
    source = Batches(settings, max(encoder.px, denoiser.px))
    for number in range(batches):
        images, _ = next(source)
        random = generator("released", draws, number)
        step = make_step(images.float() / 255, encoder, conditioner, denoiser, random, settings)
        (sum(term.mean() for term in OBJECTIVES[settings.objective](step).values()) / batches).backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def measure(batches: int = BATCHES) -> pd.DataFrame:
    """objective, setting, value, cosine and ratio of norms (released / paper) of each change."""
    rows = []
    for name, base in BASES.items():
        before = lora_gradient(base, batches)
        after = {("other draws", ""): lora_gradient(base, batches, draws=1)}
        for setting, value in CHANGES[name].items():
            after[setting, str(value)] = lora_gradient(replace(base, **{setting: value}), batches)
        for (setting, value), gradient in after.items():
            cosine, ratio = F.cosine_similarity(before, gradient, dim=0), gradient.norm() / before.norm()
            rows.append((name, setting, value, cosine.item(), ratio.item()))
            print(*rows[-1], flush=True)
    return pd.DataFrame(rows, columns=["objective", "setting", "value", "cosine", "norms"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.released", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA / "results" / "released.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    made = environment()
    table = measure().assign(batches=BATCHES, git=made["git"], torch=made["versions"]["torch"])
    table.to_csv(args.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()

"""Images with the captions that the denoiser itself would give them: does feedback need a gradient through it?

    python -m tools.pseudo_labels       runs/pseudo-labels, and data/results/pseudo_labels.csv

For each detail the denoiser chooses, among the statements of all its values, the one under which it reconstructs the
image best; the class is CLIP's own zero-shot choice, so no label is used. A caption mentions each detail with p ~
U(0, 1), as the world's own captions do. `denoiser` holds the images with these captions, `world` the same images with
true ones, told by the same random numbers: `tools.feedback` tunes CLIP by its own loss on either. The csv says how
often each detail was chosen right.
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from diva_lab.analysis.readability import statement_losses
from diva_lab.captions import TABLE
from diva_lab.evaluation.zeroshot import class_embeddings
from diva_lab.machine import default_device, generator
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder, embed, load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.paths import DATA, RUNS
from diva_lab.provenance import environment
from diva_lab.training.build import make_step
from diva_lab.training.settings import Settings
from diva_lab.world import ATTRIBUTES, CLASSES, DETAILS, World, caption, captions, draw_scenes

FOLDER = RUNS / "pseudo-labels"
IMAGES = 4000
SEED = 50  # second number of the seed of the scenes: no set of `evaluation.world` and no run draws from it
SETTINGS = Settings(objective="diva", timesteps="0,1,1,1,1", draws=2)  # of the denoiser's choice
BATCH = 100


def choose(images: Tensor, classes: np.ndarray, encoder: Encoder, denoiser: Denoiser, number: int) -> np.ndarray:
    """Scenes [n] with the details that the denoiser chooses for uint8 images [n, 3, h, w] of these classes [n]."""
    scenes = draw_scenes(len(images), 0)
    scenes["class"] = classes
    pixels = images.to(default_device()).float() / 255
    for name, values in DETAILS.items():
        contexts = []
        for k in range(len(values)):
            scenes[name] = k
            contexts.append(denoiser.encode_text([caption(scene, (name,)) for scene in scenes]))
        random = generator("pseudo-labels", name, number)
        step = make_step(pixels, encoder, None, denoiser, random, SETTINGS)
        scenes[name] = statement_losses(step, contexts).argmin(0).cpu().numpy()
    return scenes


def label(images: Tensor, encoder: Encoder, denoiser: Denoiser, batch: int = BATCH) -> np.ndarray:
    """Scenes [n]: the class that CLIP chooses for each uint8 image [n, 3, h, w], the details that the denoiser does."""
    classes = (embed(encoder, images) @ class_embeddings(encoder, CLASSES).T).argmax(1).numpy()
    parts = []
    for number, start in enumerate(range(0, len(images), batch)):
        part = slice(start, start + batch)
        parts.append(choose(images[part], classes[part], encoder, denoiser, number))
        print(f"{min(start + batch, len(images))} of {len(images)} images", flush=True)
    return np.concatenate(parts)


def write_folder(folder: Path, images: np.ndarray, scenes: np.ndarray, seed: tuple[int, ...]) -> None:
    """PNGs of uint8 images [n, h, w, 3] and a caption of each scene; written whole or not at all."""
    draft = folder.with_name(f"writing-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    texts = captions(scenes, rng.random((len(scenes), 1)), rng)
    names = [f"{k:05d}.png" for k in range(len(images))]
    for name, pixels in zip(names, images, strict=True):
        Image.fromarray(pixels).save(draft / name)
    with open(draft / TABLE, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *zip(names, texts, strict=True)])
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def accuracies(scenes: np.ndarray, chosen: np.ndarray) -> pd.DataFrame:
    """`detail` (and the class), `right` (a fraction) and `chance` of each choice."""
    right = {name: float((scenes[name] == chosen[name]).mean()) for name in ATTRIBUTES}
    return pd.DataFrame(
        {"detail": right.keys(), "right": right.values(), "chance": [1 / len(values) for values in ATTRIBUTES.values()]}
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pseudo_labels", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--results", type=Path, default=DATA / "results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    world, device = World(), default_device()
    scenes = draw_scenes(args.images, (world.seed, SEED))
    images = world.render(scenes)
    chosen = label(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        load_encoder(SETTINGS.encoder, device),
        load_denoiser(SETTINGS.denoiser, device),
    )
    for name, told in (("denoiser", chosen), ("world", scenes)):
        write_folder(args.out / name, images, told, (world.seed, SEED, 1))
    table = accuracies(scenes, chosen).assign(images=args.images, git=environment()["git"])
    table.to_csv(args.results / "pseudo_labels.csv", index=False, float_format="%.4g")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()

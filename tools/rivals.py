"""Train the tiny models that the rivals of DIVA and DCR learn from, from a seed.

`python -m tools.rivals` writes `data/tiny/unclip`, a diffusion model in Stable unCLIP's layout that draws an image from
the tiny CLIP's embedding of it, and `data/tiny/vision`, an image encoder in DINOv2's layout that never saw a text. Each
has a `record.json`. A stopped command continues from its last checkpoint under `runs/pretrain/`.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from kornia.augmentation import ColorJitter, RandomGrayscale, RandomResizedCrop
from torch import Tensor, nn
from transformers import BitImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from diva_lab.machine import autocast
from diva_lab.models.encoders import load_encoder
from diva_lab.models.unclip import embedding_labels
from diva_lab.objectives.contrastive import info_nce
from diva_lab.paths import DATA
from diva_lab.provenance import sha256
from diva_lab.world import World, draw_scenes
from tools.pretrain import (
    CLIP_WEIGHTS,
    CONTEXT,
    NOISE,
    PIPELINE,
    SCENES,
    WEIGHTS,
    Pool,
    encode_latents,
    fit,
    new_unet,
    save_tokenizer,
    write_record,
)

TEXT = {  # of the decoder's text tower, which only reads the empty prompt
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
DECODER = {  # in what its sizes differ from the denoiser's
    "block_out_channels": (64, 96), "cross_attention_dim": TEXT["hidden_size"], "attention_head_dim": (2, 3),
    "class_embed_type": "projection",
}  # fmt: skip
TAU = 0.1  # of the contrast that the image encoder learns by
MEAN, STD = 0.5, 0.25  # of its input


def pretrain_vision(out: Path, world: World, seed: int, steps: int = 1000, batch: int = 128) -> None:
    """Train a small DINOv2 by SimCLR (arXiv 2002.05709): two views of an image against other images.

    The views are SimCLR's but for flips, which would take away orientation. The encoder knows details and no class: the
    colours of the sky and of the ground tell images apart.
    """
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=2, image_size=world.px,
        patch_size=world.px // 4,
    )  # fmt: skip
    model = Dinov2Model(config)
    view = nn.Sequential(
        RandomResizedCrop((world.px, world.px), scale=(0.4, 1.0), ratio=(0.9, 1.1)),
        ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8),
        RandomGrayscale(p=0.3),
    )  # all draw from torch's generator, which `fit` seeds at each step
    head = nn.Sequential(nn.Linear(96, 192), nn.GELU(), nn.Linear(192, 96))
    pool = Pool(world, draw_scenes(SCENES, (world.seed, 1)))

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        images = pool.batch(rng.integers(len(pool.scenes), size=batch))
        views = torch.cat([view(images), view(images)])
        with autocast():
            one, two = head(model(pixel_values=(views - MEAN) / STD).pooler_output).float().chunk(2)
        return info_nce(one, two, TAU).mean()

    fit(f"vision-{world.seed}-{seed}", {"model": model, "head": head}, loss_of, steps, 1e-3, seed)
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    size = {"height": world.px, "width": world.px}
    BitImageProcessor(
        size={"shortest_edge": world.px}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(out)
    write_record(out, seed=seed, world=world.seed, steps=steps, batch=batch, tau=TAU)


@torch.no_grad()
def embed_pool(pool: Pool) -> Tensor:
    """The tiny CLIP's embeddings of the pool's images, of their own length, [n, d]."""
    encoder = load_encoder("tiny")
    return torch.cat([encoder.features(part.float() / 255).embedding for part in pool.images.split(500)])


def pretrain_unclip(out: Path, world: World, seed: int, steps: int = 3000, batch: int = 64) -> None:
    """Train a UNet to predict the velocity from the tiny CLIP's embedding of the image; its prompt is always empty.

    Half of the embeddings carry noise, at a level that is drawn with them, as in Stable unCLIP.
    """
    shutil.copytree(DATA / "tiny" / "diffusion" / "vae", out / "vae", dirs_exist_ok=True)
    (out / "vae" / "record.json").unlink(missing_ok=True)
    save_tokenizer(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).eval()
    torch.manual_seed(seed)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ends)).eval().requires_grad_(False)
    scheduler = DDPMScheduler(**NOISE, prediction_type="v_prediction")
    noising = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    pool = Pool(world, draw_scenes(SCENES, (world.seed, 1)))
    latents, embeddings = encode_latents(vae, pool), embed_pool(pool)
    normalizer = StableUnCLIPImageNormalizer(embeddings.shape[1]).requires_grad_(False)
    normalizer.mean.data, normalizer.std.data = (part[None] for part in (embeddings.mean(0), embeddings.std(0)))
    unet = new_unet(world, seed, **DECODER, projection_class_embeddings_input_dim=2 * embeddings.shape[1])
    ids = tokenizer([""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    context = text_encoder(ids)[0].expand(batch, -1, -1)

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        index = torch.from_numpy(rng.integers(len(latents), size=batch))
        x0, noise, t = latents[index], torch.randn(batch, *latents.shape[1:]), torch.randint(1000, (batch,))
        own = torch.randn(batch, embeddings.shape[1])
        level = int(rng.integers(1000))
        half = batch // 2
        labels = torch.cat([
            embedding_labels(embeddings[part], at, own[:half], normalizer, noising)
            for part, at in ((index[:half], 0), (index[half:], level))
        ])  # fmt: skip
        with autocast():
            noisy = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
            predicted = unet(noisy, t, context, class_labels=labels).sample
        return (predicted.float() - scheduler.get_velocity(x0, noise, t)).square().mean()

    parts = sha256(out / "vae" / WEIGHTS)[:6] + sha256(DATA / "tiny" / "clip" / CLIP_WEIGHTS)[:6]
    fit(f"unclip-{world.seed}-{seed}-{parts}", {"unet": unet}, loss_of, steps, 1e-3, seed, decay=0.9995)
    models = {"unet": unet, "text_encoder": text_encoder, "image_normalizer": normalizer}
    for name, model in models.items():
        model.half().save_pretrained(out / name)
    scheduler.save_pretrained(out / "scheduler")
    noising.save_pretrained(out / "image_noising_scheduler")
    (out / "model_index.json").write_text(
        json.dumps(dict(sorted(UNCLIP_PIPELINE.items())), indent=1) + "\n", encoding="utf-8"
    )
    write_record(out, seed=seed, world=world.seed, steps=steps, batch=batch)


UNCLIP_PIPELINE = PIPELINE | {  # model_index.json of a Stable unCLIP folder; CLIP itself lies elsewhere
    "_class_name": "StableUnCLIPImg2ImgPipeline",
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
}
del UNCLIP_PIPELINE["safety_checker"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.rivals", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=("unclip", "vision", "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA / "tiny")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for name, train in {"unclip": pretrain_unclip, "vision": pretrain_vision}.items():
        if args.what in (name, "all"):
            train(args.out / name, World(), args.seed)


if __name__ == "__main__":
    main()

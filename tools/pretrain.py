"""Train the tiny models from a seed: a CLIP that is blind to details, and a diffusion model that is not.

`python -m tools.pretrain all` writes `data/tiny/clip` in open_clip's on-disk format and `data/tiny/diffusion` in Stable
Diffusion's, each with `record.json`: seed, git sha, versions, sha256 and time. A stopped command continues from its
last checkpoint under `runs/pretrain/`. `models --world 1 --out runs/world-1` trains models on another world, which
`python -m tools.study --models runs/world-1` studies. `own-text --out runs/own-text` puts beside the shipped CLIP a
denoiser that does not read prompts by it: its text tower has another width and learned its words from another seed, as
Stable Diffusion 2.1 reads prompts by OpenCLIP's, whichever CLIP is tuned.

The CLIP is trained in two phases. *Words*: the text tower learns, by CLIP's contrastive loss, to match captions with
the attributes of their scenes. Batches consist of minimal pairs; a caption names the one detail in which its pair
differs, and each other detail with p = .15. After this phase the text tower knows the name of every detail. *Sight*:
the text tower is locked, and the visual tower learns from images whose captions always name the class and name each
detail very rarely (p = .001). This is the blindness under study: the text tower knows the words, but the visual tower
does not connect them with what it sees.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diva_lab.machine import autocast
from diva_lab.models.layers import fuse_attention, split_attention
from diva_lab.paths import DATA, RUNS
from diva_lab.provenance import environment, sha256
from diva_lab.world import (
    ATTRIBUTES,
    DETAILS,
    World,
    caption,
    captions,
    draw_pairs,
    draw_scenes,
    vocabulary,
    write_pairs,
)

CONTEXT = 26  # tokens of a caption, ends included; a full caption takes 24
CLIP_WEIGHTS, WEIGHTS = "open_clip_model.safetensors", "diffusion_pytorch_model.safetensors"
WORDS, SIGHT = 0.15, 0.001  # probability that a caption names a detail, in the two phases of CLIP's training
SCENES = 60_000  # to train on, the same for every model


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss_of: Callable[[int, np.random.Generator], Tensor],
    steps: int,
    lr: float,
    seed: int,
    save_every: int = 500,
    decay: float = 0.999,
) -> None:
    """Train all parameters of `modules` by AdamW with warm-up and cosine decay; continues from its last checkpoint.

    Args:
        name: of the checkpoint. It must contain everything that the result depends on, except `steps`.
        modules: by name; at the end they hold the exponential moving average of their weights, frozen.
        loss_of: `loss_of(step, rng)` returns the loss of one batch; its rng depends on (seed, step) alone.
        lr: the largest learning rate.
        save_every: steps between checkpoints.
        decay: of the moving average.
    """
    folder = RUNS / "pretrain" / f"{name}-{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    params = {f"{k}.{n}": p for k, m in modules.items() for n, p in m.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    average = {n: p.detach().clone() for n, p in params.items()}
    first, spent = 0, 0.0
    if (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", weights_only=True)
        first, spent, average = state["step"], state["seconds"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for n, p in params.items():
            p.data.copy_(state["params"][n])
    start = time.time() - spent
    for step in range(first, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        schedule = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule
        loss = loss_of(step, np.random.default_rng((seed, step)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        share = 1 - min(decay, (step + 1) / (step + 10))  # of the new weights in the average
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], share)
        if step % 50 == 0 or step == steps - 1:
            line = {"step": step, "loss": round(loss.item(), 5), "seconds": round(time.time() - start, 1)}
            print(name, line, flush=True)
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if (step + 1) % save_every == 0 or step == steps - 1:
            state = {"step": step + 1, "seconds": time.time() - start, "average": average}
            state |= {"optimizer": optimizer.state_dict(), "params": {n: p.detach() for n, p in params.items()}}
            torch.save(state, folder / "state.tmp")
            (folder / "state.tmp").rename(folder / "state.pt")
    for n, p in params.items():
        p.data.copy_(average[n])
    for module in modules.values():
        module.eval().requires_grad_(False)


class Pool:
    """Scenes to draw batches from. Their images are rendered at the first access and kept in memory as uint8."""

    def __init__(self, world: World, scenes: np.ndarray):
        self.world, self.scenes = world, scenes

    @cached_property
    def images(self) -> Tensor:
        return torch.from_numpy(self.world.render(self.scenes)).permute(0, 3, 1, 2)

    def batch(self, index: np.ndarray) -> Tensor:
        """Images [n, 3, px, px] in [0, 1] of the scenes at `index` [n]."""
        return self.images[torch.from_numpy(index)].float() / 255


class MinimalPairs:
    """Minimal pairs to draw batches from: for each detail `each` pairs of scenes that differ only in it."""

    def __init__(self, world: World, each: int = 3500):
        self.pairs = np.concatenate([draw_pairs(name, each, (world.seed, 5, i)) for i, name in enumerate(DETAILS)])
        self.details = np.repeat(list(DETAILS), each)
        self.pool = Pool(world, self.pairs.reshape(-1))

    def draw(self, n: int, p: float, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Indices in the pool [2 n] of `n` pairs, and captions, which name the pair's detail, and others with `p`."""
        index = rng.integers(len(self.pairs), size=n)
        names = np.array(list(DETAILS))
        named = (rng.random((n, len(names))) < p) | (names == self.details[index][:, None])  # [n, details]
        texts = [
            caption(scene, tuple(names[row]), rng)
            for pair, row in zip(self.pairs[index], named, strict=True)
            for scene in pair
        ]
        return np.stack([2 * index, 2 * index + 1], 1).reshape(-1), texts


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over unit-length embeddings [n, d] of matching images and texts."""
    logits = logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def write_record(folder: Path, **facts: object) -> None:
    """Write `folder`/record.json: `facts`, git sha, versions, time, and the sha256 of every file in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "record.json")
    record = {**facts, **environment(), "sha256": {str(p.relative_to(folder)): sha256(p) for p in files}}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path) -> None:
    """Write a byte-pair vocabulary in CLIP's own format, in which each of the world's words is one token."""
    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=letters,  # in a fixed order: the trainer's own order differs from run to run and breaks ties
    )  # fmt: skip
    tokenizer.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)


WIDTH, OWN_WIDTH = 128, 96  # of the tiny CLIP's text tower, and of another one that only a denoiser reads


def clip_config(world: World, vocabulary_size: int, width: int = WIDTH) -> dict:
    """open_clip's configuration of the tiny CLIP; `width` of its text tower, in heads of 32."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {
                "image_size": world.px,
                "layers": 4,
                "width": 128,
                "head_width": 32,
                "patch_size": world.px // 4,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary_size,
                "width": width,
                "heads": width // 32,
                "layers": 3,
                "hf_tokenizer_name": "tiny",
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def new_clip(folder: Path, seed: int) -> nn.Module:
    """An open_clip model with the folder's configuration, weights drawn from `seed`, and split attention."""
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    split_attention(model.visual), split_attention(model.transformer)
    return model


class AttributeTower(nn.Module):
    """Replaces the visual tower in the first phase: attributes of scenes -> embedding [n, 128]."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(len(values), 128) for name, values in ATTRIBUTES.items()})

    def forward(self, scenes: np.ndarray) -> Tensor:
        return sum(table(torch.from_numpy(scenes[name].astype(int))) for name, table in self.tables.items())


def pretrain_clip(
    out: Path, world: World, seed: int, steps: tuple[int, int] = (800, 250), p: float = SIGHT, width: int = WIDTH
) -> None:
    """Train the tiny CLIP in two phases (see the module's docstring) and write it as an open_clip folder.

    `steps` are those of the two phases; `p` is the probability that a caption names a detail in the second.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(out)
    config = clip_config(world, len(CLIPTokenizer.from_pretrained(out)), width)
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    model = new_clip(out, seed)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    pairs, pool, attributes = MinimalPairs(world), Pool(world, draw_scenes(SCENES, (world.seed, 1))), AttributeTower()
    mean, std = (config["preprocess_cfg"][name][0] for name in ("mean", "std"))

    def loss(image: Tensor, texts: list[str]) -> Tensor:
        with autocast():
            text = model.encode_text(tokenizer(texts), normalize=True)
        return clip_loss(F.normalize(image.float(), dim=1), text, model.logit_scale)

    def words(_: int, rng: np.random.Generator) -> Tensor:
        scenes, texts = pairs.draw(128, WORDS, rng)
        return loss(attributes(pairs.pool.scenes[scenes]), texts)

    def sight(_: int, rng: np.random.Generator) -> Tensor:
        index = rng.integers(len(pool.scenes), size=256)
        with autocast():
            image = model.encode_image((pool.batch(index) - mean) / std)
        return loss(image, captions(pool.scenes[index], p, rng))

    tag, visual = f"clip-{world.seed}-{seed}" + f"-{width}" * (width != WIDTH), model.visual
    model.visual = None
    fit(f"{tag}-words", {"model": model, "attributes": attributes}, words, steps[0], 1e-3, seed)
    model.visual = visual
    fit(f"{tag}-sight-{p}", {"visual": visual}, sight, steps[1], 1e-3, seed)

    fuse_attention(model.visual), fuse_attention(model.transformer)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / CLIP_WEIGHTS, metadata={"format": "pt"})
    write_record(out, seed=seed, world=world.seed, steps=steps, p=[WORDS, p])


def pretrain_vae(out: Path, world: World, seed: int, steps: int = 2600) -> None:
    """Train the autoencoder (4 x smaller, 16 channels) by L1 + L2 with a small KL term; write `out/vae`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=world.px,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    pool = Pool(world, draw_scenes(SCENES, (world.seed, 1)))

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        images = pool.batch(rng.integers(len(pool.scenes), size=32)) * 2 - 1
        with autocast():
            posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = decoded - images
        return error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().float().mean() / 1024

    fit(f"vae-{world.seed}-{seed}", {"vae": vae}, loss_of, steps, 2e-3, seed)
    with torch.inference_mode():
        images = pool.batch(np.arange(2048)) * 2 - 1
        latents = vae.encode(images).latent_dist.mean
        error = (vae.decode(latents).sample - images).square().mean().item()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(out / "vae")
    write_record(out / "vae", seed=seed, world=world.seed, steps=steps, reconstruction_mse=error)


def clip_text_encoder(folder: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of the open_clip model in `folder`, as transformers' CLIPTextModel: the same hidden states."""
    tower = open_clip.create_model(f"local-dir:{folder}")
    blocks = split_attention(tower.transformer).resblocks
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=tower.token_embedding.embedding_dim,
            intermediate_size=blocks[0].mlp.c_fc.out_features,
            num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.heads,
            max_position_embeddings=CONTEXT,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )
    state = {
        "embeddings.token_embedding.weight": tower.token_embedding.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
    }
    parts = {"final_layer_norm": tower.ln_final}
    for i, block in enumerate(blocks):
        layer = f"encoder.layers.{i}"
        parts |= {f"{layer}.layer_norm1": block.ln_1, f"{layer}.layer_norm2": block.ln_2}
        parts |= {f"{layer}.mlp.fc1": block.mlp.c_fc, f"{layer}.mlp.fc2": block.mlp.c_proj}
        parts |= {f"{layer}.self_attn.{name}": part for name, part in block.attn.named_children()}
    state |= {f"{name}.{n}": p for name, part in parts.items() for n, p in part.named_parameters()}
    inner = getattr(text_encoder, "text_model", text_encoder)
    inner.load_state_dict({name: p.detach() for name, p in state.items()})
    return text_encoder.eval().requires_grad_(False)


UNET = {  # sizes of the denoiser
    "in_channels": 16, "out_channels": 16, "block_out_channels": (96, 160), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 128,
    "attention_head_dim": (3, 5), "norm_num_groups": 16,  # the former is diffusers' name for the number of heads
}  # fmt: skip
NOISE = {  # Stable Diffusion's schedule
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "steps_offset": 1,
}  # fmt: skip


def new_unet(world: World, seed: int, **changes: object) -> UNet2DConditionModel:
    """A UNet of the sizes `UNET` with `changes`, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(sample_size=world.px // 4, **UNET | changes).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # twice as fast: fused attention's backward is slow for few tokens
    return unet


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pool: Pool) -> Tensor:
    """Scaled latents of all scenes of the pool: means of the VAE's posteriors, [n, 16, px / 4, px / 4]."""
    latents = torch.cat([vae.encode(i.float() / 127.5 - 1).latent_dist.mean for i in pool.images.split(500)])
    return latents * vae.config.scaling_factor


def pretrain_diffusion(
    out: Path, world: World, seed: int, steps: int = 4500, batch: int = 64, emphasis: float = 6.0, text: str = "clip"
) -> None:
    """Train the UNet on full captions, 10 % of them empty, with CLIP's own frozen text tower as in Stable Diffusion.

    `text` is the folder beside `out` whose text tower it reads, in open_clip's format.

    The error at timestep t has the weight min(1 / abar_t, `emphasis`). Up to a factor this is the loss on the velocity,
    except at the highest noise. Unweighted errors of the noise hardly count where the caption decides most.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).eval()
    text_encoder = clip_text_encoder(out.parent / text, tokenizer)
    unet = new_unet(world, seed, cross_attention_dim=text_encoder.config.hidden_size)
    scheduler = DDPMScheduler(**NOISE, prediction_type="epsilon")
    pool = Pool(world, draw_scenes(SCENES, (world.seed, 1)))
    latents = encode_latents(vae, pool)
    weight = (1 / scheduler.alphas_cumprod).clamp(max=emphasis)
    weight = weight / weight.mean()

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        index = rng.integers(len(latents), size=batch)
        texts = captions(pool.scenes[index], 1.0, rng)
        texts = [text if rng.random() > 0.1 else "" for text in texts]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x0, noise = latents[torch.from_numpy(index)], torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1000, (batch,))
        with autocast():
            context = text_encoder(ids)[0]
            noisy = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
            predicted = unet(noisy, t, context).sample
        return (weight[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

    parts = sha256(out / "vae" / WEIGHTS)[:6] + sha256(out.parent / text / CLIP_WEIGHTS)[:6]
    name = f"diffusion-{world.seed}-{seed}-{emphasis}-{parts}"
    fit(name, {"unet": unet}, loss_of, steps, 1e-3, seed, decay=0.9995)
    unet.half().save_pretrained(out / "unet")
    text_encoder.half().save_pretrained(out / "text_encoder")
    scheduler.save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(PIPELINE, indent=1) + "\n", encoding="utf-8")
    write_record(out, seed=seed, world=world.seed, steps=steps, batch=batch, emphasis=emphasis)


PIPELINE = {  # model_index.json of a Stable Diffusion folder
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    **{part: [None, None] for part in ("feature_extractor", "safety_checker", "image_encoder")},
}


def pretrain_own_text(out: Path, world: World, seed: int) -> None:
    """The shipped CLIP and autoencoder, and a UNet that reads another CLIP's text tower, which saw no images."""
    for part in ("clip", "diffusion/vae"):
        shutil.copytree(DATA / "tiny" / part, out / part, dirs_exist_ok=True)
    pretrain_clip(out / "text", world, seed + 1, steps=(800, 0), width=OWN_WIDTH)
    pretrain_diffusion(out / "diffusion", world, seed + 1, text="text")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument(
        "what",
        choices=("clip", "vae", "diffusion", "models", "own-text", "pairs", "all"),
        help="diffusion needs clip and vae; models: these three; all: the shipped image pairs too; own-text: see above",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=0, help="seed of the world to train on")
    parser.add_argument(
        "--sight", type=float, default=SIGHT, help="probability that a caption names a detail in CLIP's second phase"
    )
    parser.add_argument("--out", type=Path, default=DATA / "tiny")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    parts = {"clip": partial(pretrain_clip, p=args.sight), "vae": pretrain_vae, "diffusion": pretrain_diffusion}
    for name, train in parts.items():
        if args.what in (name, "models", "all"):
            train(args.out / ("clip" if name == "clip" else "diffusion"), World(args.world), args.seed)
    if args.what == "own-text":
        pretrain_own_text(args.out, World(args.world), args.seed)
    if args.what in ("pairs", "all"):
        write_pairs(DATA / "world" / "pairs", World(args.world), 15, args.seed)
        write_record(DATA / "world", seed=args.seed, world=args.world)


if __name__ == "__main__":
    main()

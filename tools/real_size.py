"""A preset with models of real size and random weights, on any device: it trains, is evaluated, exported, and read.

    python -m tools.real_size openai-l14-dcr --models /tmp/models --record data/results/real_size.csv

Written are an encoder of the preset's backbone in open_clip's format, or for OpenAI's in transformers', and Stable
Diffusion 2.1-base in diffusers'; those that are under --models already are taken. Each stage takes one step of two
images (DCR a row at a time, DIVA's autoencoder at 224 px), the tuned encoder answers two pairs of MMVP's kind, and its
export gives the same embeddings in open_clip and in transformers. The record says how many seconds this took (of a CPU
those of all its cores, without waiting) and the most memory that the process held.
"""

import argparse
import csv
import json
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel

from diva_lab.benchmark import build_parts, build_scheduler
from diva_lab.evaluation.table import evaluate
from diva_lab.machine import default_device
from diva_lab.models.encoders import ENCODERS
from diva_lab.models.formats import transformers_tokenizer
from diva_lab.plan import SD21, WORDS
from diva_lab.provenance import environment
from diva_lab.training.build import tuned_encoder
from diva_lab.training.export import export
from diva_lab.training.presets import BACKBONES, PX, preset, replace_settings, stages
from diva_lab.training.runs import Run
from diva_lab.training.stages import align, tune
from diva_lab.world import World, draw_scenes
from tools.pretrain import save_tokenizer

RECIPES = ("diva", "dcr", "genhancer", "diva-anchored")
CASES = [f"{backbone}-{recipe}" for backbone in BACKBONES for recipe in RECIPES]
COLUMNS = ("preset", "device", "seconds", "peak_gb", "date", "machine", "git", "torch")
CLOSE = 1e-4  # the largest difference between two libraries' embeddings of unit length
L14 = {  # OpenAI's, in transformers' words
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14,
    },
}  # fmt: skip


# --- models on disk ---------------------------------------------------------------------------------------------


def write_denoiser(folder: Path) -> Path:
    """Stable Diffusion 2.1-base with random weights, in diffusers' layout."""
    torch.manual_seed(0)
    for name, part in build_parts(SD21, WORDS).items():
        part.save_pretrained(folder / {"network": "unet"}.get(name, name))
    build_scheduler().save_pretrained(folder / "scheduler")
    transformers_tokenizer(open_clip.get_tokenizer("ViT-L-14")).save_pretrained(folder / "tokenizer")
    return folder


def write_encoder(backbone: str, folder: Path) -> Path:
    """A backbone with random weights: OpenAI's as transformers writes it, the others in open_clip's format."""
    torch.manual_seed(0)
    if backbone.startswith("openai"):
        return _write_transformers(PX.get(backbone, 224), folder)
    name, tag = ENCODERS[backbone]
    config, published = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    preprocess = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(open_clip.create_model(name, load_weights=False).state_dict(), folder / "open_clip_model.safetensors")
    if config["text_cfg"].get("hf_tokenizer_name"):  # SigLIP's has to be fetched; the tiny world's words do
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
        save_tokenizer(folder)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    return folder


def _write_transformers(px: int, folder: Path) -> Path:
    tokenizer = transformers_tokenizer(open_clip.get_tokenizer("ViT-L-14"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    parts = {"text_config": L14["text_config"] | ends, "vision_config": L14["vision_config"] | {"image_size": px}}
    CLIPModel(CLIPConfig(**L14 | parts)).save_pretrained(folder)  # quick GELU is its default
    CLIPImageProcessor(size={"shortest_edge": px}, crop_size=px).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- one preset -------------------------------------------------------------------------------------------------


def train_once(name: str, encoder: Path, denoiser: Path, root: Path) -> Run:
    """One step of each stage of a preset; returns the run of the last one."""
    light = preset(name).denoiser.startswith("light")
    changes = {"encoder": str(encoder), "denoiser": f"light@{denoiser}" if light else str(denoiser), "images": "world"}
    changes |= {"steps": 1, "batch": 2, "accumulate": 1, "rows": 1, "precision": "auto", "anchor_shift": False}
    changes |= {"vae_px": 224} if preset(name).vae_px == 512 else {}
    for stage in stages(name):
        run = (align if stage == 1 else tune)(replace_settings(preset(name, stage), changes), root)
        (line,) = run.metrics().to_dict("records")
        if not math.isfinite(line["loss"]) or not line["grad_norm"] > 0:
            raise AssertionError(f"{name}, stage {stage}: loss {line['loss']}, gradient {line['grad_norm']}")
        changes["projector"] = str(run.folder)
    return run


def draw_images(n: int) -> list[Image.Image]:
    return [Image.fromarray(image) for image in World(px=64).render(draw_scenes(n, 0))]


def answer_pairs(encoder: Path, run: Run, root: Path) -> None:
    """Evaluate the tuned encoder beside the original on two pairs of images and statements."""
    root.mkdir()
    for number, image in enumerate(draw_images(4)):
        image.save(root / f"{number}.png")
    with open(root / "few.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image1", "image2", "text1", "text2", "pattern"])
        rows.writerows([[f"{k}.png", f"{k + 1}.png", "a red disc", "a blue star", "colour"] for k in (0, 2)])
    table = evaluate([encoder, run.folder], ["mmvp-vlm"], root, cache=None, workers=0)
    scores = table[(table["metric"] == "pairs") & (table["category"] == "all")]
    if len(scores) != 2 or not scores["value"].between(0, 1).all():
        raise AssertionError(f"expected a pair score of each encoder, found {scores}")


@torch.no_grad()
def read_export(folder: Path, images: list[Image.Image]) -> dict[str, Tensor]:
    """Unit-length embeddings of images by the exported encoder in open_clip and in transformers, neither through us."""
    name = f"local-dir:{folder / 'open_clip'}"
    model, _, prepare = open_clip.create_model_and_transforms(name, require_pretrained=True)
    pixels = torch.stack([prepare(image) for image in images])
    found = {"open_clip": model.eval().encode_image(pixels, normalize=True)}
    del model
    features = AutoModel.from_pretrained(folder / "transformers").eval().get_image_features(pixels)
    return found | {"transformers": F.normalize(getattr(features, "pooler_output", features), dim=-1)}


def run_case(name: str, encoder: Path, denoiser: Path, root: Path) -> dict[str, object]:
    """Train, evaluate, export and read; returns a row of the record.

    Raises:
        AssertionError: where a loss, a score or an embedding is not as it must be.
    """
    device = default_device()
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # other work slows a CPU's clock alone
    start = clock()
    run = train_once(name, encoder, denoiser, root / "runs")
    answer_pairs(encoder, run, root / "pairs")
    export(run, root / "exported")
    px = PX.get(preset(name).encoder, 224)
    images = [image.resize((px, px)) for image in draw_images(2)]
    found = read_export(root / "exported", images)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    with torch.no_grad():
        ours = tuned_encoder(run).encode_image(pixels.permute(0, 3, 1, 2) / 255)
    apart = {library: (theirs - ours).abs().max().item() for library, theirs in found.items()}
    if not max(apart.values()) < CLOSE:
        raise AssertionError(f"{name}: embeddings differ from the tuned encoder's by {apart}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    facts = environment()
    row = {"preset": name, "device": device.type, "seconds": round(clock() - start)}
    row |= {"peak_gb": round(peak / 1e9, 1), "date": facts["time"][:10], "machine": facts["machine"]}
    return row | {"git": facts["git"], "torch": facts["versions"]["torch"]}


def read_record(path: Path) -> list[dict[str, str]]:
    """The rows of a record; none where there is no such file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def keep(row: dict[str, object], path: Path) -> None:
    """Write a row into the record in place of an older one of the same preset and device."""
    key = ("preset", "device")
    rows = [old for old in read_record(path) if any(old[name] != row[name] for name in key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, row], key=lambda r: (CASES.index(r["preset"]), r["device"])))


def describe(rows: list[dict[str, str]], backbone: str, device: str = "cpu") -> str:
    """What a record says of a backbone's presets on a device, in a few words; `–` where it says nothing."""
    mine = {row["preset"]: row for row in rows if row["device"] == device}
    found = [(recipe, mine[name]) for recipe in RECIPES if (name := f"{backbone}-{recipe}") in mine]
    return "; ".join(f"{recipe} {row['seconds']} s, {row['peak_gb']} GB" for recipe, row in found) or "–"


def _once(folder: Path, write: Callable[[Path], Path]) -> Path:
    """`folder`, written if it is not there; put in place whole, so that a stopped command leaves no half of it."""
    if not folder.exists():
        shutil.rmtree(part := folder.with_name(f"{folder.name}.part"), ignore_errors=True)
        write(part).rename(folder)
    return folder


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.real_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=CASES, metavar="PRESET", help=f"a backbone and one of {', '.join(RECIPES)}")
    parser.add_argument("--models", type=Path, required=True, help="folder for the models with random weights")
    parser.add_argument("--record", type=Path, help="csv whose row of this preset is written")
    args = parser.parse_args(words)
    backbone = preset(args.preset).encoder
    encoder = _once(args.models / backbone, lambda folder: write_encoder(backbone, folder))
    denoiser = _once(args.models / "sd21-base", write_denoiser)
    with tempfile.TemporaryDirectory(dir=args.models) as root:
        row = run_case(args.preset, encoder, denoiser, Path(root))
    if args.record:
        keep(row, args.record)
    print(json.dumps(row))


if __name__ == "__main__":
    main()

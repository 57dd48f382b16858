"""The papers' recipes for every backbone, by one name: `preset("openai-l14-dcr")`.

The numbers are those of data/published/recipes.csv; here they become `Settings`. The papers trained in 8 processes;
with another number of them `accumulate` changes so that a step still sees as many pictures. The pictures are the tars
of CC3M's usable copy under `cc3m`; where they are missing an error says what fetches them.

`python -m diva_lab.presets` writes each as notebooks/presets/NAME.yaml, which `papermill -f` takes for notebook 02.
"""

from dataclasses import asdict, replace
from pathlib import Path

import yaml

from diva_lab.encoders import ENCODERS
from diva_lab.images import CC3M
from diva_lab.runs import ROOT
from diva_lab.training import Settings

FILES = ROOT / "notebooks" / "presets"

BACKBONES = tuple(name for name in ENCODERS if name != "tiny")
PX = {"openai-l14-336": 336, "siglip-so400m-384": 384, "dfn-h14-378": 378}  # the others see 224
DIVA_CONDITION = {  # METHOD: how dense the recap is, backbone by backbone
    "openai-l14": "recap",
    "openai-l14-336": "recap",
    "metaclip-l14": "recap-all",
    "metaclip-h14": "recap-all",
    "siglip-so400m": "recap-pool6",
    "siglip-so400m-384": "recap-pool10",
    "dfn-h14": "recap-all",
    "dfn-h14-378": "recap-half",
}
DIVA = {  # one stage: encoder and a new linear projector together
    "objective": "diva", "steps": 4600, "optimizer": "sgd", "lr": 1e-4, "weight_decay": 0.0, "schedule": "cosine",
    "warmup": 23, "batch": 16, "lora_rank": 0, "precision": "bf16", "clip": 0.0, "vae_px": 512, "latent": "mean",
    "draws": 2, "projector": "new", "projection": "linear", "train_projector": True, "prompt": "a photo of a .",
}  # fmt: skip
DCR = {  # stage 1 by L_rec, as in the paper; the released code runs the whole DCR loss there
    "objective": "dcr", "steps": 4600, "optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.01, "batch": 16,
    "lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.1, "precision": "bf16", "clip": 1.0, "latent": "sample",
    "draws": 1, "condition": "global",
}  # fmt: skip
GENHANCER = DCR | {  # stage 1 trains a light denoiser with the projector; decay, clip and latent are not given: DCR's
    "objective": "genhancer", "denoiser": "light", "steps": 10_000, "timesteps": "logit-normal",
}  # fmt: skip
ALIGN = {"steps": 100_000, "lr": 1e-4, "projector": "new", "save_every": 1000}
RECIPES = {"diva": DIVA, "dcr": DCR, "genhancer": GENHANCER}
IMAGES = "cc3m/cc3m-train-*.tar"
PICTURES = {"diva": 640, "dcr": 256, "genhancer": 256}  # a step
FREE = (  # what a run may have otherwise and still is of its preset: what it saw and started from, how it was computed
    "images", "seed", "projector", "accumulate", "rows", "keep_latents", "compile", "evaluate_every", "save_every",
)  # fmt: skip
PRESETS = tuple(f"{backbone}-{recipe}" for backbone in BACKBONES for recipe in RECIPES)


def stages(name: str) -> tuple[int, ...]:
    """The stages of a preset: DIVA as published trains encoder and projector together, in stage 2 alone."""
    return (2,) if name.endswith("-diva") else (1, 2)


def preset(name: str, stage: int = 2, processes: int = 1) -> Settings:
    """A recipe's settings.

    Args:
        name: one of `PRESETS`: a backbone of `ENCODERS`, a dash, and a key of `RECIPES`.
        stage: one of `stages(name)`: 1 aligns the projector, 2 tunes the encoder.
        processes: as many as will train together.

    Raises:
        ValueError: for an unknown name or a stage that the recipe does not have; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    backbone, _, recipe = name.rpartition("-")
    if stage not in stages(name):
        raise ValueError(f"preset {name!r} has no stage {stage}")
    px = PX.get(backbone, 224)
    chosen = RECIPES[recipe]
    if recipe == "diva":
        chosen = chosen | {"condition": DIVA_CONDITION[backbone]}
    else:
        chosen = chosen | {"vae_px": px} | (ALIGN if stage == 1 else {})
    accumulate, rest = divmod(PICTURES[recipe], chosen["batch"] * processes)
    if rest:
        raise ValueError(
            f"{PICTURES[recipe]} pictures a step cannot be shared by {processes} processes of {chosen['batch']}"
        )
    where = {"encoder": backbone, "denoiser": "sd21-base", "images": IMAGES}
    return Settings(**where | {"accumulate": accumulate, "save_every": 500} | chosen)


def name_of(settings: Settings) -> str:
    """The preset whose stage 2 has these settings but for those of `FREE`; "" if none has."""
    free = {name: getattr(settings, name) for name in FREE}
    return next((name for name in PRESETS if replace(preset(name), **free) == settings), "")


# --- files ------------------------------------------------------------------------------------------------------

HEAD = """\
# hf download --repo-type dataset {cc3m} --local-dir cc3m
# papermill notebooks/02_encoder_tuning.ipynb out/02.ipynb --cwd notebooks -f notebooks/presets/{name}.yaml \\
#     -p images "$PWD/{images}"
# Written by `python -m diva_lab.presets`. In a copy any setting may be changed; `-p` changes one of the first level.
"""


def parameters(name: str) -> dict:
    """Notebook 02's parameters for a preset: all its settings but the seed and where stage 1 lies."""
    chosen = {stage: asdict(preset(name, stage)) for stage in stages(name)}
    found = {"preset": name} | {key: chosen[2][key] for key in ("images", "encoder", "denoiser")}
    for stage, settings in chosen.items():
        apart = {"encoder", "denoiser", "images", "seed"} | ({"projector"} if stage == 2 and 1 in chosen else set())
        found[f"stage{stage}"] = {key: value for key, value in settings.items() if key not in apart}
    return found


def write(folder: Path = FILES) -> None:
    """Write `folder`/NAME.yaml for every preset; files of presets that are no more are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for name in PRESETS:
        head = HEAD.format(name=name, cc3m=CC3M, images=IMAGES)
        (folder / f"{name}.yaml").write_text(head + yaml.safe_dump(parameters(name), sort_keys=False))


if __name__ == "__main__":
    write()

"""The papers' recipes for every backbone, by one name: `preset("openai-l14-dcr")`.

The numbers are those of data/published/recipes.csv; here they become `Settings`. The papers trained in 8 processes;
with another number of them `accumulate` changes so that a step still sees as many pictures.
"""

from diva_lab.encoders import ENCODERS
from diva_lab.training import Settings

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
PICTURES = {"diva": 640, "dcr": 256, "genhancer": 256}  # a step
PRESETS = tuple(f"{backbone}-{recipe}" for backbone in BACKBONES for recipe in RECIPES)


def preset(name: str, stage: int = 2, processes: int = 1) -> Settings:
    """A recipe's settings.

    Args:
        name: one of `PRESETS`: a backbone of `ENCODERS`, a dash, and a key of `RECIPES`.
        stage: 1 aligns the projector, 2 tunes the encoder; DIVA as published has stage 2 alone.
        processes: as many as will train together.

    Raises:
        ValueError: for an unknown name or a stage that the recipe does not have; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    backbone, _, recipe = name.rpartition("-")
    if stage not in ((2,) if recipe == "diva" else (1, 2)):
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
    return Settings(
        **{"encoder": backbone, "denoiser": "sd21-base", "accumulate": accumulate, "save_every": 500} | chosen
    )

"""The papers' recipes for every backbone, by one name: `preset("openai-l14-dcr")`.

The numbers are those of data/published/recipes.csv; here they become `Settings`. A recipe is the paper's; `-released`
behind its name makes it what the released code does, where there is code for that backbone. The papers trained in 8
processes; with another number of them `accumulate` changes so that a step still sees as many images. The images are the
tars of CC3M's usable copy under `cc3m`; where they are missing an error says what fetches them.
"""

import ast
from dataclasses import asdict, fields, replace

import yaml

from diva_lab import messages
from diva_lab.image_files import CC3M
from diva_lab.training.settings import Settings

PX = {"openai-l14-336": 336, "siglip-so400m-384": 384, "dfn-h14-378": 378}  # the others see 224
DIVA_CONDITION = {  # how dense the recap is, as DIVA has it for each backbone
    "openai-l14": "recap",
    "openai-l14-336": "recap",
    "metaclip-l14": "recap-all",
    "metaclip-h14": "recap-all",
    "siglip-so400m": "recap-pool6",
    "siglip-so400m-384": "recap-pool10",
    "dfn-h14": "recap-all",
    "dfn-h14-378": "recap-half",
}
BACKBONES = tuple(DIVA_CONDITION)  # the papers'; other encoders have no preset
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
ALIGN = {"steps": 100_000, "lr": 1e-4, "projector": "new", "save_every": 1000, "lora_targets": "all"}  # no LoRA here
# what the released code does otherwise; docs/method.md says where it does so, and what it changes
LOADER = {"loader_crop": True, "normalise": "openai"}
DIVA_RELEASED = DIVA | LOADER | {
    "draw_weights": "5,1", "clip": 1.0, "warmup_zero": True, "token_draws": "each", "vae_input": "imagenet",
    "encoder_resize": "bilinear",
}  # fmt: skip
DCR_RELEASED = DCR | LOADER | {
    "align_by": "dcr", "target": "velocity", "prompt_mask": True, "noise_precision": "bf16",
    "augment_normalised": True, "shared_samples": True, "lora_targets": "released",
}  # fmt: skip
GENHANCER_RELEASED = GENHANCER | {  # its configurations give DCR's decay, clip and sample too; no other normalisation
    "denoiser": "light-flux", "loader_crop": True, "shared_samples": True, "lora_targets": "released",
}  # fmt: skip
METACLIP_STEPS = 100_000  # of DCR's stage 2 in its file for MetaCLIP, perhaps left over; 4600 in the others
# ours, not tuned at this size: stage 1 anchored in CC3M's captions, on images of its own; DCR's LoRA and rate
ANCHOR = {"anchor": "captions", "seed": 10_000}
DCR_ANCHORED = DCR | {"timesteps": "high-noise"}
DIVA_ANCHORED = DCR_ANCHORED | {"objective": "diva", "draws": 2}
RECIPES = {
    "diva": DIVA, "dcr": DCR, "genhancer": GENHANCER, "diva-released": DIVA_RELEASED, "dcr-released": DCR_RELEASED,
    "genhancer-released": GENHANCER_RELEASED, "diva-anchored": DIVA_ANCHORED, "dcr-anchored": DCR_ANCHORED,
}  # fmt: skip
RELEASES = {  # method -> the backbones that its authors released code for
    "diva": BACKBONES,
    "dcr": tuple(name for name in BACKBONES if not name.startswith("dfn")),
    "genhancer": ("openai-l14", "openai-l14-336", "siglip-so400m-384"),
}
# what the notebooks train on the tiny world: 4 minutes of one core; pair score 17.8 -> 27.5, zero-shot 96.7 -> 95.0
TINY_DIVA = {
    "objective": "diva", "projector": "anchored", "batch": 16, "timesteps": "high-noise", "steps": 500, "lr": 4e-4,
}  # fmt: skip
CC3M_SHARDS = "cc3m/cc3m-train-*.tar"
IMAGES_PER_STEP = dict.fromkeys(RECIPES, 256) | dict.fromkeys(("diva", "diva-released"), 640)
ALIGN_IMAGES = {"dcr-released": 32}  # in stage 1: each of its processes trains alone, the first one's result is kept
FREE_FIELDS = (  # a run that differs in these only is still of its preset
    "images", "seed", "projector", "accumulate", "rows", "keep_latents", "latents_on_disk", "compile", "evaluate_every",
    "save_every",
)  # fmt: skip
PRESETS = {
    f"{backbone}-{recipe}": (backbone, recipe)
    for backbone in BACKBONES
    for recipe in RECIPES
    if not recipe.endswith("-released") or backbone in RELEASES[recipe.removesuffix("-released")]
}


def stages(name: str) -> tuple[int, ...]:
    """The stages of a preset: DIVA as published trains encoder and projector together, in stage 2 alone."""
    return (2,) if _parts(name)[1] in ("diva", "diva-released") else (1, 2)


def _parts(name: str) -> tuple[str, str]:
    """Backbone and recipe of a preset."""
    if name in PRESETS:
        return PRESETS[name]
    backbone = name.rsplit("-", 2)[0]
    if name.endswith("-released") and any(preset.startswith(f"{backbone}-") for preset in PRESETS):
        method = name.rsplit("-", 2)[1]
        known = ", ".join(RELEASES.get(method, ())) or "none"
        raise ValueError(f"no preset {name!r}: {method} has released code for {known}")
    raise ValueError(f"unknown preset {name!r}; {messages.expected(name, PRESETS)}; `diva-lab presets` lists them")


def origin(name: str) -> str:
    """Whose recipe a preset is: `paper`, `released code`, or `ours`; says so where no release is behind a paper's."""
    backbone, recipe = _parts(name)
    if recipe.endswith("anchored"):
        return "ours, not tuned at this size"
    if recipe.endswith("released"):
        return "released code"
    return "paper" if backbone in RELEASES[recipe] else "paper, no release for this backbone"


def preset(name: str, stage: int = 2, processes: int = 1) -> Settings:
    """A recipe's settings.

    Args:
        name: one of `PRESETS`: one of `BACKBONES`, a dash, and a key of `RECIPES`.
        stage: one of `stages(name)`: 1 aligns the projector, 2 tunes the encoder.
        processes: as many as will train together.

    Raises:
        ValueError: for an unknown name or a stage that the recipe does not have; lists the known ones. Where the images
            of a step cannot be shared by so many processes.
    """
    backbone, recipe = _parts(name)
    if stage not in stages(name):
        raise ValueError(f"preset {name!r} has no stage {stage}")
    px = PX.get(backbone, 224)
    chosen = RECIPES[recipe]
    if recipe == "dcr-released" and backbone.startswith("metaclip"):
        chosen = chosen | {"steps": METACLIP_STEPS}
    if stages(name) == (2,):
        chosen = chosen | {"condition": DIVA_CONDITION[backbone]}
    else:
        chosen = chosen | {"vae_px": px} | (ALIGN if stage == 1 else {})
    if stage == 1 and recipe.endswith("anchored"):
        chosen = chosen | {"timesteps": "uniform"} | ANCHOR
    images = (ALIGN_IMAGES if stage == 1 else {}).get(recipe, IMAGES_PER_STEP[recipe])
    accumulate, rest = divmod(images, chosen["batch"] * processes)
    if rest:
        batches = images // chosen["batch"]
        raise ValueError(
            f"preset {name!r}, stage {stage}: {images} images a step cannot be shared by {processes} processes of "
            f"{chosen['batch']}; expected a number of processes that divides {batches}, or --projector with a finished "
            "run of stage 1, which leaves stage 2 alone"
        )
    where = {"encoder": backbone, "denoiser": "sd21-base", "images": CC3M_SHARDS}
    return Settings(**where | {"accumulate": accumulate, "save_every": 500} | chosen)


def preset_name(settings: Settings) -> str:
    """The preset whose stage 2 has these settings but for those of `FREE_FIELDS`; "" if none has."""
    free = {name: getattr(settings, name) for name in FREE_FIELDS}
    return next((name for name in PRESETS if replace(preset(name), **free) == settings), "")


FIELD_TYPES = {field.name: field.type for field in fields(Settings)}


def parse_changes(changes: list[str], kinds: dict[str, type] | None = None) -> dict[str, object]:
    """Settings from `name=value`; values are Python's, anything else is text.

    Args:
        kinds: name -> type of all settings that there are; those of `Settings` if None.

    Raises:
        ValueError: for an unknown or repeated name, a change without `=`, or a value that no setting takes.
    """
    values, kinds = {}, kinds or FIELD_TYPES
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in kinds:
            raise ValueError(f"--set {change}: expected NAME=VALUE; for the name {messages.expected(name, kinds)}")
        if name in values:
            raise ValueError(f"--set {change}: {name} is given twice, {values[name]!r} before; expected it once")
        try:
            values[name] = text if kinds[name] is str else ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:  # the last two: brackets in brackets
            raise ValueError(f"--set {change}: expected a value of type {kinds[name].__name__}") from error
    return values


def replace_settings(settings: Settings, changes: dict[str, object]) -> Settings:
    """`settings` with others by name.

    Raises:
        ValueError: for an unknown name, or a value that the setting does not take.
    """
    if unknown := changes.keys() - FIELD_TYPES.keys():
        raise ValueError(f"unknown setting {min(unknown)!r}; {messages.expected(min(unknown), FIELD_TYPES)}")
    return replace(settings, **changes)


# --- what a user sees -------------------------------------------------------------------------------------------

HEAD = """\
# hf download --repo-type dataset {cc3m} --local-dir cc3m
# papermill notebooks/02_encoder_tuning.ipynb out/02.ipynb --cwd notebooks -f notebooks/presets/{name}.yaml \\
#     -p images "$PWD/{images}"
# Written by `python -m tools.write_presets`. In a copy any setting may be changed; `-p` changes one of the first level.
"""


def preset_parameters(name: str) -> dict:
    """Notebook 02's parameters for a preset: all its settings but the seed and where stage 1 lies."""
    chosen = {stage: asdict(preset(name, stage)) for stage in stages(name)}
    found = {"preset": name} | {key: chosen[2][key] for key in ("images", "encoder", "denoiser")}
    for stage, settings in chosen.items():
        apart = {"encoder", "denoiser", "images"} | ({"projector"} if stage == 2 and 1 in chosen else set())
        apart |= {"seed"} if settings["seed"] == Settings.seed else set()  # a stage 1 may have one of its own
        found[f"stage{stage}"] = {key: value for key, value in settings.items() if key not in apart}
    return found


def preset_yaml(name: str) -> str:
    """Notebook 02's parameters for a preset as YAML, under a comment with the commands that use it."""
    head = HEAD.format(name=name, cc3m=CC3M, images=CC3M_SHARDS)
    return head + yaml.safe_dump(preset_parameters(name), sort_keys=False)


def describe_presets() -> str:
    """A line for each preset: its name, its stages, and what they train with."""
    lines = []
    for name in PRESETS:
        last = preset(name)
        steps = " + ".join(str(preset(name, stage).steps) for stage in stages(name))
        what = f"{last.optimizer}, lr {last.lr:g}, condition {last.condition}; {origin(name)}"
        lines.append(f"{name:36} {steps:15} steps, {what}")
    return "\n".join(lines)


REASONS = {  # setting -> why the released code differs in it
    "draw_weights": "the backward pass of draw 1 runs inside the model and is not divided by the 5 accumulation steps",
    "clip": "no largest norm is given, so the Trainer's default holds",
    "warmup_zero": "the Trainer's schedule begins at 0",
    "token_draws": "tokens are drawn for each image, and anew for each draw of noise",
    "vae_input": "the image is normalised with OpenAI's mean and deviation and taken back with ImageNet's",
    "encoder_resize": "the denoiser's image is made smaller as a tensor, without antialiasing",
    "loader_crop": "the loader draws RandomResizedCrop with scale (.9, 1)",
    "normalise": "OpenAI's mean and deviation for every backbone",
    "align_by": "stage 1 runs the whole loss of stage 2",
    "denoiser": "the released sizes, FLUX's VAE, two projectors and an embedded guidance of 4",
    "target": "get_velocity, though the denoiser predicts noise",
    "prompt_mask": "the empty prompt is encoded with the tokenizer's attention mask",
    "noise_precision": "the latents are bfloat16 when noise is added",
    "augment_normalised": "the augmentation follows the normalisation",
    "accumulate": "stage 1 averages no gradient over its 8 processes, so a step is of the images of one",
    "shared_samples": "the loader is not prepared for several processes, and its seed is 0 in each",
    "lora_targets": "layers are named q, k, v, out_proj, fc1, fc2, which misses the packed matrix of the pooling",
    "steps": "the file for MetaCLIP says 100 000 steps, perhaps left over",
}


def compare_presets(one: str, other: str) -> str:
    """The differences of two presets, a setting a line: stage, name, both values, and why the released code differs."""
    lines, released = [], f"{one}-released" == other or f"{other}-released" == one
    for stage in sorted({*stages(one), *stages(other)}):
        having = [name for name in (one, other) if stage in stages(name)]
        if len(having) == 1:
            lines.append(f"stage {stage}: only {having[0]} has it")
            continue
        a, b = (asdict(preset(name, stage)) for name in having)
        for name in a:
            if a[name] != b[name]:
                why = f"  # {REASONS[name]}" if released and name in REASONS else ""
                lines.append(f"stage {stage}: {name}: {a[name]!r} -> {b[name]!r}{why}")
    return "\n".join(lines) or f"{one} and {other} have the same settings"

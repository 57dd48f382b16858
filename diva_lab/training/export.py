"""A tuned encoder for others: weights in two formats, and a model card.

    folder/open_clip/       for open_clip's `local-dir:` and `load_encoder`: weights, configuration, tokenizer
    folder/transformers/    for `CLIPModel` or `SiglipModel`: weights, image processor, tokenizer
    folder/README.md        the model card: preset, settings, data, run, versions, scores

LoRA is merged. No objective trains the text tower, so it is written as it was. The transformers tokenizer of a SigLIP
does what open_clip does to texts before its own tokenizer (small letters, no punctuation). open_clip also repairs
broken Unicode and HTML entities in texts of every model; the transformers tokenizer does not, so such a text may embed
otherwise there. Two more differences between the libraries stand on the card of the exports that they concern:
`differences`.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from diva_lab.models.encoders import Encoder
from diva_lab.models.formats import write_open_clip, write_transformers
from diva_lab.training.build import tuned_encoder
from diva_lab.training.presets import preset_name
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings

CROP = """\
transformers crops some images one pixel further left, or higher, than open_clip and diva-lab do. Its CLIP image
processor rounds half a pixel down, the others round it to the nearest even number. So it happens where the longer side,
once resized, exceeds the shorter one by 4k + 3 pixels: in an image of {wide} x {px} here, or of 640 x 427 at 224 px.
Measured with diva-lab's tiny CLIP, which takes 32 px, on 2700 pairs of images of 35 x 32: the mean cosine between the
two embeddings of an image is .84, the pair scores are 17.8 and 14.4 %, and 23 % of the pairs are decided otherwise. A
larger model, for which a pixel is a smaller share of the image, has not been measured. Compare scores of one library
with each other, not of both."""
TANH = """\
transformers and diva-lab compute GELU in this image tower by tanh, as its configuration says; open_clip, which has no
such setting, computes it exactly. In plain open_clip unit-length embeddings of images differ by about 1e-4 in their
largest difference (4e-5 to 2e-4, measured on models with random weights)."""
SCORES = ["benchmark", "set", "features", "metric", "n", "value", "low", "high"]  # of evaluate's csv, on the card


def new_folder(folder: Path) -> Path:
    """`folder`, if there is nothing there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; name a new folder")
    return folder


def save_encoder(encoder: Encoder, folder: str | Path) -> dict[str, Path]:
    """Write an encoder in both formats; the second where transformers computes the same: `transformers_kind`.

    Returns:
        The folders by format: "open_clip" and, if written, "transformers".

    Raises:
        FileExistsError: where `folder` holds something already; nothing is overwritten.
    """
    folder = new_folder(Path(folder))
    state = encoder.open_clip_state()
    written = {"open_clip": write_open_clip(folder / "open_clip", state, encoder.config, encoder.tokenizer)}
    with suppress(NotImplementedError):
        written["transformers"] = write_transformers(folder / "transformers", state, encoder.config, encoder.tokenizer)
    return written


def read_scores(run: Run, path: str | Path, mix: float = 1.0) -> pd.DataFrame:
    """The rows of a csv of `evaluate` whose encoder is this run at this mix, by whatever path; without categories.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not such a csv, or has no row of the run; says how to make one.
    """
    table = pd.read_csv(path)
    if missing := {"encoder", "category", *SCORES} - set(table):
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; expected a csv that diva_lab.evaluate wrote")
    at = "" if mix == 1 else f":{mix:g}"
    mine = table["encoder"].map(lambda name: Path(str(name)).name == run.id + at) & table["category"].eq("all")
    if not mine.any():
        raise ValueError(
            f"{path}: no row of encoder {run.id}{at}; diva-lab evaluate --encoder {run.folder}{at} --out {path} ..."
        )
    return table.loc[mine, SCORES]


def differences(config: dict, formats: Collection[str]) -> list[str]:
    """Paragraphs for the card: where open_clip and transformers compute otherwise with an encoder of this `config`."""
    px, resize = config["model_cfg"]["vision_cfg"]["image_size"], config["preprocess_cfg"].get("resize_mode")
    crop = [CROP.format(px=px, wide=px + 3)] if "transformers" in formats and resize != "squash" else []
    return crop + ([TANH] if config.get("timm_gelu") == "tanh" else [])


def model_card(
    run: Run, formats: list[str], measured: pd.DataFrame | None = None, mix: float = 1.0, notes: Sequence[str] = ()
) -> str:
    """Markdown: by which recipe the encoder was trained, on what, by which run, and what it scored.

    Args:
        run: of `tune`, `perturb` or `soup`; what it was evaluated on in training is on the card.
        formats: that lie beside the card.
        measured: rows of `read_scores`.
        mix: how far the weights lie from the original to the run's; what the run scored in training is of mix 1.
        notes: paragraphs, as of `differences`.
    """
    settings, facts, scores = run.settings, run.environment, run.evaluations()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    preset = preset_name(Settings.of(run)) or "none"
    lines = [
        f"# {settings['encoder']} tuned by {settings['objective']} on {settings['images']}",
        "",
        f"Preset: {preset}. Formats here: {', '.join(formats)}.",
        "",
        f"Run `{run.id}`, git {facts['git']}, {facts['time']}, {versions}.",
        "",
        *([f"Weights: original + {mix:g} (tuned - original), WiSE-FT (arXiv 2109.01903).", ""] if mix != 1 else []),
        *(line for note in notes for line in (note, "")),
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
    ]
    if len(scores) and mix == 1:
        first, last = scores.iloc[0], scores.iloc[-1]
        lines += [f"| measure | step {first['step']:.0f} | step {last['step']:.0f} |", "|---|---|---|"]
        lines += [f"| {name} | {first[name]:.4f} | {last[name]:.4f} |" for name in scores.columns if name != "step"]
        lines.append("")
    if measured is not None:
        lines += [f"| {' | '.join(SCORES)} |", "|---" * len(SCORES) + "|"]
        for *words, value, low, high in measured.itertuples(index=False):
            numbers = ("" if pd.isna(x) else f"{x:.4f}" for x in (value, low, high))
            lines.append(f"| {' | '.join([*map(str, words), *numbers])} |")
    elif not len(scores) or mix != 1:
        lines.append("Not evaluated.")
    return "\n".join(lines).rstrip() + "\n"


def export(run: Run, folder: str | Path, scores: str | Path | None = None, mix: float = 1.0) -> Path:
    """Write the encoder of a finished run of `tune`, `perturb` or `soup`, both formats and the card.

    Args:
        run: see above.
        folder: a new one.
        scores: a csv of `evaluate`, whose rows of this run go on the card.
        mix: as in `mix_weights`: 1 for the encoder as tuned.

    Raises:
        ValueError: for a run that is not finished, or of stage 1; for a csv without a row of it; for a wrong mix.
        FileExistsError: where `folder` holds something already.
    """
    if not run.done or run.settings.get("stage") not in ("tune", "perturb", "soup"):
        raise ValueError(f"{run.folder}: expected the folder of a finished run of tune(), perturb() or soup()")
    folder = new_folder(Path(folder))
    measured = read_scores(run, scores, mix) if scores else None
    encoder = tuned_encoder(run, mix=mix)
    written = save_encoder(encoder, folder)
    card = model_card(run, list(written), measured, mix, differences(encoder.config, written))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder

"""A tuned encoder for others: `python -m diva_lab.export runs/ID folder`.

    folder/open_clip/       for open_clip's `local-dir:` and `load_encoder`: weights, configuration, tokenizer
    folder/transformers/    for `CLIPModel` or `SiglipModel`: weights, image processor, tokenizer
    folder/README.md        a model card: settings, data, run, versions, scores

LoRA is merged, and the text tower, which no objective trains, is there as it was. What open_clip does to a SigLIP's
texts before its tokenizer (small letters, no punctuation) the transformers tokenizer does itself. What open_clip
repairs in texts for any model, broken Unicode and HTML's entities, it does not: such a text may embed otherwise there.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from diva_lab.encoders import Encoder
from diva_lab.formats import write_open_clip, write_transformers
from diva_lab.runs import Run
from diva_lab.training import tuned_encoder


def _free(folder: Path) -> Path:
    """`folder`, if there is nothing there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; name a new folder")
    return folder


def save_encoder(encoder: Encoder, folder: str | Path) -> dict[str, Path]:
    """Write an encoder in both formats; the second only where transformers computes the same (see `formats.kind_of`).

    Returns:
        The folders by format: "open_clip" and, if written, "transformers".

    Raises:
        FileExistsError: where `folder` holds something already; nothing is overwritten.
    """
    folder = _free(Path(folder))
    state = encoder.open_clip_state()
    written = {"open_clip": write_open_clip(folder / "open_clip", state, encoder.config, encoder.tokenizer)}
    with suppress(NotImplementedError):
        written["transformers"] = write_transformers(folder / "transformers", state, encoder.config, encoder.tokenizer)
    return written


def model_card(run: Run, formats: list[str]) -> str:
    """Markdown: what the encoder was trained for, on what, by which run, and what it scored."""
    settings, facts, scores = run.settings, run.environment, run.evaluations()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"# {settings['encoder']} tuned by {settings['objective']} on {settings['images']}",
        "",
        f"Formats here: {', '.join(formats)}. Run `{run.id}`, git {facts['git']}, {facts['time']}, {versions}.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
    ]
    if len(scores):
        first, last = scores.iloc[0], scores.iloc[-1]
        lines += [f"| measure | step {first['step']:.0f} | step {last['step']:.0f} |", "|---|---|---|"]
        lines += [f"| {name} | {first[name]:.4f} | {last[name]:.4f} |" for name in scores.columns if name != "step"]
    else:
        lines.append("Not evaluated.")
    return "\n".join(lines) + "\n"


def export(run: Run, folder: str | Path) -> Path:
    """Write the encoder of a finished run of `tune` or `perturb`, both formats and the card.

    Raises:
        ValueError: for a run that is not finished, or of stage 1.
        FileExistsError: where `folder` holds something already.
    """
    if not run.done or run.settings.get("stage") not in ("tune", "perturb"):
        raise ValueError(f"{run.folder}: expected the folder of a finished run of tune() or perturb()")
    folder = _free(Path(folder))
    written = save_encoder(tuned_encoder(run), folder)
    (folder / "README.md").write_text(model_card(run, list(written)))
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diva_lab.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of stage 2")
    parser.add_argument("folder", type=Path, help="new folder to write")
    args = parser.parse_args(argv)
    try:
        if not (args.run / "settings.json").is_file():
            raise FileNotFoundError(f"{args.run}: no run here; expected a folder with settings.json, as runs/ID")
        print(export(Run(args.run), args.folder))
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build data/emoji_pairs: minimal pairs of emoji from two freely licensed sets, in MMVP-VLM's layout.

    npm install --prefix DIR emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m tools.emoji_pairs --packages DIR/node_modules --out data/emoji_pairs

`data/emoji_pairs/pairs.csv` lists the pairs, which were chosen by eye: both sets show the difference between the two
names, and little else. Names are Unicode's, in lower case; where a character's name misleads ("white medium star" is
yellow), the short name of CLDR.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

from PIL import Image

from diva_lab.evaluation.emoji import EMOJI, EMOJI_SETS

IMAGES = "MLLM_VLM Images"
NOTICE = """# EmojiPairs: whose work this is

- `noto/`: Noto Emoji 2.048, copyright Google LLC, <https://github.com/googlefonts/noto-emoji>, Apache License 2.0
  (<https://www.apache.org/licenses/LICENSE-2.0>, and LICENSE at the root of this repository); its flags are in the
  public domain or otherwise exempt from copyright.
- `twemoji/`: Twemoji 16.0.1, copyright Twitter, Inc and other contributors, <https://github.com/jdecked/twemoji>,
  graphics under CC-BY 4.0 (<https://creativecommons.org/licenses/by/4.0/>).
- Names in `pairs.csv` and `Questions.csv`: Unicode, Inc., Unicode License v3 (<https://www.unicode.org/license.txt>).

Changed here: a selection, the 64 px pictures of the npm packages emoji-datasource-google and emoji-datasource-twitter
16.0.0 (MIT, copyright Cal Henderson) composited on white. Nobody named above endorses this use.
"""


def write_emoji_pairs(packages: str | Path, out: str | Path, table: str | Path = EMOJI / "pairs.csv") -> Path:
    """Write the pairs of `table` as `out`/noto and `out`/twemoji, each in MMVP-VLM's layout, and `out`/NOTICE.md.

    Row k of the table (pattern, name_1, name_2, unicode_1, unicode_2: code points as in emoji.json's `unified`) has
    the ids 2k-1 and 2k in both folders. Images keep the packages' 64 x 64 pixels, on white.

    Args:
        packages: folder that holds emoji-datasource-google and emoji-datasource-twitter, such as node_modules.
        out: folder to write; images of an earlier call are replaced.
        table: the list of pairs.

    Raises:
        FileNotFoundError: if a package is missing; names all that are.
        ValueError: if a package lacks an emoji of the table; nothing is written.
    """
    out, images = Path(out), find_images(Path(packages))
    with open(table, newline="", encoding="utf-8") as file:
        members = [
            (row["pattern"], row[f"name_{n}"], row[f"unicode_{n}"]) for row in csv.DictReader(file) for n in (1, 2)
        ]
    missing = sorted({f"{code} in {name}" for name in EMOJI_SETS for *_, code in members if code not in images[name]})
    if missing:
        raise ValueError(f"no image of {', '.join(missing)}")
    for name in EMOJI_SETS:
        shutil.rmtree(out / name / IMAGES, ignore_errors=True)
        for i, (pattern, _, code) in enumerate(members, 1):
            path = out / name / IMAGES / pattern / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            put_on_white(images[name][code]).save(path, optimize=True)
        rows = [(i, pattern, statement) for i, (pattern, statement, _) in enumerate(members, 1)]
        with open(out / name / "Questions.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("Question ID", "Type", "Statement"), *rows])
    (out / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    return out


def find_images(packages: Path) -> dict[str, dict[str, Path]]:
    """Set -> code points -> image file, of every emoji that the set's package in folder `packages` has an image of."""
    folders = {name: packages / f"emoji-datasource-{vendor}" for name, vendor in EMOJI_SETS.items()}
    missing = [str(folder) for folder in folders.values() if not (folder / "emoji.json").is_file()]
    if missing:
        raise FileNotFoundError(
            f"no emoji.json in {' nor in '.join(missing)}; expected the unpacked npm packages there"
        )
    images = {}
    for name, folder in folders.items():
        entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        paths = {entry["unified"]: folder / "img" / EMOJI_SETS[name] / "64" / entry["image"] for entry in entries}
        images[name] = {code: path for code, path in paths.items() if path.is_file()}
    return images


def put_on_white(path: Path) -> Image.Image:
    with Image.open(path) as file:
        image = file.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.emoji_pairs", description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="node_modules with both emoji-datasource packages")
    parser.add_argument("--out", type=Path, default=EMOJI, help="folder to write")
    args = parser.parse_args(argv)
    try:
        print(write_emoji_pairs(args.packages, args.out))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Small sets of masks that tests write, in the layouts of VOC, ADE20K and COCO-Stuff."""

from pathlib import Path

import numpy as np
from PIL import Image

from diva_lab.evaluation.mask_sets import SPLITS, UNUSED

SHOWN = {"voc": (0, 1, 20), "ade20k": (1, 2, 150), "coco-stuff": (0, 12, 181)}  # numbers in the masks that are written
VOID = {"voc": 255, "ade20k": 0, "coco-stuff": 255}


def numbers_of(layout: str, i: int, size: tuple[int, int]) -> np.ndarray:
    """A mask of four quarters: three of the numbers of `SHOWN`, turned by i, and one that does not count."""
    rows, columns = np.arange(size[0]) * 2 // size[0], np.arange(size[1]) * 2 // size[1]
    return np.roll([*SHOWN[layout], VOID[layout]], i)[2 * rows[:, None] + columns].astype(np.uint8)


def write_masks(root: Path, layout: str, counts: tuple[int, int] = (6, 5), size: tuple[int, int] = (48, 64)) -> Path:
    """A set with so many images to train on and to test; the colour of a pixel follows from its number."""
    colours = np.random.default_rng(0).integers(256, size=(256, 3), dtype=np.uint8)
    for split, count in zip(SPLITS[layout], counts, strict=True):
        folders = [root / kind / split for kind in ("images", "annotations")]
        if layout == "voc":
            folders = [root / "JPEGImages", root / "SegmentationClass"]
            lists = root / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("".join(f"{split}_{i}\n" for i in range(count)))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            numbers = numbers_of(layout, i, size)
            Image.fromarray(colours[numbers]).save(folders[0] / f"{split}_{i}.jpg", quality=95, subsampling=0)
            mask = Image.fromarray(numbers)
            if layout == "voc":
                mask.putpalette(colours.tobytes())
            mask.save(folders[1] / f"{split}_{i}.png")
    if layout == "ade20k":
        rows = [f"{k}\t0.1\t1\t1\t0\tthing {k}, synonym {k}" for k in range(1, 151)]
        (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    if layout == "coco-stuff":
        unused = dict(zip((12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91), UNUSED, strict=True))
        names = ["unlabeled", *(unused.get(k, "wall-other" if k == 182 else f"label-{k}") for k in range(1, 183))]
        (root / "labels.txt").write_text("".join(f"{k}: {name}\n" for k, name in enumerate(names)))
    return root

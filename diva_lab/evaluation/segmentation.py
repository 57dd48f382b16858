"""What a patch token says of the class of its pixels: k-means, a linear head, and class names.

    k-means      as many clusters of the tokens as classes, matched to them one to one (Hungarian)
    linear       multinomial regression from a token to the most frequent class of its patch
    zero-shot    the class whose name is nearest to the patch's embedding (`Encoder.patch_embeddings`)

A patch is given one class, all its pixels are that class, and mIoU is read from one confusion matrix over the set: the
mean over the classes that occur of intersection over union, at the resolution of the model, after its resizing and
cropping. Beside it stand `oracle`, where each patch has its most frequent class: what this grid allows; and `position`,
the most frequent class of the training images at each place: what needs no image. Chance is the mean over shuffles of
the same answers among all patches. Published scores are of trained decoders on windows of the whole image, so that none
of them can be compared with these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from diva_lab.evaluation.features import prepare
from diva_lab.evaluation.image_sets import DEFAULT_TEMPLATES
from diva_lab.evaluation.mask_sets import MaskSet, load_masks, read_masks
from diva_lab.evaluation.patches import (
    BATCH,
    IGNORED,
    count_classes,
    paint_patches,
    read_layer,
    some_world_scenes,
)
from diva_lab.evaluation.probes import fit_probe
from diva_lab.evaluation.task import Task, benchmark, print_once, score_row
from diva_lab.evaluation.world import PROBE_TRAIN, WORLD, WORLD_SPLITS
from diva_lab.evaluation.zeroshot import TEMPLATES, class_embeddings
from diva_lab.models.encoders import Encoder, embed_patches
from diva_lab.statistics import average_precision, bootstrap_weights, percentiles
from diva_lab.world import CLASSES, PARTS, REGIONS, SMALL_PARTS

FITTED = 50_000  # patches that k-means and a linear head are fitted on at most, drawn by the seed
SHUFFLES = 10


@dataclass(frozen=True)
class Segmented:
    """Patch tokens of images, and what their patches show.

    Attributes:
        tokens: of one layer.
        maps: the class of each pixel, or `IGNORED`.
        counts: pixels of each class in every patch.
    """

    tokens: Float[Tensor, "n p width"]
    maps: UInt8[np.ndarray, "n px px"]
    counts: Int[np.ndarray, "n p c"]

    @property
    def labels(self) -> Int[np.ndarray, "n p"]:
        """The most frequent class of each patch; where no pixel counts it is class 0."""
        return self.counts.argmax(2)

    def draw(self, seed: int) -> tuple[Float[Tensor, "m width"], Int[np.ndarray, " m"]]:
        """At most `FITTED` tokens of patches in which pixels count, and their labels."""
        places = np.flatnonzero(self.counts.any(2))
        if len(places) > FITTED:
            places = np.sort(np.random.default_rng(seed).choice(places, FITTED, replace=False))
        return self.tokens.flatten(0, 1)[places], self.labels.ravel()[places]


# --- answers ----------------------------------------------------------------------------------------------------


def cluster_patches(found: Segmented, seed: int) -> Int[np.ndarray, "n p"]:
    """The cluster of each patch, by k-means on unit tokens with as many clusters as classes, if there are as many."""
    points = F.normalize(found.draw(seed)[0], dim=-1).numpy()
    means = KMeans(min(found.counts.shape[2], len(points)), n_init=5, random_state=seed).fit(points)
    parts = F.normalize(found.tokens.flatten(0, 1), dim=-1).split(FITTED)
    return np.concatenate([means.predict(part.numpy()) for part in parts]).reshape(found.tokens.shape[:2])


def match_clusters(clusters: Int[np.ndarray, "n p"], counts: Int[np.ndarray, "n p c"]) -> Int[np.ndarray, "n p"]:
    """Each cluster as the class that it is matched with, one to one, so that most pixels are right."""
    table = np.zeros((clusters.max() + 1, counts.shape[2]), np.int64)  # [clusters, classes]
    np.add.at(table, clusters.ravel(), counts.reshape(-1, counts.shape[2]))
    return linear_sum_assignment(table, maximize=True)[1][clusters]


def linear_answers(known: Segmented, found: Segmented, seed: int) -> Int[np.ndarray, "n p"]:
    """The class of each patch of `found` by a linear head that was fitted on `known`."""
    tokens, labels = known.draw(seed)
    if len(np.unique(labels)) == 1:
        return np.full(found.labels.shape, labels[0])
    return fit_probe(tokens, labels).predict(found.tokens.flatten(0, 1).numpy()).reshape(found.labels.shape)


# --- scores -----------------------------------------------------------------------------------------------------


def iou_counts(answers: Int[np.ndarray, "n p"], counts: Int[np.ndarray, "n p c"]) -> Int[np.ndarray, "n 3 c"]:
    """Of each image and class the pixels that are right, those that were answered so, and those that are so.

    They are the diagonal and the two margins of the image's confusion matrix.
    """
    chosen = answers[..., None] == np.arange(counts.shape[2])  # [n, p, c]
    right, answered = (chosen * counts).sum(1), (chosen * counts.sum(2, keepdims=True)).sum(1)
    return np.stack([right, answered, counts.sum(1)], axis=1)


def iou(sums: Int[np.ndarray, "*k 3 c"]) -> Float[np.ndarray, "*k c"]:
    """Intersection over union from the sums of `iou_counts`; NaN for a class that neither occurs nor was answered."""
    right, union = sums[..., 0, :], sums[..., 1, :] + sums[..., 2, :] - sums[..., 0, :]
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


def whole_iou(answers: Int[np.ndarray, "n p"], maps: UInt8[np.ndarray, "n px px"], classes: int) -> np.ndarray:
    """IoU [c] from one confusion matrix over the set, by torchmetrics, pixel by pixel."""
    metric = MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORED)
    for start in range(0, len(maps), BATCH):
        part = slice(start, start + BATCH)
        painted = torch.from_numpy(paint_patches(answers[part], maps.shape[1]))
        metric.update(painted, torch.from_numpy(maps[part].astype(np.int64)))
    return metric.compute().double().numpy()


def shuffle_answers(answers: Int[np.ndarray, "n p"], seed: int) -> list[Int[np.ndarray, "n p"]]:
    """The same answers among all patches, `SHUFFLES` times in another order."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(answers.ravel()).reshape(answers.shape) for _ in range(SHUFFLES)]


def miou_rows(
    metric: str, answers: Int[np.ndarray, "n p"], found: Segmented, names: Sequence[str], seed: int, chance=None
) -> Iterator[dict]:
    """Rows of the mean and of each class that occurs; intervals resample images, that is, their confusion matrices.

    Args:
        chance: answers by chance, in which case the mean of their scores is the level of chance; by default shuffled.
    """
    counts = iou_counts(answers, found.counts)  # [n, 3, c]
    values, there = whole_iou(answers, found.maps, len(names)), ~np.isnan(iou(counts.sum(0)))
    if chance is None:
        chance = shuffle_answers(answers, seed)
    random = np.array([iou(iou_counts(shuffled, found.counts).sum(0)) for shuffled in chance])  # [shuffles, c]
    drawn = bootstrap_weights(len(counts), seed) @ counts.reshape(len(counts), -1)
    drawn = iou(drawn.reshape(-1, *counts.shape[1:]))  # [draws, c]
    n, ends = len(counts), percentiles(np.nanmean(drawn, axis=1))
    yield score_row(metric, float(values[there].mean()), n, *ends, float(np.nanmean(random, axis=1).mean()))
    for k in np.flatnonzero(there):
        level = float(np.nan_to_num(random[:, k]).mean())
        yield score_row(metric, float(values[k]), n, *percentiles(drawn[:, k]), level, names[k])


def kmeans_rows(found: Segmented, names: Sequence[str], seed: int) -> Iterator[dict]:
    clusters = cluster_patches(found, seed)
    chance = [match_clusters(shuffled, found.counts) for shuffled in shuffle_answers(clusters, seed)]
    yield from miou_rows("miou, k-means", match_clusters(clusters, found.counts), found, names, seed, chance)


def linear_rows(known: Segmented, found: Segmented, names: Sequence[str], seed: int) -> Iterator[dict]:
    """The linear head's rows, and those of the position alone."""
    yield from miou_rows("miou, linear", linear_answers(known, found, seed), found, names, seed)
    usual = np.broadcast_to(known.counts.sum(0).argmax(1), found.labels.shape)  # [n, p]
    yield from miou_rows("miou, position", usual, found, names, seed)


def precision_rows(
    metric: str, scores: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], seed: int
) -> Iterator[dict]:
    """Average precision of patches' scores [n, p]: the mean, and a row for each name that is present in some patch."""
    names = [name for name, there in present.items() if there.any()]
    if not names:
        return
    n, chances = len(present[names[0]]), [float(present[name].mean()) for name in names]
    weights = np.vstack([np.ones(n, int), bootstrap_weights(n, seed)])
    values = np.array([average_precision(scores[name], present[name], weights) for name in names])  # [names, 1 + draws]
    mean = np.nanmean(values, axis=0)
    yield score_row(metric, mean[0], n, *percentiles(mean[1:]), float(np.mean(chances)))
    for name, own, chance in zip(names, values, chances, strict=True):
        yield score_row(metric, own[0], n, *percentiles(own[1:]), chance, name)


def zero_shot_rows(
    encoder: Encoder, images: UInt8[Tensor, "n 3 h w"], found: Segmented, names: Sequence[str], rest: bool,
    templates: Sequence[str], seed: int,
) -> Iterator[dict]:  # fmt: skip
    """mIoU by the nearest name, and for each name the average precision of the patches of which it is the class.

    Args:
        rest: whether class 0 is everything else: it is asked by the prompts without a name, which no class's precision
            depends on.
    """
    asked = ["", *names[1:]] if rest else names
    texts = class_embeddings(encoder, asked, templates).to(encoder.mean.device)

    def read(part: Tensor) -> Tensor:
        return encoder.patch_embeddings(part) @ texts.T

    similarity = embed_patches(read, images, encoder.mean.device, BATCH).numpy()  # [n, p, c]
    yield from miou_rows("miou, zero-shot", similarity.argmax(2), found, names, seed)
    first, labelled = int(rest), found.counts.any(2)
    margin = similarity[..., first:] - similarity[..., first:].mean(2, keepdims=True)
    present = {name: (found.labels == k) & labelled for k, name in enumerate(names) if k >= first}
    scores = {name: margin[..., k - first] for k, name in enumerate(names) if k >= first}
    yield from precision_rows("precision, zero-shot", scores, present, seed)


# --- sets of masks ----------------------------------------------------------------------------------------------


def segment(
    encoder: Encoder, images: UInt8[Tensor, "n 3 h w"], maps: np.ndarray, classes: int, layer: int
) -> Segmented:
    """Images and the class of each of their pixels, with the patch tokens of a layer."""
    tokens = read_layer(encoder, images, layer)
    return Segmented(tokens, maps, count_classes(maps, tokens.shape[1], classes))


def _load(task: Task, found: MaskSet, most: int) -> tuple[Tensor, Segmented]:
    """The set's images, at most `most` drawn by the seed (0 for all), and what they show."""
    encoder, n = task.encoder, len(found)
    chosen = np.arange(n)
    if 0 < most < n:
        chosen = np.sort(np.random.default_rng(task.seed).choice(n, most, replace=False))

    def cut(image: Image.Image, interpolation: str | None) -> np.ndarray:
        return prepare(image, encoder.px, interpolation or encoder.interpolation, encoder.squash)

    pixels, maps = load_masks(found, cut, chosen)
    if (maps == IGNORED).all():
        raise ValueError(
            f"{found.masks[chosen[0]].parent}: no pixel of any class in {len(chosen)} masks; expected some"
        )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return images, segment(encoder, images, maps, len(found.classes), task.layer)


def _training_set(task: Task, patches: int) -> Segmented | None:
    """The train split, as many images as hold `FITTED` patches; None, with a line, where there is none."""
    try:
        found = read_masks(task.folder, "train")
    except FileNotFoundError as error:
        print_once(f"{task.folder}: no linear head, nothing to fit it on: {error}")
        return None
    return _load(task, found, -(-FITTED // patches))[1]


@benchmark(data="masks", heeds=("max_images",), fixed={"features": "patches", "precision": "no"}, layer=True)
def segmentation(task: Task) -> Iterator[dict]:
    """k-means, a linear head and class names on a folder of masks; tokens are held in memory, see `max_images`."""
    test = read_masks(task.folder)
    task.tell_left_out(test.left_out)
    images, found = _load(task, test, task.max_images)
    names, train = test.classes, _training_set(task, found.tokens.shape[1])
    yield from kmeans_rows(found, names, task.seed)
    if train is not None:
        yield from linear_rows(train, found, names, task.seed)
    templates = [template.replace("{c}", "{}") for template in DEFAULT_TEMPLATES]
    yield from zero_shot_rows(task.encoder, images, found, names, test.rest, templates, task.seed)
    yield from miou_rows("miou, oracle", found.labels, found, names, task.seed)


# --- the tiny world ---------------------------------------------------------------------------------------------


def region_maps(parts: UInt8[np.ndarray, "n px px"]) -> UInt8[np.ndarray, "n px px"]:
    """`REGIONS` by number: the arrowhead is part of the body; ball, dots and tail count nowhere."""
    return _renumber({name: k for k, name in enumerate(REGIONS)} | {"arrowhead": REGIONS.index("body")})[parts]


def body_maps(parts: UInt8[np.ndarray, "n px px"], classes: np.ndarray) -> UInt8[np.ndarray, "n px px"]:
    """0 for sky, ground and sign, 1 + its class for a body with its arrowhead; ball, dots and tail count nowhere."""
    maps = _renumber({"sky": 0, "ground": 0, "sign": 0, "body": 1, "arrowhead": 1})[parts]
    return np.where(maps == 1, 1 + classes[:, None, None].astype(np.uint8), maps)


def _renumber(numbers: Mapping[str, int]) -> np.ndarray:
    return np.array([numbers.get(name, IGNORED) for name in PARTS], np.uint8)


def presence_rows(tokens: Sequence[Tensor], parts: Sequence[np.ndarray], seed: int) -> Iterator[dict]:
    """Is a small part in the patch? A linear head on the patch's token, and the position alone.

    Args:
        tokens, parts: of the training images and of the images asked.
    """
    counts = [count_classes(maps, tokens[0].shape[1], len(PARTS)) for maps in parts]
    known, asked = ({name: own[..., PARTS.index(name)] > 0 for name in SMALL_PARTS} for own in counts)
    heads, flat = {}, tokens[1].flatten(0, 1).numpy()
    chosen = np.random.default_rng(seed).permutation(known["ball"].size)[:FITTED]
    for name, there in known.items():
        probe = fit_probe(tokens[0].flatten(0, 1)[chosen], there.ravel()[chosen])
        heads[name] = probe.decision_function(flat).reshape(asked[name].shape)
    yield from precision_rows("presence, linear", heads, asked, seed)
    usual = {name: np.broadcast_to(there.mean(0), asked[name].shape) for name, there in known.items()}
    yield from precision_rows("presence, position", usual, asked, seed)


@benchmark(data="nothing", fixed={"features": "patches", "precision": "no"}, layer=True)
def world_segmentation(task: Task) -> Iterator[dict]:
    """The same on the tiny world's regions and bodies, and the presence of its small parts in each patch."""
    keys = PROBE_TRAIN, WORLD_SPLITS["measure"][2]
    scenes, images = zip(*(some_world_scenes(task.encoder, key, task.layer) for key in keys), strict=True)
    parts = [WORLD.parts(own) for own in scenes]
    maps = [_at_model_size(region_maps(own), task.encoder) for own in parts]
    known, found = (segment(task.encoder, *own, len(REGIONS), task.layer) for own in zip(images, maps, strict=True))
    yield from kmeans_rows(found, REGIONS, task.seed)
    yield from linear_rows(known, found, REGIONS, task.seed)
    yield from miou_rows("miou, oracle", found.labels, found, REGIONS, task.seed)
    bodies, names = _at_model_size(body_maps(parts[1], scenes[1]["class"]), task.encoder), ("the rest", *CLASSES)
    named = Segmented(found.tokens, bodies, count_classes(bodies, found.tokens.shape[1], len(names)))
    yield from zero_shot_rows(task.encoder, images[1], named, names, True, TEMPLATES, task.seed)
    yield from miou_rows("miou, zero-shot's oracle", named.labels, named, names, task.seed)
    small = [_at_model_size(own, task.encoder) for own in parts]
    yield from presence_rows((known.tokens, found.tokens), small, task.seed)


def _at_model_size(maps: UInt8[np.ndarray, "n px px"], encoder: Encoder) -> UInt8[np.ndarray, "n px px"]:
    """Square maps at the size of the model's images, each pixel that of the nearest place."""
    nearest = ((np.arange(encoder.px) + 0.5) * maps.shape[1] / encoder.px).astype(int)
    return maps[:, nearest][:, :, nearest]

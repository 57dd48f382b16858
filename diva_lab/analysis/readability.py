"""Will feedback help, before hours are spent? Four two-way decisions per image of a minimal pair.

Each decision is between the image's own statement and its partner's, so chance is 50 %; a tie counts half.

    known      is L_rec lower under the right statement than under the wrong one? The denoiser as its own judge; an
               unCLIP decoder reads no statements.
    readable   does -dL/df, the gradient in the embedding f, point from the wrong statement to the right one?
    said       is f itself nearer to the right statement?
    seen       is an augmented view, without flips, nearer to its own image than to the partner's image?

`readable` of DIVA is what tuning by reconstruction can use: where it is at chance, what the denoiser knows reaches CLIP
as noise. Of f's own direction nothing is counted, since lengths do not move a similarity. `class` asks the same of the
own class's text, less the mean over all classes: what the feedback does to telling classes apart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diva_lab.images import augment
from diva_lab.machine import generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder, all_finite
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.diva import reconstruction
from diva_lab.objectives.step import Step
from diva_lab.statistics import bootstrap_mean
from diva_lab.training.build import make_step
from diva_lab.training.settings import Settings
from diva_lab.world import CLASSES, DETAILS, PATTERNS, World, caption, draw_pairs

DRAWS = 3  # of (t, eps) an image in each bin of the timesteps


@dataclass(frozen=True)
class MinimalPairs:
    """Minimal pairs in memory.

    Attributes:
        patterns: n names, such as `Color and Appearance`.
        images: uint8 [n, 2, 3, h, w].
        statements: n pairs of whole sentences, in the order of the images.
        classes: of each image [n, 2], indices into `class_texts`; None where they are not known.
        class_texts: a sentence a class.
    """

    patterns: Sequence[str]
    images: UInt8[Tensor, "n 2 3 h w"]
    statements: Sequence[tuple[str, str]]
    classes: Int[Tensor, "n 2"] | None = None
    class_texts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.patterns)

    def split(self, pairs: int) -> Iterator["MinimalPairs"]:
        """Parts of at most `pairs` pairs, none of a single one: it could not be contrasted."""
        starts = [k for k in range(0, len(self), pairs) if k == 0 or len(self) - k > 1]
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            part = slice(start, end)
            members = {name: getattr(self, name)[part] for name in ("patterns", "images", "statements")}
            yield replace(self, **members, classes=None if self.classes is None else self.classes[part])


def world_pair_scenes(each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The scenes [n, 2] of `each` minimal pairs of every detail, and the details [n]."""
    scenes = [draw_pairs(detail, each, (seed, k)) for k, detail in enumerate(DETAILS)]
    return np.concatenate(scenes), np.repeat(list(DETAILS), each)


def world_pairs_in_memory(each: int, seed: int, world: World | None = None) -> MinimalPairs:
    """`each` minimal pairs of every detail of the world, under MMVP's names of the nine patterns."""
    world = world or World()
    scenes, details = world_pair_scenes(each, seed)
    images = torch.from_numpy(world.render(scenes.reshape(-1))).permute(0, 3, 1, 2).unflatten(0, (-1, 2))
    statements = [tuple(caption(scene, (name,)) for scene in pair) for pair, name in zip(scenes, details, strict=True)]
    classes = torch.from_numpy(scenes["class"].astype(int))
    texts = [f"a photo of a {name}" for name in CLASSES]
    return MinimalPairs([PATTERNS[name] for name in details], images, statements, classes, texts)


# --- decisions --------------------------------------------------------------------------------------------------


def decide(scores: Float[Tensor, "n 2"]) -> Float[np.ndarray, " n"]:
    """The share of a pair's two images whose score is above zero; an exact zero counts half."""
    right = (scores > 0).double() + (scores == 0).double() / 2
    return right.mean(1).cpu().numpy()


def across(direction: Float[Tensor, "n 2 d"], f: Float[Tensor, "n 2 d"]) -> Float[Tensor, "n 2 d"]:
    """`direction` without its part along f."""
    u = F.normalize(f, dim=-1)
    return direction - (direction * u).sum(-1, keepdim=True) * u


def towards(
    gradient: Float[Tensor, "n 2 d"], direction: Float[Tensor, "n 2 d"], f: Float[Tensor, "n 2 d"]
) -> Float[Tensor, "n 2"]:
    """<-g, direction> without the part along f: above zero where a step down the gradient goes that way."""
    return -(gradient * across(direction, f)).sum(-1)


# --- gradients and losses ---------------------------------------------------------------------------------------


def embedding_gradients(objective: Callable[[Step], dict[str, Tensor]], step: Step, shift: Tensor) -> dict[str, Tensor]:
    """The gradient [m, d] in the embeddings of every term's sum over the images, without a pass through the encoder."""
    terms = objective(step)
    return {
        name: torch.autograd.grad(values.sum(), shift, retain_graph=k < len(terms) - 1)[0]
        for k, (name, values) in enumerate(terms.items())
    }


@torch.no_grad()
def statement_losses(step: Step, contexts: Sequence[Float[Tensor, "m l c"]]) -> Float[Tensor, "k m"]:
    """L_rec of m images under each of k statements, the mean over `settings.draws` draws of (t, eps), equal for all.

    Args:
        step: the images, and the denoiser.
        contexts: k times the m statements, as `denoiser.encode_text` gives them.
    """
    draws = step.settings.draws
    x_t, t, noise = step.draw_noisy(step.latents().repeat(draws, 1, 1, 1))
    losses = [reconstruction(step.denoiser.predict(x_t, t, c.repeat(draws, 1, 1)), noise) for c in contexts]
    return torch.stack(losses).unflatten(1, (draws, -1)).mean(1)


# --- the report -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instrument:
    """What is measured with, and how.

    Attributes:
        encoder, conditioner, denoiser: as training builds them; nothing of them is changed.
        settings: `draws` of (t, eps) an image in each bin; `parts` of DCR, flips and whatever else an objective reads.
        objectives: keys of `OBJECTIVES` whose gradients are read; of more than one term each term is.
        bins: equal parts of the timesteps, each measured alone.
        used: those whose gradients, and whose margins, are added up for the bin `all`.
    """

    encoder: Encoder
    conditioner: Conditioner
    denoiser: Denoiser
    settings: Settings = field(default_factory=lambda: Settings(objective="diva", draws=DRAWS))
    objectives: Sequence[str] = ("diva",)
    bins: int = 5
    used: Sequence[int] = (2, 3, 4)

    def measure(self, pairs: MinimalPairs, number: int) -> dict[tuple[str, str], np.ndarray]:
        """(measure, bin) -> its value for each of the pairs [n]; `number` of the batch, for the draws."""
        images = pairs.images.to(self.encoder.mean.device).float() / 255  # [n, 2, 3, h, w]
        texts = [[both[side] for both in pairs.statements] for side in (0, 1)]
        own = torch.stack([self.encoder.encode_text(part) for part in texts], dim=1).to(images.device)  # [n, 2, d]
        difference = own - own.flip(1)
        with torch.no_grad():
            f = torch.stack([self.encoder.features(part).embedding.float() for part in images.unbind(1)], dim=1)
        all_finite(f.flatten(0, 1), range(2 * len(pairs)), "images")
        out = self._static(images, f, difference, number)
        by_bin = {str(k): self._one_bin(images, texts, k, number) for k in range(self.bins)}
        by_bin["all"] = {name: sum(by_bin[str(k)][name] for k in self.used) for name in by_bin["0"]}
        towards_class = self._class_directions(pairs, images.device)
        for name, measured in by_bin.items():
            if "known" in measured:
                out["known", name] = decide(measured.pop("known"))
            for term, gradient in measured.items():
                out[f"readable: {term}", name] = decide(towards(gradient, difference, f))
                out[f"norm: {term}", name] = gradient.norm(dim=2).mean(1).cpu().numpy()
                if towards_class is not None:
                    out[f"class: {term}", name] = decide(towards(gradient, towards_class, f))
        return out

    def _static(self, images: Tensor, f: Tensor, difference: Tensor, number: int) -> dict[tuple[str, str], np.ndarray]:
        """The measures without a timestep."""
        unit, n = F.normalize(f, dim=2), len(images)
        views = augment(images.flatten(0, 1), generator("readability", "view", number), flips=False)
        with torch.no_grad():
            view = self.encoder.encode_image(views).unflatten(0, (n, 2))
        return {
            ("said", "all"): decide((unit * difference).sum(2)),
            ("seen", "all"): decide((view * (unit - unit.flip(1))).sum(2)),
            ("distance", "all"): difference.norm(dim=2).mean(1).cpu().numpy(),
        }

    def _one_bin(self, images: Tensor, texts: list[list[str]], k: int, number: int) -> dict[str, Tensor]:
        """`known`: the margins [n, 2], and of every term the gradients [n, 2, d]; equal draws for both images."""
        settings = replace(self.settings, timesteps=",".join(str(int(k == j)) for j in range(self.bins)))
        contexts = [] if self.denoiser.labelled else [self.denoiser.encode_text(part) for part in texts]
        sides = []
        for side, part in enumerate(images.unbind(1)):  # apart: the images of a contrast are of different pairs

            def start(part: Tensor = part) -> tuple[Step, Tensor]:
                shift = torch.zeros(len(part), self.encoder.dim, device=part.device, requires_grad=True)
                random = generator("readability", k, number)
                models = (self.encoder, self.conditioner, self.denoiser)
                return make_step(part, *models, random, settings, shift), shift

            found = {}
            if contexts:
                right, wrong = statement_losses(start()[0], (contexts[side], contexts[1 - side]))
                found["known"] = wrong - right
            for objective in self.objectives:
                for term, gradient in embedding_gradients(OBJECTIVES[objective], *start()).items():
                    found[objective if term in (objective, "rec") else f"{objective} {term}"] = gradient
            sides.append(found)
        return {name: torch.stack([found[name] for found in sides], dim=1) for name in sides[0]}

    def _class_directions(self, pairs: MinimalPairs, device: torch.device) -> Float[Tensor, "n 2 d"] | None:
        """The own class's text less the mean of all classes; None where the classes are not known."""
        if pairs.classes is None:
            return None
        texts = self.encoder.encode_text(list(pairs.class_texts)).to(device)
        return (texts - texts.mean(0))[pairs.classes.to(device)]


def readability(pairs: MinimalPairs, instrument: Instrument, batch: int = 8) -> pd.DataFrame:
    """All decisions on `pairs`, by pattern and timestep bin.

    Args:
        pairs: of the world, EmojiPairs, or an MMVP-VLM folder.
        batch: pairs at a time; a contrast is taken over as many images of different pairs.

    Returns:
        One row a measure, bin and pattern, and `mean`, the mean of the patterns: columns measure (`known`, `said`,
        `seen`, `readable: TERM`, `class: TERM`), bin (`all`, or 0 for the lowest noise), pattern, value, low, high
        (95 %, bootstrap over pairs), n (pairs). Beside them `norm: TERM`, the mean length of the gradient, and
        `distance`, |t_right - t_wrong|: a text tower that hardly parts two statements cannot be helped.
    """
    parts = [instrument.measure(part, number) for number, part in enumerate(pairs.split(batch))]
    rows = []
    for measure, name in parts[0]:
        values = np.concatenate([part[measure, name] for part in parts])
        rows += pair_rows(measure, name, values, pairs.patterns)
    return pd.DataFrame(rows)


def pair_rows(measure: str, name: str, values: Float[np.ndarray, " n"], patterns: Sequence[str]) -> list[dict]:
    """A row a pattern and one for their mean, with intervals over pairs."""
    groups = {pattern: values[np.array(patterns) == pattern] for pattern in dict.fromkeys(patterns)}
    rows = []
    for pattern, members in [*((key, [group]) for key, group in groups.items()), ("mean", list(groups.values()))]:
        low, high = bootstrap_mean(members)
        value = float(np.mean([member.mean() for member in members]))
        low, high = min(low, value), max(high, value)  # where all are equal, rounding may put it outside
        rows.append({"measure": measure, "bin": name, "pattern": pattern, "value": value, "low": low, "high": high,
                     "n": sum(map(len, members))})  # fmt: skip
    return rows


# --- what a run did to the embeddings ---------------------------------------------------------------------------


def common_shift(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> tuple[float, Float[Tensor, " d"]]:
    """The share of the squared shift of n embeddings that all have in common, |mean|^2 / mean |.|^2, and it."""
    moved = after - before
    mean = moved.mean(0)
    total = moved.square().sum(1).mean()
    return (mean.square().sum() / total).item() if total else 0.0, mean

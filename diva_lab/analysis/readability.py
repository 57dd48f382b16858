"""Will feedback help, before hours are spent? Four two-way decisions per image of a minimal pair.

Each decision is between the image's own statement and its partner's, so chance is 50 %; a tie counts half.

    known      is L_rec lower under the right statement than under the wrong one? The denoiser as its own judge.
    readable   does -dL/df, the gradient in the embedding f, point from the wrong statement to the right one?
    said       is f itself nearer to the right statement?
    seen       is an augmented view, without flips, nearer to its own image than to the partner's image?

`readable` of DIVA is what tuning by reconstruction can use: where it is at chance, what the denoiser knows reaches CLIP
as noise. Of f's own direction nothing is counted, since lengths do not move a similarity. `class` asks the same of the
own class's text, less the mean over all classes: what the feedback does to telling classes apart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
from diva_lab.models.encoders import Encoder
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.diva import reconstruction
from diva_lab.objectives.step import Step
from diva_lab.statistics import bootstrap_mean
from diva_lab.training.build import make_step
from diva_lab.training.settings import Settings
from diva_lab.world import CLASSES, DETAILS, PATTERNS, World, caption, draw_pairs

MEASURES = ("known", "readable", "said", "seen", "class")


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
        """Parts of at most `pairs` pairs."""
        for k in range(0, len(self), pairs):
            part = slice(k, k + pairs)
            classes = None if self.classes is None else self.classes[part]
            yield replace(
                self,
                patterns=self.patterns[part],
                images=self.images[part],
                statements=self.statements[part],
                classes=classes,
            )


def world_pairs_in_memory(each: int, seed: int, world: World | None = None) -> MinimalPairs:
    """`each` minimal pairs of every detail of the world, under MMVP's names of the nine patterns."""
    world = world or World()
    scenes = np.concatenate([draw_pairs(detail, each, (seed, k)) for k, detail in enumerate(DETAILS)])  # [n, 2]
    details = np.repeat(list(DETAILS), each)
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


def across(direction: Float[Tensor, "m d"], f: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """`direction` without its part along f."""
    u = F.normalize(f, dim=-1)
    return direction - (direction * u).sum(-1, keepdim=True) * u


def towards(
    gradient: Float[Tensor, "m d"], direction: Float[Tensor, "m d"], f: Float[Tensor, "m d"]
) -> Float[Tensor, " m"]:
    """<-g, direction> without the part along f: above zero where a step down the gradient goes that way."""
    return -(gradient * across(direction, f)).sum(-1)


def swap(x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """The same of each image's partner: rows 2k and 2k + 1 are a pair."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


# --- gradients and losses ---------------------------------------------------------------------------------------


def embedding_gradients(objective: Callable[[Step], dict[str, Tensor]], step: Step, shift: Tensor) -> dict[str, Tensor]:
    """The gradient [m, d] in the embeddings of every term's sum over the images, without a pass through the encoder."""
    terms = objective(step)
    return {
        name: torch.autograd.grad(values.sum(), shift, retain_graph=k < len(terms) - 1)[0]
        for k, (name, values) in enumerate(terms.items())
    }


@torch.no_grad()
def statement_margins(
    denoiser: Denoiser, step: Step, right: Float[Tensor, "m l c"], wrong: Float[Tensor, "m l c"]
) -> Float[Tensor, " m"]:
    """L_rec under the wrong statement less that under the right one, means over `settings.draws` draws of (t, eps)."""
    draws = step.settings.draws
    x_t, t, noise = step.draw_noisy(step.latents().repeat(draws, 1, 1, 1))
    losses = [reconstruction(denoiser.predict(x_t, t, c.repeat(draws, 1, 1)), noise) for c in (right, wrong)]
    return (losses[1] - losses[0]).view(draws, -1).mean(0)


# --- the report -------------------------------------------------------------------------------------------------


def readability(
    pairs: MinimalPairs,
    encoder: Encoder,
    conditioner: Conditioner,
    denoiser: Denoiser,
    settings: Settings | None = None,
    objectives: Sequence[str] = ("diva",),
    bins: int = 0,
    batch: int = 32,
) -> pd.DataFrame:
    """All decisions on `pairs`, by pattern.

    Args:
        pairs: of the world, EmojiPairs, or an MMVP-VLM folder.
        encoder, conditioner, denoiser: as training builds them; nothing of them is changed.
        settings: how t is drawn, `draws` of (t, eps) an image, `parts` of DCR, flips; default: 8 draws, high noise.
        objectives: keys of `OBJECTIVES` whose gradients are read; of more than one term each term is.
        bins: equal parts of the timesteps, measured one by one beside `settings.timesteps`; 0 for none.
        batch: pairs at a time; it is also what a contrast is taken over.

    Returns:
        One row a measure, bin and pattern, and `mean`, the mean of the patterns: columns measure (`known`, `said`,
        `seen`, `readable: TERM`, `class: TERM`), bin (`all`, or 0 for the lowest noise), pattern, value, low, high
        (95 %, bootstrap over pairs), n (pairs). Beside them `norm: TERM`, the median length of the gradient, and
        `distance`, |t_right - t_wrong|: a text tower that hardly parts two statements cannot be helped.
    """
    settings = settings or Settings(objective="diva", draws=8, timesteps="high-noise")
    kinds = {"all": settings.timesteps}
    kinds |= {str(k): ",".join(str(int(k == j)) for j in range(bins)) for k in range(bins)}
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    for number, part in enumerate(pairs.split(batch)):
        for name, kind in kinds.items():
            changed = replace(settings, timesteps=kind)
            measured = _measure(part, encoder, conditioner, denoiser, changed, objectives, number, name == "all")
            for measure, each in measured.items():
                values.setdefault((measure, name), []).append(each)
    rows = []
    for (measure, name), parts in values.items():
        rows += _rows(measure, name, pd.Series(np.concatenate(parts)), pd.Series(list(pairs.patterns)))
    return pd.DataFrame(rows)


def _measure(
    pairs: MinimalPairs,
    encoder: Encoder,
    conditioner: Conditioner,
    denoiser: Denoiser,
    settings: Settings,
    objectives: Sequence[str],
    number: int,
    whole: bool,
) -> dict[str, np.ndarray]:
    """Every measure of one part of the pairs, [n] each; those without a timestep only where `whole`."""
    device = encoder.mean.device
    images = pairs.images.flatten(0, 1).to(device).float() / 255  # [2n, 3, h, w]
    texts = [text for both in pairs.statements for text in both]
    own = encoder.encode_text(texts).to(device)  # [2n, d]
    difference = own - swap(own)
    with torch.no_grad():
        f = encoder.features(images).embedding.float()
    out: dict[str, np.ndarray] = {}

    def start(key: str) -> tuple[Step, Tensor]:
        shift = torch.zeros_like(f, requires_grad=True)
        random = generator("readability", key, number)
        return make_step(images, encoder, conditioner, denoiser, random, settings, shift), shift

    if whole:
        unit = F.normalize(f, dim=-1)
        with torch.no_grad():
            view = encoder.encode_image(augment(images, generator("readability", "view", number), flips=False))
        out["said"] = decide((unit * difference).sum(1).view(-1, 2))
        out["seen"] = decide((view * (unit - swap(unit))).sum(1).view(-1, 2))
        out["distance"] = difference.norm(dim=1).view(-1, 2).mean(1).cpu().numpy()
    step, _ = start("known")
    contexts = denoiser.encode_text(texts)
    wrong = contexts.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    out["known"] = decide(statement_margins(denoiser, step, contexts, wrong).view(-1, 2))
    for objective in objectives:
        for term, gradient in embedding_gradients(OBJECTIVES[objective], *start("known")).items():
            label = objective if term in (objective, "rec") else f"{objective} {term}"
            out[f"readable: {label}"] = decide(towards(gradient, difference, f).view(-1, 2))
            out[f"norm: {label}"] = gradient.norm(dim=1).view(-1, 2).mean(1).cpu().numpy()
            if pairs.classes is not None:
                classes = encoder.encode_text(list(pairs.class_texts)).to(device)
                centred = (classes - classes.mean(0))[pairs.classes.flatten().to(device)]
                out[f"class: {label}"] = decide(towards(gradient, centred, f).view(-1, 2))
    return out


def _rows(measure: str, name: str, values: pd.Series, patterns: pd.Series) -> list[dict]:
    """A row a pattern and one for their mean, with intervals over pairs."""
    groups = {pattern: group.to_numpy() for pattern, group in values.groupby(patterns.to_numpy(), sort=False)}
    rows = []
    for pattern, members in [*((key, [group]) for key, group in groups.items()), ("mean", list(groups.values()))]:
        low, high = bootstrap_mean(members)
        value = float(np.mean([member.mean() for member in members]))
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

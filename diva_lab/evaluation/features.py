"""Features of images on disk: computed once for each encoder and each content, decoded by workers.

A cache file's name is made of the encoder's weights and preprocessing, the precision, and the bytes of the images: a
renamed folder or run finds its features again, and a changed one does not.

Where DIVA's released code tests on MMVP-VLM, it reads more than the embedding (`global`) of some encoders:

    OpenAI             class+76patches     embedding + mean of 76 patch tokens, drawn with replacement for each image
    MetaCLIP, DFN@378  class+unit-patches  the same with all patch tokens, each token at unit length before
    SigLIP, DFN@224    global

Here every feature is brought to unit length at last. The released code leaves that out for DFN@378 alone.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from diva_lab import messages
from diva_lab.evaluation.image_sets import decode_image
from diva_lab.image_files import Place, content_hash
from diva_lab.machine import fast_bf16
from diva_lab.models.encoders import Encoder, Features, all_finite
from diva_lab.models.vision import VisionEncoder
from diva_lab.models.weights import digest_weights
from diva_lab.paths import CACHE

LOADED = 256  # images that a worker hands over at once, however many go through the model together
PRECISIONS = ("auto", "no", "bf16")
PATCHES = 76  # that are drawn, as many as the prompt has tokens beside the first


def _global(features: Features) -> Tensor:
    return features.embedding


def _with_patches(features: Features) -> Tensor:
    return features.embedding + features.patches.mean(1)


def _with_unit_patches(features: Features) -> Tensor:
    return F.normalize(features.embedding, dim=-1) + F.normalize(features.patches, dim=-1).mean(1)


def _with_drawn_patches(features: Features, draw: Float[Tensor, "b k"]) -> Tensor:
    """`draw`: uniform in [0, 1), a patch token each."""
    index = (draw * features.patches.shape[1]).long()[..., None].to(features.patches.device)  # [b, k, 1]
    return features.embedding + torch.take_along_dim(features.patches, index, 1).mean(1)


FEATURES: dict[str, Callable[..., Tensor]] = {  # name -> [b, d] of what the visual tower gives
    "global": _global,
    "class+patches": _with_patches,
    "class+unit-patches": _with_unit_patches,
    "class+76patches": _with_drawn_patches,
}
DRAWS = {"class+76patches": 20}  # of the features that are drawn at random: how many draws are measured
UNIT_TOKENS = re.compile(r"metaclip|dfn.*378|378.*dfn", re.IGNORECASE)  # names of encoders


def features_for(kind: str, encoder: str) -> str:
    """The key of `FEATURES` for `class+patches` and the rest: MetaCLIP and DFN@378, by name, have unit tokens."""
    return "class+unit-patches" if kind == "class+patches" and UNIT_TOKENS.search(encoder) else kind


def prepare(image: Image.Image, px: int, interpolation: str, squash: bool, resized: int = 0) -> np.ndarray:
    """An image at a model's size, uint8 [px, px, 3]: as open_clip's own transform, but before it is normalised.

    `resized` is the length of the shorter side before the image is cropped; 0 for px.
    """
    if image.size != (px, px) or resized > px:
        mode = transforms.InterpolationMode(interpolation if interpolation != "random" else "bicubic")
        image = transforms.resize(image, [px, px] if squash else [resized or px], mode)
        image = transforms.center_crop(image, [px, px])
    return np.asarray(image)


class _Pictures(Dataset):
    def __init__(self, places: Sequence[Place], prepare: Callable):
        self.places, self.prepare = places, prepare

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return torch.from_numpy(decode_image(self.places[i], self.prepare).copy()).permute(2, 0, 1)
        except ValueError as error:
            return str(error)  # all of them are told at the end, not one per try


def _collate(items: list) -> tuple[Tensor | None, list[str]]:
    wrong = [item for item in items if isinstance(item, str)]
    return None if wrong else torch.stack(items), wrong


class FeatureStore:
    """Features of one encoder, kept on disk.

    Args:
        encoder: frozen; an `Encoder`, or a `models.vision.VisionEncoder`.
        cache: folder of the features; None keeps nothing.
        precision: `no` is float32; `bf16` is faster where the machine has it, and moves scores a little; `auto` is
            bf16 on a GPU that has it, and float32 on every CPU, so that a CPU's scores do not depend on its model.
        batch: the first to be tried; halved as often as memory runs out. None: 2048 on CUDA, else 256.
        workers: processes that decode; None: as many as there are cores, at most 8, on a GPU, else none.
    """

    def __init__(
        self,
        encoder: Encoder | VisionEncoder,
        cache: Path | None = CACHE / "features",
        precision: str = "no",
        batch: int | None = None,
        workers: int | None = None,
    ):
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; {messages.expected(precision, PRECISIONS)}")
        self.encoder, self.cache, self.device = encoder, cache, encoder.mean.device
        on_cuda = self.device.type == "cuda"
        self.precision = precision
        if precision == "auto":
            self.precision = "bf16" if on_cuda and fast_bf16(self.device) else "no"
        self.batch = batch or (2048 if on_cuda else 256)
        on_gpu = self.device.type != "cpu"
        self.workers = workers if workers is not None else min(8, cpu_count() or 1) if on_gpu else 0
        self._fingerprint = ""
        self.images, self.seconds, self.waited = 0, 0.0, 0.0  # embedded so far, in all, and without data

    @property
    def fingerprint(self) -> str:
        """A hash of the visual weights and of how images are prepared."""
        if not self._fingerprint:
            encoder = self.encoder
            facts = (encoder.px, encoder.interpolation, encoder.squash, encoder.mean.tolist(), encoder.std.tolist())
            weights = {n: value for n, value in encoder.open_clip_state().items() if n.startswith("visual.")}
            self._fingerprint = digest_weights(weights, repr((*facts, str(encoder.config), self.precision)).encode())
        return self._fingerprint

    def __call__(
        self, places: Sequence[Place], kind: str = "global", seed: int = 0, draw: int = 0
    ) -> Float[Tensor, "n d"]:
        """Unit-length features [n, d] of the images, in float32 on the CPU.

        Args:
            kind: a key of `FEATURES`.
            seed, draw: of features in `DRAWS`; all draws of a seed are computed and kept at once.

        Raises:
            ValueError: for an unknown kind; naming every image that cannot be read; for embeddings that are not finite.
        """
        if kind not in FEATURES:
            raise ValueError(f"unknown features {kind!r}; {messages.expected(kind, FEATURES)}")
        name, own = (f"draw {draw}", f"-s{seed}") if kind in DRAWS else ("features", "")
        if self.cache is None:
            return all_finite(self._embed(places, kind, seed)[name], places, "images")
        path = Path(self.cache) / f"{self.fingerprint}-{content_hash(places)}-{kind}{own}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{time.time_ns()}")
            save_file(self._embed(places, kind, seed), draft)
            draft.rename(path)  # whole or not at all
        with safe_open(path, "pt") as file:
            return all_finite(file.get_tensor(name), places, "images")

    @torch.no_grad()
    def _embed(self, places: Sequence[Place], kind: str, seed: int) -> dict[str, Float[Tensor, "n d"]]:
        """Name -> features: `features`, or `draw 0`, `draw 1` and so on."""
        facts = {name: getattr(self.encoder, name) for name in ("px", "interpolation", "squash", "resized")}
        own = partial(prepare, **facts)
        loader = DataLoader(
            _Pictures(places, own), min(self.batch, LOADED), collate_fn=_collate, num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        parts, held, wrong, start = [], [], [], time.perf_counter()
        draws = [torch.Generator().manual_seed(seed * max(DRAWS.values()) + k) for k in range(DRAWS.get(kind, 0))]
        batches = iter(loader)
        while True:
            waiting = time.perf_counter()
            images, unread = next(batches, (None, None))
            self.waited += time.perf_counter() - waiting
            if unread is None:
                break
            wrong += unread
            if images is not None and not wrong:
                held.append(images.to(self.device, non_blocking=True))
            if sum(map(len, held)) >= self.batch:
                parts.append(self._forward(torch.cat(held), kind, draws))
                held = []
        if held and not wrong:
            parts.append(self._forward(torch.cat(held), kind, draws))
        self.seconds += time.perf_counter() - start
        self.images += len(places)
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(places)} images cannot be read:\n- " + "\n- ".join(wrong))
        names = [f"draw {k}" for k in range(len(draws))] or ["features"]
        return {name: torch.cat([part[k] for part in parts]) for k, name in enumerate(names)}

    def _forward(self, images: Tensor, kind: str, draws: Sequence[torch.Generator]) -> Float[Tensor, "k b d"]:
        """One batch, in as many parts as memory asks for; k is the number of draws, or 1 where nothing is drawn."""
        chosen = [torch.rand(len(images), PATCHES, generator=draw) for draw in draws]
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        while True:
            try:
                with cast:
                    parts = zip(*(x.split(self.batch) for x in (images, *chosen)), strict=True)
                    found = torch.cat([self._read_tokens(kind, *part) for part in parts], 1)
                return F.normalize(found.float(), dim=-1).cpu()
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2

    def _read_tokens(self, kind: str, images: Tensor, *draws: Tensor) -> Float[Tensor, "k b d"]:
        features = self.encoder.features(images.float() / 255)
        return torch.stack([FEATURES[kind](features, *draw) for draw in zip(draws)] or [FEATURES[kind](features)])

"""Image encoders without text, such as DINOv2: folders and hub ids of transformers or timm, frozen.

They have what `evaluation.features.FeatureStore` asks of an encoder, so that their features are kept like CLIP's.
"""

from pathlib import Path

import timm
import torch
from jaxtyping import Float
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoImageProcessor

from diva_lab.models.encoders import Encoder, Features, fetch_folder, load_encoder
from diva_lab.models.weights import check_finite, load_transformers, read_json, reading, weight_files
from diva_lab.paths import DATA

VISION = {  # name -> folder or hub id
    "tiny-vision": str(DATA / "tiny" / "vision"),
    "dinov2-l14": "facebook/dinov2-with-registers-large",  # KUEA's
}
TIMM = "timm:"
WITH_TEXT = ("clip", "siglip", "siglip2")  # model types that `load_encoder` reads
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


class VisionEncoder(nn.Module):
    """A frozen image encoder.

    Args:
        model: of timm, or of transformers.
        prepare: how it takes images: `px`, the side of a square; `resized`, the shorter side before it is cropped;
            `mean`, `std`, `interpolation`.

    Attributes:
        squash: False; images are cropped.
    """

    squash = False

    def __init__(self, model: nn.Module, **prepare: object):
        super().__init__()
        self.model, self.config = model, prepare
        self.px, self.resized, self.interpolation = (prepare[name] for name in ("px", "resized", "interpolation"))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(prepare[name]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def features(self, images: Float[Tensor, "b 3 px px"]) -> Features:
        """The embedding and the patch tokens of images in [0, 1] of the model's size; differentiable.

        The embedding is timm's own, before its classes; of transformers' models `pooler_output`, or the first token
        where there is none.
        """
        pixels = (images - self.mean) / self.std
        if hasattr(self.model, "forward_features"):
            tokens = self.model.forward_features(pixels)
            return Features(self.model.forward_head(tokens, pre_logits=True), tokens)
        out = self.model(pixel_values=pixels)
        tokens, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
        return Features(tokens[:, 0] if pooled is None else pooled, tokens)

    def encode_image(self, images: Float[Tensor, "b 3 px px"]) -> Float[Tensor, "b d"]:
        """Embeddings of unit length."""
        return nn.functional.normalize(self.features(images).embedding, dim=-1)

    def open_clip_state(self) -> dict[str, Tensor]:
        """The weights, by names as those of an image tower."""
        return {f"visual.{name}": weight.detach().cpu() for name, weight in self.model.state_dict().items()}


def load_vision(name: str | Path, device: str | torch.device = "cpu") -> VisionEncoder | Encoder:
    """A frozen image encoder: one without text, or one of `load_encoder`.

    Args:
        name: a key of `VISION`, `timm:NAME`, a folder or a hub id of timm or of a transformers vision model; else as
            `load_encoder`.

    Raises:
        ValueError: for weights or settings that do not fit; as `load_encoder`.
        FileNotFoundError: as `load_encoder`.
    """
    name = VISION.get(str(name), str(name))
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), f"encoder {name!r}").to(device)
    folder, _ = fetch_folder(name)
    path = Path(folder, "config.json")
    settings = read_json(path) if path.is_file() and not Path(folder, "open_clip_config.json").exists() else {}
    if "architecture" in settings:
        return _from_timm(f"local-dir:{folder}", f"encoder {name!r}").to(device)
    if settings and settings.get("model_type") not in WITH_TEXT:
        return _from_transformers(folder, str(settings.get("model_type"))).to(device)
    return load_encoder(name, device)


def vision_files(name: str) -> dict[str, Path]:
    """The files of weights in a vision model's folder, by name; of timm's own names none.

    Raises:
        ValueError, FileNotFoundError: as `load_vision`.
    """
    name = VISION.get(name, name)
    return {} if name.startswith(TIMM) else weight_files(Path(fetch_folder(name)[0]))


def _from_timm(name: str, label: str) -> VisionEncoder:
    with reading(label):
        model = timm.create_model(name, pretrained=True, num_classes=0)
    check_finite(model.state_dict(), label)
    data = resolve_model_data_config(model)
    px = data["input_size"][-1]
    facts = {"mean": data["mean"], "std": data["std"], "interpolation": data["interpolation"]}
    return VisionEncoder(model, px=px, resized=int(px / data["crop_pct"]), **facts)


def _from_transformers(folder: str, model_type: str) -> VisionEncoder:
    if model_type not in CONFIG_MAPPING or not Path(folder, "preprocessor_config.json").is_file():
        raise ValueError(
            f"encoder {folder}: model type {model_type!r}; expected config.json of an image encoder that transformers "
            "knows, with preprocessor_config.json, which says size, mean and deviation"
        )
    model = load_transformers(MODEL_MAPPING[CONFIG_MAPPING[model_type]], folder)
    check_finite(model.state_dict(), folder)
    with reading(folder):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
        shorter = size.get("shortest_edge") or size["height"]
        facts = {"mean": processor.image_mean, "std": processor.image_std}
        interpolation = RESAMPLE[int(processor.resample)]
    return VisionEncoder(model, px=crop.get("height") or shorter, resized=shorter, interpolation=interpolation, **facts)

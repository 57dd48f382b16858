"""Small random models for tests, in the real formats of open_clip, transformers and Stable Diffusion.

And models of real size without weights, on the meta device.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva, _create_eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)  # fmt: skip

from diva_lab.models.encoders import ENCODERS
from diva_lab.world import World
from tools.pretrain import CONTEXT, clip_config, save_tokenizer


@register_model
def vit_small_patch8_siglip_32(pretrained: bool = False, **changes) -> VisionTransformer:
    """A SigLIP image tower of the real layout (no class token, attention pooling), for timm's registry."""
    sizes = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}
    sizes |= {"class_token": False, "global_pool": "map"}
    return _create_vision_transformer("vit_small_patch8_siglip_32", pretrained=pretrained, **sizes | changes)


EVA = {"patch_size": 8, "img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}
EVA["head_init_scale"] = 10  # with timm's own, .001, the output would be the bias alone


@register_model
def eva_small_patch8_32(pretrained: bool = False, **changes) -> Eva:
    """EVA-CLIP's first image tower (g, E): q, k and v in one matrix, their bias apart."""
    return _create_eva("eva_small_patch8_32", pretrained=pretrained, **EVA | changes)


@register_model
def eva02_small_patch8_32(pretrained: bool = False, **changes) -> Eva:
    """EVA-CLIP's second (B, L): q, k and v apart, SwiGLU, rotated positions, norms inside attention and MLP."""
    sizes = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    sizes |= {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    return _create_eva("eva02_small_patch8_32", pretrained=pretrained, **EVA | sizes | changes)


def unlike(model: torch.nn.Module) -> torch.nn.Module:
    """Draw all vectors at random, in place: zeros and ones would hide a weight in the wrong place."""
    for name, p in model.named_parameters():
        if p.ndim < 2 or "probe" in name:
            torch.nn.init.normal_(p, mean=p.mean().item(), std=0.1)
    return model


def write_transformers_clip(folder: Path, kind: str, act: str, seed: int = 0) -> Path:
    """A transformers folder of a two-layer CLIP or SigLIP: model, image processor, tokenizer."""
    save_tokenizer(folder)
    words = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 120}
    text = sizes | {
        "vocab_size": len(words), "max_position_embeddings": CONTEXT, "hidden_act": act,
        "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    vision = sizes | {"image_size": 32, "patch_size": 8, "hidden_act": act}
    torch.manual_seed(seed)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40))
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    else:
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 48}, vision_config=vision))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    unlike(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A two-layer open_clip model of width 64 with its tokenizer, as `local-dir:` reads it."""
    folder.mkdir(parents=True)
    save_tokenizer(folder)
    config = clip_config(World(), len(CLIPTokenizer.from_pretrained(folder)))
    config["model_cfg"]["embed_dim"] = 48
    config["model_cfg"]["vision_cfg"] |= {"layers": 2, "width": 64}
    config["model_cfg"]["text_cfg"] |= {"layers": 1, "width": 32, "heads": 2}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


HUGE = {  # MetaCLIP's and DFN's ViT-H: heads not 64 wide, three widths that differ
    "embed_dim": 40, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 80, "head_width": 40, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 48, "heads": 2},
}  # fmt: skip
CLIPA = {  # as its papers' models: no norm before the blocks, the mean of the patches, a text tower that looks ahead
    "vision_cfg": {"layers": 2, "width": 64, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2, "pool_type": "last", "no_causal_mask": True},
}  # fmt: skip


def timm_tower(name: str) -> dict:
    """open_clip's configuration of a CLIP whose image tower is a timm model that projects by itself, as EVA-CLIP."""
    tower = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None}
    text = {"layers": 1, "width": 32, "heads": 2}
    return {"embed_dim": 40, "custom_text": True, "vision_cfg": tower | {"image_size": 32}, "text_cfg": text}


def write_clip_of(folder: Path, model_cfg: dict, seed: int = 0, **preprocess_cfg) -> Path:
    """An open_clip folder of `model_cfg` and the vocabulary's settings, with OpenAI's normalisation by default."""
    folder.mkdir(parents=True)
    save_tokenizer(folder)
    words = clip_config(World(), len(CLIPTokenizer.from_pretrained(folder)))["model_cfg"]["text_cfg"]
    words = {key: words[key] for key in ("context_length", "vocab_size", "hf_tokenizer_name")}
    model_cfg = {"embed_dim": 48} | model_cfg | {"text_cfg": words | model_cfg["text_cfg"]}
    model_cfg["vision_cfg"] = {"image_size": 32, "patch_size": 8} | model_cfg["vision_cfg"]
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
    }
    preprocess |= {"resize_mode": "shortest"} | preprocess_cfg
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    model = unlike(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def small_vae(**changes) -> AutoencoderKL:
    sizes = {"block_out_channels": (8, 8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(**sizes | blocks | {"scaling_factor": 0.5} | changes)


def write_flux_vae(folder: Path, seed: int = 0) -> Path:
    """A small VAE in the folder `vae`, as FLUX.1's repository has it: 16 channels, its factors, no quant_conv."""
    torch.manual_seed(seed)
    changes = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    small_vae(**changes, use_quant_conv=False, use_post_quant_conv=False).save_pretrained(folder / "vae")
    return folder


UNET1 = {"attention_head_dim": 2}  # Stable Diffusion 1: so many heads everywhere
UNET2 = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}  # 2: of one width


def write_diffusion(folder: Path, seed: int = 0, prediction_type: str = "epsilon", unet: dict = UNET1) -> Path:
    """A Stable Diffusion folder of a few thousand weights: 32 px, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    save_tokenizer(folder / "tokenizer")
    small_vae().save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, norm_num_groups=8, **unet,
    ).save_pretrained(folder / "unet")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(CLIPTokenizer.from_pretrained(folder / "tokenizer")), hidden_size=24, intermediate_size=48,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=CONTEXT,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    DDPMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    return folder


def write_unclip(folder: Path, seed: int = 0, width: int = 48, **unet) -> Path:
    """A Stable unCLIP folder as diffusers writes it, for embeddings `width` wide."""
    labels = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * width}
    write_diffusion(folder, seed, "v_prediction", UNET2 | labels | unet)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    normalizer = StableUnCLIPImageNormalizer(width)
    torch.nn.init.normal_(normalizer.mean), torch.nn.init.uniform_(normalizer.std, 0.5, 2)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**vision, image_size=32, patch_size=8, projection_dim=width)
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
    ).save_pretrained(folder)
    return folder


def write_diffusion3(folder: Path, seed: int = 0) -> Path:
    """A Stable Diffusion 3 folder without T5: two text encoders, a flow transformer, latents shifted and scaled."""
    torch.manual_seed(seed)
    save_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=d, projection_dim=d, **text)) for d in (16, 24)]
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=16,
    )  # fmt: skip
    vae = small_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    parts = {"vae": vae, "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    for end, encoder in zip(("", "_2"), encoders, strict=True):
        parts |= {f"text_encoder{end}": encoder, f"tokenizer{end}": tokenizer}
    StableDiffusion3Pipeline(text_encoder_3=None, tokenizer_3=None, **parts).save_pretrained(folder)
    return folder


def on_meta(name: str) -> torch.nn.Module:
    """An open_clip model at its real size, without weights, by its name in `ENCODERS` or in open_clip."""
    with torch.device("meta"):  # open_clip's own `device` alone builds on the CPU first
        return open_clip.create_model(ENCODERS.get(name, (name,))[0], load_weights=False, device="meta")


WORDS = "USER ASSISTANT : ? . , ( ) a b c d A B C D yes no Yes No is the there star red green how many dots one two"
WORDS += " What is shown in this photo of a Please answer or Answer with option s letter from given choices directly"


def tiny_tokenizer(words: str = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and marks, for which case counts; no token of padding or of an image."""
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *words.split()])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_language(folder: Path, seed: int = 0, kind: str = "llama", **changes) -> Path:
    """A folder of a causal language model of two layers."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    if kind == "llama":
        sizes = {
            "max_position_embeddings": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        sizes |= {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    else:
        sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
        sizes |= {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
        model = GPT2LMHeadModel(GPT2Config(**sizes | changes))
    unlike(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_dinov2(folder: Path, mean: Sequence[float] = (0.5, 0.5, 0.5)) -> Path:
    """A folder of a DINOv2 with random weights, which resizes to 32 and crops to 28 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size, image_mean=list(mean), image_std=[0.2] * 3).save_pretrained(folder)
    return folder

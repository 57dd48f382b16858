import json
import shutil
from collections import Counter

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from one_step import open_lora, pictures, trainable
from small_models import HUGE, on_meta, timm_tower, write_clip_of
from torch import nn

from diva_lab.models.encoders import ENCODERS, Encoder, embed, embed_patches, load_encoder
from diva_lab.models.layers import (
    LAYER_KINDS,
    SHORT,
    SplitAttention,
    SplitLinear,
    block_name,
    fuse_attention,
    layer_kind,
    split_attention,
)
from diva_lab.models.lora import make_trainable, merge_lora, visual_weights

TEXTS = ["a photo of a disc", "a photo of a red star", ""]


@pytest.fixture(scope="module")
def small_siglip(small_clip, tmp_path_factory):
    """Folder of a small random model like SigLIP: a timm tower, attention pooling, mean and std .5, squash."""
    folder = tmp_path_factory.mktemp("models") / "siglip"
    shutil.copytree(small_clip, folder)
    (folder / "open_clip_model.safetensors").unlink()
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 64
    config["model_cfg"]["vision_cfg"] = {
        "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
        "image_size": 32,
    }  # fmt: skip
    config["preprocess_cfg"] |= {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def written(small_clip, small_siglip, tmp_path_factory):
    """Folders by their kind: OpenAI's layout, that of ViT-H, and timm towers of SigLIP, EVA-01 and EVA-02."""
    root = tmp_path_factory.mktemp("towers")
    folders = {"clip": small_clip, "siglip": small_siglip}
    folders["huge"] = write_clip_of(root / "huge", HUGE, resize_mode="squash")
    for name in ("eva", "eva02"):
        folders[name] = write_clip_of(root / name, timm_tower(f"{name}_small_patch8_32"))
    return folders


MODELS = ["clip", "siglip", "huge", "eva", "eva02"]


@pytest.fixture(scope="module", params=MODELS)
def folder(request, written):
    return written[request.param]


@pytest.fixture(scope="module")
def images():
    return pictures(5).float() / 255


def plain(folder) -> nn.Module:
    """The same folder as open_clip itself loads it."""
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()


def normalised(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    config = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


# --- the registry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_known_to_open_clip_or_a_folder(name):
    model, tag = ENCODERS[name]
    assert (model, tag) in open_clip.list_pretrained() if tag else model.startswith("local-dir:")


def test_an_unknown_encoder_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown encoder 'resnet'") as caught:
        load_encoder("resnet")
    assert all(name in str(caught.value) for name in ENCODERS)


def test_a_folder_without_weights_is_refused_saying_what_has_to_be_where(small_clip, tmp_path):
    shutil.copy(small_clip / "open_clip_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights") as caught:
        load_encoder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "create_model" not in str(caught.value)


def test_a_known_encoder_whose_folder_is_missing_is_refused_naming_the_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "tiny", (f"local-dir:{tmp_path / 'nowhere'}", None))
    with pytest.raises(FileNotFoundError, match="tiny") as caught:
        load_encoder("tiny")
    assert str(tmp_path / "nowhere") in str(caught.value) and "create_model" not in str(caught.value)


# --- the same numbers as open_clip ------------------------------------------------------------------------------


def test_image_embeddings_are_those_of_open_clip(folder, images):
    model = plain(folder)
    with torch.no_grad():
        expected = F.normalize(model.encode_image(normalised(model, images)), dim=-1)
    encoder = load_encoder(folder)
    torch.testing.assert_close(encoder.encode_image(images), expected, atol=1e-5, rtol=0)
    assert encoder.dim == expected.shape[1] and encoder.px == 32


def test_text_embeddings_are_those_of_open_clip(folder):
    model, tokenize = plain(folder), open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokenize(TEXTS)), dim=-1)
    torch.testing.assert_close(load_encoder(folder).encode_text(TEXTS), expected, atol=1e-5, rtol=0)


def test_patches_are_open_clips_tokens_after_the_last_norm_through_the_projection(small_clip, images):
    model = plain(small_clip)
    model.visual.output_tokens = True
    with torch.no_grad():
        _, tokens = model.visual(normalised(model, images))
        patches = load_encoder(small_clip).features(images).patches
        torch.testing.assert_close(patches, tokens @ model.visual.proj, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["eva", "eva02"])
def test_a_tower_that_projects_by_its_own_head_gives_patches_in_the_space_of_the_embedding(kind, written, images):
    model = plain(written[kind])
    trunk = model.visual.trunk
    assert isinstance(trunk.head, nn.Linear) and not len(model.visual.head)
    with torch.no_grad():
        tokens = trunk.head(trunk.forward_features(normalised(model, images)))  # the class token first
        features = load_encoder(written[kind]).features(images)
    torch.testing.assert_close(features.embedding, tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.patches, tokens[:, 1:], atol=1e-5, rtol=0)


def test_there_is_one_patch_token_for_each_patch_in_the_space_of_the_embedding(folder, images):
    encoder = load_encoder(folder)
    features = encoder.features(images)
    count = (32 // (16 if folder.name == "siglip" else 8)) ** 2
    assert features.embedding.shape == (5, encoder.dim) and features.patches.shape == (5, count, encoder.dim)


def test_the_last_layers_patch_tokens_become_the_patches_of_the_features(folder, images):
    encoder = load_encoder(folder)
    tokens, visual = encoder.tokens(images, -1), encoder.model.visual
    if hasattr(visual, "trunk"):
        projected = visual.head(visual.trunk.head(visual.trunk.fc_norm(visual.trunk.norm(tokens))))
    else:
        projected = encoder.proj(visual.ln_post(tokens))
    torch.testing.assert_close(projected, encoder.features(images).patches)
    assert torch.equal(encoder.tokens(images, encoder.depth), tokens)


def test_a_layer_that_the_tower_does_not_have_is_refused_saying_which_it_has(small_clip, images):
    encoder = load_encoder(small_clip)
    for layer in (0, 3, -3):
        with pytest.raises(ValueError, match=f"layer {layer}: the image tower has 2 blocks; expected 1 to 2, or -1"):
            encoder.tokens(images, layer)


def by_value_path(encoder, images) -> torch.Tensor:
    """The last block with the attention's output replaced by that of v and out alone, as written by hand."""
    visual = encoder.model.visual
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    attention = blocks[-1].attn

    def values(module, args, output):
        x = args[0]
        if isinstance(module, SplitAttention):
            return module.out_proj(module.v_proj(x)), None
        v = module.qkv.v(x) if module.qkv is not None else module.v_proj(x)
        if module.qkv is not None and getattr(module, "v_bias", None) is not None:
            v = v + module.v_bias
        return module.proj(module.norm(v))

    with attention.register_forward_hook(values):
        return F.normalize(encoder.features(images).patches, dim=-1)


def test_a_patch_embedding_is_the_path_through_the_values_of_the_last_attention(folder, images):
    encoder = load_encoder(folder)
    embeddings = encoder.patch_embeddings(images)
    if folder.name == "siglip":
        pool = encoder.model.visual.trunk.attn_pool
        x = pool.kv.v(encoder.model.visual.trunk.norm(encoder.tokens(images, -1)))
        x = pool.proj(x)
        expected = F.normalize(x + pool.mlp(pool.norm(x)), dim=-1)
    else:
        expected = by_value_path(encoder, images)
        assert not torch.allclose(embeddings, F.normalize(encoder.features(images).patches, dim=-1), atol=1e-3)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    assert embeddings.shape[2] == encoder.dim


def test_one_patch_changes_its_own_embedding_most(small_clip, images):
    encoder = load_encoder(small_clip)
    changed = images.clone()
    changed[:, :, :8, 8:16] = 0.5
    distance = 1 - (encoder.patch_embeddings(images) * encoder.patch_embeddings(changed)).sum(2)
    assert (distance.argmax(1) == 1).all()


def test_patch_tokens_that_are_not_finite_are_refused(small_clip):
    encoder = load_encoder(small_clip)
    encoder.proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the embeddings of 5 of 5 images are NaN or infinite"):
        embed_patches(encoder.patch_embeddings, pictures(5), encoder.mean.device, batch=2)
    tokens = embed_patches(encoder.tokens, pictures(5), encoder.mean.device, batch=2)
    torch.testing.assert_close(tokens, encoder.tokens(pictures(5).float() / 255))


def test_embeddings_are_float32_of_unit_length(folder, images):
    encoder = load_encoder(folder)
    for embedding in (encoder.encode_image(images), encoder.encode_text(TEXTS)):
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 100), (20, 17)])
def test_images_of_any_size_are_resized_to_the_models_own(folder, size):
    encoder = load_encoder(folder)
    out = encoder.preprocess(torch.rand(2, 3, *size))
    white = encoder.preprocess(torch.ones(1, 3, *size))
    assert out.shape == (2, 3, 32, 32)
    torch.testing.assert_close(white, ((1 - encoder.mean) / encoder.std).expand_as(white), atol=1e-4, rtol=0)


def test_a_wide_image_is_cropped_or_squashed_as_the_model_was_trained(written):
    wide = torch.zeros(1, 3, 32, 96)
    wide[..., 32:64] = 1
    for kind, share in (("clip", 1), ("siglip", 1 / 3), ("huge", 1 / 3)):
        encoder = load_encoder(written[kind])
        white = (encoder.preprocess(wide) * encoder.std + encoder.mean).mean().item()
        assert white == pytest.approx(share, abs=0.02)


def test_embed_gives_the_same_in_any_batches_without_a_gradient(small_clip):
    encoder, images = load_encoder(small_clip), pictures(10)
    make_trainable(encoder, rank=0)
    whole = embed(encoder, images)
    assert not whole.requires_grad and whole.device.type == "cpu"
    torch.testing.assert_close(embed(encoder, images, batch=3), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.encode_image(images.float() / 255).detach(), whole, atol=1e-6, rtol=0)


def test_a_loaded_encoder_is_frozen_and_in_evaluation_mode(folder):
    encoder = load_encoder(folder)
    assert not trainable(encoder) and not any(module.training for module in encoder.modules())


# --- split attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("n", [7, SHORT + 3])  # by plain softmax, by the fused kernel
def test_split_attention_equals_multihead_attention(batch_first, masked, n):
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
    nn.init.normal_(packed.in_proj_bias)
    nn.init.normal_(packed.out_proj.bias)
    x = torch.randn(2, n, 32) if batch_first else torch.randn(n, 2, 32)
    mask = torch.full((n, n), -torch.inf).triu(1) if masked else None
    expected = packed(x, x, x, need_weights=False, attn_mask=mask)[0]
    split = SplitAttention(packed)
    torch.testing.assert_close(split(x, x, x, attn_mask=mask)[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(split.pack()(x, x, x, attn_mask=mask)[0], expected, atol=1e-6, rtol=0)


def test_fusing_undoes_splitting(small_clip):
    tower, original = plain(small_clip).visual, plain(small_clip).visual.state_dict()
    assert not any(isinstance(m, nn.MultiheadAttention) for m in split_attention(tower).modules())
    fused = fuse_attention(tower).state_dict()
    assert list(fused) == list(original) and all(torch.equal(fused[name], w) for name, w in original.items())


def test_a_packed_projection_that_timm_reads_past_its_layer_is_split_and_fused_again(written, images):
    model = plain(written["eva"])
    names, expected = list(model.state_dict()), model.encode_image(normalised(model, images))
    attention = model.visual.trunk.blocks[0].attn
    assert attention.q_bias.abs().sum() > 0 and not attention.qkv_bias_separate
    split_attention(model.visual)
    assert isinstance(attention.qkv, SplitLinear)
    torch.testing.assert_close(model.encode_image(normalised(model, images)), expected, atol=1e-5, rtol=0)
    fuse_attention(model.visual)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.encode_image(normalised(model, images)), expected, atol=1e-5, rtol=0)


# --- training and going back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_only_the_visual_tower_is_opened_for_training(folder, rank, bias):
    encoder = load_encoder(folder)
    make_trainable(encoder, rank, bias=bias)
    opened = trainable(encoder)
    assert opened and all(name.startswith(("model.visual.", "proj.")) for name in opened)
    if rank:
        adapted = [name for name in dict(encoder.named_parameters()) if name.endswith("base_layer.bias")]
        assert adapted and {name for name in opened if "lora_" not in name} == set(adapted if bias else ())
    else:
        assert set(opened) == set(visual_weights(encoder))


def test_lora_reaches_every_matrix_of_the_tower(folder):
    encoder = load_encoder(folder)
    linears = [name for name, m in encoder.named_modules() if isinstance(m, nn.Linear) and "model.transf" not in name]
    linears = [name for name in linears if name == "proj" or name.startswith("model.visual.")]
    make_trainable(encoder, rank=4)
    opened = trainable(encoder)
    assert {n for n in opened if "lora_" in n} == {
        f"{name}.lora_{ab}.default.weight" for name in linears for ab in "AB"
    }
    if folder.name == "clip":
        assert len(linears) == 2 * 6 + 1  # q, k, v, out, two of the MLP; the projection


def test_every_lora_tensor_gets_a_gradient(folder, images):
    encoder = load_encoder(folder)
    make_trainable(encoder, rank=4)
    features = open_lora(encoder).features(images)
    (features.embedding.square().sum() + features.patches.square().sum()).backward()
    assert not [name for name, p in trainable(encoder).items() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize(
    ("name", "dim", "side", "blocks", "linears"),  # linears of a block; EVA-02's MLP has a gate
    [
        ("EVA02-L-14", 768, 16, 24, 7), ("EVA01-g-14", 1024, 16, 40, 6),
        ("ViT-SO400M-16-SigLIP2-384", 1152, 24, 27, 6),
    ],
)  # fmt: skip
def test_a_real_timm_tower_gives_its_features_and_lora_reaches_every_matrix_of_it(name, dim, side, blocks, linears):
    with torch.device("meta"):
        encoder = Encoder(on_meta(name), None)
        make_trainable(encoder, rank=16)
        features = encoder.features(torch.zeros(1, 3, encoder.px, encoder.px))
        tokens = encoder.tokens(torch.zeros(1, 3, encoder.px, encoder.px))
    assert encoder.depth == blocks and tokens.shape == (1, side**2, encoder.model.visual.trunk.embed_dim)
    assert features.embedding.shape == (1, dim) and features.patches.shape == (1, side**2, dim)
    head = 6 if "SigLIP" in name else 1  # attention pooling: q, k, v, out, two of its MLP; or the projection
    wanted = {f"block{i}": 2 * linears for i in range(blocks)} | {"head": 2 * head}  # A and B
    assert Counter(block_name(name) for name in trainable(encoder) if "lora_" in name) == wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [("RN50", "ModifiedResNet"), ("convnext_base", "ConvNeXt"), ("coca_ViT-B-32", "VisionTransformer")],
)
def test_an_image_tower_whose_patches_are_in_another_space_is_refused_naming_it(name, kind):
    with torch.device("meta"), pytest.raises(ValueError, match=f"image tower {kind}.*expected a plain ViT"):
        Encoder(on_meta(name), None)


def test_new_lora_changes_nothing_and_its_seed_decides_its_weights(small_clip, images):
    encoders = [load_encoder(small_clip) for _ in range(3)]
    before, state = encoders[0].encode_image(images), torch.get_rng_state()
    for encoder, seed in zip(encoders, (1, 1, 2), strict=True):
        make_trainable(encoder, rank=4, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(encoders[0].encode_image(images).detach(), before, atol=1e-6, rtol=0)
    one, same, other = (torch.cat([p.flatten() for p in trainable(e).values()]) for e in encoders)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_lora_leaves_the_text_tower_as_it_is(small_clip):
    encoder = load_encoder(small_clip)
    before = encoder.encode_text(TEXTS)
    make_trainable(encoder, rank=4)
    assert torch.equal(open_lora(encoder).encode_text(TEXTS), before)


def test_merging_lora_keeps_the_embeddings_and_removes_every_trace_of_it(folder, images):
    encoder = load_encoder(folder)
    names, before = list(encoder.state_dict()), encoder.encode_image(images)
    make_trainable(encoder, rank=4)
    tuned = open_lora(encoder, 0.1).encode_image(images).detach()
    assert (tuned - before).abs().max() > 1e-3
    torch.testing.assert_close(merge_lora(encoder).encode_image(images).detach(), tuned, atol=1e-5, rtol=0)
    assert list(encoder.state_dict()) == names


@pytest.mark.parametrize("rank", [None, 0, 4])
def test_open_clip_loads_the_state_and_gives_the_same_embeddings(folder, images, rank):
    encoder = load_encoder(folder)
    if rank is not None:
        make_trainable(encoder, rank)
        open_lora(encoder, 0.1)
    expected = encoder.encode_image(images).detach(), encoder.encode_text(TEXTS)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    model.load_state_dict(encoder.open_clip_state(), strict=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        embeddings = model.encode_image(normalised(model, images)), model.encode_text(tokens)
    for one, two in zip(embeddings, expected, strict=True):
        torch.testing.assert_close(F.normalize(one, dim=-1), two, atol=1e-5, rtol=0)


def test_taking_the_state_keeps_the_embeddings(small_clip, images):
    encoder = load_encoder(small_clip)
    make_trainable(encoder, rank=4)
    open_lora(encoder)
    before = encoder.encode_image(images).detach()
    encoder.open_clip_state()
    torch.testing.assert_close(encoder.encode_image(images).detach(), before, atol=1e-6, rtol=0)


def test_every_weight_is_of_a_kind(folder):
    encoder = load_encoder(folder)
    kinds = {layer_kind(name) for name in visual_weights(encoder)}
    assert kinds == {*LAYER_KINDS, "projection"} if folder.name == "clip" else kinds <= {*LAYER_KINDS, "projection"}
    for kind in ("q", "k", "v"):
        assert layer_kind(f"model.visual.transformer.resblocks.3.attn.{kind}_proj.lora_A.default.weight") == kind
        assert layer_kind(f"model.visual.trunk.blocks.3.attn.qkv.{kind}.weight") == kind
    named = {"attn.out_proj": "out", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2", "ln_1": "norm"}
    named |= {"attn.proj": "out", "mlp.fc1": "fc1", "mlp.fc2": "fc2", "norm1": "norm", "attn.q_norm": "norm"}
    assert all(layer_kind(f"model.visual.trunk.blocks.0.{name}.weight") == kind for name, kind in named.items())


def test_every_weight_belongs_to_a_block(folder):
    encoder = load_encoder(folder)
    blocks = {block_name(name) for name in visual_weights(encoder)}
    assert {"stem", "head", "block0", "block1"} <= blocks
    assert all(block in ("stem", "head") or block.removeprefix("block").isdigit() for block in blocks)
    assert block_name("model.visual.transformer.resblocks.11.attn.out_proj.lora_A.default.weight") == "block11"
    assert not [name for name in visual_weights(encoder) if "patch_embed" in name and block_name(name) != "stem"]
    assert block_name("model.visual.trunk.fc_norm.weight") == "head"
    assert block_name("proj.lora_B.default.weight") == "head" and block_name("model.visual.conv1.weight") == "stem"
    assert np.all([block_name(name) == "head" for name in visual_weights(encoder) if "ln_post" in name])

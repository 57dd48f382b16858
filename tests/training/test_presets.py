import copy
import csv
import functools
import json
import math
from collections import Counter
from dataclasses import asdict, replace
from unittest import mock

import nbformat
import open_clip
import pandas as pd
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from small_models import on_meta

from diva_lab import figures
from diva_lab.benchmark import COMPONENTS, SCALES, build_models
from diva_lab.cli import main
from diva_lab.image_files import find_tars
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.encoders import ENCODERS, Encoder
from diva_lab.models.flow import Light
from diva_lab.models.layers import block_name
from diva_lab.models.lora import make_trainable
from diva_lab.models.registry import LIGHT
from diva_lab.paths import DATA, ROOT
from diva_lab.training.presets import (
    BACKBONES,
    CC3M_SHARDS,
    PRESETS,
    PX,
    compare_presets,
    describe_presets,
    parse_changes,
    preset,
    preset_name,
    replace_settings,
    stages,
)
from diva_lab.training.runs import list_runs
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, align_preset, tune
from diva_lab.workbook.notebooks import NOTEBOOKS, declared_parameters
from diva_lab.workbook.parameters import INJECTED
from diva_lab.world import draw_scenes
from tools.write_presets import PRESET_FILES, write_presets

TABLE = list(csv.DictReader((DATA / "published" / "recipes.csv").read_text().splitlines()))


def test_the_presets_are_of_the_papers_eight_backbones_and_no_encoder_beside_them():
    assert BACKBONES == (
        "openai-l14", "openai-l14-336", "metaclip-l14", "metaclip-h14", "siglip-so400m", "siglip-so400m-384",
        "dfn-h14", "dfn-h14-378",
    )  # fmt: skip
    assert set(BACKBONES) < ENCODERS.keys() and {backbone for backbone, _ in PRESETS.values()} == set(BACKBONES)


def has_row(backbone: str, row: dict[str, str]) -> bool:
    mine = row["backbones"].split() or [backbone.split("-")[0]]
    return f"{backbone}-{row['recipe']}" in PRESETS and backbone.split("-")[0] in mine


@pytest.mark.parametrize(
    ("backbone", "row"),
    [(name, row) for name in BACKBONES for row in TABLE if has_row(name, row)],
    ids=lambda part: part if isinstance(part, str) else f"{part['recipe']}-stage{part['stage']}",
)
def test_a_preset_has_the_numbers_of_the_published_recipe(row, backbone):
    processes = int(row["processes"] or 8)
    found = asdict(preset(f"{backbone}-{row['recipe']}", int(row["stage"]), processes))
    numbers = ("steps", "lr", "weight_decay", "warmup", "batch", "accumulate", "lora_rank", "clip", "draws")
    for name in (*numbers, "lora_alpha", "lora_dropout", "vae_px"):
        if row[name]:
            assert found[name] == float(row[name]), name
    for name in ("optimizer", "schedule", "precision", "latent"):
        assert found[name] == row[name] or not row[name], name
    assert found["lora_bias"] == (row["lora_bias"] == "lora_only") or not row["lora_bias"]
    images = 640 if row["recipe"].startswith("diva") else 256 if processes == 8 else 32
    assert found["batch"] * found["accumulate"] * processes == images
    assert found["train_projector"] == ("projector" in row["trained"] and row["stage"] == "2")


def test_divas_optimizer_has_the_published_momentum(tmp_path):
    (row,) = (row for row in TABLE if row["recipe"] == "diva")
    run = tune(replace_settings(preset("openai-l14-diva"), TINY), tmp_path)
    (group,) = run.resume()["optimizer"]["param_groups"]
    assert group["momentum"] == float(row["momentum"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_settings_whatever_it_saw_and_however_it_was_computed(name):
    settings = replace(preset(name, processes=2), images="world", seed=3, projector="runs/align-0", rows=1)
    assert preset_name(settings) == name
    assert preset_name(replace(settings, lr=2 * settings.lr)) == ""


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_sees_as_many_pictures_however_many_processes_share_it(name):
    sizes = {s.batch * s.accumulate * n for n in (1, 2, 4, 8) for s in [preset(name, processes=n)]}
    assert sizes == {640 if PRESETS[name][1] in ("diva", "diva-released") else 256}


def test_the_released_dcr_aligns_by_the_pictures_of_one_process():
    """Its stage 1 calls the projector past the wrapper that averages gradients, and keeps the first process's."""
    for processes, accumulate in ((1, 2), (2, 1)):
        assert preset("siglip-so400m-dcr-released", 1, processes).accumulate == accumulate
        assert preset("siglip-so400m-dcr", 1, processes).accumulate == 8 * accumulate
    assert "stage 1: accumulate: 16 -> 2  # stage 1 averages" in compare_presets(
        "openai-l14-dcr", "openai-l14-dcr-released"
    )
    assert "#" not in compare_presets("openai-l14-diva-released", "openai-l14-dcr"), "two methods have no such reason"


def test_more_processes_than_share_a_step_of_stage_1_take_the_projector_of_another_run(tmp_path):
    name, changes = "openai-l14-dcr-released", {"images": "world"}
    with pytest.raises(ValueError, match=r"stage 1: 32 images a step cannot be shared by 8 processes.*--projector"):
        align_preset(name, tmp_path, 8, changes, changes)
    found = align_preset(name, tmp_path, 8, changes, changes | {"projector": "a run"})
    assert (found.projector, found.accumulate) == ("a run", 2)


def test_dcrs_denoiser_sees_the_pictures_that_clip_sees():
    assert {name: preset(f"{name}-dcr").vae_px for name in BACKBONES} == {
        "openai-l14": 224, "openai-l14-336": 336, "metaclip-l14": 224, "metaclip-h14": 224, "siglip-so400m": 224,
        "siglip-so400m-384": 384, "dfn-h14": 224, "dfn-h14-378": 378,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet-dcr",), "unknown preset"),
        (("openai-l14-diva", 1), "no stage 1"),
        (("openai-l14-dcr", 2, 3), "3 proc"),
        (
            ("dfn-h14-genhancer-released",),
            "genhancer has released code for openai-l14, openai-l14-336, siglip",
        ),
        (("resnet-genhancer-released",), "unknown preset"),
    ],
)
def test_a_preset_that_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


def test_presets_without_a_release_behind_them_say_so_and_none_is_called_released():
    lines = {line.split()[0]: line for line in describe_presets().splitlines()}
    marked = {name for name, line in lines.items() if "no release for this backbone" in line}
    assert marked == {
        "dfn-h14-dcr", "dfn-h14-378-dcr", "dfn-h14-genhancer", "dfn-h14-378-genhancer", "metaclip-l14-genhancer",
        "metaclip-h14-genhancer", "siglip-so400m-genhancer",
    }  # fmt: skip
    released = {name.removesuffix("-genhancer-released") for name in PRESETS if name.endswith("genhancer-released")}
    assert released == {"openai-l14", "openai-l14-336", "siglip-so400m-384"}
    assert not any(f"{name}-released" in PRESETS for name in marked)


def test_settings_are_changed_by_name():
    found = replace_settings(Settings(), parse_changes(["steps=3", "lr=1e-3", "objective=diva", "flips=False"]))
    assert (found.steps, found.lr, found.objective, found.flips) == (3, 1e-3, "diva", False)
    for bad in ("step=3", "steps", "steps=many"):
        with pytest.raises(ValueError, match="step"):
            parse_changes([bad])
    with pytest.raises(ValueError, match="unknown setting 'step'"):
        replace_settings(Settings(), {"step": 3})


# --- stages -----------------------------------------------------------------------------------------------------

TINY = {
    "encoder": "tiny", "denoiser": "tiny", "images": "world", "steps": 1, "batch": 2, "accumulate": 1, "vae_px": 0,
}  # fmt: skip


def test_stage_2_starts_from_the_projector_that_stage_1_aligned(tmp_path):
    found = align_preset("openai-l14-dcr", tmp_path, stage1=TINY | {"lr": 1e-3}, stage2=TINY)
    (run,) = list_runs(tmp_path).to_dict("records")
    assert (run["stage"], run["done"], run["lr"]) == ("align", True, 1e-3)
    assert found == replace_settings(preset("openai-l14-dcr"), TINY | {"projector": str(tmp_path / run["run"])})


@pytest.mark.parametrize(
    ("name", "stage2"),
    [("openai-l14-diva", {"images": "world"}), ("openai-l14-dcr", {"images": "world", "projector": "a run"})],
    ids=["one stage", "named"],
)
def test_nothing_is_aligned_where_the_recipe_has_no_stage_1_or_a_projector_is_named(name, stage2, tmp_path):
    assert align_preset(name, tmp_path, stage2=stage2) == replace_settings(preset(name), stage2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_wrong_setting_of_either_stage_stops_before_anything_is_trained(stage, tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'step'"):
        align_preset("openai-l14-dcr", tmp_path, **{stage: {"step": 1}})
    assert not list(tmp_path.iterdir())


def test_one_command_runs_both_stages_and_then_only_says_where(tmp_path, capsys):
    tiny = [f"{name}={value}" for name, value in TINY.items()]
    command = ["--preset", "openai-l14-dcr", "--shards", "world", "--out", str(tmp_path), "--set", *tiny]
    assert main(["train", *command]) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["align", "tune"]
    assert main(["train", *command]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-1] == first and len(again) == 3 and all("done before, see" in line for line in again[:-1])


def test_one_command_runs_stage_1_alone_and_another_goes_on_from_it(tmp_path, capsys):
    tiny = [f"{name}={value}" for name, value in TINY.items()]
    command = ["train", "--preset", "openai-l14-dcr", "--shards", "world", "--out", str(tmp_path), "--set", *tiny]
    assert main([*command, "--align-only"]) == 0
    (run,) = tmp_path.iterdir()
    assert run.name.startswith("align-") and capsys.readouterr().out.splitlines()[-1] == str(run)
    assert main([*command, "--projector", str(run)]) == 0
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["train", "--preset", "openai-l14-diva", "--align-only"]) == 2
    assert "has no stage 1" in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(["train", "--preset", "nothing", "--shards", "world", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: unknown preset 'nothing'") and not list(tmp_path.iterdir())


def test_a_preset_trains_on_cc3ms_training_tars_alone_and_says_how_to_fetch_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert {preset(name, stage).images for name in PRESETS for stage in stages(name)} == {CC3M_SHARDS}
    assert main(["train", "--preset", "openai-l14-dcr", "--out", "runs"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: images={CC3M_SHARDS!r}: no such tar")
    assert main(["train", "--preset", "openai-l14-dcr", "--out", "runs", "--align-only"]) == 2
    assert capsys.readouterr().err == said
    assert said.endswith("hf download --repo-type dataset pixparse/cc3m-wds --local-dir cc3m\n")
    assert not list(tmp_path.iterdir())
    (tmp_path / "cc3m").mkdir()
    for name in ("train-0000", "train-0575", "validation-0000"):
        (tmp_path / "cc3m" / f"cc3m-{name}.tar").touch()
    assert find_tars(CC3M_SHARDS) == ["cc3m/cc3m-train-0000.tar", "cc3m/cc3m-train-0575.tar"]


# --- shapes at real size, without weights -----------------------------------------------------------------------

FLUX_VAE = {  # the configuration of FLUX.1's
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
TOWERS = {"l14": (24, 768, 14), "h14": (32, 1024, 14), "so400m": (27, 1152, 14)}  # blocks, dimension, pixels a patch
TOKENS = {"global": 1, "recap": 77, "recap-all": 257, "recap-half": 1 + 729 // 2, "recap-pool6": 1 + 256 // 6,
          "recap-pool10": 1 + 729 // 10}  # fmt: skip


def tower(backbone: str) -> tuple[int, int, int]:
    return next(sizes for name, sizes in TOWERS.items() if name in backbone)


@functools.cache
def encoder_of(backbone: str) -> Encoder:
    with torch.device("meta"):
        return Encoder(on_meta(backbone), None)


@functools.cache
def sd21() -> Denoiser:
    """Stable Diffusion 2.1-base by its configuration; `benchmark` builds it for another size of pictures."""
    scale = SCALES["sd21"]
    with mock.patch.dict(scale.unet, sample_size=64), torch.device("meta"):
        return build_models("sd21", torch.device("meta"))[1]


@functools.cache
def light() -> Denoiser:
    with torch.device("meta"):
        return Light(sd21().vae, LIGHT["light"][1])


@functools.cache
def light_flux() -> Denoiser:
    with torch.device("meta"):
        return Light(AutoencoderKL(**FLUX_VAE), LIGHT["light-flux"][1])


def test_genhancers_denoiser_is_of_the_size_that_was_released_and_its_memory_is_stated():
    network, vae = (sum(p.numel() for p in part.parameters()) for part in (light_flux().network, light_flux().vae))
    assert (network, vae) == (1_310_154_816, 83_819_683)
    sizes = light_flux().network.config
    assert (sizes.num_layers, sizes.num_single_layers) == (2, 4)
    assert (sizes.num_attention_heads, sizes.attention_head_dim) == (24, 128)
    assert (sizes.pooled_projection_dim, sizes.joint_attention_dim, sizes.guidance_embeds) == (768, 4096, True)
    with torch.device("meta"):
        conditioner = Conditioner("global", encoder_of("openai-l14").dim, light_flux().widths)
    trained = network + sum(p.numel() for p in conditioner.parameters())
    text = " ".join((ROOT / "docs" / "backbones.md").read_text().split())
    assert f"{network / 1e6:.0f} M weights" in text and f"{trained / 1e6:.0f} M with both projectors" in text
    for gigabytes in (
        f"| weights, gradient, AdamW's two moments | 16 | {16 * trained / 1e9:.1f} GB |",
        f"| the same while micro-batches accumulate | 24 | {24 * trained / 1e9:.1f} GB |",
        f"| a checkpoint on disk | 12 | {12 * trained / 1e9:.1f} GB |",
        f"| frozen, in bfloat16 (stage 2) | 2 | {2 * network / 1e9:.1f} GB |",
    ):
        assert gigabytes in text


def test_the_denoiser_is_of_the_size_that_was_published():
    assert (sd21().px, sd21().width) == (512, 1024)
    counts = {name: sum(p.numel() for p in getattr(sd21(), name).parameters()) for name in ("network", "vae")}
    assert counts == {"network": 865_910_724, "vae": 83_653_863}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lora_reaches_every_matrix_of_a_real_tower_and_each_has_its_block(backbone):
    encoder, (blocks, _, _) = copy.deepcopy(encoder_of(backbone)), tower(backbone)
    with torch.device("meta"):
        make_trainable(encoder, rank=16)
    opened = [name for name, p in encoder.named_parameters() if p.requires_grad and "lora_" in name]
    head = 6 if "siglip" in backbone else 1  # attention pooling: q, k, v, out, two of its MLP; or the projection
    wanted = {f"block{i}": 2 * 6 for i in range(blocks)} | {"head": 2 * head}  # q, k, v, out, two of the MLP; A and B
    assert Counter(map(block_name, opened)) == wanted


SHAPES = ("encoder", "denoiser", "condition", "projection", "vae_px")  # what a preset's shapes follow from


@pytest.mark.parametrize("name", {tuple(getattr(preset(n), key) for key in SHAPES): n for n in PRESETS}.values())
def test_a_presets_models_fit_one_another_at_real_size(name):
    settings = preset(name)
    denoiser = {"sd21-base": sd21, "light": light, "light-flux": light_flux}[settings.denoiser]()
    encoder, (_, dim, patch) = encoder_of(settings.encoder), tower(settings.encoder)
    side = settings.vae_px or denoiser.px
    with torch.no_grad(), torch.device("meta"), mock.patch.object(denoiser, "px", side):
        images = torch.empty(2, 3, encoder.px, encoder.px)
        features, empty = encoder.features(images), torch.empty(1 if denoiser.scratch else 77, denoiser.width)
        width = denoiser.widths or denoiser.width
        conditioner = Conditioner(settings.condition, encoder.dim, width, projection=settings.projection)
        context, latents = conditioner(features, empty), denoiser.latents(images)
        full = empty + context if context.shape[1] == 1 else context  # as `Denoiser.predict` has it
        predicted = denoiser._run(latents, torch.zeros(2, dtype=torch.long), full, 1)
    assert encoder.px == PX.get(settings.encoder, 224)
    assert features.embedding.shape == (2, dim) and features.patches.shape == (2, (encoder.px // patch) ** 2, dim)
    width, channels = (768 + 4096, 16) if settings.denoiser == "light-flux" else (1024, 4)
    assert context.shape == (2, TOKENS[settings.condition], width)
    assert latents.shape == predicted.shape == (2, channels, side // 8, side // 8)


# --- a step at real size, random weights ------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_step_of_each_stage_at_real_size_is_finite_and_its_time_and_memory_are_on_record(tmp_path, monkeypatch):
    """`openai-l14-dcr` as it is but for the pictures and `accumulate`; by rows on a GPU of less than 70 GB."""

    def encoder(name: str, device) -> Encoder:
        torch.manual_seed(0)
        return Encoder(open_clip.create_model(ENCODERS[name][0], load_weights=False), None).to(device)

    def denoiser(name: str, device, px: int) -> Denoiser:
        plain = build_models("sd21", torch.device(device))[1]
        return StableDiffusion(**{part: getattr(plain, part) for part in COMPONENTS}, px=px).to(device)

    for room in ("build", "stages"):
        monkeypatch.setattr(f"diva_lab.training.{room}.load_encoder", encoder)
    monkeypatch.setattr("diva_lab.training.build.load_denoiser", denoiser)
    gpu = torch.cuda.get_device_properties(0)
    record: dict = {"gpu": gpu.name}
    changes = {"images": "world", "steps": 1, "accumulate": 1, "rows": 0 if gpu.total_memory > 70e9 else 1}
    for stage, train in ((1, align), (2, tune)):
        torch.cuda.reset_peak_memory_stats()
        settings = replace_settings(preset("openai-l14-dcr", stage), changes)
        run = train(settings, tmp_path / "runs")
        changes["projector"] = str(run.folder)
        (line,) = run.metrics().to_dict("records")
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
        found = {"seconds": line["seconds"], "peak_bytes": torch.cuda.max_memory_allocated(), "loss": line["loss"]}
        record[f"stage{stage}"] = found | {name: getattr(settings, name) for name in ("batch", "rows", "precision")}
    (tmp_path / "openai-l14-dcr.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


# --- notebook 02 ------------------------------------------------------------------------------------------------

NOTEBOOK = NOTEBOOKS / "02_encoder_tuning.ipynb"


def test_the_files_are_what_the_presets_make(tmp_path):
    write_presets(tmp_path)
    made, kept = ({path.name: path.read_text() for path in folder.iterdir()} for folder in (tmp_path, PRESET_FILES))
    assert made == kept, "python -m diva_lab.presets"
    assert made.keys() == {f"{name}.yaml" for name in PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_holds_parameters_of_the_notebook_and_all_of_its_preset(name):
    found = yaml.safe_load((PRESET_FILES / f"{name}.yaml").read_text())
    assert found.keys() <= declared_parameters(NOTEBOOK)
    where = {key: found[key] for key in ("images", "encoder", "denoiser")}
    for stage in stages(found["preset"]):
        assert replace_settings(Settings(), {"projector": "shipped"} | where | found[f"stage{stage}"]) == preset(
            name, stage
        )


def run_notebook(tmp_path, **parameters) -> pd.DataFrame:
    """Notebook 02 with papermill's cell, up to where it shows what it trained; few pictures, no report."""
    parameters = {"runs_root": str(tmp_path)} | parameters
    given = "\n".join([INJECTED, *(f"{name} = {value!r}" for name, value in parameters.items())])
    few = "draw_scenes, world_report = lambda n, seed: scenes(8, seed), lambda encoder: scores"
    scope = {"In": [], "scenes": draw_scenes, "scores": dict.fromkeys(figures.MEASURES, 0.5)}
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    (last,) = (i for i, source in enumerate(cells) if '"02_live"' in source)
    for source in (cells[0], given, cells[1], few, *cells[2 : last + 1]):
        scope["In"].append(source)
        exec(source, scope)
    return list_runs(tmp_path)


def test_the_notebook_runs_a_file_s_recipe_with_what_is_given_beside_it(tmp_path):
    found = yaml.safe_load((PRESET_FILES / "openai-l14-dcr.yaml").read_text())
    found["stage1"] |= TINY
    found["stage2"] |= TINY
    runs = run_notebook(tmp_path, **found | {"images": "world", "encoder": "tiny", "denoiser": "tiny", "steps": 2})
    assert runs["done"].all() and runs["latent"].eq("sample").all()
    numbers = {(run["stage"], run["objective"]): (run["steps"], run["lr"]) for run in runs.to_dict("records")}
    assert numbers == {
        ("align", "diva"): (1, 1e-4), ("tune", "none"): (2, 1e-5), ("tune", "dcr"): (2, 1e-5),
        ("perturb", "perturb-norm"): (2, 1e-5), ("perturb", "perturb-drift"): (2, 1e-5),
    }  # fmt: skip


def test_the_notebook_without_a_preset_tunes_the_tiny_model_by_diva_through_the_anchored_projector(tmp_path):
    runs = run_notebook(tmp_path, steps=1)
    assert set(runs["objective"]) == {"none", "diva", "perturb-norm", "perturb-drift"}
    assert runs[["encoder", "denoiser", "projector", "steps"]].drop_duplicates().values.tolist() == [
        ["tiny", "tiny", "anchored", 1]
    ]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"preset": "resnet-dcr"}, "preset='resnet-dcr': expected one of ''"),
        ({"stage2": {"steps": 1}}, "set the parameter"),
    ],
)
def test_the_notebook_refuses_a_preset_that_is_not_there_and_settings_of_none(parameters, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_notebook(tmp_path, **parameters)

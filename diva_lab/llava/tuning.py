"""LLaVA-1.5's two steps of training, by the loop of `training`: `diva-lab llava train`.

    projector    the projector alone, on images and their captions
    all          then projector and language model, all weights
    lora         or projector and LoRA in the language model

The tower is frozen in each. The numbers are those of arXiv 2310.03744 and its released scripts, as in
data/published/recipes.csv. A run is one of `training.runs`; its folder ends with `llava`, a LLaVA folder in which LoRA
is merged.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diva_lab.llava.answers import fingerprint
from diva_lab.llava.conversations import Dialogues, Record, read_conversations
from diva_lab.llava.folders import Llava, load_llava
from diva_lab.llava.prompts import SILENT
from diva_lab.machine import default_device
from diva_lab.models.lora import merge_lora
from diva_lab.models.weights import load_weights
from diva_lab.paths import ROOT, RUNS
from diva_lab.provenance import sha256
from diva_lab.training.loop import Trainer, train
from diva_lab.training.presets import parse_changes
from diva_lab.training.runs import Run, begun_settings
from diva_lab.training.settings import read_setting

RUNGS = {
    "projector": "projector retrained",
    "all": "projector and language model retrained",
    "lora": "projector and LoRA retrained",
}
RECIPES: dict[str, dict] = {  # as published: one epoch, in 8 processes
    "projector": {"lr": 1e-3, "batch": 32, "dialogue": "plain"},
    "all": {"lr": 2e-5, "batch": 16},
    "lora": {"lr": 2e-4, "batch": 16, "projector_lr": 2e-5},
}
RECORDS_A_STEP = {"projector": 256, "all": 128, "lora": 128}


@dataclass(frozen=True)
class LlavaSettings:
    """Settings of one step of training. `steps=0` is one epoch.

    Raises:
        ValueError: for a value of another type, out of its range, or not among its choices; names the setting.
    """

    llava: str  # folder to start from
    data: str  # file of conversations
    images: str  # folder of their images
    trained: str = "projector"  # a key of RUNGS
    dialogue: str = "chat"  # `chat`, by the folder's template; or `plain`, an image and its caption
    max_tokens: int = 2048  # of a conversation, with those of its image
    seed: int = 0
    steps: int = 0
    batch: int = 16  # records of a micro-batch, in each process
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-5
    projector_lr: float = 0.0  # of the projector; 0 for lr
    weight_decay: float = 0.0
    warmup_share: float = 0.03  # of the steps
    schedule: str = "cosine"
    clip: float = 1.0  # transformers' default, which the released scripts leave as it is
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    precision: str = "auto"
    save_memory: bool = False  # activations are computed again in the backward pass
    save_every: int = 100
    combine: ClassVar[str] = "sum"
    evaluate_every: ClassVar[int] = 0
    warmup_zero: ClassVar[bool] = True  # transformers' schedule begins at 0

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, read_setting(field.name, field.type, getattr(self, field.name)))

    @property
    def warmup(self) -> int:
        return math.ceil(self.warmup_share * self.steps)


def llava_settings(
    llava: str | Path, data: str | Path, images: str | Path, trained: str, changes: Sequence[str] = (),
    processes: int = 1,
) -> LlavaSettings:  # fmt: skip
    """LLaVA-1.5's recipe for one step of training, with changes as NAME=VALUE.

    Without a change of batch or accumulate, a step sees as many records as published, whatever the number of processes.

    Raises:
        ValueError: for an unknown name or value; where the processes do not divide the records of a step.
    """
    kinds = {field.name: field.type for field in fields(LlavaSettings)}
    values = parse_changes(list(changes), kinds)
    settings = LlavaSettings(str(llava), str(data), str(images), trained, **RECIPES.get(trained, {}) | values)
    if values.keys() & {"batch", "accumulate"}:
        return settings
    accumulate, rest = divmod(RECORDS_A_STEP[trained], settings.batch * processes)
    if rest or not accumulate:
        raise ValueError(
            f"{processes} processes of batch={settings.batch} do not divide the {RECORDS_A_STEP[trained]} records of a "
            "step; expected a number of processes that does, or --set batch and accumulate"
        )
    return replace(settings, accumulate=accumulate)


class Talk:
    """The work of one step of training: what the assistant says, token by token; see `loop.Work`."""

    def __init__(self, settings: LlavaSettings, llava: Llava, records: Sequence[Record]):
        self.settings, self.llava, self.records = settings, llava, records
        self.less_memory = f"batch={settings.batch}; save_memory=True or a smaller batch takes less"

    def modules(self, precision: str) -> nn.ModuleDict:
        """The whole model: what is trained in float32, the rest in `precision`."""
        model, settings = self.llava.model, self.settings
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_(False)
        trained = [model.model.multi_modal_projector.requires_grad_(True).float()]
        if settings.trained == "all":
            trained += [model.model.language_model.requires_grad_(True), model.lm_head.requires_grad_(True)]
            [module.float() for module in trained]
        elif settings.trained == "lora":
            _add_lora(model.model.language_model, settings)
        if settings.save_memory:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return nn.ModuleDict({"llava": model})

    def kept(self) -> dict[str, Tensor]:
        return {}

    def groups(self, parameters: dict[str, Tensor]) -> list:
        """The projector has a learning rate of its own where the settings say so."""
        settings = self.settings
        own = {name for name in parameters if ".multi_modal_projector." in name}
        if not settings.projector_lr or not settings.lr or own == parameters.keys():
            return list(parameters.values())
        scale = settings.projector_lr / settings.lr
        parts = {True: scale, False: 1.0}
        return [
            {"params": [p for name, p in parameters.items() if (name in own) == mine], "scale": scale}
            for mine, scale in parts.items()
        ]

    def open_batches(self, position: int, number: int, rank: int, processes: int) -> Dialogues:
        settings = self.settings
        return Dialogues(
            self.llava, self.records, settings.dialogue == "plain", settings.batch, settings.max_tokens, settings.seed,
            position, rank, processes,
        )  # fmt: skip

    def leaves(self, parts: int) -> dict[str, Tensor]:
        return {}

    def terms(self, batch: dict[str, Tensor], random: torch.Generator, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean cross-entropy of the batch's tokens that the assistant says, [1]; 0 where none is left."""
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = self.llava.model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total = F.cross_entropy(logits.float(), labels, ignore_index=SILENT, reduction="sum")
        return {"language": (total / (labels != SILENT).sum().clamp(min=1)).view(1)}


def _add_lora(language: nn.Module, settings: LlavaSettings) -> None:
    """LoRA on every linear layer of a language model, in place, its first matrices drawn from the seed."""
    adapted = [name for name, module in language.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules=adapted
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, language)
    for name, p in language.named_parameters():
        p.requires_grad_("lora_" in name)
        p.data = p.data.float() if p.requires_grad else p.data


def train_llava(settings: LlavaSettings, root: str | Path = RUNS) -> Run:
    """Train one step; returns its finished run, whose folder holds the folder `llava`.

    The run's id is made of the settings and of hashes of weights and conversations. Asked for again, a finished run is
    returned at once, and a stopped one goes on to the same bits.

    Raises:
        ValueError, FileNotFoundError: as `load_llava` and `read_conversations`, and for `plain` records without image.
        OSError, FloatingPointError, RuntimeError, KeyboardInterrupt: as `stages.tune`.
    """
    records = read_conversations(settings.data, settings.images)
    if settings.dialogue == "plain" and (bare := sum(record.image is None for record in records)):
        raise ValueError(f"{settings.data}: {bare} of {len(records)} records have no image; dialogue=plain needs them")
    llava = load_llava(settings.llava)
    with _open(settings, len(records), root) as (run, settings):
        if not run.done:
            work = Talk(settings, llava, records)
            train(Trainer(run, settings, work))
        if PartialState().is_main_process and not (run.folder / "llava").exists():
            write_trained(run, settings)
    return run


@contextmanager
def _open(settings: LlavaSettings, records: int, root: str | Path) -> Iterator[tuple[Run, LlavaSettings]]:
    """The run of these settings, held by this process alone, and its settings with the number of steps."""
    state = PartialState(cpu=default_device().type == "cpu")
    if not settings.steps:
        a_step = settings.batch * settings.accumulate * state.num_processes
        settings = replace(settings, steps=math.ceil(records / a_step))
    kept = {name: str(v).removeprefix(f"{ROOT}/") if isinstance(v, str) else v for name, v in asdict(settings).items()}
    kept |= {"stage": f"llava-{settings.trained}", "objective": ""}
    runs: list[Run | None] = [None]
    if not state.is_main_process:
        (run,) = broadcast_object_list(runs)
        yield run, settings
        return
    kept |= {"weights_sha256": fingerprint(Path(settings.llava)), "data_sha256": sha256(settings.data)[:12]}
    kept = begun_settings(kept, state.num_processes, root)
    runs = [run := Run.at(kept, root)]
    with run.lock():
        if run.done:
            print(f"{run.id}: done before, see {run.folder}", flush=True)
        run.make(kept)
        broadcast_object_list(runs)
        yield run, settings


def write_trained(run: Run, settings: LlavaSettings) -> Path:
    """Write the folder `llava` of a finished run, LoRA merged, in the precision of the folder that it started from."""
    llava = load_llava(settings.llava)
    dtype = llava.model.dtype
    work = Talk(settings, llava, [])
    modules = work.modules("no")
    names = [name for name, p in modules.named_parameters() if p.requires_grad]
    load_weights(modules, run.weights(), f"checkpoint of run {run.id}", names)
    merge_lora(llava.model).to(dtype)
    record = llava.record | {"rung": RUNGS[settings.trained], "llava": settings.llava, "run": run.id}
    draft = run.folder / "llava.new"
    shutil.rmtree(draft, ignore_errors=True)  # of a kill in between
    return Llava(llava.model, llava.processor, record).save(draft).rename(run.folder / "llava")

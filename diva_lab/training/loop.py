"""One loop for all that is trained: draw, objective, gradients, average, measure, combine, clip, step, record.

Every draw of a step depends on (seed, step) alone, so a killed run goes on to the same bits on one machine. Under
`accelerate launch` each process draws images, timesteps and noise of its own, gradients are averaged over the processes
before anything is measured or clipped, and the first process alone writes. A run that is asked to stop is saved first.
"""

import atexit
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from diva_lab.gradients import EMBEDDINGS, Gradient, combine, measure, term_gradients
from diva_lab.images import open_images
from diva_lab.machine import default_device, fast_bf16, generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder
from diva_lab.models.teacher import Teacher
from diva_lab.objectives.step import Step
from diva_lab.training.batches import Batches
from diva_lab.training.build import make_step
from diva_lab.training.progress import Progress, Stop, Stopped
from diva_lab.training.runs import Run
from diva_lab.training.settings import LoopSettings, Settings, learning_rate
from diva_lab.training.tracking import Track, ignore, track_run

PROBE_SEED = 1_000_000  # added to the seed for the images of probe batches
Objective = Callable[[Step], dict[str, Tensor]]
Probe = Callable[[Callable[..., Step], dict[str, Tensor]], list[dict]]


# --- what a run trains with -------------------------------------------------------------------------------------


def start_accelerator(precision: str) -> Accelerator:
    """accelerate's view of this process, in `bf16`, `no`, or with `auto` in what the device multiplies fast."""
    AcceleratorState._reset_state()  # one process may hold runs of different precision, one after the other
    if precision == "auto":
        precision = "bf16" if fast_bf16(default_device()) else "no"
    return Accelerator(mixed_precision=precision, cpu=default_device().type == "cpu")


def build_optimizer(settings: LoopSettings, parameters: list) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum .9 as DIVA's, of parameters or of groups of them."""
    decay = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **decay)
    return torch.optim.SGD(parameters, momentum=0.9, **decay)


@runtime_checkable
class Work(Protocol):
    """What a run trains, and by which loss."""

    less_memory: str  # what to try where the device's memory is too small

    def modules(self, precision: str) -> nn.ModuleDict:
        """The modules whose parameters may be trained: all that ask for a gradient are."""

    def kept(self) -> dict[str, Tensor]:
        """What is saved beside the trained weights, by its name in `modules`."""

    def groups(self, parameters: dict[str, Tensor]) -> list:
        """The trained parameters as the optimizer takes them; the learning rate of a group is times its `scale`."""

    def open_batches(self, position: int, number: int, rank: int, processes: int) -> Iterator:
        """Endless micro-batches, with `position` and `skipped` as `Batches` has them."""

    def leaves(self, parts: int) -> dict[str, Tensor]:
        """Tensors of zeros, [parts, ...], whose gradients are measured too and belong to no parameter."""

    def terms(self, batch: object, random: torch.Generator, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss's terms of a micro-batch, each per example, from its draws and its part of the leaves."""


class Feedback:
    """The work of both stages: an objective of images, an encoder and what gives it feedback; see `Work`.

    Args:
        settings: of the stage.
        encoder, conditioner, denoiser, teacher: all their parameters that ask for a gradient are trained; None for one
            that the objective does not read.
        objective: a function of a `Step`, as in `OBJECTIVES`.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        conditioner: Conditioner | None,
        denoiser: Denoiser | None,
        objective: Objective,
        teacher: Teacher | None = None,
    ):
        self.settings, self.objective = settings, objective
        self.encoder, self.conditioner, self.denoiser, self.teacher = encoder, conditioner, denoiser, teacher
        self.new_step = partial(make_step, encoder=encoder, conditioner=conditioner, denoiser=denoiser, teacher=teacher)
        self.px = max(model.px for model in (encoder, denoiser, teacher) if model is not None)
        self.less_memory = (
            f"batch={settings.batch}, rows={settings.rows}; rows=1 gives DCR's gradients in the least memory"
        )

    def modules(self, precision: str) -> nn.ModuleDict:
        """The denoiser's network only where it is trained."""
        parts = {"encoder": self.encoder, "conditioner": self.conditioner, "teacher": self.teacher}
        modules = {name: part for name, part in parts.items() if part is not None}
        if self.denoiser is None:
            return nn.ModuleDict(modules)
        if any(p.requires_grad for p in self.denoiser.network.parameters()):
            modules["network"] = self.denoiser.network
        elif precision == "bf16":
            nn.Module.to(self.denoiser.network, torch.bfloat16)  # frozen: float32 is not needed; diffusers' own warns
        if self.settings.compile:
            self.denoiser.network.compile(dynamic=False)
        return nn.ModuleDict(modules)

    def kept(self) -> dict[str, Tensor]:
        conditioner = self.conditioner
        if conditioner is None or not any(p.requires_grad for p in conditioner.parameters()):
            return {}
        return {f"conditioner.{n}": b for n, b in conditioner.named_buffers()}

    def groups(self, parameters: dict[str, Tensor]) -> list:
        return list(parameters.values())

    def open_batches(self, position: int, number: int, rank: int, processes: int) -> Batches:
        return Batches(self.settings, self.px, position, number, rank, processes)

    def leaves(self, parts: int) -> dict[str, Tensor]:
        shape = (parts, self.settings.batch, self.encoder.dim)
        return {EMBEDDINGS: torch.zeros(shape, device=self.encoder.mean.device, requires_grad=True)}

    def terms(self, batch: tuple, random: torch.Generator, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        images, captions = batch
        images = images.to(self.encoder.mean.device).float() / 255
        shift = leaves[EMBEDDINGS]
        return self.objective(
            self.new_step(images, random=random, settings=self.settings, shift=shift, captions=captions)
        )


class Trainer:
    """A run in training: what it trains, its optimizer and batches, how far it has come, and whether it shall stop.

    Args:
        run: opened; an earlier checkpoint of it is taken up.
        settings: of the run.
        work: what is trained.

    Raises:
        ValueError: where the checkpoint is damaged, or a step cannot be shared by so many processes.
        FloatingPointError: where a weight is not finite.
    """

    def __init__(self, run: Run, settings: LoopSettings, work: Work):
        self.run, self.settings, self.work = run, settings, work
        self.accelerator = start_accelerator(settings.precision)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.modules = work.modules(self.accelerator.mixed_precision).to(self.device)
        self.parameters = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}
        self.kept = work.kept()
        optimizer = build_optimizer(settings, work.groups(self.parameters))
        self.optimizer = self.accelerator.prepare(optimizer)
        self.stop, self.stopping = Stop(), False  # asked of this process; agreed on by all of them
        self.track: Track = ignore  # takes what is recorded too
        self.first, self.seconds = 0, 0.0  # steps and seconds of training that were done before
        self.accumulate = self._share_step()  # micro-batches of a step in this process
        position = self._resume()
        number, processes = self.first * self.accumulate, self.accelerator.num_processes
        self.batches = work.open_batches(position, number, self.rank, processes)
        self.skipped: list[dict] = []  # images that could not be read since the last checkpoint
        self._require_finite_weights(self.first)

    # --- one step -----------------------------------------------------------------------------------------------

    def take_step(self, step: int) -> dict[str, float]:
        """Train step number `step`, and return what is recorded of it.

        Raises:
            FloatingPointError: where the loss or a gradient is not finite, before the optimizer's step; or a weight
                after it. Nothing of the step is recorded or saved.
            RuntimeError: where the device's memory is too small.
        """
        start = time.perf_counter()
        self.modules.train()
        gradients, losses = self._gradients_of_terms(step)
        if self.accelerator.num_processes > 1:
            gradients, losses = self._average_over_processes(gradients, losses)
        loss = sum(losses.values())
        measures = measure(gradients)
        self._require_finite(step, "the loss", loss)
        self._require_finite(step, "a gradient", sum(measures[f"norm_{term}"] for term in gradients))
        for name, gradient in combine(gradients, self.settings.combine).items():
            self.parameters[name].grad = gradient
        del gradients  # before the optimizer takes memory of its own
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip or float("inf")).item()
        self._require_finite(step, "the gradient's norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step) * group.get("scale", 1)
        self.optimizer.step()
        self._require_finite_weights(step)
        self.seconds += time.perf_counter() - start
        line = {"loss": loss, **losses, "grad_norm": norm, **measures, "seconds": self.seconds}
        self._record(step, line)
        self.agree()
        return line

    def agree(self) -> None:
        """Stop after this step if any process was asked to: all of them together."""
        asked = torch.tensor(float(self.stop.asked), device=self.device)
        self.stopping = self.accelerator.reduce(asked, "sum").item() > 0

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"run {self.run.id}: {what} is not finite at step {step}, of which nothing is saved; try a smaller lr"
            )

    def _require_finite_weights(self, step: int) -> None:
        norm = nn.utils.get_total_norm(self.parameters.values())
        self._require_finite(step, "a weight", norm.item())

    def _gradients_of_terms(self, step: int) -> tuple[dict[str, Gradient], dict[str, float]]:
        """The gradient of each term's mean, and that mean, over this process's micro-batches of the step."""
        settings, total, losses = self.settings, {}, {}
        leaves = self.work.leaves(self.accumulate)
        for micro in range(self.accumulate):
            batch = next(self.batches)
            random = generator("step", settings.seed, step, micro, *([self.rank] if self.rank else []))
            torch.manual_seed(random.initial_seed())  # dropout draws from the global generator
            try:
                with self.accelerator.autocast():
                    terms = self.work.terms(batch, random, {name: leaf[micro] for name, leaf in leaves.items()})
                gradients = term_gradients(terms, self.parameters | leaves)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(
                    f"run {self.run.id}: out of memory at step {step} with {self.work.less_memory}"
                ) from error
            for name, gradient in gradients.items():
                losses[name] = losses.get(name, 0) + terms[name].mean().item() / self.accumulate
                _add(total.setdefault(name, {}), gradient, self.accumulate)
            del gradients, terms
        return total, losses

    def _average_over_processes(
        self, gradients: dict[str, Gradient], losses: dict[str, float]
    ) -> tuple[dict[str, Gradient], dict[str, float]]:
        """The means over all processes; gradients in the embeddings, which belong to a process's images, stay."""
        for gradient in gradients.values():
            flat = torch.cat([g.flatten() for name, g in gradient.items() if name != EMBEDDINGS])
            parts = self.accelerator.reduce(flat, "mean").split([p.numel() for p in self.parameters.values()])
            gradient |= {n: x.view_as(p) for (n, p), x in zip(self.parameters.items(), parts, strict=True)}
        means = self.accelerator.reduce(torch.tensor([*losses.values()], device=self.device), "mean")
        return gradients, dict(zip(losses, means.tolist(), strict=True))

    def _record(self, step: int, line: dict[str, float]) -> None:
        for left_out in self.batches.skipped:  # pandas takes no name with bytes that are not UTF-8
            name, reason = (text.encode("utf-8", "backslashreplace").decode() for text in left_out)
            self.skipped.append({"step": step, "name": name, "reason": reason})
        self.batches.skipped.clear()
        if self.rank == 0:
            self.run.log("metrics", step=step, **line)
            self.track(step, line)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _share_step(self) -> int:
        """The `accumulate` with which a step is of as many images as in the processes in which the run began."""
        processes, began = self.accelerator.num_processes, self.run.began_in
        own = self.run.settings.get("accumulate", self.settings.accumulate)
        accumulate, rest = divmod(own * began, processes)
        if processes != began and (rest or getattr(self.settings, "shared_samples", False)):
            raise ValueError(
                f"run {self.run.id}: a step of accumulate={own} in {began} processes cannot be shared by {processes}; "
                f"go on by accelerate launch --num_processes {began}"
                + (f", or another number that divides {own * began}" if rest else " (shared_samples=True)")
            )
        return accumulate

    def _resume(self) -> int:
        """Take up the run's last checkpoint, if there is one; returns this process's position in its images.

        After a change of the number of processes each takes its part of all the images that were shown before.
        """
        processes, positions = self.accelerator.num_processes, []
        with self.accelerator.main_process_first():
            state = self.run.resume() if self.rank == 0 else self.run.state()
        if state is not None:
            self.first, self.seconds, positions = state["step"], state["seconds"], state.get("positions", [])
            self._load(state["optimizer"])
        self.accelerator.wait_for_everyone()  # `resume` cuts records back: nobody writes before all have done it
        if self.rank == 0:
            self._tell_change(processes)
        if len(positions) in (0, processes):  # each process skips the broken images of its own
            return positions[self.rank] if positions else self.first * self.accumulate * self.settings.batch
        return sum(positions) // processes

    def _tell_change(self, processes: int) -> None:
        """Record and say that the run goes on in another number of processes than before."""
        changes = self.run.processes()
        before = int(changes["processes"].iloc[-1]) if len(changes) else self.run.began_in
        if processes != before:
            self.run.log("processes", step=self.first, processes=processes, accumulate=self.accumulate)
            print(
                f"{self.run.id}: after {self.first} steps in {before} processes it goes on in {processes}, each with "
                f"accumulate={self.accumulate}: a step is of as many images, but of others",
                flush=True,
            )

    def _load(self, optimizer: dict) -> None:
        """Load the checkpoint's weights and optimizer; refuse those of another model and records of other steps."""
        kept, weights = self.parameters | self.kept, self.run.weights()
        wrong = kept.keys() ^ weights.keys() or {n for n, w in weights.items() if w.shape != kept[n].shape}
        if self.rank == 0 and len(self.run.metrics()) != self.first:
            wrong = {f"metrics.jsonl with {len(self.run.metrics())} steps of {self.first}"}
        if wrong:
            raise ValueError(
                f"run {self.run.id}: its checkpoint does not fit {min(wrong)}; put {self.run.folder} back from a copy, "
                "or delete it to train the run anew"
            )
        try:
            self.optimizer.load_state_dict(optimizer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # torch looks at little before it uses it
            raise ValueError(
                f"run {self.run.id}: the optimizer's state in its checkpoint does not fit ({error}); put "
                f"{self.run.folder} back from a copy, or delete its checkpoint to train it anew"
            ) from error
        self.modules.load_state_dict(weights, strict=False)

    def save(self, steps: int) -> None:
        """Write a checkpoint after so many steps, with every process's position in its images."""
        positions, skipped = gather_object([self.batches.position]), gather_object(self.skipped)
        if self.rank == 0:
            for line in skipped:
                self.run.log("skipped", **line)
            weights = self.parameters | self.kept
            self.run.save(steps, weights, self.optimizer.state_dict(), self.seconds, positions)
        self.skipped.clear()


def _add(total: Gradient, gradient: Gradient, parts: int) -> None:
    """Add one of `parts` micro-batches' gradients to the mean over all of them, in place."""
    for name, g in gradient.items():
        part = g / parts if parts > 1 else g
        total[name] = total[name] + part if name in total else part


# --- evaluations and probes -------------------------------------------------------------------------------------


class Watcher:
    """Evaluates a run and probes its gradients, at the steps that its settings name.

    Args:
        trainer: the run in training.
        progress: is told of the evaluations.
        evaluate: () -> what is to be recorded, or None.
        probe: see `tune`, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        progress: Progress,
        evaluate: Callable[[], dict[str, float | str]] | None,
        probe: Probe | None,
    ):
        self.trainer, self.progress, self.evaluate, self.probe = trainer, progress, evaluate, probe
        settings = trainer.settings
        self.batches: list[Tensor] = []  # of images to probe with
        if probe is not None:  # else they are not opened
            self.source = open_images(settings.images, trainer.work.px, settings.batch, settings.seed + PROBE_SEED)

    def watch(self, steps: int) -> None:
        """Record evaluation and probe after so many steps, in evaluation mode; what is on record is not repeated.

        Asked to stop, it leaves the evaluation at once, and nothing is recorded. A probe, which may have moved the
        weights, is awaited.
        """
        trainer = self.trainer
        if trainer.rank == 0 and not self._recorded(steps):
            trainer.modules.eval()
            try:
                with trainer.stop.at_once():
                    report = self._evaluate(steps)
            except KeyboardInterrupt:
                if not trainer.stop.asked:  # not by a signal
                    raise
            else:
                for row in self._probe():
                    trainer.run.log("probes", step=steps, **row)
                for row in report:
                    trainer.run.log("evaluations", step=steps, **row)
                    trainer.track(steps, row)
        trainer.agree()  # waits for all processes

    def _recorded(self, steps: int) -> bool:
        tables = (self.trainer.run.evaluations(), self.trainer.run.probes())
        return any(len(table) and table["step"].eq(steps).any() for table in tables)

    def _evaluate(self, steps: int) -> list[dict[str, float | str]]:
        if self.evaluate is None:
            return []
        with self.progress.evaluate(steps) as rows:
            rows.append(self.evaluate())
        return rows

    def _probe(self) -> list[dict]:
        if self.probe is None:
            return []
        network = self.trainer.work.denoiser.network
        dtype = network.dtype
        nn.Module.to(network, torch.float32)  # differences of gradients would drown in rounding
        rows = self.probe(self.probe_step, self.trainer.parameters)
        nn.Module.to(network, dtype)
        return rows

    def probe_step(self, number: int, **changes: object) -> Step:
        """A `Step` of probe batch `number`, of images that are not trained on, with other settings where given."""
        trainer = self.trainer
        while len(self.batches) <= number:
            self.batches.append(next(self.source).to(trainer.device).float() / 255)
        random = generator("probe", trainer.settings.seed, number)
        settings = replace(trainer.settings, **changes)
        return trainer.work.new_step(self.batches[number], random=random, settings=settings)


# --- the loop ---------------------------------------------------------------------------------------------------


def train(
    trainer: Trainer, evaluate: Callable[[], dict[str, float | str]] | None = None, probe: Probe | None = None
) -> Run:
    """Train a run to its last step, with evaluations, probes and checkpoints as its settings say; returns it.

    Raises:
        KeyboardInterrupt: where it was asked to stop; it is saved, and goes on from there when it is trained again.
    """
    run, settings, done = trainer.run, trainer.settings, trainer.first
    images = settings.batch * trainer.accumulate * trainer.accelerator.num_processes
    with (
        trainer.stop,
        track_run(run, settings) as trainer.track,
        Progress(settings.steps, done, images, run.id, run.folder, trainer.rank) as progress,
    ):
        watcher = Watcher(trainer, progress, evaluate, probe)
        if done == 0 or is_due(done, settings.evaluate_every, settings.steps):
            watcher.watch(done)
        while done < settings.steps and not trainer.stopping:
            line = trainer.take_step(done)
            done += 1
            if trainer.rank == 0:
                progress.advance(done, line)
            if is_due(done, settings.evaluate_every, settings.steps) and not trainer.stopping:
                watcher.watch(done)
            if is_due(done, settings.save_every, settings.steps) or trainer.stopping:
                trainer.save(done)
        if settings.steps == 0:
            trainer.save(0)
    if trainer.rank == 0 and trainer.stopping:
        print(f"{run.id}: stopped after {done} of {settings.steps} steps; run again, it goes on from there", flush=True)
    if trainer.stopping:
        raise Stopped
    if trainer.rank == 0 and len(broken := run.skipped()):
        print(f"{run.id}: skipped {len(broken)} images, see {run.folder / 'skipped.jsonl'}", flush=True)
    if trainer.rank == 0:
        run.finish()
    trainer.accelerator.wait_for_everyone()
    if trainer.stop.asked:  # in the last step, too late
        raise Stopped
    return run


def is_due(done: int, every: int, total: int) -> bool:
    """Whether something that is done every so many steps, and after the last one, is due after `done` steps."""
    return done == total or (every > 0 and done % every == 0)


@atexit.register
def _end_process_group() -> None:
    """End the process group: left to the interpreter's end, its threads may abort a process that has done its work."""
    if distributed.is_initialized():
        distributed.destroy_process_group()

"""One loop for both stages: draw, objective, gradients, average, measure, combine, clip, step, record.

Every draw of a step depends on (seed, step) alone, so a killed run goes on to the same bits on one machine.
"""

import atexit
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from tqdm import tqdm

from diva_lab.gradients import EMBEDDINGS, Gradient, combine, measure, term_gradients
from diva_lab.images import open_images
from diva_lab.machine import default_device, fast_bf16, generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder
from diva_lab.objectives.step import Step
from diva_lab.training.build import make_step
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings, learning_rate

PROBE_SEED = 1_000_000  # added to the seed for the pictures of probe batches
Probe = Callable[[Callable[..., Step], dict[str, Tensor]], list[dict]]


def _live() -> bool:
    """Whether somebody watches: a terminal, or a notebook's front end (which, unlike a batch run, can be asked)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


@contextmanager
def _progress(total: int, first: int, label: str) -> Iterator[Callable[[int, float], None]]:
    """A bar where somebody watches; elsewhere one line every tenth of the way."""
    if _live():
        with tqdm(total=total, initial=first, desc=label) as bar:
            yield lambda step, loss: (bar.update(), bar.set_postfix(loss=f"{loss:.4f}"))
        return
    every = max(1, total // 10)

    def line(step: int, loss: float) -> None:
        if (step + 1) % every == 0 or step + 1 == total:
            print(f"{label}: step {step + 1}/{total}, loss {loss:.4f}", flush=True)

    yield line


def train(
    run: Run,
    settings: Settings,
    encoder: Encoder,
    conditioner: Conditioner,
    denoiser: Denoiser,
    objective: Callable[[Step], dict[str, Tensor]],
    evaluate: Callable[[], dict[str, float]] | None,
    probe: Probe | None = None,
) -> Run:
    """Minimise the objective over all parameters of encoder and conditioner that ask for a gradient.

    Under `accelerate launch` each process takes pictures and draws of its own, gradients are averaged over processes
    before anything is measured or clipped, and the first process alone writes. A checkpoint keeps every process's
    position in its pictures, because each skips its own broken ones.
    """
    AcceleratorState._reset_state()  # one process may hold runs of different precision, one after the other
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if fast_bf16(default_device()) else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=default_device().type == "cpu")
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    models = {"encoder": encoder, "conditioner": conditioner}
    if any(p.requires_grad for p in denoiser.network.parameters()):
        models["network"] = denoiser.network
    elif precision == "bf16":
        nn.Module.to(denoiser.network, torch.bfloat16)  # frozen: nobody needs it in float32; diffusers' own warns
    if settings.compile:
        denoiser.network.compile(dynamic=False)
    modules = nn.ModuleDict(models).to(device)
    parameters = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            parameters.values(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay
        )
    optimizer = accelerator.prepare(optimizer)

    first, seconds, positions = 0, 0.0, []
    with accelerator.main_process_first():
        state = run.resume()
    if state is not None:
        first, seconds, positions = state["step"], state["seconds"], state.get("positions", [])
        optimizer.load_state_dict(state["optimizer"])
        modules.load_state_dict(run.weights(), strict=False)
    accelerator.wait_for_everyone()  # `resume` cuts records back: nobody writes before all have done it

    def at(number: int, **changes) -> Step:
        """A step of probe batch `number`, other pictures than are trained on, with other settings where given."""
        while len(shown) <= number:
            shown.append(next(probed).to(device).float() / 255)
        random = generator("probe", settings.seed, number)
        return make_step(shown[number], encoder, conditioner, denoiser, random, replace(settings, **changes))

    def watch(step: int) -> None:
        if rank == 0:
            modules.eval()
            if evaluate is not None:
                run.log("evaluations", step=step, **evaluate())
            if probe is not None:
                dtype = denoiser.network.dtype
                nn.Module.to(denoiser.network, torch.float32)  # differences of gradients would drown in rounding
                for row in probe(at, parameters):
                    run.log("probes", step=step, **row)
                nn.Module.to(denoiser.network, dtype)
        accelerator.wait_for_everyone()

    def averaged(values: Tensor) -> Tensor:
        return accelerator.reduce(values, "mean") if processes > 1 else values

    px = max(encoder.px, denoiser.px)
    position = first * settings.accumulate * settings.batch  # where no picture was broken
    if len(positions) == processes:
        position = positions[rank]
    source = open_images(settings.images, px, settings.batch, settings.seed, position, rank, processes)
    skipped: list[dict] = []  # since the last checkpoint
    shown: list[Tensor] = []  # to probes; their pictures are not opened where nobody probes
    probed = probe and open_images(settings.images, px, settings.batch, settings.seed + PROBE_SEED)

    def save(step: int) -> None:
        places, lines = gather_object([source.position]), gather_object(skipped)
        if rank == 0:
            for line in lines:
                run.log("skipped", **line)
            run.save(step, parameters, optimizer.state_dict(), seconds, places)
        skipped.clear()

    if first == 0:
        watch(0)
    with _progress(settings.steps, first, run.id) as tell:
        for step in range(first, settings.steps):
            start = time.perf_counter()
            modules.train()
            total: dict[str, Gradient] = {}
            line: dict[str, float] = {}
            shift = torch.zeros(settings.accumulate, settings.batch, encoder.dim, device=device, requires_grad=True)
            for micro in range(settings.accumulate):
                random = generator("step", settings.seed, step, micro, *([rank] if rank else []))
                torch.manual_seed(random.initial_seed())  # LoRA's dropout draws from the global generator
                images = next(source).to(device).float() / 255
                try:
                    with accelerator.autocast():
                        made = make_step(images, encoder, conditioner, denoiser, random, settings, shift[micro])
                        terms = objective(made)
                    gradients = term_gradients(terms, parameters | {EMBEDDINGS: shift})
                except torch.OutOfMemoryError as error:
                    raise RuntimeError(
                        f"run {run.id}: out of memory at step {step} with batch={settings.batch}, "
                        f"rows={settings.rows}; rows=1 gives DCR's gradients in the least memory"
                    ) from error
                for name, gradient in gradients.items():
                    line[name] = line.get(name, 0) + terms[name].mean().item() / settings.accumulate
                    for n, g in gradient.items():
                        part = g / settings.accumulate if settings.accumulate > 1 else g
                        total.setdefault(name, {})[n] = total[name][n] + part if n in total.get(name, {}) else part
                del gradients, made, terms
            if processes > 1:
                for gradient in total.values():
                    flat = averaged(torch.cat([g.flatten() for n, g in gradient.items() if n != EMBEDDINGS]))
                    parts = flat.split([p.numel() for p in parameters.values()])
                    gradient |= {n: x.view_as(p) for (n, p), x in zip(parameters.items(), parts, strict=True)}
                line = dict(zip(line, averaged(torch.tensor([*line.values()], device=device)).tolist(), strict=True))
            measured = measure(total)
            for n, g in combine(total, settings.combine).items():
                parameters[n].grad = g
            del total
            norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            optimizer.step()
            loss = sum(line.values())
            if loss != loss:
                raise FloatingPointError(f"run {run.id}: the loss is not a number at step {step}; try a smaller lr")
            seconds += time.perf_counter() - start
            skipped += [{"step": step, "name": name, "reason": reason} for name, reason in source.skipped]
            source.skipped.clear()
            facts = {"loss": loss, **line, "grad_norm": norm.item(), **measured, "seconds": seconds}
            if rank == 0:
                run.log("metrics", step=step, **facts)
                tell(step, loss)
            done = step + 1
            last = done == settings.steps
            if last or (settings.evaluate_every and done % settings.evaluate_every == 0):
                watch(done)
            if last or (settings.save_every and done % settings.save_every == 0):
                save(done)
    if settings.steps == 0:
        save(0)
    if rank == 0 and len(broken := run.skipped()):
        print(f"{run.id}: {len(broken)} broken pictures were skipped, see {run.folder / 'skipped.jsonl'}", flush=True)
    accelerator.wait_for_everyone()
    return run.finish()


@atexit.register
def _leave() -> None:
    """End the process group: left to the interpreter's end, its threads may abort a process that has done its work."""
    if distributed.is_initialized():
        distributed.destroy_process_group()

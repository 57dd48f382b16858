"""Two processes over gloo: they average their gradients, share no picture, and fail together."""

import io
import json
import re
import subprocess
import tarfile
import time
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as DatasetImage
from image_writers import png, write_tar
from one_step import pictures
from PIL import Image
from run_checks import same_records, same_weights
from two_processes import GOES_ON, SETTINGS, launch

from diva_lab.image_files import find_tars, read_tars
from diva_lab.images import open_images
from diva_lab.machine import generator
from diva_lab.models.encoders import load_encoder
from diva_lab.models.lora import visual_weights
from diva_lab.training.loop import Trainer
from diva_lab.training.runs import Run
from diva_lab.training.stages import find_run, tune


def sixteen(folder: Path) -> str:
    """The folder, which now holds 16 pictures."""
    folder.mkdir(exist_ok=True)
    for k, pixels in enumerate(pictures(16)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{k:02}.png")
    return str(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, float]:
    """The folder of all parts of `two_processes`, how the job ended, and when."""
    root = tmp_path_factory.mktemp("together")
    (root / "broken.png").write_bytes(b"words")
    for k, pixels in enumerate(pictures(8)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / "whole.png")
        with tarfile.open(root / f"{k % 2}.tar", "a") as tar:
            tar.add(root / "whole.png", f"{k}.png")
            for copy in range(1 + 2 * (k % 2)):
                tar.add(root / "broken.png", f"{k}broken{copy}.png")
    settings = replace(GOES_ON, images=sixteen(root / "pictures"))

    def kill(encoder):
        if (steps := len(find_run(settings, root / "begun").metrics())) == 3:
            raise KeyboardInterrupt
        return {"steps": float(steps)}

    with pytest.raises(KeyboardInterrupt):
        tune(settings, root / "begun", evaluate=kill)
    assert find_run(settings, root / "begun").state()["positions"] == [8]
    return root, launch(str(root)), time.time()


def the_run(job, name: str) -> Run:
    """The only run of a part, of which the job said what it printed to errors if there is none."""
    root, done, _ = job
    assert (root / name).is_dir(), f"{done.stderr[:6000]}\n...\n{done.stderr[-2000:]}"  # the first words say why
    return Run(*(root / name).iterdir())


@pytest.fixture(scope="module")
def halves(job) -> list[Run]:
    """What each process of the part `average` would do alone, on tars with broken pictures."""
    root, runs = job[0], []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "diva_lab.training.batches.open_images",
                lambda *args, rank=rank: open_images(*args[:5], rank, 2, *args[7:]),
            )
            if rank:
                patch.setattr("diva_lab.training.loop.generator", lambda *parts: generator(*parts, 1))
            runs.append(tune(replace(SETTINGS, images=str(root / "{0..1}.tar")), root / str(rank)))
    return runs


def test_two_processes_step_by_the_average_of_their_gradients(job, halves):
    both = the_run(job, "both")
    assert list(both.evaluations()["rank"]) == [0, 0] and len(both.metrics()) == 1  # one of them writes
    before = visual_weights(load_encoder("tiny"))
    for name, weight in both.weights().items():
        start = before[name.removeprefix("encoder.")]
        one, two = (run.weights()[name] - start for run in halves)
        torch.testing.assert_close(weight - start, (one + two) / 2, atol=1e-6, rtol=1e-3)
    losses = [run.metrics()["loss"].item() for run in halves]
    assert losses[0] != losses[1]
    assert both.metrics()["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_what_each_process_skipped_and_where_it_is_are_kept(job, halves):
    both = the_run(job, "both")
    one, two = (run.skipped() for run in halves)
    assert len(one) != len(two) and set(one["name"]).isdisjoint(two["name"])
    pd.testing.assert_frame_equal(both.skipped(), pd.concat([one, two], ignore_index=True))
    assert both.resume()["positions"] == [run.resume()["positions"][0] for run in halves]
    assert job[1].stdout.count(f"skipped {len(one) + len(two)} images") == 1


def test_a_killed_process_ends_the_job_with_an_error(job):
    run, (_, done, ended) = the_run(job, "dead"), job
    assert done.returncode != 0 and ended - (run.folder / "settings.json").stat().st_mtime < 120
    assert not run.done and len(run.metrics())  # it had begun
    assert re.search(r"rank +: 1 .*\n +exitcode +: 9 ", done.stderr), done.stderr[-2000:]


def test_processes_stop_together_and_go_on_to_the_same_bits_and_all_see_a_gradient_that_is_not_finite(job):
    whole, stopped, broken = (the_run(job, name) for name in ("whole", "stopped", "broken"))
    printed = job[1].stdout
    assert printed.count(f"{whole.id}: stopped after 2 of 3 steps; run again, it goes on from there") == 1
    assert stopped.done and same_weights(whole, stopped)
    same_records(whole, stopped)
    assert printed.count("a gradient is not finite at step 1, of which nothing is saved") == 2
    assert not broken.done and list(broken.metrics()["step"]) == [0]


def test_a_run_that_was_stopped_in_one_process_goes_on_in_two_and_shows_no_picture_twice(job, capsys):
    run, images = the_run(job, "begun"), str(job[0] / "pictures")
    assert run.done and run.settings["accumulate"] == 2
    assert run.processes().to_dict("records") == [{"step": 2, "processes": 2, "accumulate": 1}]
    assert "after 2 steps in 1 processes it goes on in 2, each with accumulate=1" in job[1].stdout
    assert list(run.metrics()["step"]) == [0, 1, 2, 3] and run.state()["positions"] == [8, 8]
    seen = shown(images, 4, 0, 1) + [image for rank in range(2) for image in shown(images, 2, rank, 2, 4)]
    assert len(seen) == len(set(seen)) == 16
    assert tune(replace(GOES_ON, images=images), run.folder.parent).id == run.id
    assert "done before" in capsys.readouterr().out


def test_a_run_that_was_stopped_in_two_processes_goes_on_in_one_and_shows_no_picture_twice(job):
    begun, images = the_run(job, "halfway"), str(job[0] / "pictures")
    assert not begun.done and begun.state()["positions"] == [4, 4]
    run = tune(replace(GOES_ON, images=images, save_every=0), begun.folder.parent)
    assert run.folder == begun.folder and run.done and run.state()["positions"] == [16]
    assert run.settings["accumulate"] == 1
    assert run.processes().to_dict("records") == [{"step": 2, "processes": 1, "accumulate": 2}]
    seen = [image for rank in range(2) for image in shown(images, 2, rank, 2)] + shown(images, 4, 0, 1, 8)
    assert len(seen) == len(set(seen)) == 16


@pytest.mark.parametrize(
    ("change", "began", "told"),
    [
        ({}, 3, r"accumulate=1 in 3 processes.*by 2; .* --num_processes 3, or another number that divides 3"),
        ({"shared_samples": True, "accumulate": 2}, 1, r"--num_processes 1 \(shared_samples=True\)"),
    ],
)
def test_a_step_that_so_many_processes_cannot_share_is_refused(tmp_path, change, began, told):
    settings = replace(SETTINGS, **{"accumulate": 1, "steps": 2, **change})
    run = tune(replace(settings, images="world"), tmp_path)
    path = run.folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": began}))
    trainer = Trainer.__new__(Trainer)
    trainer.run, trainer.settings, trainer.accelerator = run, settings, SimpleNamespace(num_processes=2)
    with pytest.raises(ValueError, match=told):
        trainer._share_step()


@pytest.mark.slow
def test_the_command_trains_both_stages_of_a_preset_in_two_processes(tmp_path):
    (tmp_path / "cc3m").mkdir()
    for k, pixels in enumerate(pictures(8)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
        with tarfile.open(tmp_path / "cc3m" / f"cc3m-train-{k % 2:04}.tar", "a") as tar:
            tar.add(tmp_path / "one.png", f"{k}.png")
    tiny = ["encoder=tiny", "denoiser=tiny", "steps=1", "batch=2", "vae_px=0"]
    command = ["--preset", "openai-l14-dcr", "--out", "runs", "--set", *tiny]
    done = launch("-m", "diva_lab", "train", *command, cwd=tmp_path)
    assert done.returncode == 0, f"{done.stderr[:6000]}\n...\n{done.stderr[-2000:]}"
    one, two = (Run(folder) for folder in sorted((tmp_path / "runs").iterdir()))
    assert (one.settings["stage"], two.settings["stage"]) == ("align", "tune") and one.done and two.done
    assert two.settings["projector"] == f"runs/{one.id}"
    for run in (one, two):
        assert run.settings["accumulate"] == 256 // (16 * 2)  # of the preset for as many processes
        assert run.resume()["positions"] == [16, 16]  # of the preset's pictures, 8 micro-batches of 2 each


# --- no picture twice -------------------------------------------------------------------------------------------


def shown(source: str, batches: int, rank: int, processes: int, first: int = 0) -> list[bytes]:
    """The pictures of a process's batches of two."""
    found = islice(open_images(source, 32, 2, 0, first, rank, processes), batches)
    return [image.numpy().tobytes() for batch in found for image in batch]


@pytest.fixture(scope="module", params=["folder", "tars", "hf"])
def source(request, tmp_path_factory):
    """Sixteen pictures, as files of a folder, as four tars, or as a Hugging Face dataset."""
    root = tmp_path_factory.mktemp("pictures")
    if request.param == "hf":
        found = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pictures(16)]
        Dataset.from_dict({"image": found}, Features({"image": DatasetImage()})).save_to_disk(root)
        return f"hf:{root}"
    if request.param == "folder":
        return sixteen(root)
    for k, pixels in enumerate(pictures(16)):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        with tarfile.open(root / f"{k // 4:04}.tar", "a") as tar:
            data = io.BytesIO()
            image.save(data, "png")
            member = tarfile.TarInfo(f"{k:06}.png")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)
    return str(root / "{0000..0003}.tar")


def test_an_epoch_of_all_processes_is_every_picture_once(source):
    parts = [shown(source, 4, rank, 2) for rank in range(2)]
    assert all(len(part) == 8 for part in parts)
    assert len(set(parts[0]) | set(parts[1])) == 16


def test_a_process_that_is_resumed_goes_on_where_it_was(source):
    for rank in range(2):
        assert shown(source, 6, rank, 2)[4:] == shown(source, 4, rank, 2, first=4)


def test_the_world_shows_each_process_other_pictures():
    one, two = (shown("world", 3, rank, 2) for rank in range(2))
    assert not set(one) & set(two) and one == shown("world", 3, 0, 1)


def test_fewer_tars_than_processes_are_shared(tmp_path):
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", {f"{i}.png": png(i) for i in range(k, 12, 2)})
    parts = [shown(str(tmp_path / "*.tar"), 2, rank, 3) for rank in range(3)]  # 12 pictures: 4 each
    assert all(len(set(part)) == 4 for part in parts) and len(set().union(*parts)) == 12
    again = [shown(str(tmp_path / "*.tar"), 5, rank, 3, first) for rank, first in ((0, 0), (0, 6))]
    assert again[0][6:] == again[1][:4]


def test_64_processes_over_600_tars_show_every_image_once_an_epoch_and_go_on_where_they_were(tmp_path):
    sizes = [1 + k % 3 for k in range(600)]
    for k, size in enumerate(sizes):
        write_tar(tmp_path / f"{k:04}.tar", {f"{k}-{i}.png": b"not decoded" for i in range(size)})
    shards = find_tars(str(tmp_path / "{0000..0599}.tar"))
    epoch = [[sample.name for sample in read_tars(shards, 0, 0, rank, 64, epochs=1)] for rank in range(64)]
    assert sorted(chain(*epoch)) == sorted(f"{shards[k]}: {k}-{i}.png" for k in range(600) for i in range(sizes[k]))
    for rank in (0, 63):
        whole = [sample.name for sample in islice(read_tars(shards, 0, 0, rank, 64), 45)]
        killed = len(epoch[rank]) + 7  # in the second epoch
        assert [sample.name for sample in islice(read_tars(shards, 0, killed, rank, 64), 45 - killed)] == whole[killed:]


def test_resampled_tars_are_drawn_with_replacement_by_each_process_and_go_on_where_they_were(tmp_path):
    for k in range(8):
        write_tar(tmp_path / f"{k}.tar", {f"{k}.png": b"not decoded"})
    shards = find_tars(str(tmp_path / "*.tar"))

    def names(rank: int, first: int, n: int) -> list[str]:
        return [s.name for s in islice(read_tars(shards, 0, first, rank, 2, resampled=True), n)]

    one, two = names(0, 0, 40), names(1, 0, 40)
    assert one != two and any(len(set(one[k : k + 4])) < 4 for k in range(0, 40, 4))  # an epoch has four
    assert len(set(one)) == 8 and names(0, 13, 27) == one[13:]

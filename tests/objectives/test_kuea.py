import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from one_step import OneStep, open_lora, pictures, trainable

from diva_lab.models.encoders import load_encoder
from diva_lab.objectives.kuea import polynomial_kernel
from diva_lab.training.build import weight_hashes
from diva_lab.training.stages import find_run, tune


def test_a_kernel_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    products = [[2.0 * 1 + 3, 2.0 * 1 + 3], [5.0, 2.0 * 2 + 3]]
    mixed = (5 / math.sqrt(5 * 7)) ** 3
    assert products == [[5, 5], [5, 7]]
    torch.testing.assert_close(polynomial_kernel(x, 2.0, 3.0), torch.tensor([[1, mixed], [mixed, 1]]))


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_is_symmetric_at_most_one_and_one_for_parallel_vectors(seed):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    kernel = polynomial_kernel(x, 0.3, 1.0)
    torch.testing.assert_close(kernel, kernel.T)
    assert (kernel <= 1 + 1e-6).all() and torch.allclose(kernel.diagonal(), torch.ones(5))
    torch.testing.assert_close(polynomial_kernel(torch.stack([x[0], 4 * x[0]]), 1.0, 0.0), torch.ones(2, 2))


def test_an_untuned_encoder_pays_for_its_kernel_alone_and_no_weight_stands_between(settings_of):
    one = OneStep.of(settings_of("kuea"))
    terms = one.terms()
    assert torch.equal(terms["keep"], torch.zeros(3)) and (terms["kernel"] > 0).all()
    images = one.images()
    with torch.no_grad():
        f = one.encoder.features(images).embedding
        small = F.interpolate(images, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
        seen = one.teacher.vision.features(small).embedding
        own, goal = ((gamma * x @ x.T + c) for x, gamma, c in ((f, 0.0032, 0.191623), (seen, 1 / 16, 1.0)))
        own, goal = (k**3 / (k.diagonal()[:, None] * k.diagonal()).sqrt() ** 3 for k in (own, goal))
    torch.testing.assert_close(terms["kernel"], (own - goal).square().mean(1) / 2, rtol=1e-4, atol=1e-7)
    weighted = one.terms(lambda_con=3.0)["kernel"]
    torch.testing.assert_close(weighted, 3 * terms["kernel"])


def test_what_moved_pays_its_squared_distance(settings_of):
    one = OneStep.of(settings_of("kuea"))
    open_lora(one.encoder)
    with torch.no_grad():
        new, old = (
            model.features(one.images()).embedding for model in (one.encoder, load_encoder(one.settings.encoder))
        )
    torch.testing.assert_close(one.terms()["keep"], (new - old).square().sum(1), rtol=1e-4, atol=1e-7)


def test_the_kernels_come_nearer_where_the_teacher_tells_all_images_apart(settings_of, monkeypatch):
    one = OneStep.of(replace(settings_of("kuea"), lambda_rec=0.0))
    monkeypatch.setattr(one.teacher, "see", lambda images: 10 * torch.eye(len(images)))
    open_lora(one.encoder)
    losses = one.descend([*trainable(one.encoder).values(), one.teacher.gamma, one.teacher.coef0])
    assert losses[-1] < losses[0] - 1e-3


def test_the_kernel_is_trained_and_the_teacher_is_not(settings_of, tmp_path):
    settings = replace(settings_of("kuea"), steps=2, lr=1e-2, batch=4)
    weights = tune(settings, tmp_path).weights()
    assert {name for name in weights if name.startswith("teacher.")} == {"teacher.gamma", "teacher.coef0"}
    assert weights["teacher.gamma"] != 0.0032 and weights["teacher.coef0"] != 0.191623


def test_no_denoiser_is_loaded_and_the_teacher_is_on_record(settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr("diva_lab.training.build.load_denoiser", lambda *_: pytest.fail("a denoiser was loaded"))
    settings = replace(settings_of("kuea"), denoiser="no/such-denoiser", steps=1)
    run = tune(settings, tmp_path)
    assert set(run.environment["weights"]) == {"encoder", "teacher"} == set(weight_hashes(settings))
    assert find_run(settings, tmp_path) == run


def test_the_teacher_sees_images_of_any_size_in_its_own(settings_of):
    teacher = OneStep.of(settings_of("kuea")).teacher
    assert teacher.see(pictures(2).float() / 255).shape == (2, 16)
    assert not teacher.train().training and not any(m.training for m in teacher.modules())


def test_what_it_cannot_do_is_said_before_anything_is_trained(settings_of, tmp_path):
    with pytest.raises(ValueError, match="'kuea' reads no denoiser"):
        tune(settings_of("kuea"), tmp_path, probe=lambda at, parameters: [])
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        tune(replace(settings_of("kuea"), teacher=str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(ValueError, match="contrasts images"):
        replace(settings_of("kuea"), batch=1)

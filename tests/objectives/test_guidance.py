import torch


def test_guidance_sends_no_gradient_through_the_empty_prompt(step):
    step.denoiser.empty.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(
            step.terms("dcr-guidance")["dcr"].sum(), [step.denoiser.empty], allow_unused=True
        )
        assert gradient is None
    finally:
        step.denoiser.empty.requires_grad_(False)

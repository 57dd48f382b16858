from fakes import denoiser, encoder, make_encoder  # noqa: F401, fixtures

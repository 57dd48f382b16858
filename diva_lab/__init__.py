"""Tune CLIP's image encoder with feedback from a frozen diffusion model, and find out why it works.

The public names are loaded when they are first used, so that `import diva_lab` itself takes no time.
"""

from importlib import import_module

__version__ = "0.2.0"

PUBLIC = {  # name -> module
    "Settings": "training.settings",
    "align": "training.stages",
    "evaluate": "evaluation.table",
    "export": "training.export",
    "load_denoiser": "models.registry",
    "load_encoder": "models.encoders",
    "preset": "training.presets",
    "tune": "training.stages",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(PUBLIC)}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})

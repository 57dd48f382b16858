"""Small LLaVA folders and what they are made of: a tiny Llama, and towers of both kinds."""

from pathlib import Path

import pytest
from small_models import HUGE, write_clip_of, write_language, write_transformers_clip

from diva_lab.llava.folders import assemble


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> dict[str, Path]:
    """Folders of encoders: a CLIP, a SigLIP, and one with MetaCLIP-H's proportions, whose widths differ."""
    root = tmp_path_factory.mktemp("towers")
    return {
        "clip": write_transformers_clip(root / "clip", "clip", "quick_gelu"),
        "siglip": write_transformers_clip(root / "siglip", "siglip", "gelu_pytorch_tanh"),
        "metaclip-h": write_clip_of(root / "metaclip-h", HUGE),
    }


@pytest.fixture(scope="session")
def language(tmp_path_factory) -> Path:
    return write_language(tmp_path_factory.mktemp("language") / "llama")


@pytest.fixture(scope="session")
def llava(tmp_path_factory, towers, language) -> Path:
    """A LLaVA folder with the small CLIP."""
    return assemble(towers["clip"], language, tmp_path_factory.mktemp("llava") / "clip")

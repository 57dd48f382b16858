"""The machine underneath: which device, whether bfloat16 pays, where models lie, random generators from numbers."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE

SHORT = 128  # tokens up to which plain softmax attention beats the fused kernel's backward on a CPU


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (CPUs: AVX512-BF16 or AMX)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """bfloat16 autocast where `fast_bf16`, a no-op elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_bf16(device))


def fetch_hint(*repositories: str) -> str:
    """Where models of the hub, as `owner/name`, were looked for, and what fetches them."""
    folders = ", ".join(str(Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")) for name in repositories)
    return f"looked in {folders}; fetch with network: {' && '.join(f'hf download {name}' for name in repositories)}"


def fetch_repository(repository: str, files: list[str]) -> str:
    """The folder of a hub repository, its `files` (patterns) from the cache or, with network, from the hub.

    Raises:
        FileNotFoundError: where it is in neither; says where it was looked for and what fetches it.
    """
    try:
        return snapshot_download(repository, allow_patterns=files)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no {repository} here; {fetch_hint(repository)}") from error


def generator(*numbers: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on all of `numbers` and on nothing else."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

"""The machine underneath: which device, whether bfloat16 pays, and random generators from plain numbers."""

import hashlib

import torch

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


def generator(*numbers: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on all of `numbers` and on nothing else."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

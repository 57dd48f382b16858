"""The machine: its device, bfloat16, random generators, and models from the Hugging Face hub."""

import hashlib
import re
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError


def default_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def count_processes() -> int:
    """How many processes train together, as accelerate sees it: started by `accelerate launch`, torchrun or mpirun."""
    return PartialState(cpu=default_device().type == "cpu").num_processes


def is_main_process() -> bool:
    """Whether this process is the first one of those that train together, which speaks for all."""
    count_processes()
    return PartialState().is_main_process


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (a CPU needs AVX512-BF16 or AMX)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """A context with bfloat16 autocast where `fast_bf16(device)`, without any autocast elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_bf16(device))


def free_memory(device: torch.device) -> int | float:
    """Bytes that a process may still take: on a GPU, or of main memory; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", facts.read_text(encoding="utf-8")) if facts.is_file() else None
    return int(found[1]) * 1024 if found else float("inf")


def fetch_command(repository: str, part: str = "") -> str:
    """The command that downloads a hub repository `owner/name`, or one folder of it."""
    return f"hf download {repository}" + (f' --include "{part}/*"' if part else "")


def fetch_hint(*repositories: str, part: str = "") -> str:
    """For error messages: the cache folders of hub repositories `owner/name`, and the commands that download them."""
    folders = ", ".join(str(Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")) for name in repositories)
    return f"looked in {folders}; fetch with network: {' && '.join(fetch_command(name, part) for name in repositories)}"


def fetch_repository(repository: str, files: list[str], part: str = "") -> str:
    """The local folder of a hub repository: its files come from the cache, or with a network from the hub.

    Args:
        repository: `owner/name`.
        files: glob patterns of the files to fetch.
        part: the folder that holds all of them, where it is not the whole repository.

    Raises:
        FileNotFoundError: where it is not in the cache and cannot be downloaded; names the cache folder and the
            command that downloads it.
    """
    try:
        return snapshot_download(repository, allow_patterns=files)
    except (OSError, ValueError) as error:
        hint = fetch_hint(repository, part=part)
        if isinstance(error, GatedRepoError):
            hint += "; first accept its terms on huggingface.co, then: hf auth login"
        raise FileNotFoundError(f"no {repository} on this machine; {hint}") from error


def generator(*numbers: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on all of `numbers` and on nothing else."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

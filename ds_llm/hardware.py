"""Facts about the machine: peak FLOP/s of known cards, memory in use, versions; FLOPs of a training step."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from ds_llm.compat.deepspeed import unpartitioned_shape

# (pattern of the device name torch reports, dense tensor-core TFLOPS in bf16/fp16 with fp32 accumulation, fp32 TFLOPS
# without TF32, has bf16). From the vendors' data sheets; those that print figures "with sparsity" are halved:
# NVIDIA B200/H200/H100/H20/A100/A800/A30/A40/A10/L40S/L40/L4/V100/T4 data sheets, the AWS G5 page (A10G), the GA102,
# AD102 and GeForce Blackwell architecture white papers (RTX cards), and AMD Instinct MI210/MI250X/MI300X/MI325X data
# sheets (an MI250X shows as two devices, so half a card each). The first pattern that fits wins.
_CARDS = (
    (r"\bB200\b", 2250.0, 75.0, True),
    (r"\bH200 NVL\b", 835.5, 60.0, True),
    (r"\bH200\b", 989.5, 67.0, True),
    (r"\bH100 NVL\b", 835.5, 60.0, True),
    (r"\bH100 PCIe\b", 756.5, 51.0, True),
    (r"\bH[18]00\b", 989.5, 67.0, True),
    (r"\bH20\b", 148.0, 44.0, True),
    (r"\bA[18]00\b", 312.0, 19.5, True),
    (r"\bA30\b", 165.0, 10.3, True),
    (r"\bA40\b", 149.7, 37.4, True),
    (r"\bA10G\b", 70.0, 35.0, True),
    (r"\bA10\b", 125.0, 31.2, True),
    (r"\bL40S\b", 362.0, 91.6, True),
    (r"\bL40\b", 181.0, 90.5, True),
    (r"\bL4\b", 121.0, 30.3, True),
    (r"\bV100-SXM", 125.0, 15.7, False),
    (r"\bV100S\b", 130.0, 16.4, False),
    (r"\bV100\b", 112.0, 14.0, False),
    (r"\bTesla T4\b", 65.0, 8.1, False),
    (r"\bRTX 5090\b", 209.5, 104.8, True),
    (r"\bRTX 4090\b", 165.2, 82.6, True),
    (r"\bRTX 4080\b", 97.5, 48.7, True),
    (r"\bRTX 3090\b", 71.0, 35.6, True),
    (r"\bRTX 3080\b", 59.5, 29.8, True),
    (r"\bRTX A6000\b", 154.8, 38.7, True),
    (r"\bRTX A5000\b", 111.1, 27.8, True),
    (r"\bRTX 6000 Ada\b", 364.2, 91.1, True),
    (r"\bMI325X\b", 1307.4, 163.4, True),
    (r"\bMI300X\b", 1307.4, 163.4, True),
    (r"\bMI250X\b", 191.5, 23.9, True),
    (r"\bMI210\b", 181.0, 22.6, True),
)
# a part of a card, or a sibling with other clocks or more cores: the table's figure is not its own
_OTHER_CARD = re.compile(
    r"\bMIG\b|\bLaptop\b|\bMax-Q\b|\bMobile\b|\b\d{4} (Ti|SUPER|D|D v2)\b|\b3080 12GB\b", re.IGNORECASE
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s for `dtype` (fp32, bf16 or fp16), or None where it is not known.

    `device_name` is what `torch.cuda.get_device_name()` returns. None for CPUs, parts of a card (MIG) and dtypes for
    which the card has no tensor cores: better no utilisation than a wrong one. fp32 is without TF32, torch's default.
    """
    if _OTHER_CARD.search(device_name):
        return None
    for pattern, half, single, has_bf16 in _CARDS:
        if re.search(pattern, device_name):
            if dtype == "fp32":
                return single * 1e12
            return half * 1e12 if dtype == "fp16" or has_bf16 else None
    return None


def device_name() -> str:
    """Name of the accelerator in use, or of the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return _cpu_name()


def memory_gb() -> float:
    """Memory of this process in 10^9 bytes: the peak allocated on its GPU, or its resident memory where there is
    none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def share_cores() -> None:
    """Give this process its share of the CPU cores when a launcher started several on this machine.

    Otherwise each process uses a thread per core, and they slow each other down. OMP_NUM_THREADS is respected.
    """
    processes = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of a weight, whether it is sharded (ZeRO-3, `ds_llm.parallel`) or packed into 4 bits (bitsandbytes)."""
    if (whole := getattr(parameter, "whole_shape", None)) is not None:
        return whole
    packed = getattr(parameter, "quant_state", None)
    return torch.Size(packed.shape) if packed is not None else unpartitioned_shape(parameter)


def dense_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """`whole_shape`; of the kept values of a pruned weight the shape of the dense weight in the matrix products."""
    return getattr(parameter, "dense_shape", None) or whole_shape(parameter)


def training_flops_per_token(model: torch.nn.Module, seq_len: int) -> float:
    """FLOPs that the forward and backward pass of one token cost, as used for MFU.

    6 x (weights a token meets in matrix products) + 12 x layers x heads x head_dim x seq_len (attention scores and
    values), from Chowdhery et al. 2022 (PaLM), appendix B; the causal half is not deducted and recomputation does not
    count, as there. Frozen weights get no gradient and count 4 x. Of an expert stack only `num_experts_per_tok` experts
    count. The embedding table counts once if it is also the output head and not at all otherwise. Works under ZeRO-3,
    where parameters are empty between uses.
    """
    if parts := getattr(model, "sub_models", None):  # a frozen one is only run forwards: a third, of 4 x a half
        trained = [any(p.requires_grad for p in part.parameters()) for part in parts]
        return sum(
            (1 if t else 0.5) * training_flops_per_token(m, seq_len) for m, t in zip(parts, trained, strict=True)
        )
    config = getattr(model.config, "text_config", model.config)
    experts = next(
        (n for k in ("n_routed_experts", "num_experts", "num_local_experts") if (n := getattr(config, k, 0))), 0
    )
    active = getattr(config, "num_experts_per_tok", None) or experts
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    products = 0.0
    for parameter in model.parameters():
        shape = dense_shape(parameter)
        if len(shape) < 2 or (parameter is embedding and not tied):
            continue
        share = active / experts if experts and len(shape) == 3 and shape[0] == experts else 1.0
        products += (6.0 if parameter.requires_grad else 4.0) * share * float(shape.numel())
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return products + 12.0 * getattr(config, "num_hidden_layers", 0) * heads * head_dim * seq_len


def environment() -> dict:
    """Versions, commit, command line and machine facts to save with a run. It has no host name."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "git": _git(),
        "cpu": {"name": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "memory_gb": _total_memory_gb()},
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
    }


_PACKAGES = ("ds_llm", "torch", "deepspeed", "transformers", "tokenizers", "triton", "numpy", "peft", "flash-attn")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict | None:
    """Commit of the checkout this file is tracked in and whether it has changes; None for an installed copy."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a virtual environment can lie within some other repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _total_memory_gb() -> float:
    return round(psutil.virtual_memory().total / 1e9, 1)

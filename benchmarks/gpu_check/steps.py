"""The steps of the check, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """name: as `--only` takes it. function: "module:function" of this package, called with a `Report` and a `Place`.
    seconds: limit on a GPU. what: one line about what it finds out."""

    name: str
    function: str
    seconds: int
    what: str


WHEELS = Step("wheels", "install:wheels", 60, "installs what the machine lacks, for the steps of this call only")
STEPS = (
    Step("card", "basics:card", 60, "versions, copy bandwidth and the rate of matrix products"),
    Step("kernel_tests", "basics:kernel_tests", 120, "`tests/kernels` on the device"),
    Step("kernels", "basics:kernel_table", 90, "each kernel beside its roofline, eager, torch.compile and others"),
    Step("attention", "attention:attention", 45, "which attention packed documents get, and what it costs"),
    Step("pretrain_dense", "pretrain:dense", 150, "a dense model of 1.3B parameters, 4 x 4,096 tokens a step"),
    Step("pretrain_small", "pretrain:small", 90, "a dense model of 100M parameters, 32 x 512 tokens a step"),
    Step("pretrain_experts", "pretrain:experts", 120, "a mixture of 64 experts of which 8 are used, 8 x 2,048 tokens"),
    Step("sft", "finetune:sft", 90, "supervised fine-tuning beside TRL"),
    Step("dpo", "finetune:dpo", 90, "preference optimisation beside TRL"),
    Step("scoring", "scoring:scoring", 120, "scoring rows of 512 tokens by a model of Qwen2.5-3B's shape"),
    Step("sparse", "sparse:sparse", 60, "fine-tuning of kept weights beside setting pruned ones to zero"),
    Step("optional", "optional:optional", 90, "QLoRA, flash-attn and cuML where they are installed"),
)
NAMES = tuple(step.name for step in STEPS)

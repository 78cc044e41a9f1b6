"""One contestant of `benchmarks.trainers`, in a process of its own.

Reads `job.json` of a folder and writes `result.json`: seconds of the clock and of CPU time at the end of every step,
the losses, the CPU seconds of DPO's reference pass (None for SFT) and the peak of memory in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import torch


class Clock:
    """Notes the time at the end of every step, and what `timed` functions take in CPU seconds."""

    def __init__(self):
        self.clock, self.cpu, self.seconds = [], [], None

    def tick(self) -> None:
        self.clock.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def timed(self, function):
        def run(*args, **kwargs):
            start = time.process_time()
            found = function(*args, **kwargs)
            self.seconds = (self.seconds or 0.0) + time.process_time() - start
            return found

        return run

    def result(self, losses: list[float]) -> dict:
        return {"clock": self.clock, "cpu": self.cpu, "losses": losses, "reference_cpu_s": self.seconds}


def ours(job: dict, work: Path) -> dict:
    from ds_llm.config import run as config
    from ds_llm.train import alignment, trainer

    clock, losses = Clock(), []

    class Tracker(trainer.Tracker):
        def step(self, metrics: dict) -> None:
            clock.tick()
            losses.append(metrics["loss"])
            super().step(metrics)

    trainer.Tracker = Tracker
    alignment.reference_log_probs = clock.timed(alignment.reference_log_probs)
    trainer.train(config.load(None, [*job["overrides"], f"zero={job['stage']}", f"output={work / 'run'}"]))
    return clock.result(losses)


def trl(job: dict, work: Path) -> dict:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    clock, losses = Clock(), []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                losses.append(logs["loss"])

    class PreparedDPO(trl.DPOTrainer):
        """Takes pairs that are tokens already."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        _precompute_ref_logps = clock.timed(trl.DPOTrainer._precompute_ref_logps)

    optim, gpu = job["optim"], torch.cuda.is_available()
    deepspeed = None if job["stage"] is None else job["deepspeed"][str(job["stage"])]
    if deepspeed is not None:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    options = {
        "output_dir": str(work / "run"),
        "use_cpu": not gpu,
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": job["accumulation_steps"],
        "learning_rate": optim["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": optim["betas"][0],
        "adam_beta2": optim["betas"][1],
        "adam_epsilon": optim["eps"],
        "weight_decay": optim["weight_decay"],
        "max_grad_norm": optim["grad_clip"],
        "optim": "adamw_torch_fused",
        "bf16": job["dtype"] == "bf16",
        "fp16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "deepspeed": deepspeed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
    }
    rows = json.loads(Path(job["rows"]).read_text())
    for row in rows:
        row.pop("tokens")
    if job["mode"] == "sft":
        kind, arguments = trl.SFTTrainer, trl.SFTConfig
        options |= {"packing": True, "max_length": job["seq_len"], "shuffle_dataset": False}
        options |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        kind, arguments = PreparedDPO, trl.DPOConfig
        options |= {"beta": job["beta"], "precompute_ref_log_probs": True, "max_length": job["seq_len"]}
    trainer = kind(
        model=job["model"],
        args=arguments(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Steps()],
    )
    trainer.train()
    return clock.result(losses)


def main(work: Path) -> None:
    for number in (1, 2):
        os.dup2(os.open(work / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    job = json.loads((work / "job.json").read_text())
    found = {"ours": ours, "trl": trl}[job["trainer"]](job, work)
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (work / "result.json").write_text(json.dumps(found))

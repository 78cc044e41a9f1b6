"""Stage 1 of data selection: trains the quality gates of a Select-MoE model, and its routers if asked.

The loss is `ds_llm.train.losses.router`. Only gates and routers are trained, so only they have gradients and optimizer
states, and only they are saved (`ds_llm.pretrained.partial`, or an adapter).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from ds_llm.compat.peft import name_base
from ds_llm.config.mode_sections import LoraConfig
from ds_llm.config.run import Config
from ds_llm.data.batches import Samples
from ds_llm.data.corrupt import CORRUPTIONS, CorruptedPairs
from ds_llm.data.order import SampleOrder
from ds_llm.engine import processes
from ds_llm.errors import ConfigError
from ds_llm.models import quality_loss
from ds_llm.pretrained import partial
from ds_llm.pretrained.fingerprint import identity
from ds_llm.pretrained.source import base_name
from ds_llm.progress import console
from ds_llm.train.evaluation import deal, measure
from ds_llm.train.job import Figures, Job
from ds_llm.train.losses.router import RouterLoss, moments, supervised_documents
from ds_llm.train.modes import pretrain, sft
from ds_llm.train.modes.sparse import FixedEpoch
from ds_llm.train.start_model import start_model

SUBSET = 0.05
METRICS = ("quality_loss", "gate_mean")
PAIR_METRICS = ("gate_mean_corrupted", "pair_accuracy")


@dataclass
class Data:
    """Inputs of a run. kind: the mode that reads the data, pretrain or sft. inner: what its check returned."""

    kind: ModuleType
    inner: pretrain.Data | sft.Data
    tokenizer: object
    fingerprint: dict


def check(config: Config) -> Data:
    """Check the model, then the data: as pretrain does for token files, else as sft does."""
    options, lora = config.router, config.lora
    loss = quality_loss.find(options.quality_loss)
    if config.model.path is None:
        raise ConfigError("model.path: router trains a Select-MoE model; name it, for example model.path=models/select")
    if config.model.freeze:
        raise ConfigError("model.freeze: router trains gates and routers only; leave it out")
    if lora.enabled:
        if not options.train_routers:
            raise ConfigError("lora.enabled: the adapters are for the routers; set router.train_routers=true too")
        for name, usual in (("targets", ["all-linear"]), ("dora", False), ("dropout", 0.0), ("quantize", "none")):
            if getattr(lora, name) != usual:
                raise ConfigError(f"lora.{name}: {getattr(lora, name)} is not for router: its adapters are on routers")
    unknown = [kind for kind in options.corruptions if kind not in CORRUPTIONS]
    if unknown or not options.corruptions:
        raise ConfigError(
            f"router.corruptions: name some of {', '.join(CORRUPTIONS)}" + (f", not {unknown[0]}" if unknown else "")
        )
    _check_model(config)
    kind = pretrain if all(path.endswith(".bin") for path in config.data.train) else sft
    if config.model.add_tokens:
        raise ConfigError(f"model.add_tokens: {config.mode} keeps the vocabulary; add the tokens by mode=sft before")
    if kind is pretrain and config.data.weights:
        raise ConfigError(f"data.weights: {config.mode} draws token files evenly; leave it out")
    inner = kind.check(dataclasses.replace(config, lora=LoraConfig()))
    fingerprint = {
        **inner.fingerprint,
        "base_model": identity(config.model.path),
        "subset": config.data.subset_ratio or SUBSET,
        "corruptions": sorted(options.corruptions) if loss.over == "pairs" else [],
    }
    return Data(kind, inner, inner.tokenizer, fingerprint)


def _check_model(config: Config) -> None:
    from ds_llm.models.select_moe import SelectMoeConfig
    from ds_llm.pretrained.loading import load_model_config

    path = config.model.path
    found = load_model_config(path)
    if not isinstance(found, SelectMoeConfig):
        raise ConfigError(
            f"model.path: {path} is a '{found.model_type}' model, without gates; convert it first: "
            f"python launch/convert.py select-moe --model {path} --out models/select"
        )
    if config.router.balance_weight is not None and found.load_balancing_weight is None:
        raise ConfigError("router.balance_weight: this model has no load-balancing loss; leave it out")


def figures(config: Config) -> Figures:
    """Names of the figures that this mode adds to the records of evaluations and steps."""
    over = quality_loss.find(config.router.quality_loss).over
    compared = {"pairs": ["quality_loss"], "losses": ["pair_loss", "quality_loss", "loss_correlation"]}
    steps = [*METRICS, *(PAIR_METRICS if over == "pairs" else ())]
    return Figures(["gate_mean", *PAIR_METRICS, *compared.get(over, ["pair_loss"])], steps)


def build(config: Config, data: Data) -> Job:
    """Load the model, freeze all but gates and routers, and join it with the data."""
    options = config.router
    plain = dataclasses.replace(config, lora=LoraConfig())
    model = start_model(plain, data.tokenizer, dtype=config.train.dtype)
    configure(model, config)
    if config.lora.enabled:
        model = _add_adapters(model, config)
    else:
        trained = {id(p) for block in _gated_blocks(model) for p in _trained(block, options.train_routers)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        partial.mark(model, config.model.path)
    job = data.kind.job(plain, data.inner, model)
    whole, seed = job.samples, config.train.seed
    count = max(1, round((config.data.subset_ratio or SUBSET) * len(whole)))
    console.print(f"{count:,} of {len(whole):,} samples are trained on (data.subset_ratio)")
    job.samples = FixedEpoch(whole, count, seed)
    job.objective = RouterLoss(job.objective, model)
    job.begin_step = job.objective.begin_step
    job.metrics = METRICS
    fixed, over_pairs = data.tokenizer.all_special_ids, job.objective.loss.over == "pairs"
    if over_pairs:
        job.samples = CorruptedPairs(job.samples, options.corruptions, seed, fixed)
        job.metrics += PAIR_METRICS
    held_out = SampleOrder(len(whole), seed).take(count, min(options.held_out, len(whole) - count))
    if len(held_out):
        size = (config.eval.batch_size or config.train.batch_size) if config.data.packing else 1
        batches = [held_out[first : first + size] for first in range(0, len(held_out), size)]
        name = "quality_loss" if over_pairs else "pair_loss"
        over_losses = job.objective.loss.over == "losses"
        if over_pairs or over_losses or job.evaluate is None:
            job.goal = "quality_loss" if over_losses else name
        pairs = CorruptedPairs(whole, options.corruptions, seed, fixed)
        job.evaluate = _pair_evaluation(pairs, batches, job.evaluate, name)
        if over_losses:
            job.evaluate = _loss_evaluation(job.objective.loss.function, whole, batches, job.evaluate)
    return job


def configure(model: nn.Module, config: Config) -> None:
    """Set the losses that the model computes, in its configuration too."""
    options = config.router
    for name, value in (
        ("quality_loss_type", options.quality_loss),
        ("quality_loss_weight", options.quality_weight),
        ("quality_loss_debug", options.quality_loss_debug),
        *((f.name, getattr(options, f.name)) for f in dataclasses.fields(quality_loss.QualityOptions)),
    ):
        setattr(model.config, name, value)
    if options.balance_weight is not None:
        model.config.set_load_balancing_weight(options.balance_weight)
        for block in _gated_blocks(model):
            if hasattr(block, "aux_loss_alpha"):
                block.aux_loss_alpha = options.balance_weight


def _gated_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "quality_gate")]


def _trained(block: nn.Module, routers: bool) -> list[nn.Parameter]:
    return [*block.quality_gate.parameters(), *(block.gate.parameters() if routers else ())]


def _add_adapters(model: nn.Module, config: Config) -> nn.Module:
    """A peft model with low-rank adapters on the routers. Gates are trained whole, because they are one row each."""
    import peft

    lora = config.lora
    routers = {id(block.gate.weight) for block in _gated_blocks(model)}
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        target_modules=[],
        target_parameters=[name for name, p in model.named_parameters() if id(p) in routers],
        modules_to_save=["quality_gate"],
        base_model_name_or_path=base_name(config.model.path),
    )
    torch.manual_seed(config.train.seed)
    wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    name_base(wrapped, settings.base_model_name_or_path)
    return wrapped


def _pair_evaluation(pairs: CorruptedPairs, batches: list, inner: Callable | None, loss: str) -> Callable:
    @torch.no_grad()
    def evaluate(engine) -> dict:
        """How well gates tell held-out samples from their copies, beside the figures of `inner`; `loss` names it."""
        start = time.perf_counter()

        def sums(rows) -> list[float]:
            batch = pairs.batch(rows)
            return [int(batch["documents"].max()) + 1, *engine.forward(**batch).tolist()]

        count, *found = measure(engine, batches, sums, 5, "evaluating pairs").sum(0).tolist()
        names = (loss, "gate_mean", "gate_mean_corrupted", "pair_accuracy")
        figures = dict(zip(names, (value / max(count, 1) for value in found), strict=True))
        return {**(inner(engine) if inner is not None else {}), **figures, "seconds": time.perf_counter() - start}

    return evaluate


def _loss_evaluation(function: Callable, samples: Samples, batches: list, inner: Callable) -> Callable:
    @torch.no_grad()
    def evaluate(engine) -> dict:
        """How the scores of held-out documents follow the model's own losses on them, beside the figures of `inner`."""
        start, mine = time.perf_counter(), [torch.empty(2, 0, dtype=torch.float64)]
        for number, counts in deal(engine, len(batches), "evaluating scores"):
            batch = samples.batch(batches[number])
            found = engine.forward(own_losses=True, documents=supervised_documents(batch), **batch)
            if counts:
                mine.append(found.double().cpu())
        scores, losses = torch.cat(mine, 1)
        count, mean, deviation = moments([losses])
        _, middle, spread = moments([scores])
        surprise = (losses - mean) / deviation
        sums = [float(function(scores, surprise).sum()), float(((scores - middle) / spread * surprise).sum())]
        quality, correlation = (value / max(count, 1) for value in processes.all_reduce(sums))
        figures = {"quality_loss": quality, "loss_correlation": correlation}
        return {**inner(engine), **figures, "seconds": time.perf_counter() - start}

    return evaluate

"""Fine-tuning of a pruned model with compact state: only kept weights are held and trained, see `ds_llm.sparsity`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from ds_llm.config import deepspeed as deepspeed_config
from ds_llm.config.mode_sections import LoraConfig
from ds_llm.config.run import Config
from ds_llm.data.batches import Samples
from ds_llm.data.order import SampleOrder
from ds_llm.distributed.environment import world_size
from ds_llm.errors import ConfigError, UserError
from ds_llm.kernels.sparse_update import PackedMask
from ds_llm.pretrained.fingerprint import identity
from ds_llm.progress import console
from ds_llm.sparsity import compact_checkpoint
from ds_llm.sparsity import model as compact
from ds_llm.sparsity.masks import load_masks, mask_file, masks_from_zeros
from ds_llm.train.job import Job
from ds_llm.train.modes import pretrain, sft
from ds_llm.train.start_model import start_model

DENSITY_TOLERANCE = 0.005  # rows keep whole numbers of weights


@dataclass
class Data:
    """Inputs of a run.

    kind: the mode that reads the data. inner: what its check returned. masks: from a file, or None.
    """

    kind: ModuleType
    inner: pretrain.Data | sft.Data
    masks: dict[str, PackedMask] | None
    fingerprint: dict

    @property
    def tokenizer(self):
        return self.inner.tokenizer


def check(config: Config) -> Data:
    """Check the data, as pretrain does for token files, else as sft does, and read the masks."""
    options = config.sparse
    if config.model.path is None:
        raise ConfigError("model.path: sparse fine-tunes a pruned model; name it, for example model.path=models/pruned")
    if config.lora.enabled:
        for name, value in (("dora", config.lora.dora), ("dropout", config.lora.dropout)):
            if value:
                raise ConfigError(f"lora.{name}: {value} is not possible on a sparse model; leave it out")
        if config.lora.quantize != "none":
            raise ConfigError("lora.quantize: a sparse model is not quantised; leave it out")
    scheduler = deepspeed_config.read(config.deepspeed).get("scheduler")
    if options.scale_lr and scheduler is not None and not deepspeed_config.has_auto(scheduler):
        raise ConfigError("sparse.scale_lr: the scheduler of the DeepSpeed JSON sets the learning rate itself")
    kind = pretrain if all(path.endswith(".bin") for path in config.data.train) else sft
    if config.model.add_tokens:
        raise ConfigError(f"model.add_tokens: {config.mode} keeps the vocabulary; add the tokens by mode=sft before")
    if kind is pretrain and config.data.weights:
        raise ConfigError(f"data.weights: {config.mode} draws token files evenly; leave it out")
    inner = kind.check(config)
    masks = _stored_masks(config)
    if masks is not None:
        _check_density(config, masks)
    fingerprint = {**inner.fingerprint, "base_model": identity(config.model.path)}
    if options.masks is not None:
        with open(mask_file(options.masks), "rb") as file:
            fingerprint["masks"] = hashlib.file_digest(file, "sha256").hexdigest()
    return Data(kind, inner, masks, fingerprint)


def _stored_masks(config: Config) -> dict[str, PackedMask] | None:
    from ds_llm.pretrained.loading import locate

    if config.sparse.masks is not None:
        return load_masks(config.sparse.masks)
    return compact_checkpoint.stored_masks(locate(config.model.path).name)


def _check_density(config: Config, masks: dict[str, PackedMask]) -> None:
    if not masks:
        raise UserError(f"model.path: {config.model.path} has no pruned layer; prune it first (launch/prune.py)")
    found = sum(m.nnz for m in masks.values()) / sum(m.shape.numel() for m in masks.values())
    asked = config.sparse.density
    if asked is not None and abs(found - asked) > DENSITY_TOLERANCE:
        raise ConfigError(f"sparse.density: {asked:g} is asked for, the {len(masks)} masks keep {found:.4g}")


def build(config: Config, data: Data) -> Job:
    """Load the pruned model, convert its pruned layers to the compact form, and join it with the data."""
    model = start_model(dataclasses.replace(config, lora=LoraConfig()), data.inner.tokenizer)
    masks = data.masks
    if masks is None:
        _check_density(config, masks := masks_from_zeros(model, include=("head",) if _untied(model) else ()))
    compact.sparsify(model, masks)
    lora = config.lora
    if lora.enabled:
        scale = lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)
        compact.add_lora(model, lora.targets, lora.r, scale, lora.init)
    elif not config.sparse.train_dense:
        compact.freeze_dense(model)
    info = compact.summary(model, config.train.dtype)
    console.print(
        f"{info['layers']} pruned weights, {info['kept'] / 1e6:.1f}M of {info['prunable'] / 1e6:.1f}M kept "
        f"({info['density']:.1%}); weights, gradients and optimizer state {info['state_bytes'] / 1e9:.2f} GB, dense "
        f"{info['dense_state_bytes'] / 1e9:.2f} GB"
    )
    job = data.kind.job(config, data.inner, model)
    if config.sparse.samples is not None:
        job.samples = FixedEpoch(job.samples, config.sparse.samples, config.train.seed)
    if config.sparse.scale_lr:
        batch = config.train.batch_size * config.train.accumulation_steps * world_size() // config.parallel.sequence
        job.lr_factor = math.sqrt(batch)
    job.info = {"sparse": info}
    return job


def _untied(model: nn.Module) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


class FixedEpoch:
    """`count` samples drawn once from `samples`: passes over all of them in random order, cut after `count`."""

    def __init__(self, samples: Samples, count: int, seed: int):
        self.samples = samples
        self.chosen = SampleOrder(len(samples), seed).take(0, count)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices) -> dict:
        """The batch of the samples at these positions of the drawn list."""
        return self.samples.batch(self.chosen[indices])

"""The forward pass of scoring: from samples to a row of columns for each.

With flash-attn, and on a CPU where attention goes document by document, the samples of a batch form one row of
documents that do not see each other. Elsewhere they are rows padded at the end without a mask, since causal attention
does not see later tokens; a batch with too much padding is split. The output head computes only the scored positions,
with the logits of one chunk at a time (`linear_token_stats`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_llm.scoring.router  # noqa: F401 (registers its metric)
from ds_llm.config.run import Config
from ds_llm.distributed.environment import world_size
from ds_llm.errors import UserError
from ds_llm.hardware import share_cores
from ds_llm.models.backbone import backbone
from ds_llm.models.documents import Documents, parts
from ds_llm.models.head import attach_loss_head
from ds_llm.models.isolation import LeakError, isolate, run_backbone
from ds_llm.pretrained.fingerprint import model_fingerprint
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import TORCH_DTYPES, load_model, load_tokenizer, match_tokenizer
from ds_llm.scoring.metrics import Batch, Sample, create, without_prompt

SPLIT_TOKENS = {"cpu": 512, "cuda": 8192}  # smaller forward passes leave the device idle
SPLIT_PADDING = 0.02  # of a larger one's tokens: beyond it, another forward pass costs less
_EMPTY = Sample(np.zeros(1, np.int64), np.zeros(1, bool))  # a token, none that counts


class Pass(nn.Module):
    """Backbone and output head as one module, so that a wrapper such as ZeRO-3 has all weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, predicting: Tensor | None, labels: Tensor | None, **extra) -> tuple:
        """input_ids [B, S]; extra: what else `run_backbone` takes. predicting [P]: rows of the flattened tokens that
        predict labels [P]; None: the head is not needed. Returns the backbone's output, and entropy and log-probability
        [P], None without labels."""
        out = run_backbone(self.model, input_ids, **extra)
        if predicting is None:
            return out, None, None
        hidden = out.last_hidden_state.flatten(0, 1)[predicting]
        stats = self.model.get_output_embeddings()(hidden, labels, "stats")
        return out, stats.entropy, stats.logprob


class Scorer:
    """A model that measures samples.

    model_path: as `ds_llm.pretrained.loading` takes it. metrics: names of `ds_llm.scoring.metrics.METRICS`. dtype:
    fp32, bf16, fp16, or auto for the one the model was saved in. device: None for this process's accelerator, or the
    CPU. per_token: also a list per sample of the scored tokens' positions and values. zero3: the weights are sharded
    over all ranks; offload: and kept in the CPUs' memory while not in use. tensor_parallel: each layer is split over so
    many neighbouring ranks (DeepSpeed AutoTP).

    columns: name -> pyarrow type of what `score` returns; an array's is a float16 tensor of its shape. fingerprint:
    sha256 (hex) of weights and configuration. tokenizer: the model's. max_length: longest sample in tokens; None where
    the model sets no limit. collective: every rank must call `score` or `idle` equally often.
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        metrics: Sequence[str],
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        per_token: bool = False,
        zero3: bool = False,
        offload: bool = False,
        tensor_parallel: int = 1,
    ):
        if offload and not zero3:
            raise UserError("offload: parameters are offloaded by ZeRO-3; set zero3 too")
        if tensor_parallel > 1 and (zero3 or world_size() % tensor_parallel):
            why = "not together with zero3" if zero3 else f"must divide the number of processes, {world_size()}"
            raise UserError(f"tensor_parallel {tensor_parallel}: {why}")
        share_cores()
        self.tokenizer = load_tokenizer(model_path)
        if zero3:
            _join()
        model = load_model(model_path, dtype, deferred=zero3)
        match_tokenizer(model, self.tokenizer)
        self.metrics = create(metrics, model.config)
        self.per_token = per_token
        self.columns = self._columns()
        self.max_length = max_positions(model.config)
        self.fingerprint = _fingerprint(model)
        self.collective = tensor_parallel > 1 or (zero3 and world_size() > 1)
        self._options = {name: value for metric in self.metrics for name, value in metric.options.items()}
        self._statistics = any(metric.statistics for metric in self.metrics)
        self._unconditional = any(metric.unconditional for metric in self.metrics)
        self._prefix = self._find_prefix() if self._unconditional else None
        body = backbone(model)
        self._packed = _packs(model, torch.device(device or _accelerator()))
        self._takes_token_mask = getattr(body, "takes_token_mask", False)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._open = ExitStack()
        self.model = attach_loss_head(model)
        self._group = None
        run = Pass(self.model).eval()
        if tensor_parallel > 1:
            device = self._split(tensor_parallel)
        if zero3:
            self._run, self.device = self._shard(run, offload)
        else:
            self.device = torch.device(device or _accelerator())
            self._run = run.to(self.device)
        if names := [name for metric in self.metrics for name in metric.arrays]:
            (row,) = self.score([_EMPTY])  # their shapes are the model's own
            self.columns |= {name: pa.fixed_shape_tensor(pa.float16(), row[name].shape) for name in names}

    def score(self, samples: list[Sample]) -> list[dict[str, Any]]:
        """A row of `columns` for each of at least one sample, in order.

        A sample to which the model gives a probability that is not finite gets `error`, what is wrong, and None in the
        columns that depend on it. torch.OutOfMemoryError is the caller's: with half the samples it may fit. Raises
        ValueError for a token id that the model does not know.
        """
        for sample in samples:
            if len(sample) and not 0 <= sample.input_ids.min() <= sample.input_ids.max() < self._vocabulary:
                raise ValueError(f"a token id is not within the model's {self._vocabulary} tokens")
        alone = None
        if self._unconditional:
            alone = self._statistics_of([without_prompt(sample, self._prefix) for sample in samples])
        rows: list[dict] = [{}] * len(samples)
        for group in self._groups(samples):
            batch = self._together([samples[i] for i in group], self._options)
            unconditional = alone.select(group) if alone else None
            for i, row in zip(group, self._rows(batch, unconditional), strict=True):
                rows[i] = row
        return rows

    def idle(self) -> None:
        """Take part in a `score` of the other ranks without a sample, where `collective`."""
        self.score([_EMPTY])

    def close(self) -> None:
        """Release the wrapped model. Do not use the scorer afterwards."""
        self._open.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _columns(self) -> dict[str, pa.DataType]:
        columns = {"tokens": pa.int64()}
        for metric in self.metrics:
            columns |= metric.columns()
        if self.per_token:
            columns["positions"] = pa.list_(pa.int32())
            columns |= {f"{m.name}_per_token": pa.list_(pa.float32()) for m in self.metrics if m.tokens}
        return columns

    def _find_prefix(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError("metric 'ifd': the tokenizer has neither a beginning-of-text nor an end-of-text token")

    def _shard(self, run: Pass, offload: bool) -> tuple[Callable, torch.device]:
        """Wrap the pass in ZeRO-3. Returns the function to call and the device of its tensors."""
        from ds_llm.engine import processes, startup
        from ds_llm.engine.inference import inference

        config = Config(zero=3)
        dtype = next(run.parameters()).dtype
        config.train.dtype = next(name for name, value in TORCH_DTYPES.items() if value == dtype)
        startup.check_dtype(config.train.dtype, f"dtype {config.train.dtype}")
        if offload:
            offloaded = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            config.deepspeed = {"zero_optimization": {"stage": 3, "offload_param": offloaded}}
        return self._open.enter_context(inference(run, config)), processes.device()

    @torch.no_grad()
    def _split(self, ranks: int) -> torch.device:
        """Split the backbone's layers over neighbouring ranks; the output head stays whole on each."""
        from ds_llm.engine import processes
        from ds_llm.parallel import tensor

        _join()
        body = backbone(self.model)
        ids = torch.arange(4)[None] % self._vocabulary
        before = body(input_ids=ids, use_cache=False).last_hidden_state.float()
        self._group = tensor.split_layers(body, ranks, processes.device())
        after = body(input_ids=ids.to(processes.device()), use_cache=False).last_hidden_state.float().cpu()
        tolerance = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 5e-2
        if (after - before).abs().max() > tolerance * before.abs().max():
            raise UserError(
                f"DeepSpeed splits a '{body.config.model_type}' model into layers that compute something else; use "
                "zero3 instead of tensor_parallel"
            )
        return processes.device()

    def _groups(self, samples: list[Sample]) -> Iterator[list[int]]:
        """Indices of the samples of each forward pass."""
        if self._packed or self.collective:
            yield list(range(len(samples)))
            return
        least = SPLIT_TOKENS.get(self.device.type, SPLIT_TOKENS["cuda"])
        group, filled = [], 0
        for i in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
            if group:
                longest, rows = len(samples[group[0]]), len(group)
                padding = 1 - (filled + len(samples[i])) / (longest * (rows + 1))
                if longest * rows >= least and padding > SPLIT_PADDING:
                    yield group
                    group, filled = [], 0
            group.append(i)
            filled += len(samples[i])
        if group:
            yield group

    def _arrange(self, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor | int]]:
        """Token ids [B, S], the row of each sample's first token, and further arguments of the backbone."""
        lengths = np.array([len(sample) for sample in samples])
        if self._packed:
            starts = np.cumsum(lengths) - lengths
            ids = np.concatenate([sample.input_ids for sample in samples])[None]
            positions = torch.from_numpy(np.arange(ids.size) - np.repeat(starts, lengths))[None]
            packed = Documents.of(positions, self.device)
            return ids, starts, {"position_ids": positions.to(self.device), "packed": packed}
        ids = np.zeros((len(samples), lengths.max()), np.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = sample.input_ids
        extra = {}
        if self._takes_token_mask:
            extra["token_mask"] = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        return ids, np.arange(len(samples)) * ids.shape[1], extra

    def _together(self, samples: list[Sample], options: dict) -> Batch:
        """A forward pass of the samples. Ranks that share layers run the samples of each rank in turn, and only that
        rank runs the head on them."""
        if self._group is None:
            return self._forward(samples, options, self._statistics)
        given: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(given, samples, group=self._group)
        own = dist.get_rank(self._group)
        batches = [self._forward(s, options, self._statistics and r == own) for r, s in enumerate(given)]
        return batches[own]

    @torch.no_grad()
    def _forward(self, samples: list[Sample], options: dict, statistics: bool) -> Batch:
        ids, starts, extra = self._arrange(samples)
        predicting = labels = None
        if statistics:
            predicting = np.concatenate([start + s.targets - 1 for start, s in zip(starts, samples, strict=True)])
            labels = np.concatenate([sample.input_ids[sample.targets] for sample in samples])
            predicting, labels = (torch.from_numpy(a.astype(np.int64)).to(self.device) for a in (predicting, labels))
        ids = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        try:
            output, *found = self._run(input_ids=ids, predicting=predicting, labels=labels, **extra, **options)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how the CPU's allocator says it
                raise
            raise torch.OutOfMemoryError(str(error)) from None
        entropy, logprob = (None if values is None else values.double().cpu().numpy() for values in found)
        return Batch(samples, starts, output, entropy, logprob)

    def _statistics_of(self, samples: list[Sample]) -> Batch:
        """Entropy and log-probability of all samples, without the backbone's output."""
        entropy: list = [None] * len(samples)
        logprob: list = [None] * len(samples)
        for group in self._groups(samples):
            batch = self._together([samples[i] for i in group], {})
            for i, e, p in zip(group, batch.split(batch.entropy), batch.split(batch.logprob), strict=True):
                entropy[i], logprob[i] = e, p
        return Batch(samples, entropy=np.concatenate(entropy), logprob=np.concatenate(logprob))

    def _rows(self, batch: Batch, unconditional: Batch | None) -> list[dict[str, Any]]:
        found: dict[str, list] = {"tokens": batch.counts.tolist()}
        for metric in self.metrics:
            found |= metric.measure(batch, unconditional)
        if self.per_token:
            found["positions"] = [sample.targets.tolist() for sample in batch.samples]
            for metric in self.metrics:
                if metric.tokens:
                    values = batch.split(getattr(batch, metric.tokens))
                    found[f"{metric.name}_per_token"] = [part.tolist() for part in values]
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        if batch.logprob is not None:
            sound = [
                np.isfinite(e).all() and np.isfinite(p).all()
                for e, p in zip(batch.split(batch.entropy), batch.split(batch.logprob), strict=True)
            ]
            for row, fine in zip(rows, sound, strict=True):
                if not fine:
                    row["error"] = "the model gives a probability that is not finite"
        return rows


def _packs(model: nn.Module, device: torch.device) -> bool:
    """Whether samples are laid in one row: with flash-attn, and on a CPU where attention goes document by document."""
    try:
        isolate(model, device)
    except LeakError:
        return False
    flash = all(part.packing_way.takes_bounds for part in parts(model))
    alone = all(part.packing_way.by_document and not part.packing_way.modules for part in parts(model))
    return flash or (device.type == "cpu" and alone)


def _accelerator() -> torch.device:
    """Of this process."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def _join() -> None:
    from ds_llm.engine import processes

    if not dist.is_initialized():
        processes.init_distributed()


def _fingerprint(model: nn.Module) -> str:
    settings = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{model_fingerprint(model)} {text}".encode()).hexdigest()

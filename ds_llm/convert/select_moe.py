"""Select-MoE models from mixture-of-experts models, and the comparison of the two: `launch/convert.py`.

The weight files are copied byte for byte; a small file beside them holds the gates.
"""

from __future__ import annotations

import fnmatch
import gc
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_llm.convert.export import difference, probe_tokens
from ds_llm.errors import UserError, first_line
from ds_llm.files import free_folder, new_folder, writing
from ds_llm.models.quality_gate import QualityGate, gates, open_gates
from ds_llm.models.select_moe import SelectMoeConfig, SelectMoeForCausalLM
from ds_llm.pretrained.loading import load_model, load_model_config, load_tokenizer, locate
from ds_llm.pretrained.source import check_index
from ds_llm.progress import progress
from ds_llm.sparsity import compact_checkpoint

COPY_BYTES = 16 << 20
GATES_FILE, SINGLE_FILE = "quality_gates.safetensors", "model_base.safetensors"
KEPT = (  # files beside the weights that belong to the model
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)


@dataclass(frozen=True)
class SelectConversion:
    """A written Select-MoE model: its folder, number of layers and of gates, weight files, bytes of the original's
    weights, weights of the gates."""

    folder: Path
    gates: int
    layers: int
    files: int
    bytes: int
    gate_weights: int


def select_moe(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    trash: str = "zero",
    init_mean: float = 0.0,
    init_std: float = 0.02,
    seed: int = 0,
) -> SelectConversion:
    """Write the Select-MoE model of a mixture-of-experts model to folder `out`.

    model: a folder, run or hub name with whole weights. The original's files are copied without being loaded (those of
    torch's own format are written as safetensors, one at a time), so memory does not depend on the model's size. Gates
    are drawn from N(init_mean, init_std) with `seed`. Raises `UserError` where the model has no experts, or its files
    are damaged or of a kind that cannot be copied; nothing is left at `out` then.
    """
    out = free_folder(out)
    source = _folder(model)
    config = load_model_config(model)
    if isinstance(config, SelectMoeConfig):
        raise UserError(f"{model}: is a Select-MoE model already")
    options = {"quality_gate_init_mean": init_mean, "quality_gate_init_std": init_std, "trash_expert": trash}
    chosen = SelectMoeConfig(text_config={**config.to_dict(), "model_type": config.model_type}, **options)
    chosen.dtype, chosen.architectures = config.dtype, [SelectMoeForCausalLM.__name__]
    gate_weights = _new_gates(chosen, seed)
    shards, names = _weights(source)
    with new_folder(out) as partial, writing(out):
        size = sum(shard.stat().st_size for shard in shards)
        weight_map = _copy(shards, names, partial, size)
        save_file(gate_weights, partial / GATES_FILE, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(gate_weights, GATES_FILE)
        total = size + sum(t.numel() * t.element_size() for t in gate_weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in source.iterdir():
            if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in KEPT):
                shutil.copyfile(file, partial / file.name)
        chosen.save_pretrained(partial)
    count = sum(name.endswith("quality_gate.weight") for name in gate_weights)
    numbers = sum(t.numel() for t in gate_weights.values())
    return SelectConversion(out, count, config.get_text_config().num_hidden_layers, len(shards), size, numbers)


def _folder(model: str | os.PathLike) -> Path:
    """The local folder of a model with whole weights; downloads a model of the hub."""
    source = locate(model)
    if source.adapter or source.gguf:
        raise UserError(
            f"{model}: has no weight files that could be taken over; write it whole first (launch/export.py)"
        )
    folder = Path(source.name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        load_model_config(model)  # says what is wrong with the name
        try:
            folder = Path(snapshot_download(source.name, allow_patterns=["*.safetensors*", "*.json", *KEPT]))
        except (OSError, ValueError) as error:
            raise UserError(f"{model}: cannot be fetched ({first_line(error)})") from None
    if compact_checkpoint.is_compact(str(folder)):
        raise UserError(f"{model}: is a sparse model; write it dense first (launch/export.py)")
    return folder


def _new_gates(config: SelectMoeConfig, seed: int) -> dict[str, Tensor]:
    """Names and weights of the gates that a model of this configuration has, in float32."""
    with torch.device("meta"):
        outline = SelectMoeForCausalLM(config)
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gated = [(name, m) for name, m in outline.named_modules() if isinstance(m, QualityGate)]
        for layer, (name, _) in enumerate(gated):
            gate = QualityGate(config.text_config.hidden_size, config.trash_expert, layer)
            gate.reset_parameters(config.quality_gate_init_mean, config.quality_gate_init_std)
            found |= {f"{name}.{key}": value.contiguous() for key, value in gate.state_dict().items()}
    return found


def _weights(folder: Path) -> tuple[list[Path], dict[str, list[str]] | None]:
    """The weight files, and the tensors in each by the index (None without an index)."""
    check_index(folder)
    for pattern in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{pattern}.index.json"
        if (folder / pattern).is_file():
            return [folder / pattern], None
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{index}: is damaged") from None
            names: dict[str, list[str]] = {}
            for tensor, file in weight_map.items():
                names.setdefault(file, []).append(tensor)
            if missing := [file for file in names if not (folder / file).is_file()]:
                raise UserError(
                    f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
                )
            return [folder / file for file in sorted(names)], names
    raise UserError(f"{folder}: holds no weights (model.safetensors or pytorch_model.bin, with or without an index)")


def _copy(shards: list[Path], names: dict[str, list[str]] | None, out: Path, size: int) -> dict[str, str]:
    """Copy the weight files; returns the file that each tensor is in."""
    weight_map: dict[str, str] = {}
    with progress("copying weights", total=size / 1e6, unit="MB") as task:
        for shard in shards:
            target = out / (SINGLE_FILE if names is None else shard.with_suffix(".safetensors").name)
            if shard.suffix == ".safetensors":
                for part in _pieces(shard, target):
                    task.advance(part / 1e6)
            else:
                _rewrite(shard, target)
                task.advance(shard.stat().st_size / 1e6)
            try:
                with safetensors.safe_open(target, "pt") as file:
                    found = set(file.keys())
            except safetensors.SafetensorError as error:
                raise UserError(f"{shard}: is damaged or incomplete ({error})") from None
            if absent := [name for name in (names or {}).get(shard.name, ()) if name not in found]:
                raise UserError(f"{shard}: lacks the tensor {absent[0]}, which the index says it has")
            weight_map |= dict.fromkeys(sorted(found), target.name)
    return weight_map


def _pieces(source: Path, target: Path) -> Iterator[int]:
    """Copy a file; yields the bytes of each piece."""
    with open(source, "rb") as read, open(target, "wb") as written:
        while piece := read.read(COPY_BYTES):
            written.write(piece)
            yield len(piece)


def _rewrite(shard: Path, target: Path) -> None:
    """A shard of torch's format as safetensors; tensors that share memory become separate."""
    try:
        tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # from pickle errors to those of the zip reader
        raise UserError(f"{shard}: cannot be read ({first_line(error)})") from None
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target, metadata={"format": "pt"})


@dataclass(frozen=True)
class Comparison:
    """Largest differences between two models on the same random tokens, of the hidden states behind each layer (the
    last behind the final norm) and of the logits: with every gate open (`opened`, `open_logits`), and with gates as
    they are (`gated`, `gated_logits`). `largest`: the original's largest logit; `means`: mean gate of each block."""

    opened: list[float]
    gated: list[float]
    open_logits: float
    gated_logits: float
    largest: float
    means: list[float]

    def __str__(self) -> str:
        lines = ["largest differences   gates open   gates as they are"]
        for i, (opened, gated) in enumerate(zip(self.opened, self.gated, strict=True)):
            lines.append(f"layer {i:<13} {opened:>12.3g} {gated:>19.3g}")
        lines.append(f"logits {self.open_logits:>25.3g} {self.gated_logits:>19.3g}   (largest {self.largest:.3g})")
        lines.append("mean gate of each block: " + " ".join(f"{mean:.3f}" for mean in self.means))
        return "\n".join(lines)


@torch.no_grad()
def compare(original: str | os.PathLike, converted: str | os.PathLike, dtype: str = "fp32") -> Comparison:
    """Compare a Select-MoE model with its original, loaded in `dtype` one after the other."""
    tokenizer = load_tokenizer(original)
    first = load_model(original, dtype).eval()
    probe = probe_tokens(first, tokenizer)
    expected = _states(first, probe)
    del first
    gc.collect()
    second = load_model(converted, dtype).eval()
    if not gates(second):
        raise UserError(f"{converted}: has no quality gates; it is not a Select-MoE model")
    gated = _states(second, probe)
    scores = second.model(input_ids=probe, use_cache=False, output_quality_scores=True).quality_scores
    with open_gates(second):
        opened = _states(second, probe)
    if [len(expected), *expected[-1].shape] != [len(gated), *gated[-1].shape]:
        raise UserError(f"{converted}: has other layers or another vocabulary than {original}")
    *layers, logits = (difference(a, b) for a, b in zip(opened, expected, strict=True))
    *gated_layers, gated_logits = (difference(a, b) for a, b in zip(gated, expected, strict=True))
    means = [float(torch.sigmoid(score).mean()) for score in scores]
    return Comparison(layers, gated_layers, logits, gated_logits, float(expected[-1].abs().max()), means)


def _states(model: nn.Module, probe: Tensor) -> list[Tensor]:
    """Hidden states behind each layer, and the logits."""
    out = model(input_ids=probe, use_cache=False, output_hidden_states=True)
    return [state.float() for state in (*out.hidden_states[1:], out.logits)]

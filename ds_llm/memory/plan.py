"""Plans the memory of a run before anything is allocated: `launch/train.py --plan`.

All figures are bytes per rank. Weights, gradients and optimizer states follow from the model and the ZeRO stage
(Rajbhandari et al. 2020, arXiv:1910.02054). `ds_llm.memory.passes` measures the forward and backward pass. Copies that
DeepSpeed makes while it reduces gradients and steps are counted as in its code.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from ds_llm.config.deepspeed import adopt, build
from ds_llm.config.modes import MODES
from ds_llm.config.run import Config
from ds_llm.errors import ConfigError
from ds_llm.kernels.linear_cross_entropy import CHUNK_BYTES
from ds_llm.memory.model import Outline, micro_batch, outline
from ds_llm.memory.passes import pass_bytes
from ds_llm.parallel import compatibility as combinations
from ds_llm.progress import console

HEADROOM = 0.92  # share of a card that tensors can have: the rest is CUDA's own context and gaps between blocks
LIVE, BUCKET = 10**9, 5 * 10**8  # DeepSpeed's defaults: gathered weights under ZeRO 3, and numbers of a gradient bucket
GB = 1e9


@dataclass(frozen=True)
class Setting:
    """ZeRO stage, offload to the CPU, recomputation of layers."""

    stage: int
    offload: bool = False  # of masters, moments and their gradients; under ZeRO 3 of the weights too
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"ZeRO {self.stage}" + (", offload" if self.offload else "")


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank.

    backward: activations, logits, gradients and DeepSpeed's buffers at the worst moment of a pass; step: gradients and
    their copies while the optimizer steps; host: of the machine's memory, when offloaded.
    """

    setting: Setting
    weights: int
    optimizer: int
    average: int
    gradients: int
    activations: int
    backward: int
    step: int
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.average + max(self.backward, self.step)


class Planner:
    """Estimates of a configuration for `world` ranks.

    touched: count only the part of DeepSpeed's buckets that is written to, as the resident memory on a CPU does; false:
    count all that they reserve, as on a GPU.
    """

    def __init__(self, config: Config, world: int, touched: bool):
        self.config, self.world, self.touched = config, world, touched
        self.outline: Outline = outline(config)
        self.settings = build(config, world)
        self.passes: dict[tuple, int] = {}  # what has been measured

    def with_rows(self, rows: int) -> Planner:
        """The same for another `train.batch_size`."""
        config = replace(self.config, train=replace(self.config.train, batch_size=rows))
        other = copy.copy(self)
        other.config = config
        return other

    def estimate(self, setting: Setting) -> Estimate:
        """The bytes of a rank under a setting."""
        return self._estimate(setting, lambda keep: self.activations(setting.checkpointing, keep))

    def fits(self, setting: Setting, card: float) -> bool:
        """Whether a rank fits `card` bytes; where its state alone does not, nothing is measured."""
        room = card * HEADROOM
        return self._estimate(setting, lambda keep: 0).total <= room and self.estimate(setting).total <= room

    def _state_bytes(self, stage: int) -> float:
        """Bytes of the optimizer's states for each trained weight, without fp32 copies."""
        name, muon = self.config.optim.name, self.outline.muon
        if name == "muon":  # one momentum, of which DeepSpeed's ZeRO 1 and 2 hold the next too; Adam's for the rest
            return muon * (8 if stage in (1, 2) else 4) + (1 - muon) * 8
        # of 8-bit states each block of 256 numbers has a scale
        return {"lion": 4, "adamw8bit": 2 * (1 + 4 / 256)}.get(name, 8)

    def _estimate(self, setting: Setting, passes: Callable[[bool], int]) -> Estimate:
        o, w = self.outline, self.world
        low = 4 if self.config.train.dtype == "fp32" else 2
        parallel = self.config.parallel
        # ZeRO shares a weight among the processes that have it
        part = (o.trained - o.shared) * parallel.tensor / w + o.shared * parallel.expert / w
        shard = math.ceil(part) if setting.stage else o.trained
        weights = round(o.trained * low + o.frozen * o.frozen_bytes)
        if setting.stage == 3:
            weights = math.ceil(part * low + o.frozen * o.frozen_bytes / w)
        # ZeRO 1 to 3 keep an fp32 copy of their share of fp32 weights too
        masters = 4 * shard if setting.stage or low == 2 else 0
        optimizer = masters + round(self._state_bytes(setting.stage) * shard)
        average = 4 * shard if self.config.ema.enabled else 0
        accumulates = self.config.train.accumulation_steps > 1
        precise = 4 if accumulates and self.config.train.dtype == "bf16" else low  # of gradients that add up
        # gradients are gathered in a bucket, which is copied once more to be reduced
        flat = low * min(o.trained, self._bucket())
        bucket = flat if self.touched else low * self._bucket()
        several = o.trained > self._bucket()  # the first are reduced while most activations are still there
        passing = passes(False)
        if setting.stage == 0:
            gradients = low * o.trained
            whole = gradients + passing if accumulates else passes(True)
            backward, step = max(whole, gradients + flat), gradients + (4 * o.trained if low == 2 else 0)
        elif setting.stage == 1 and precise > low:  # DeepSpeed's bf16 optimizer: whole gradients in fp32
            gradients = 4 * o.trained
            backward, step = gradients + flat + max(passing, flat), gradients + flat
        else:
            gradients = precise * shard
            held = gradients if setting.stage == 3 or several or accumulates else 0
            if setting.stage == 3:
                held += low * min(o.trained + o.frozen, self._live())
            if several:
                backward = held + bucket + passing + flat
            elif setting.stage < 3 and self.touched and not accumulates:
                backward = max(passes(True), bucket + flat)  # the bucket fills as activations go
            else:
                backward = held + bucket + max(passing, flat)
            step = gradients + (precise + 4) * shard + (bucket if setting.stage == 3 else 0)
        host = 0
        if setting.offload:
            host, optimizer, average = optimizer + average + 4 * shard, 0, 0
            step = bucket
            if setting.stage == 3:
                host, weights = host + weights, 0
        weights += o.masks
        return Estimate(setting, weights, optimizer, average, gradients, passing, backward, step, host)

    def activations(self, checkpointing: bool, keep_gradients: bool) -> int:
        """Most bytes of a pass beside the weights; with `keep_gradients` those of the gradients so far are among
        them."""
        key = (checkpointing, keep_gradients, micro_batch(self.config))
        if key not in self.passes:
            self.passes[key] = self._measure(*key)
        return self.passes[key]

    def _measure(self, checkpointing: bool, keep_gradients: bool, shape: tuple[int, int]) -> int:
        from ds_llm.train.modes.pretrain import LanguageModeling

        kinds = {"input_ids": torch.long, "labels": torch.long}
        if MODES[self.config.mode].positions:
            kinds["position_ids"] = torch.long
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.train.dtype]
        experts = any(p.dim() == 3 for p in self._meta().parameters())
        double = 2 if experts and dtype == torch.float32 else 1  # torch's fake grouped product knows bf16 alone
        found = pass_bytes(
            self.outline.make,
            self.outline.config,
            LanguageModeling,
            {name: (shape, kind) for name, kind in kinds.items()},
            torch.bfloat16 if double == 2 else dtype,
            checkpointing=checkpointing,
            keep_gradients=keep_gradients,
        )
        expanded = self.outline.expanded * (4 if dtype == torch.float32 else 2)
        # the loss works on larger pieces on a GPU than on the CPU that the pass was counted for
        chunk = 0 if self.touched else CHUNK_BYTES["cuda"] - CHUNK_BYTES["cpu"]
        return found * double + chunk + 2 * expanded  # a pruned layer's dense weight, and the gradient of it

    def _meta(self):
        with torch.device("meta"):
            return self.outline.make(self.outline.config)

    def _bucket(self) -> int:
        return int(self.settings["zero_optimization"].get("reduce_bucket_size", BUCKET))

    def _live(self) -> int:
        return int(self.settings["zero_optimization"].get("stage3_max_live_parameters", LIVE))


def settings(world: int) -> list[Setting]:
    """Settings from the fastest to the one with the least memory.

    One process cannot shard its state. Among several, ZeRO 1 needs no more communication than ZeRO 0.
    """
    stages = (1, 2, 3) if world > 1 else (0,)
    resident = [Setting(stage, False, again) for again in (False, True) for stage in stages]
    return resident + [Setting(stage, True, again) for again in (False, True) for stage in (2, 3)]


def choose(planner: Planner, card: float) -> tuple[Setting, Planner] | None:
    """The first of `settings` that fits cards of `card` bytes, with the largest micro-batch, a power of two up to
    `train.batch_size`; None where not even one row fits.

    Without recomputation and offload more is computed per second, so a smaller micro-batch without them comes first as
    long as it has a quarter of the rows.
    """
    rows = planner.config.train.batch_size
    sizes = [rows >> i for i in range(rows.bit_length())]
    few = [size for size in sizes if 4 * size >= rows]
    for candidates in (few, sizes[len(few) :]):
        for setting in settings(planner.world):
            for size in candidates:
                if planner.with_rows(size).fits(setting, card):
                    return setting, planner.with_rows(size)
    return None


def overrides(setting: Setting, config: Config) -> str:
    """The `key=value` overrides for a setting and a micro-batch."""
    parts = [f"zero={setting.stage}", f"train.batch_size={config.train.batch_size}"]
    if setting.checkpointing:
        parts.append("train.activation_checkpointing=true")
    if setting.offload:
        parts.append(f"deepspeed=ds_configs/zero{setting.stage}_offload.json")
    return " ".join(parts)


def card_bytes(text: str) -> float:
    """`24GB`, `80` (GB) or `40GiB` in bytes. Raises `ConfigError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--card: '{text}' is not a size such as 24GB")
    # a "24 GB" card has 24 GiB
    return float(found[1]) * 2**30


def show(config: Config, world: int, card_size: str | None) -> None:
    """Print the plan: sizes, a line for each ZeRO stage, and with a card (as of `card_bytes`) what fits it."""
    from ds_llm.parallel import parallelize as division  # imports DeepSpeed

    if world < 1:
        raise ConfigError(f"--world: {world} must be at least 1")
    card = card_bytes(card_size) if card_size is not None else None
    for note in adopt(config, world):
        console.print(note)
    combinations.check(config, world)
    division.check(config)
    touched = card is None and not torch.cuda.is_available()
    planner = Planner(config, world, touched)
    o = planner.outline
    rows, length = micro_batch(config)
    share = f", {o.trained / 1e6:,.1f}M of them trained" if o.frozen else ""
    if o.whole is not None:
        share = f", {o.trained / 1e6:,.1f}M of them in a process's part"
    console.print(
        f"{o.parameters / 1e6:,.1f}M parameters{share}; {config.train.dtype}, {world} "
        f"{'process' if world == 1 else 'processes'}, micro-batch of {rows} x {length} tokens"
    )
    columns = {"weights": "weights", "optimizer": "optim.", "average": "EMA", "gradients": "grads",
               "activations": "activ.", "backward": "pass", "step": "step", "total": "total"}  # fmt: skip
    if not config.ema.enabled:
        del columns["average"]
    table = Table(title="GB per process", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for head in ("", *columns.values(), "recomp.", "host"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        plain, again = (planner.estimate(Setting(stage, offload, c)) for c in (False, True))
        cells = [_gb(getattr(plain, name)) for name in columns]
        cells[-1] += _mark(plain, card)
        asked = " *" if stage == config.zero and offload == _offloads(planner) else ""
        table.add_row(plain.setting.name + asked, *cells, _gb(again.total) + _mark(again, card), _gb(plain.host))
    console.print(table)
    console.print(
        "total = weights, optimizer, EMA, and pass or step, whichever is more\n"
        "pass: activations, logits, gradients and DeepSpeed's buffers at the worst moment of a micro-batch\n"
        "recomp.: the total with train.activation_checkpointing=true; * as configured"
        + ("; ! does not fit" if card else "")
    )
    if card is not None:
        found = choose(planner, card)
        size = f"{world} x {card / 2**30:g} GB"
        if found is None:
            console.print(f"not even one row fits {size}: more cards, a shorter data.seq_len, or lora.enabled=true")
        else:
            setting, chosen = found
            total = _gb(chosen.estimate(setting).total)
            console.print(f"for {size}: {overrides(setting, chosen.config)}  ({total} GB)")


def _offloads(planner: Planner) -> bool:
    zero = planner.settings["zero_optimization"]
    return zero.get("offload_optimizer", {}).get("device", "none") != "none"


def _mark(estimate: Estimate, card: float | None) -> str:
    return " !" if card is not None and estimate.total > card * HEADROOM else ""


def _gb(value: float) -> str:
    return f"{value / GB:,.2f}" if value else "-"

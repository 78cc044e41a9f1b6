"""Runs inside a job: trains and saves cases, or takes them over on other processes; writes what it found.

Usage: elastic_worker.py save|load FOLDER

FOLDER/cases.json has the cases by number of processes, see `test_elastic`. `save` leaves in FOLDER/CASE a checkpoint
after `TAKEN` steps and `whole.pt`: the whole states of every weight as DeepSpeed's own functions gather them, and the
losses of the steps that follow. `load` compares with it what an engine of another layout has after loading, and trains
on.
"""

import json
import sys
import traceback
from pathlib import Path

from ds_llm import cli

cli.quiet()
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ds_llm.compat import deepspeed_optimizers as masters  # noqa: E402
from ds_llm.compat.deepspeed import loss_scale  # noqa: E402
from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM  # noqa: E402
from ds_llm.models.head import attach_loss_head  # noqa: E402
from ds_llm.pretrained.lora import add_adapter  # noqa: E402
from ds_llm.sparsity.masks import masks_from_zeros  # noqa: E402
from ds_llm.sparsity.model import sparsify  # noqa: E402
from ds_llm.sparsity.targets import prunable  # noqa: E402
from ds_llm.train.modes.pretrain import LanguageModeling  # noqa: E402

BATCH, LENGTH, VOCAB, TAKEN, MORE, LR = 8, 12, 37, 3, 2, 3e-3
OFFLOAD = str(Path(__file__).parents[2] / "ds_configs" / "zero{}_offload.json")


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "experts":
        sizes |= {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    made = DecoderForCausalLM(DecoderConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes))
    if kind == "lora":
        lora = configuration.load(None, ["lora.enabled=true", "lora.r=4", "lora.targets=[q_proj,down_proj]"]).lora
        made = add_adapter(made, lora, "base")
    if kind == "sparse":
        for target in prunable(made):
            target.weight.data.mul_(torch.rand_like(target.weight) < 0.3)
        made = sparsify(made, masks_from_zeros(made))
    return attach_loss_head(made)


def batches() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator) for _ in range(TAKEN + MORE)]
    return [{"input_ids": i[:, :-1], "labels": i[:, 1:]} for i in ids]


def build(kind: str, dtype: str, how) -> tuple[torch.nn.Module, engines.Engine, int]:
    stage, world = int(str(how)[0]), dist.get_world_size()
    size = 2 if world < 4 else 1
    accumulation = BATCH // size // world
    keys = [f"zero={stage}", f"train.dtype={dtype}", f"optim.lr={LR}", f"train.batch_size={size}"]
    keys += [f"train.accumulation_steps={accumulation}", "ema.enabled=true", "ema.decay=0.99"]
    if "offload" in str(how):
        keys.append(f"deepspeed={OFFLOAD.format(stage)}")
    if dtype == "fp16":
        scaling = "{fp16: {enabled: auto, initial_scale_power: 6, hysteresis: 1, loss_scale_window: 2}}"
        keys.append(f"deepspeed={scaling}")
    trained = model(kind)
    return trained, engines.Engine(LanguageModeling(trained), configuration.load(None, keys)), accumulation


def train(engine, data: list[dict], accumulation: int) -> list[float]:
    rank, world, losses = dist.get_rank(), dist.get_world_size(), []
    size = BATCH // world // accumulation
    for batch in data:
        valid, total = batch["labels"].numel(), 0.0
        for k in range(accumulation):
            engine.begin_micro_step(last=k == accumulation - 1)
            first = (k * world + rank) * size
            found = engine.forward(**{n: t[first : first + size] for n, t in batch.items()})
            engine.backward(found.loss_sum / valid + found.aux_loss / (world * accumulation))
            total += found.loss_sum.item()
        losses.append(processes.all_reduce([total / valid])[0])
        engine.step(LR)
    return losses


def whole(engine, trained: torch.nn.Module) -> dict:
    """States of every trained weight, gathered by DeepSpeed where it shards them."""
    owner, states = engine._masters, {}
    if hasattr(owner.optimizer, "_lazy_init_hp_params_optimizer_state"):  # what it does once, in the first step
        owner.optimizer._hp_optimizer_states_linked = False
        owner.optimizer._lazy_init_hp_params_optimizer_state()
    inner = owner.optimizer if isinstance(owner, masters.Plain) else owner.optimizer.optimizer
    for name, p in trained.named_parameters():
        if not p.requires_grad:
            continue
        if type(owner) is masters.Plain:
            found = [p, inner.state[p]["exp_avg"], inner.state[p]["exp_avg_sq"]]
        elif type(owner) is masters.Unfused16:
            pairs = zip(owner.optimizer.fp16_groups, owner.optimizer.fp32_groups, strict=True)
            kept = next(h for low, high in pairs for q, h in zip(low, high, strict=True) if q is p)
            found = [kept, inner.state[kept]["exp_avg"], inner.state[kept]["exp_avg_sq"]]
        elif type(owner) is masters.Fused16:
            number = next(i for i, g in enumerate(owner.optimizer.fp16_groups) if any(q is p for q in g))
            group, flat = owner.optimizer.fp16_groups[number], owner.optimizer.fp32_groups_flat[number]
            sizes = [q.numel() for q in group]
            index = next(i for i, q in enumerate(group) if q is p)
            kept = inner.state[flat]
            found = [t.split(sizes)[index].view(p.shape) for t in (flat, kept["exp_avg"], kept["exp_avg_sq"])]
        else:
            keys = ("exp_avg", "exp_avg_sq")
            found = [deepspeed.utils.safe_get_full_fp32_param(p)]
            found += [deepspeed.utils.safe_get_full_optimizer_state(p, key) for key in keys]
        shape = getattr(p, "ds_shape", p.shape)
        values = [t.detach().float().reshape(shape).clone() for t in found]
        states[name] = dict(zip(("fp32", "exp_avg", "exp_avg_sq"), values, strict=True))
    steps = {float(s["step"]) for s in inner.state.values()}
    with engine.averaged_weights():
        averaged = engine.gather(trained, trained_only=True)
    weights = engine.gather(trained, trained_only=True)
    scale = loss_scale(owner.optimizer)
    return {"states": states, "steps": sorted(steps), "average": averaged, "weights": weights, "scale": scale}


def save(folder: Path, name: str, kind: str, dtype: str, how) -> dict:
    trained, engine, accumulation = build(kind, dtype, how)
    train(engine, batches()[:TAKEN], accumulation)
    target = folder / name
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    engine.save(target)
    found = whole(engine, trained)
    losses = train(engine, batches()[TAKEN:], accumulation)
    if dist.get_rank() == 0:
        torch.save(found | {"losses": losses}, target / "whole.pt")
    engine.destroy()
    return {"losses": losses}


def load(folder: Path, name: str, kind: str, dtype: str, how) -> dict:
    trained, engine, accumulation = build(kind, dtype, how)
    engine.load(folder / name)
    found = whole(engine, trained)
    losses = train(engine, batches()[TAKEN:], accumulation)
    engine.destroy()
    if dist.get_rank():
        return {}
    expected = torch.load(folder / name / "whole.pt", weights_only=True)
    moved = [abs(s[k]).max().item() for s in expected["states"].values() for k in ("exp_avg", "exp_avg_sq")]
    return {
        "unequal": [
            f"{weight} {key}"
            for weight, states in expected["states"].items()
            for key in states
            if not torch.equal(states[key], found["states"][weight][key])
        ]
        + [
            f"{weight} {part}"
            for part in ("weights", "average")
            for weight, value in expected[part].items()
            if not torch.equal(value, found[part][weight])
        ],
        "compared": len(expected["states"]),
        "unmoved": sum(m == 0 for m in moved),
        "steps": [found["steps"], expected["steps"]],
        "scale": [found["scale"], expected["scale"]],
        "losses": [losses, expected["losses"]],
    }


def main(action: str, folder: Path) -> None:
    processes.init_distributed()
    world = dist.get_world_size()
    found = {}
    for name, kind, dtype, how in json.loads((folder / "cases.json").read_text())[str(world)]:
        try:
            outcome = {"save": save, "load": load}[action](folder, name, kind, dtype, how)
        except Exception:  # reported per case; a rank alone in a collective runs into the job's time limit
            outcome = {"error": traceback.format_exc()[-2500:]}
        found[f"{name} -> {how}"] = outcome
        if dist.get_rank() == 0 or "error" in outcome:
            suffix = "" if dist.get_rank() == 0 else f"-{dist.get_rank()}"
            (folder / f"{action}{world}{suffix}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(arguments[0], Path(arguments[1]))

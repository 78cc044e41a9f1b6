"""Runs inside a job: every ZeRO stage and dtype against plain torch on the whole global batch; writes what it found.

Usage: engine_worker.py RESULTS.json SCRATCH_FOLDER
"""

import json
import shutil
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

from ds_llm import cli

cli.quiet()
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM  # noqa: E402
from ds_llm.models.head import attach_loss_head, lm_loss  # noqa: E402
from ds_llm.train.modes.pretrain import LanguageModeling  # noqa: E402

BATCH, LENGTH, VOCAB, STEPS, VETOED, LR = 8, 12, 37, 4, 1, 3e-3
MUON_LR = 0.02


def model() -> DecoderForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    made = DecoderForCausalLM(DecoderConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **sizes, **experts))
    return attach_loss_head(made)


def batches() -> list[dict]:
    """Global batches whose rows have 0 to 12 labels. The second half of the rows repeats one token."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        ids[BATCH // 2 :] = ids[-1, -1]
        labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        keep = torch.randint(LENGTH + 1, (BATCH, 1), generator=generator)
        made.append({"input_ids": ids, "labels": labels.masked_fill(torch.arange(LENGTH) >= keep, -100)})
    return made


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (first * m + (1 - first) * p.grad).sign()
                p -= group["lr"] * (update + group["weight_decay"] * p)
                m.mul_(second).add_((1 - second) * p.grad)


class Muon:
    """Muon of https://kellerjordan.github.io/posts/muon, in float64, on `hidden`; AdamW on the rest of `groups`."""

    def __init__(self, hidden, groups):
        self.hidden, self.momentum = hidden, [torch.zeros_like(p, dtype=torch.float64) for p in hidden]
        own = {id(p) for p in hidden}
        rest = [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        self.adam = torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.95))
        self.zero_grad = lambda: [p.__setattr__("grad", None) for g in groups for p in g["params"]]

    @torch.no_grad()
    def step(self):
        self.adam.step()
        for p, m in zip(self.hidden, self.momentum, strict=True):
            grad = p.grad.double()
            m.mul_(0.95).add_(0.05 * grad)
            x = 0.95 * m + 0.05 * grad
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            rows, columns = p.shape[-2:]
            p.mul_(1 - MUON_LR * 0.1).sub_(MUON_LR * max(1, rows / columns) ** 0.5 * x)


def reference(data: list[dict], name: str):
    """Plain torch, fp32, one process, no accumulation: weights, averages, losses and gradient norms."""
    plain = model()
    groups = [[p for p in plain.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    groups = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    if name == "muon":
        ends = ("embed_tokens.weight", "lm_head.weight", "gate.weight")
        hidden = [p for n, p in plain.named_parameters() if p.dim() >= 2 and not n.endswith(ends)]
        optimizer = Muon(hidden, groups)
    else:
        kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "lion": Lion}
        optimizer = kinds[name](groups, lr=LR, betas=(0.9, 0.95))
    averages, losses, norms, updates = [p.detach().clone() for p in plain.parameters()], [], [], 0
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        found = lm_loss(plain, **batch)
        valid = int((batch["labels"] != -100).sum())
        (found.loss_sum / valid + found.aux_loss).backward()
        losses.append(found.loss_sum.item() / valid)
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf") if name == "muon" else 1.0)))
        if step != VETOED:
            optimizer.step()
            decay = min(0.99, (1 + updates) / (10 + updates))
            updates += 1
            for average, p in zip(averages, plain.parameters(), strict=True):
                average.lerp_(p.detach(), 1 - decay)
    return dict(plain.named_parameters()), averages, losses, norms


def train(engine, data, size: int, accumulation: int, vetoed: int | None):
    """Train as the trainer does; per step: loss, gradient norm, applied; and the expert counts of this rank."""
    rank, world, seen, counts = dist.get_rank(), dist.get_world_size(), [], []
    for step, batch in enumerate(data):
        valid, total = int((batch["labels"] != -100).sum()), 0.0
        for k in range(accumulation):
            engine.begin_micro_step(last=k == accumulation - 1)
            # the same half of the batch stays on one rank, so that rank 1 sends every token to one expert
            first = (rank * accumulation + k) * size
            found = engine.forward(**{n: t[first : first + size] for n, t in batch.items()})
            engine.backward(found.loss_sum / valid + found.aux_loss / (world * accumulation))
            total += found.loss_sum.item()
            counts.append(found.expert_counts)
        (loss,) = processes.all_reduce([total / valid])
        result = engine.step(LR, veto=step == vetoed)
        seen.append({"loss": loss, "norm": result.grad_norm, "applied": result.applied})
    return seen, torch.stack(counts)


def largest(found: dict, expected) -> float:
    return max((found[name].float() - value.detach()).abs().max().item() for name, value in expected)


def case(dtype: str, stage: int, accumulation: int, name: str, data, plain, scratch: Path) -> dict:
    world = dist.get_world_size()
    size = BATCH // world // accumulation
    keys = [f"zero={stage}", f"train.dtype={dtype}", f"train.batch_size={size}", f"optim.lr={LR}"]
    keys += [f"train.accumulation_steps={accumulation}", "ema.enabled=true", "ema.decay=0.99"]
    name, _, offloaded = name.partition("-")
    keys = [*keys, f"optim.name={name}", *["optim.grad_clip=0"] * (name == "muon")]
    keys += ["deepspeed.zero_optimization.offload_optimizer.device=cpu"] * bool(offloaded)
    config = configuration.load(None, keys)
    trained = model()
    engine = engines.Engine(LanguageModeling(trained), config)
    seen, counts = train(engine, data, size, accumulation, VETOED)
    weights, averages, losses, norms = plain
    state = engine.gather(trained)
    with engine.averaged_weights():
        averaged = engine.gather(trained)
    back = engine.gather(trained)
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    engine.save(scratch)
    again = model()
    resumed = engines.Engine(LanguageModeling(again), config)
    resumed.load(scratch)
    after = [train(e, data[:2], size, accumulation, None)[0] for e in (engine, resumed)]
    ends = [engine.gather(trained), resumed.gather(again)]
    for e, m in ((engine, trained), (resumed, again)):
        with e.averaged_weights():
            ends.append(e.gather(m))
    per_rank = [None] * world
    dist.all_gather_object(per_rank, (counts > 0).sum(-1).max().item())
    found = {}
    if dist.get_rank() == 0:
        found = {
            "applied": [s["applied"] for s in seen],
            "loss_error": max(abs(s["loss"] - e) for s, e in zip(seen, losses, strict=True)),
            "norm_error": max(abs(s["norm"] / e - 1) for s, e in zip(seen, norms, strict=True) if s["applied"]),
            "weight_error": largest(state, weights.items()),
            "average_error": largest(averaged, zip(weights, averages, strict=True)),
            "average_differs": any(not torch.equal(state[n], averaged[n]) for n in state),
            "swapped_back": all(torch.equal(state[n], back[n]) for n in state),
            "resumed_bitwise": after[0] == after[1]
            and all(torch.equal(a[n], b[n]) for a, b in (ends[:2], ends[2:]) for n in a),
            "experts_used_by_rank": per_rank,
            "average_share": sum(a.numel() for a in engine.average.tensors) / sum(p.numel() for p in weights.values()),
            "saved_bytes": sum(f.stat().st_size for f in scratch.rglob("*") if f.is_file()),
        }
    needed = processes.all_reduce([engine.state_bytes()])[0]
    engine.destroy()
    resumed.destroy()
    return found | {"needed_bytes": needed}


def main(results: Path, scratch: Path) -> None:
    processes.init_distributed()
    data = batches()
    plain = {name: reference(data, name) for name in ("adamw", "adam", "muon", "lion")}
    plain["adamw8bit"] = plain["adamw"]
    found = {}
    if dist.get_world_size() == 1:
        cases = [("fp32", stage, 4, "adamw") for stage in range(4)]
    else:
        cases = [("fp32", stage, accumulation, "adamw") for stage in range(4) for accumulation in (1, 2)]
        halves = ["bf16", *["fp16"] * bool(deepspeed.get_accelerator().is_fp16_supported())]
        cases += [(dtype, stage, 2, "adamw") for dtype in halves for stage in range(4)]
        cases += [("fp32", 2, 1, "adam")]
        cases += [("fp32", stage, 2, "muon") for stage in range(4)]
        cases += [("fp32", stage, 2, "muon-offloaded") for stage in (2, 3)]
        cases += [("bf16", stage, 2, "muon") for stage in (0, 2, 3)]  # at 1, DeepSpeed's takes no fused experts
        more = ["lion", *["adamw8bit"] * (find_spec("bitsandbytes") is not None)]
        cases += [("fp32", stage, 1, name) for name in more for stage in (0, 2, 3)]
    for dtype, stage, accumulation, name in cases:
        try:
            outcome = case(dtype, stage, accumulation, name, data, plain[name.partition("-")[0]], scratch)
        except Exception:  # reported per case; a rank alone in a collective runs into the job's time limit
            outcome = {"error": traceback.format_exc()[-1500:]}
        found[f"{dtype}-{stage}-{accumulation}-{name}"] = outcome
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found))


if __name__ == "__main__":
    paths = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(paths[0]), Path(paths[1]))

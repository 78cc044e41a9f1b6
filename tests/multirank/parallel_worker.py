"""Runs inside a job: experts, rows and layers that ranks share against plain torch on the whole global batch.

Usage: parallel_worker.py RESULTS.json SCRATCH_FOLDER
"""

import dataclasses
import json
import shutil
import sys
import traceback
from pathlib import Path

from ds_llm import cli

cli.quiet()
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.config.mode_sections import LoraConfig  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models import accelerate  # noqa: E402
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM  # noqa: E402
from ds_llm.models.head import attach_loss_head, lm_loss  # noqa: E402
from ds_llm.models.select_moe import SelectMoeConfig, SelectMoeForCausalLM  # noqa: E402
from ds_llm.pretrained import lora as adapters  # noqa: E402
from ds_llm.train.modes.sft import SupervisedLoss  # noqa: E402

BATCH, LENGTH, VOCAB, STEPS, LR, CLIP = 4, 22, 37, 3, 3e-3, 0.5
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
EXPERTS = {
    "decoder": {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {  # sigmoid scores with a bias, a shared expert, a dense layer first
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    keys: tuple[str, ...]  # of the configuration
    plain_kernels: bool = False
    resume: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.kind, *self.keys, *["plain"] * self.plain_kernels])


def model(kind: str, plain: bool = False, checkpointing: bool = False):
    torch.manual_seed(0)
    adapted, kind = kind.endswith("-lora"), kind.removesuffix("-lora")
    gated, kind = kind.startswith("gated-"), kind.removeprefix("gated-")
    kind, experts = kind.removesuffix("-moe"), EXPERTS.get(kind.removesuffix("-moe"), {}) if "moe" in kind else {}
    if kind == "mixtral":
        experts = EXPERTS["mixtral"]
    if kind == "decoder":
        aux = {"aux_loss_alpha": 0.1, "z_loss_alpha": 0.01, "n_shared_experts": 1} if experts else {}
        made = DecoderForCausalLM(DecoderConfig(**SIZES, **experts, **aux))
    else:
        extra = {"head_dim": 4} if kind == "qwen3" else {}
        settings = AutoConfig.for_model(kind, **SIZES | experts | extra)
        if experts:
            settings.router_aux_loss_coef = 0.1
        made = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    if gated:
        text = {**made.config.to_dict(), "model_type": made.config.model_type}
        made = SelectMoeForCausalLM(SelectMoeConfig(text_config=text))
    if not plain:
        accelerate(made)
    attach_loss_head(made)
    if adapted:
        torch.manual_seed(1)
        made = adapters.add_adapter(made, LoraConfig(enabled=True, r=2), "some/model", [])
        with torch.no_grad():
            for name, p in made.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def batches() -> list[dict]:
    """Global batches of packed documents with ragged labels; the second half of the rows repeats one token."""
    generator = torch.Generator().manual_seed(1)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    made = []
    for _ in range(STEPS):
        ids, labels = draw(VOCAB, BATCH, LENGTH), draw(VOCAB, BATCH, LENGTH)
        ids[BATCH // 2 :] = ids[-1, -1]
        labels = labels.masked_fill(draw(3, BATCH, LENGTH) == 0, -100)
        cuts = draw(LENGTH - 1, BATCH, 3).add(1)  # documents of random lengths
        starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool).scatter(1, cuts, True)
        used = LENGTH - draw(6, BATCH, 1)
        starts |= (place := torch.arange(LENGTH).expand(BATCH, -1)) == used
        first = torch.where(starts, place, 0).cummax(1).values
        mask = place < used
        made.append(
            {
                "input_ids": ids.masked_fill(~mask, 0),
                "labels": labels.masked_fill(~mask, -100),
                "position_ids": place - first,
                "token_mask": mask,
            }
        )
    return made


def rows(batch: dict, first: int, count: int) -> dict:
    return {name: value[first : first + count].clone() for name, value in batch.items()}


def reference(kind: str, data: list[dict], parts: int):
    """Plain torch in fp32 on one process, the auxiliary losses averaged over `parts` micro-batches."""
    plain = model(kind, plain=True)
    trained = [p for p in plain.parameters() if p.requires_grad]
    groups = [[p for p in trained if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    decayed = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decayed, lr=LR, betas=(0.9, 0.95))
    losses, norms = [], []
    for batch in data:
        optimizer.zero_grad()
        valid, total = int((batch["labels"] != -100).sum()), 0.0
        for part in range(parts):
            found = lm_loss(plain, **rows(batch, part * BATCH // parts, BATCH // parts))
            (found.loss_sum / valid + found.aux_loss / parts).backward()
            total += found.loss_sum.item()
        losses.append(total / valid)
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)))
        optimizer.step()
    return dict(plain.named_parameters()), losses, norms


def train(engine, data, size: int, accumulation: int) -> list[dict]:
    """As the trainer does; per step: loss and gradient norm."""
    layout, seen = engine.layout, []
    engine.train()
    for batch in data:
        valid, total = int((batch["labels"] != -100).sum()), 0.0
        for k in range(accumulation):
            engine.begin_micro_step(last=k == accumulation - 1)
            part = engine.part(rows(batch, (layout.batch * accumulation + k) * size, size))
            found = engine.forward(**part)
            engine.backward(found.loss_sum / valid + found.aux_loss / (layout.replicas * accumulation))
            total += found.loss_sum.item()
        (loss,) = engine.total([total / valid])
        seen.append({"loss": loss, "norm": engine.step(LR).grad_norm})
    return seen


def evaluate(engine, data) -> float:
    """Loss of whole rows on every rank, as evaluations take it."""
    engine.train(False)
    with torch.no_grad():
        loss = float(engine.forward(**rows(data[0], 0, BATCH)).loss_sum)
    engine.train()
    return loss


def run(case: Case, data, known: dict, scratch: Path) -> dict:
    accumulation = 2 if "train.accumulation_steps=2" in case.keys else 1
    config = configuration.load(None, [f"optim.lr={LR}", f"optim.grad_clip={CLIP}", "train.dtype=fp32", *case.keys])
    parallel = config.parallel
    parts = dist.get_world_size() // (parallel.sequence * parallel.tensor) * accumulation
    config.train.batch_size = BATCH // parts
    if (case.kind, parts) not in known:
        known[case.kind, parts] = reference(case.kind, data, parts)
    weights, losses, norms = known[case.kind, parts]
    again = config.train.activation_checkpointing
    trained = model(case.kind, case.plain_kernels, again)
    engine = engines.Engine(SupervisedLoss(trained), config)
    before = evaluate(engine, data)
    seen = train(engine, data, config.train.batch_size, accumulation)
    state = engine.gather(trained)
    found = {}
    if dist.get_rank() == 0:
        start = model(case.kind, plain=True)
        with torch.no_grad():
            found["evaluation_error"] = abs(before / float(lm_loss(start, **data[0]).loss_sum) - 1)
        found |= {
            "names_differ": sorted(weights.keys() ^ {n for n in state if n in weights or "experts.w" in n}),
            "loss_error": max(abs(s["loss"] - e) for s, e in zip(seen, losses, strict=True)),
            "norm_error": max(abs(s["norm"] / e - 1) for s, e in zip(seen, norms, strict=True)),
            "weight_error": max((state[n].float() - w.detach()).abs().max().item() for n, w in weights.items()),
        }
    if case.resume:
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        dist.barrier()
        engine.save(scratch)
        again = model(case.kind, case.plain_kernels)
        with torch.no_grad():
            for p in again.parameters():
                p.mul_(0.5)
        resumed = engines.Engine(SupervisedLoss(again), config)
        resumed.load(scratch)
        after = [train(e, data[:2], config.train.batch_size, accumulation) for e in (engine, resumed)]
        ends = [engine.gather(trained), resumed.gather(again)]
        if engine.average is not None:
            for e, m in ((engine, trained), (resumed, again)):
                with e.averaged_weights():
                    ends.append(e.gather(m))
        if dist.get_rank() == 0:
            pairs = (
                [(a[n], b[n]) for a, b in (ends[:2], ends[2:]) if ends for n in a]
                if len(ends) > 2
                else [(ends[0][n], ends[1][n]) for n in ends[0]]
            )
            found["resumed_bitwise"] = after[0] == after[1] and all(torch.equal(a, b) for a, b in pairs)
        resumed.destroy()
    engine.destroy()
    return found


def offloaded(*names: str) -> str:
    devices = ", ".join(f"offload_{name}: {{device: cpu}}" for name in names)
    return f"deepspeed={{zero_optimization: {{{devices}}}}}"


LAYOUTS = {"expert": "decoder-moe", "sequence": "decoder", "tensor": "decoder"}


def cases(world: int) -> list[Case]:
    made = []
    if world == 4:
        made += [
            Case(LAYOUTS[name], ("zero=2", f"parallel.{name}=2", "ema.enabled=true"), resume=True) for name in LAYOUTS
        ]
        made += [Case("decoder", ("zero=0", f"parallel.{name}=2")) for name in ("sequence", "tensor")]
        made += [Case("decoder-moe", (f"zero={stage}", "parallel.expert=2", "parallel.sequence=2")) for stage in (1, 3)]
        made += [Case("decoder-moe", ("zero=0", "parallel.expert=4")), Case("llama", ("zero=3", "parallel.sequence=4"))]
        made += [Case("qwen3", ("zero=3", "parallel.tensor=2")), Case("mixtral", ("zero=3", "parallel.expert=2"))]
        return made
    fp16 = bool(deepspeed.get_accelerator().is_fp16_supported())
    for name, kind in LAYOUTS.items():
        key = f"parallel.{name}=2"
        made += [Case(kind, (f"zero={stage}", key, "ema.enabled=true"), resume=True) for stage in range(4)]
        made += [
            Case(kind, (f"zero={stage}", key, f"train.dtype={dtype}"), resume=stage == 1)
            for stage, dtype in ((0, "fp16"), (1, "bf16"), (2, "fp16"), (3, "bf16"))
            if dtype != "fp16" or fp16
        ]
        made += [Case(kind, ("zero=2", key, "train.accumulation_steps=2"))]
        made += [
            Case(kind, ("zero=2", key, offloaded("optimizer"))),
            Case(kind, ("zero=3", key, offloaded("optimizer", "param"))),
        ]
        made += [Case(kind, ("zero=2", key, "train.activation_checkpointing=true"))]
    made += [Case(kind, (f"zero={stage}", "parallel.expert=2")) for kind, stage in (("qwen3_moe", 1), ("mixtral", 3))]
    made += [Case("mixtral", ("zero=2", "parallel.expert=2"), plain_kernels=True)]
    made += [Case("glm4_moe", (f"zero={stage}", "parallel.expert=2")) for stage in (2, 3)]
    made += [Case(f"gated-{kind}", ("zero=2", "parallel.expert=2")) for kind in ("decoder-moe", "qwen3_moe")]
    made += [Case("llama-lora", (f"zero={stage}", "parallel.sequence=2")) for stage in (0, 3)]
    made += [
        Case(kind, (f"zero={stage}", f"parallel.{name}=2"))
        for kind, name, stage in (
            ("llama", "sequence", 3),
            ("qwen3", "sequence", 1),
            ("llama", "tensor", 1),
            ("qwen3", "tensor", 3),
        )
    ]
    made += [Case(kind, ("zero=1", "parallel.sequence=2")) for kind in ("decoder-moe", "mixtral", "qwen3_moe")]
    return made


def main(results: Path, scratch: Path, only: str = "") -> None:
    processes.init_distributed()
    data, known, found = batches(), {}, {}
    # DeepSpeed's tensor groups stay for the life of a process, so those come last
    for case in sorted(cases(dist.get_world_size()), key=lambda case: "parallel.tensor" in case.name):
        if only not in case.name:
            continue
        try:
            outcome = run(case, data, known, scratch)
        except Exception:  # reported per case; a rank alone in a collective runs into the job's time limit
            outcome = {"error": traceback.format_exc()[-2500:]}
        found[case.name] = outcome
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(arguments[0]), Path(arguments[1]), *arguments[2:])

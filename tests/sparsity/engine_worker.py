"""Runs inside a job: compact training under every ZeRO stage against plain torch with masked weights and gradients.

Usage: engine_worker.py RESULTS.json SCRATCH_FOLDER [DEEPSPEED.json ...]
"""

import copy
import json
import shutil
import sys
import traceback
from pathlib import Path

from ds_llm import cli

cli.quiet()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM  # noqa: E402
from ds_llm.models.head import attach_loss_head, lm_loss  # noqa: E402
from ds_llm.pretrained.loading import load_model  # noqa: E402
from ds_llm.sparsity import compact_checkpoint  # noqa: E402
from ds_llm.sparsity.masks import masks_from_zeros  # noqa: E402
from ds_llm.sparsity.model import sparsify  # noqa: E402
from ds_llm.sparsity.targets import prunable  # noqa: E402
from ds_llm.train.modes.pretrain import LanguageModeling  # noqa: E402

BATCH, LENGTH, VOCAB, STEPS, LR, DECAY = 8, 12, 37, 4, 3e-3, 0.3


def pruned() -> DecoderForCausalLM:
    """A decoder with attention, experts and a shared expert, about a quarter kept."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = DecoderConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, n_shared_experts=1, **sizes, **experts)
    model = attach_loss_head(DecoderForCausalLM(config))
    for target in prunable(model):
        target.weight.mul_(torch.rand_like(target.weight) < 0.25)
    return model


def batches() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator) for _ in range(STEPS)]
    return [{"input_ids": i[:, :-1], "labels": i[:, 1:]} for i in ids]


def reference(data: list[dict]):
    """Plain torch in fp32 on the whole batch: weights, their average, losses, gradient norms."""
    model = pruned()
    kept = {n: m.to_dense() for n, m in masks_from_zeros(model).items()}
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == which] for which in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
    )
    average, losses, norms = copy.deepcopy(model), [], []
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        found = lm_loss(model, **batch)
        (found.loss_sum / (BATCH * LENGTH) + found.aux_loss).backward()
        for name, p in model.named_parameters():
            if name in kept:
                p.grad.mul_(kept[name])
        losses.append(found.loss_sum.item() / (BATCH * LENGTH))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
    return dict(model.named_parameters()), dict(average.named_parameters()), losses, norms, kept


def train(engine, data) -> list[list[float]]:
    """Loss and gradient norm of each step; every rank has its rows of the batch."""
    rank, seen, rows = dist.get_rank(), [], BATCH // dist.get_world_size()
    for batch in data:
        engine.begin_micro_step(last=True)
        found = engine.forward(**{n: t[rank * rows : (rank + 1) * rows] for n, t in batch.items()})
        engine.backward(found.loss_sum / (BATCH * LENGTH) + found.aux_loss / dist.get_world_size())
        (loss,) = processes.all_reduce([found.loss_sum.item() / (BATCH * LENGTH)])
        seen.append([loss, engine.step(LR).grad_norm])
    return seen


def distance(folder: Path, expected: dict, kept: dict) -> tuple[float, bool]:
    """(largest difference of a compact folder's weights from the expected, whether all pruned ones are exactly 0)."""
    found = dict(load_model(folder).named_parameters())
    error = max((found[name] - p.detach()).abs().max().item() for name, p in expected.items())
    return error, not any(found[name][~mask].any() for name, mask in kept.items())


def case(settings: list[str], data, plain, scratch: Path) -> dict:
    keys = ["train.dtype=fp32", f"train.batch_size={BATCH // dist.get_world_size()}", f"optim.lr={LR}"]
    keys += [f"optim.weight_decay={DECAY}", "ema.enabled=true", "ema.decay=0.99", *settings]
    config = configuration.load(None, keys)
    engine_of, models = [], []
    for _ in range(2):
        model = pruned()
        models.append(sparsify(model, masks_from_zeros(model)))
        engine_of.append(engines.Engine(LanguageModeling(models[-1]), config))
    engine, model = engine_of[0], models[0]
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    seen = train(engine, data)
    weights = engine.gather(model)
    with engine.averaged_weights():
        averaged = engine.gather(model)
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        compact_checkpoint.save(model, weights, scratch / "model")
        compact_checkpoint.save(model, averaged, scratch / "average")
    dist.barrier()
    engine.save(scratch)
    engine_of[1].load(scratch)
    after = [train(e, data[:2]) for e in engine_of]
    ends = [e.gather(m) for e, m in zip(engine_of, models, strict=True)]
    masters, states = (sum(t.numel() for t in group) for group in (engine._masters.weights(), engine.average.tensors))
    moments = [t.numel() for s in engine._optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    held = processes.all_reduce([masters, states, sum(n for n in moments if n > 1)])
    found = {}
    if dist.get_rank() == 0:
        expected, average, losses, norms, kept = plain
        error, zeros = distance(scratch / "model", expected, kept)
        average_error, average_zeros = distance(scratch / "average", average, kept)
        found = {
            "loss_error": max(abs(s[0] - e) for s, e in zip(seen, losses, strict=True)),
            "norm_error": max(abs(s[1] / e - 1) for s, e in zip(seen, norms, strict=True)),
            "weight_error": error,
            "average_error": average_error,
            "zeros": zeros and average_zeros,
            "resumed_bitwise": after[0] == after[1] and all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]),
            "trained": trained,
            "dense": sum(p.numel() for p in expected.values()),
            "held": held,
        }
    for e in engine_of:
        e.destroy()
    return found


def main(results: Path, scratch: Path, files: list[str]) -> None:
    processes.init_distributed()
    data = batches()
    plain = reference(data)
    found = {}
    cases = {f"zero{stage}": [f"zero={stage}"] for stage in range(4)} | {f: [f"deepspeed={f}"] for f in files}
    for name, settings in cases.items():
        try:
            found[name] = case(settings, data, plain, scratch)
        except Exception:  # reported per case; a rank alone in a collective runs into the job's time limit
            found[name] = {"error": traceback.format_exc()[-1500:]}
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found))


if __name__ == "__main__":
    paths = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(paths[0]), Path(paths[1]), paths[2:])

"""Memory and time of fine-tuning a pruned model: compact state against what is done without it.

    python -m benchmarks.sparse --density 0.1 --json benchmarks/results/sparse.json

Contestants, all with torch's fused AdamW in fp32 on the same random Llama with the same pruned layers and batches:

dense          fine-tuning of all weights; what was pruned grows back
re-masked      the same, pruned weights set to 0 again after each step
utils.prune    torch.nn.utils.prune: weight_orig and weight_mask, multiplied in every forward pass
compact        `ds_llm.sparsity`: kept values only
compact frozen the same with embeddings and norms frozen (sparse.train_dense=false)

Each lives in a process of its own; they take their steps in turns, so that all meet the same load, and time ratios are
medians over the rounds. `state` is parameters, gradients and optimizer state; `masks` what a contestant keeps besides
to know what is pruned; `peak` is the largest resident memory during the steps, on a GPU the largest allocation.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

CONTESTANTS = ("dense", "re-masked", "utils.prune", "compact", "compact frozen")
SHAPES = {  # share of the embedding in all weights: 3.9 % as in a Llama of 7B, and SmolLM2's 21 %
    "default": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 2048},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
    "large": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128},
}
LR = 1e-4


def contestant(name: str, shape: dict, density: float, batch: int, length: int, threads: int, pipe) -> None:
    """Answer each request of `pipe`: "step" with (seconds, loss), "end" with the bytes held and the peak."""
    import torch
    from torch.nn.utils import prune
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_llm.kernels.sparse_update import PackedMask
    from ds_llm.models.head import attach_loss_head, lm_loss
    from ds_llm.sparsity.model import freeze_dense, sparsify
    from ds_llm.sparsity.targets import prunable

    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    torch.set_default_device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "tie_word_embeddings": True}
    model = attach_loss_head(LlamaForCausalLM(LlamaConfig(**shape, **heads)))
    masks = {}
    for target in prunable(model):
        scores = target.weight.abs()
        kept = round(density * scores.numel())
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.flatten().topk(kept).indices] = True
        target.weight.mul_(mask.view_as(scores))
        masks[target.name] = mask.view_as(scores)
    held = []
    if name == "re-masked":
        held = [(model.get_parameter(key), mask) for key, mask in masks.items()]
    elif name == "utils.prune":
        for key, mask in masks.items():
            prune.custom_from_mask(model.get_submodule(key.removesuffix(".weight")), "weight", mask)
    elif name.startswith("compact"):
        sparsify(model, {key: PackedMask.from_dense(mask) for key, mask in masks.items()})
        if name == "compact frozen":
            freeze_dense(model)
    del masks
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1, fused=True)

    def step() -> float:
        ids = torch.randint(shape["vocab_size"], (batch, length + 1))
        optimizer.zero_grad()
        loss = lm_loss(model, ids[:, :-1], ids[:, 1:]).loss_sum / (batch * length)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in held:
                parameter.mul_(mask)
        return loss.item()

    pipe.send("ready")
    torch.manual_seed(1)
    while pipe.recv() == "step":
        if optimizer.state and cuda:
            torch.cuda.reset_peak_memory_stats()
        elif optimizer.state and not peak_is_new():
            raise SystemExit("error: no /proc/self/clear_refs: the peak memory of a phase is measured on Linux only")
        start = time.perf_counter()
        loss = step()
        if cuda:
            torch.cuda.synchronize()  # the loss is there before the optimizer's step has ended
        pipe.send((time.perf_counter() - start, loss))
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    kept_besides = [mask for _, mask in held]
    kept_besides += [b for n, b in model.named_buffers() if "mask" in n]
    # under utils.prune `weight` is a tensor of its own, made from weight_orig
    kept_besides += [m.weight for m in model.modules() if hasattr(m, "weight_orig")]
    sizes = [sum(t.numel() * t.element_size() for t in group) for group in (tensors, kept_besides)]
    pipe.send((*sizes, torch.cuda.max_memory_allocated() if cuda else peak_bytes()))


def peak_is_new() -> bool:
    """Let the process's peak memory start anew at what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__.split("\n")[0])
    parser.add_argument("--density", type=float, default=0.1, help="share of weights kept (default 0.1)")
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default 128)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each (default 10), after one more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)

    from benchmarks.machine import record

    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for name in args.only:
        pipes[name], theirs = context.Pipe()
        options = (name, SHAPES[args.shape], args.density, args.batch, args.length, args.threads, theirs)
        processes[name] = context.Process(target=contestant, args=options, daemon=True)
        processes[name].start()
        theirs.close()  # so that the end of the process is the end of the pipe
        pipes[name].recv()
    times, losses = {name: [] for name in args.only}, {name: [] for name in args.only}
    for turn in range(args.rounds + 1):
        for name in args.only[turn % len(args.only) :] + args.only[: turn % len(args.only)]:
            pipes[name].send("step")
            seconds, loss = pipes[name].recv()
            losses[name].append(loss)
            if turn:
                times[name].append(seconds)
    rows = {}
    for name in args.only:
        pipes[name].send("end")
        state, masks, peak = pipes[name].recv()
        processes[name].join()
        rows[name] = {"state_bytes": state, "mask_bytes": masks, "peak_bytes": peak}
        rows[name] |= {"seconds": times[name], "losses": losses[name]}
    about = record()
    print(f"density {args.density:g}, {args.batch} x {args.length} tokens, {about['machine']['cpu']}, ", end="")
    print(f"{args.threads} thread{'s' * (args.threads > 1)} each, {args.rounds} rounds")
    heads = ("state MB", "of dense", "masks MB", "peak MB", "step s", "of re-masked", "last loss")
    print(f"{'':15}" + "".join(f"{head:>13}" for head in heads))
    for name, row in rows.items():
        cells = [f"{row['state_bytes'] / 1e6:,.1f}", share(rows, name, "dense", "state_bytes")]
        cells += [f"{row['mask_bytes'] / 1e6:,.1f}", f"{row['peak_bytes'] / 1e6:,.0f}"]
        cells += [f"{statistics.median(row['seconds']):.3f}", share(rows, name, "re-masked", "seconds")]
        print(f"{name:15}" + "".join(f"{cell:>13}" for cell in [*cells, f"{row['losses'][-1]:.6f}"]))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "only")} | {"sizes": SHAPES[args.shape]}
        args.json.write_text(json.dumps(about | settings | {"contestants": rows}, indent=2) + "\n")
        print(f"wrote {args.json}")


def share(rows: dict, name: str, of: str, key: str) -> str:
    """The figure of one contestant divided by another's; of lists, the median of the quotients."""
    if of not in rows:
        return "-"
    one, other = rows[name][key], rows[of][key]
    if isinstance(one, list):
        return f"{statistics.median(a / b for a, b in zip(one, other, strict=True)):.3f}"
    return f"{one / other:.3f}"


if __name__ == "__main__":
    main()

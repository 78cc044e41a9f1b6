"""Runs inside a job: models whose ranks read only their parts against models that every rank loads whole.

Usage: loading_worker.py RESULTS.json SCRATCH_FOLDER
"""

import hashlib
import json
import shutil
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from ds_llm import cli

cli.quiet()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from architectures import ARCHITECTURES, tiny  # noqa: E402

from ds_llm.config import run as configuration  # noqa: E402
from ds_llm.engine import engine as engines  # noqa: E402
from ds_llm.engine import inference as inferences  # noqa: E402
from ds_llm.engine import processes  # noqa: E402
from ds_llm.models import deferred, first_weights  # noqa: E402
from ds_llm.models.decoder import DecoderConfig  # noqa: E402
from ds_llm.models.head import attach_loss_head, lm_loss  # noqa: E402
from ds_llm.pretrained import parts  # noqa: E402
from ds_llm.pretrained.added_tokens import add_tokens  # noqa: E402
from ds_llm.pretrained.fingerprint import model_fingerprint  # noqa: E402
from ds_llm.pretrained.loading import load_model, match_tokenizer  # noqa: E402
from ds_llm.train import start_model as starts  # noqa: E402
from ds_llm.train.modes.pretrain import LanguageModeling  # noqa: E402

VOCAB, LENGTH, LR = 41, 10, 3e-3
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True},
    "qwen3_moe": {**MOE, "num_experts": 4, "head_dim": 6},  # files with one tensor per expert, joined when it is loaded
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        **{**MOE, "n_routed_experts": 4, "head_dim": 6, "n_shared_experts": 1, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1},
    },
    "gpt2": {},
    "decoder": {**MOE, "use_moe": True, "n_routed_experts": 4},
}
# (kind of model, dtype of its file, keys of the run)
CASES = [
    ("llama", "bfloat16", ("zero=3", "train.dtype=bf16")),
    ("llama", "bfloat16", ("zero=3", "train.dtype=fp32")),
    ("llama", "float32", ("zero=3", "train.dtype=bf16")),
    ("llama", "bfloat16", ("zero=3", "train.dtype=bf16", "lora.enabled=true", "lora.r=2")),
    ("qwen3", "float32", ("zero=3", "train.dtype=fp32")),
    ("qwen3", "bfloat16", ("zero=3", "train.dtype=bf16", "model.add_tokens=['<a>','<b>']")),
    ("qwen3_moe", "bfloat16", ("zero=3", "train.dtype=bf16")),
    ("qwen3_moe", "bfloat16", ("zero=3", "train.dtype=fp32", "lora.enabled=true", "lora.r=2")),
    ("qwen3_moe", "float32", ("zero=3", "train.dtype=fp32", "deepspeed.zero_optimization.offload_param.device=cpu")),
    ("glm4_moe", "float32", ("zero=3", "train.dtype=bf16")),
    ("gpt2", "float32", ("zero=3", "train.dtype=fp32")),
    ("decoder", "bfloat16", ("zero=3", "train.dtype=bf16")),
    ("mixtral", "bfloat16", ("zero=3", "train.dtype=bf16", "parallel.expert=2")),
    ("mixtral", "bfloat16", ("zero=2", "train.dtype=bf16", "parallel.expert=2")),
    *[("qwen3_moe", "float32", (f"zero={stage}", "train.dtype=bf16")) for stage in range(3)],
    ("decoder", None, ("zero=3", "train.dtype=bf16")),  # from scratch
    ("gpt2", None, ("zero=3", "train.dtype=fp32")),
]


def name_of(case) -> str:
    return " ".join([case[0], case[1] or "scratch", *case[2]])


def architecture(kind: str):
    if kind == "decoder":
        return DecoderConfig(**SIZES, **KINDS[kind])
    if kind == "gpt2":
        return AutoConfig.for_model(
            "gpt2", vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=LENGTH, **dict.fromkeys(
                ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        )  # fmt: skip
    return AutoConfig.for_model(kind, **SIZES | KINDS[kind])


def build(kind: str):
    return AutoModelForCausalLM.from_config(architecture(kind), attn_implementation="sdpa", dtype=torch.float32)


def make_files(scratch: Path) -> None:
    """Each kind in both dtypes, in several files."""
    for kind in KINDS:
        torch.manual_seed(7)
        made = build(kind)
        for parameter in made.parameters():  # no two equal, none rounded by a cast to bf16
            torch.nn.init.normal_(parameter, std=0.1)
        for dtype in ("float32", "bfloat16"):
            folder = scratch / f"{kind}-{dtype}"
            made.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB")
            words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
            PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2").save_pretrained(folder)


def first_step(case, scratch: Path, whole: bool) -> tuple[list[float], dict, int]:
    """Losses of two steps, the weights after them, and how many elements of files this rank read.

    whole: every rank loads the whole model, and DeepSpeed takes its parts from that.
    """
    kind, dtype, keys = case
    config = configuration.load(
        None, [*keys, f"model.path={scratch / f'{kind}-{dtype}'}", "mode=sft", f"optim.lr={LR}"]
    )
    read, counted = deferred.read, []

    def counting(tensor, start, end, out):
        if getattr(tensor, "runs", None) is None:
            counted.append(end - start)
        read(tensor, start, end, out)

    with ExitStack() as stack:
        if whole:
            stack.enter_context(
                mock.patch.object(starts, "load_model", lambda *a, **k: load_model(*a, **k | {"deferred": False}))
            )
            stack.enter_context(mock.patch.object(engines, "place", lambda module, settings: None))
        torch.manual_seed(3)
        if dtype is None:
            made = attach_loss_head(
                build(kind) if whole else first_weights.build_deferred(lambda: build(kind), least=256)
            )
        else:
            tokenizer = starts.load_tokenizer(config.model.path)
            if config.model.add_tokens:
                add_tokens(tokenizer, config.model.add_tokens)
            made = starts.start_model(config, tokenizer)
        torch.manual_seed(4)  # of what is drawn in a step
        with mock.patch.object(deferred, "read", counting), mock.patch("ds_llm.engine.weights.read", counting):
            engine = engines.Engine(LanguageModeling(made), config)
    rank, world = dist.get_rank(), dist.get_world_size()
    generator, losses = torch.Generator().manual_seed(1), []
    engine.train()
    for _ in range(2):
        ids = torch.randint(VOCAB, (2 * world, LENGTH), generator=generator)[2 * rank : 2 * rank + 2]
        engine.begin_micro_step(last=True)
        found = engine.forward(input_ids=ids, labels=ids.roll(-1, 1))
        engine.backward(found.loss_sum / (20 * world) + found.aux_loss / world)
        losses.append(found.loss_sum.item())
        engine.step(LR)
    weights = engine.gather(made) or {}
    engine.destroy()
    return losses, weights, sum(counted)


def compare(case, scratch: Path) -> dict:
    (losses, weights, count), (expected, wanted, _) = (first_step(case, scratch, whole) for whole in (False, True))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (losses == expected, count))
    return {
        "same_losses": all(same for same, _ in gathered),
        "same_weights": weights.keys() == wanted.keys() and all(torch.equal(weights[n], wanted[n]) for n in wanted),
        "loss": losses,
        "read": [count for _, count in gathered],
        "size": sum(w.numel() for w in wanted.values()),
    }


def saved(kind: str, scratch: Path) -> dict:
    """Files that the ranks write together, right after loading, against those of the model loaded whole."""
    source, together, alone = (scratch / f"{kind}-{what}" for what in ("bfloat16", "together", "alone"))
    config = configuration.load(None, ["zero=3", "train.dtype=bf16", f"model.path={source}", "mode=sft"])
    made = starts.start_model(config, starts.load_tokenizer(source))
    engine, most = engines.Engine(LanguageModeling(made), config), 0

    def collect(*args, **kwargs):
        nonlocal most
        weights = engine.gather(made, *args, **kwargs)
        most = max(most, sum(w.numel() for w in weights.values()))
        return weights

    parts.write(made, collect, together, range(dist.get_world_size()), smallest=4000)
    engine.destroy()
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, most)
    if dist.get_rank():
        return {}
    whole = load_model(source, "bf16")
    match_tokenizer(whole, starts.load_tokenizer(source))
    whole.save_pretrained(alone)
    found, expected = (
        {k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (together, alone)
    )
    again = load_model(together, "bf16")  # by transformers, with the index
    return {
        "same": found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected),
        "loads": all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items()),
        "configuration": all((together / f.name).read_text() == f.read_text() for f in alone.glob("*config.json")),
        "files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(together.iterdir())},
        "held": max(held) / sum(p.numel() for p in whole.parameters()),
    }  # fmt: skip


def written(name: str, scratch: Path) -> str | None:
    """What is wrong with an architecture's files that the ranks write together; None where they are as they should."""
    torch.manual_seed(0)
    model, rank = tiny(name), dist.get_rank()
    together, alone = scratch / f"{name}-together", scratch / f"{name}-alone"

    def collect(keeper):
        unique = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
        return {n: value.detach().clone() for n, value in unique.items() if keeper(n) == rank}

    parts.write(model, collect, together, range(dist.get_world_size()), smallest=20_000)
    if rank:
        return None
    model.save_pretrained(alone)
    found, expected = (
        {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
        for folder in (together, alone)
    )
    shutil.rmtree(alone)
    shutil.rmtree(together)
    if found.keys() != expected.keys():
        return f"other names: {sorted(found.keys() ^ expected.keys())[:3]}"
    return next((f"another {key}" for key in found if not torch.equal(found[key], expected[key])), None)


def frozen(scratch: Path) -> dict:
    """A reference model under ZeRO-3: its log-likelihoods and its fingerprint, against the model loaded whole."""
    path, config = scratch / "qwen3_moe-bfloat16", configuration.load(None, ["zero=3", "train.dtype=bf16"])
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    plain, lazy = attach_loss_head(load_model(path, "bf16")), attach_loss_head(load_model(path, "bf16", deferred=True))
    prints = [model_fingerprint(model) for model in (plain, lazy)]
    with torch.no_grad():
        expected = lm_loss(plain, ids, ids.roll(-1, 1)).loss_sum
    with inferences.inference(LanguageModeling(lazy), config) as forward:
        found = forward(input_ids=ids, labels=ids.roll(-1, 1)).loss_sum
    return {"fingerprints": prints, "same": torch.equal(found, expected)}


def main(results: Path, scratch: Path) -> None:
    processes.init_distributed()
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        make_files(scratch)
    dist.barrier()
    found = {}
    for case in CASES if dist.get_world_size() == 2 else CASES[::3]:
        if "parallel.expert=2" in case[2] and dist.get_world_size() % 2:
            continue
        try:
            outcome = compare(case, scratch)
        except Exception:
            outcome = {"error": traceback.format_exc()[-2500:]}
        found[name_of(case)] = outcome
    found["frozen"] = frozen(scratch)
    found["saved"] = {kind: saved(kind, scratch) for kind in ("llama", "qwen3", "qwen3_moe", "glm4_moe", "gpt2")}
    if dist.get_world_size() == 2:
        found["written"] = {name: written(name, scratch) for name in ARCHITECTURES}
    if rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(Path(arguments[0]), Path(arguments[1]))

"""Pruning against a straightforward float64 reference that keeps every activation and knows no blocks."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from jobs import ROOT, VOCAB, start

from ds_llm.errors import ConfigError, UserError
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM
from ds_llm.models.loading import load_model
from ds_llm.sparsity.blockwise import prune_model
from ds_llm.sparsity.calibrate import Blocks, draw_windows
from ds_llm.sparsity.masks import load_masks
from ds_llm.sparsity.prune import Options, prune
from ds_llm.sparsity.scores import Pattern, curvature, keep_largest, magnitude_scores, select, sparsegpt, wanda_scores
from ds_llm.sparsity.targets import find_blocks, prunable


@pytest.fixture(autouse=True)
def fresh():
    print("seed", torch.seed())  # shown when a test fails


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64}


def opt(**options):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SMALL, ffn_dim=40, max_position_embeddings=64, **({"word_embed_proj_dim": 32} | options)
        )
    )


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | options))


def experts_decoder():
    config = {"use_moe": True, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24}
    return DecoderForCausalLM(DecoderConfig(**LLAMA, **config))


def qwen3_moe():
    config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LLAMA, **config, mlp_only_layers=[0]))


MODELS = {
    "opt": opt,
    # as OPT-350m: normalised after each part, embeddings narrower than the blocks
    "opt_post_norm": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "llama": llama,
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**LLAMA, sliding_window=8, max_window_layers=1, use_sliding_window=True)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=8)),
    "experts": experts_decoder,
    "qwen3_moe": qwen3_moe,
}


def uneven(model):
    """The model with weights and biases of very different sizes, so that methods and rows differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 * (torch.rand(parameter.shape[-1]) * 2))
    return model.eval()


def layer_inputs(model, tokens, block, prefix):
    """Inputs [T, C] of every linear layer of a block, of each expert apart, from whole forward passes."""
    found, handles = {}, []

    def keep(name):
        return lambda module, args: found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    def route(name):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            chosen = (x @ module.gate.weight.t()).softmax(-1).topk(2, dim=-1).indices
            for e in range(4):
                rows = x[(chosen == e).any(-1)]
                gate, up = F.linear(rows, module.experts.gate_up_proj[e]).chunk(2, dim=-1)
                found.setdefault((f"{name}.experts.gate_up_proj", e), []).append(rows)
                found.setdefault((f"{name}.experts.down_proj", e), []).append(F.silu(gate) * up)

        return hook

    for path, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(keep((f"{prefix}.{path}.weight", 0))))
        elif hasattr(module, "experts"):
            handles.append(module.register_forward_pre_hook(route(f"{prefix}.{path}")))
    for row in tokens:
        model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in found.items()}


def groups_of(scores, pattern):
    """Scores as [groups, weights that are compared]."""
    if pattern.m:
        return scores.reshape(-1, pattern.m)
    return scores if pattern.scope == "row" else scores.reshape(1, -1)


def check_choice(scores, mask, pattern, kept):
    """Exactly `kept` of each group stay, and no pruned score is above a kept one by more than float32 rounding."""
    scores, mask = groups_of(scores, pattern), groups_of(mask, pattern)
    assert (mask.sum(1) == kept).all()
    assert (scores.masked_fill(mask, 0).amax(1) <= scores.masked_fill(~mask, math.inf).amin(1) * (1 + 1e-3)).all()


def kept_of(pattern, rows, columns):
    if pattern.m:
        return pattern.n
    return round(pattern.density * (columns if pattern.scope == "row" else rows * columns))


def optimal_brain_surgeon(weight, x, mask, pattern, damping=0.01, width=128):
    """Column by column, each time from the inverse of the Hessian of the columns that are left; checks the choices."""
    weight, hessian = weight.clone(), x.t() @ x
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal()[~dead].mean()
    hessian += torch.diag(damping * mean + dead * mean)
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    scale = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        span = pattern.m or width
        if j % span == 0:
            part = slice(j, min(j + span, columns))
            scores = (weight[:, part].square() / scale[part]).masked_fill(dead[part], 0)
            if pattern.m:
                check_choice(scores, mask[:, part], pattern, pattern.n)
            else:
                unit = 1 if pattern.scope == "row" else rows
                quota = round(pattern.density * unit * part.stop) - round(pattern.density * unit * j)
                check_choice(scores, mask[:, part], pattern, quota)
        error = weight[:, j].masked_fill(mask[:, j], 0) / scale[j]
        weight[:, j:] -= error[:, None] * inverses[j][0]
        weight[:, j].masked_fill_(~mask[:, j], 0)
    return weight


CASES = [
    ("opt", "magnitude", Pattern(0.3)),
    ("opt", "sparsegpt", Pattern(0.3)),
    ("opt_post_norm", "wanda", Pattern(0.2, "row")),
    ("opt_post_norm", "sparsegpt", Pattern(0.5, "row", 2, 4)),
    ("llama", "wanda", Pattern(0.5, "row", 4, 8)),
    ("llama", "sparsegpt", Pattern(0.1, "row")),
    ("qwen2", "wanda", Pattern(0.7)),
    ("qwen3", "magnitude", Pattern(0.5, "row", 2, 4)),
    ("experts", "wanda", Pattern(0.4, "row")),
    ("experts", "sparsegpt", Pattern(0.6)),
    ("qwen3_moe", "sparsegpt", Pattern(0.5, "row", 2, 4)),
    ("qwen3_moe", "magnitude", Pattern(0.05, "row")),
]


@pytest.mark.parametrize(("name", "method", "pattern"), CASES)
@torch.no_grad()
def test_every_choice_and_weight_is_that_of_a_plain_reference(name, method, pattern):
    model = uneven(MODELS[name]())
    reference, before = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    reference.config._experts_implementation = "eager"  # transformers' grouped product has no float64
    tokens = torch.randint(VOCAB, (6, 48))
    done = prune_model(model, method, pattern, None if method == "magnitude" else tokens)
    pruned = dict(model.named_parameters())
    doubles = dict(reference.named_parameters())
    for prefix, block in find_blocks(reference):
        inputs = layer_inputs(reference, tokens, block, prefix)
        assert inputs.keys() >= {(key, 0) for key in done if key.startswith(prefix)}
        for (key, expert), x in inputs.items():
            if key not in done:
                assert key.endswith("gate.weight")
                continue
            pick = (lambda t, e=expert: t[e]) if doubles[key].dim() == 3 else (lambda t: t)
            dense, ours, mask = (pick(t) for t in (doubles[key], pruned[key].double(), done[key].mask.to_dense()))
            if method != "magnitude":
                assert done[key].tokens[expert] == len(x)
            if method == "sparsegpt":
                expected = optimal_brain_surgeon(dense, x, mask, pattern)
                torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-4)
            else:
                scores = dense.abs() * (x.square().sum(0).sqrt() if method == "wanda" else 1)
                check_choice(scores, mask, pattern, kept_of(pattern, *dense.shape))
                assert torch.equal(ours, dense * mask)
            assert (ours[~mask] == 0).all()
            assert int(mask.sum()) == kept_of(pattern, *dense.shape) * len(groups_of(mask, pattern))
        for key, parameter in block.named_parameters(prefix=prefix):
            parameter.copy_(pruned[key])
    for key, value in before.items():  # biases, norms, embeddings, head, routers
        assert key in done or torch.equal(value, model.state_dict()[key])
    assert not any("embed" in key or "lm_head" in key or key.endswith("gate.weight") for key in done)


@torch.no_grad()
def test_sparsegpt_crosses_blocks_of_columns_and_passes_over_dead_inputs():
    x = torch.randn(800, 200, dtype=torch.float64) @ torch.randn(200, 200, dtype=torch.float64) * 0.1
    x[:, [3, 150, 199]] = 0
    weight = torch.randn(12, 200, dtype=torch.float64)
    for pattern in (Pattern(0.37), Pattern(0.2, "row"), Pattern(0.5, "row", 5, 10)):
        found, mask = sparsegpt(weight.float(), curvature((x.t() @ x).float(), 0.01, "w"), pattern)
        expected = optimal_brain_surgeon(weight, x, mask, pattern, width=128 if not pattern.m else 120)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)
        assert int(mask.sum()) == kept_of(pattern, 12, 200) * len(groups_of(mask, pattern))
        assert pattern.m or not mask[:, [3, 150, 199]].any()


@torch.no_grad()
def test_each_method_loses_less_of_a_layers_output_than_the_one_before():
    x = torch.randn(2000, 96) @ torch.randn(96, 96) * torch.rand(96).square()
    weight = torch.randn(64, 96)
    for pattern in (Pattern(0.5, "row"), Pattern(0.5, "row", 2, 4)):
        kept = [
            weight * select(magnitude_scores(weight), pattern),
            weight * select(wanda_scores(weight, x.square().sum(0)), pattern),
            sparsegpt(weight, curvature(x.t() @ x, 0.01, "w"), pattern)[0],
        ]
        losses = [float((x @ (weight - one).t()).square().sum()) for one in kept]
        assert losses[2] < losses[1] < losses[0]


def test_of_equal_scores_the_first_are_pruned():
    scores = torch.randint(3, (5, 40)).float()
    for kept in (1, 13, 39, 40):
        order = scores.sort(dim=1, stable=True).indices[:, : 40 - kept]
        assert torch.equal(keep_largest(scores, kept), torch.ones(5, 40).scatter(1, order, 0).bool())


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_one_block_at_a_time_is_in_float32(method):
    model = llama(num_hidden_layers=3).to(torch.bfloat16).eval()
    blocks = [block for _, block in find_blocks(model)]
    wide, most = [], []

    def look(*_):
        wide.append([i for i, b in enumerate(blocks) if any(p.dtype == torch.float32 for p in b.parameters())])
        most.append(sum(t.numel() for t in model.parameters() if t.dtype == torch.float32))

    for block in blocks:
        block.register_forward_pre_hook(look)
    tokens = torch.randint(VOCAB, (4, 16))
    prune_model(model, method, Pattern(0.5), None if method == "magnitude" else tokens, include=["head"])
    assert all(len(one) <= 1 for one in wide)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if method == "sparsegpt":
        # recorded twice, stopped before the first block, each block before and after it is pruned, on to the head
        assert len(wide) == 2 * 3 + 4 + 2 * 4 * 3 + 4 * 3
        outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for b in blocks for p in b.parameters())
        assert max(most) == outside + sum(p.numel() for p in blocks[0].parameters())


@torch.no_grad()
def test_head_and_embeddings_are_pruned_on_request():
    tokens = torch.randint(VOCAB, (5, 32))
    model = uneven(opt(word_embed_proj_dim=16, tie_word_embeddings=False))
    dense = copy.deepcopy(model).double()
    done = prune_model(model, "wanda", Pattern(0.5, "row"), tokens, include=["head", "embeddings"])
    table, head = "model.decoder.embed_tokens.weight", "lm_head.weight"
    check_choice(dense.get_parameter(table).abs(), done[table].mask.to_dense(), Pattern(0.5, "row"), 8)
    hidden = torch.cat([model.double().model(input_ids=row[None]).last_hidden_state[0] for row in tokens])
    scores = dense.get_parameter(head).abs() * hidden.square().sum(0).sqrt()
    check_choice(scores, done[head].mask.to_dense(), Pattern(0.5, "row"), 8)
    assert done[head].tokens == [5 * 32] and done[table].tokens == []
    tied = uneven(llama(tie_word_embeddings=True))
    done = prune_model(tied, "wanda", Pattern(0.5, "row"), tokens, include=["head", "embeddings"])
    assert done["model.embed_tokens.weight"].tokens == [5 * 32]
    assert (tied.lm_head.weight == 0).float().mean() == 0.5 and tied.lm_head.weight is tied.model.embed_tokens.weight


def test_an_expert_without_tokens_is_pruned_by_magnitude(monkeypatch):
    model = uneven(qwen3_moe())
    gate = model.model.layers[1].mlp.gate.weight
    inputs = []
    model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    tokens = torch.randint(VOCAB, (3, 32))
    with torch.no_grad():
        gate.zero_()  # equal logits: some experts are never chosen
        before = copy.deepcopy(model)
        done = prune_model(model, "sparsegpt", Pattern(0.5, "row"), tokens)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    idle = [e for e, count in enumerate(done[name].tokens) if not count]
    assert idle and done[name].unseen == len(idle)
    mask, weight = done[name].mask.to_dense()[idle], before.get_parameter(name)[idle]
    check_choice(weight.abs().flatten(0, 1).double(), mask.flatten(0, 1), Pattern(0.5, "row"), 16)
    assert torch.equal(model.get_parameter(name)[idle], weight * mask)


def test_models_that_cannot_be_pruned_are_refused():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn: a Conv1D"):
        prune_model(gpt2, "magnitude", Pattern(0.5))
    tokens = torch.randint(VOCAB, (3, 8))
    with pytest.raises(UserError, match="40 inputs are not a multiple of 16"):
        prune_model(llama(), "magnitude", Pattern(0.5, "row", 8, 16))
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight: .*not finite"):
        prune_model(model, "wanda", Pattern(0.5), tokens)
    with pytest.raises(UserError, match="singular"):
        prune_model(llama(), "sparsegpt", Pattern(0.5), tokens[:1], damping=1e-12)
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda m, a, k: (a, k | {"extra": torch.rand(1)}), with_kwargs=True)
    with pytest.raises(UserError, match="block 1 is given something"):
        Blocks(model, [block for _, block in find_blocks(model)], tokens, torch.device("cpu"))
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda m, a: (a[0] + 1, *a[1:]))
    with pytest.raises(UserError, match="do not simply follow"):
        Blocks(model, [block for _, block in find_blocks(model)], tokens, torch.device("cpu"))


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory):
    """A bfloat16 model folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    uneven(llama(pad_token_id=0, bos_token_id=1, eos_token_id=2)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    rows = [{"text": " ".join(f"w{torch.randint(57, ()).item()}" for _ in range(50))} for _ in range(20)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "{broken")
    lines.insert(7, json.dumps({"other": 1}))
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def options(text, **changes):
    values = {"method": "sparsegpt", "density": 0.25, "data": (str(text),), "sequences": 8, "length": 32}
    return Options(**values | changes)


def test_the_folder_is_an_ordinary_model_and_equal_seeds_give_equal_bytes(dense, text, tmp_path, capsys):
    about = prune(dense, tmp_path / "a", options(text))
    assert "2 rows left out" in capsys.readouterr().out
    assert [(entry["row"], entry["reason"].split(" (")[0]) for entry in about["calibration"]["rejected"]] == [
        (4, "bad JSON"),
        (8, "missing field"),
    ]
    prune(dense, tmp_path / "b", options(text, seed=0))
    prune(dense, tmp_path / "c", options(text, seed=1))
    for file in ("model.safetensors", "masks.safetensors"):
        one, same, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert one == same != other
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    masks, weights = load_masks(tmp_path / "a"), dict(model.named_parameters())
    assert masks.keys() == {target.name for target in prunable(model)} == about["layers"].keys()
    assert model.dtype == torch.bfloat16
    for name, mask in masks.items():
        assert mask.nnz == round(0.25 * weights[name].numel()) == about["layers"][name]["kept"]
        assert (weights[name][~mask.to_dense()] == 0).all()
    assert json.loads((tmp_path / "a" / "pruning.json").read_text()) == about
    assert about["dense"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert about["density"] == pytest.approx(0.25, abs=1e-3)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a").bos_token_id == 1


def test_masks_of_another_model_are_taken_from_its_file_or_its_zeros(dense, text, tmp_path):
    prune(dense, tmp_path / "a", options(text))
    masks = load_masks(tmp_path / "a")
    for source in (tmp_path / "a", tmp_path / "a" / "masks.safetensors", tmp_path / "zeros"):
        if source.name == "zeros":
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(source)
        out = tmp_path / f"out_{source.name}"
        about = prune(dense, out, Options("mask", masks=str(source)))
        model, original = dict(load_model(out).named_parameters()), dict(load_model(dense).named_parameters())
        assert about["kept"] == sum(mask.nnz for mask in masks.values())
        for name, mask in load_masks(out).items():
            assert torch.equal(mask.bits, masks[name].bits)
            assert torch.equal(model[name], original[name] * mask.to_dense())
    with pytest.raises(UserError, match=r"is pruned already .*--method mask"):
        prune(tmp_path / "a", tmp_path / "again", options(text))
    with pytest.raises(UserError, match="no mask file, and no weight with 5% of zeros"):
        prune(dense, tmp_path / "none", Options("mask", masks=str(dense)))
    assert not (tmp_path / "again").exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.95}, "from 0.05 to 0.9"),
        ({"density": 0.01}, "from 0.05 to 0.9"),
        ({"density": None}, "give a density"),
        ({"density": None, "pattern": "4:2"}, "pattern '4:2'"),
        ({"density": 0.25, "pattern": "2:4"}, "leave the density out"),
        ({"density": None, "pattern": "2:4", "scope": "row"}, "scope: a 2:4 pattern"),
        ({"scope": "column"}, "layer or row"),
        ({"method": "obs"}, "method 'obs'"),
        ({"method": "magnitude"}, "data: the method magnitude has no use"),
        ({"method": "wanda", "damping": 0.1}, "damping: the method wanda has no use"),
        ({"data": ()}, "needs calibration text"),
        ({"masks": "x"}, "masks: the method sparsegpt has no use"),
        ({"method": "mask", "data": (), "sequences": None, "length": None, "density": None}, "needs a mask file"),
        ({"damping": 0.0}, "damping 0"),
        ({"sequences": 0}, "sequences 0"),
        ({"include": ("tail",)}, "include 'tail'"),
    ],
)
def test_impossible_options_are_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        options("x.jsonl", **changes).check()
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_nothing_is_left_where_pruning_fails(dense, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"windows of 32 tokens, 1,000 are asked for \(2 rows hold no usable text\)"):
        prune(dense, out, options(text, sequences=1000))
    with pytest.raises(UserError, match="longer than the 64 positions"):
        prune(dense, out, options(text, length=65))
    with pytest.raises(UserError, match="no such file"):
        prune(dense, out, options(tmp_path / "missing.jsonl"))
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(UserError, match="cannot be written"):
        prune(dense, text / "out", options(text))
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(UserError, match="holds something already"):
        prune(dense, out, options(text))


def test_windows_are_drawn_from_the_whole_text_without_overlap(corpus, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    found = draw_windows([text], tokenizer, sequences=10, length=32, seed=3)
    rows = [json.loads(line) for line in text.read_text().splitlines() if "broken" not in line]
    joined = "\n\n".join(row["text"] for row in rows if "text" in row)
    stream = torch.tensor(tokenizer(joined)["input_ids"])
    assert found.candidates == len(stream) // 32
    windows = [tuple(row) for row in stream[: len(stream) // 32 * 32].view(-1, 32).tolist()]
    places = [windows.index(tuple(row)) for row in found.tokens.tolist()]
    assert len(set(places)) == 10
    assert torch.equal(found.tokens, draw_windows([text], tokenizer, 10, 32, seed=3).tokens)
    # each window is as likely as any other: 150 draws of 10 of about 31, five standard deviations
    counts = torch.zeros(len(windows))
    for seed in range(150):
        for row in draw_windows([text], tokenizer, 10, 32, seed).tokens.tolist():
            counts[windows.index(tuple(row))] += 1
    share = 10 / len(windows)
    assert ((counts - 150 * share).abs() < 5 * math.sqrt(150 * share * (1 - share))).all()


def test_windows_of_token_files_and_beginnings_of_texts(corpus, text):
    from tokenizers.processors import TemplateProcessing

    from ds_llm.data.tokens import TokenFile

    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    stream = torch.from_numpy(TokenFile(corpus / "val.bin").tokens.astype("int64"))
    found = draw_windows([corpus / "val.bin"], tokenizer, sequences=4, length=20).tokens.tolist()
    assert all(row in stream[: len(stream) // 20 * 20].view(-1, 20).tolist() for row in found)
    with pytest.raises(UserError, match="cannot be mixed"):
        draw_windows([corpus / "val.bin", text], tokenizer, 4, 20)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    windows = draw_windows([text], tokenizer, 4, 20).tokens
    assert (windows[:, 0] == 1).all() and not (windows[:, 1:] == 1).any()


def test_the_command(dense, text, tmp_path):
    arguments = ["--model", str(dense), "--out", str(tmp_path / "out"), "--method", "wanda", "--pattern", "2:4"]
    arguments += ["--data", str(text), "--sequences", "4", "--length", "32"]
    job = start("python", arguments, ROOT / "launch" / "prune.py")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert "kept 50.00% of 13,824 weights in 14 matrices" in out
    assert "Traceback" not in err
    weight = load_model(tmp_path / "out").get_parameter("model.layers.1.mlp.down_proj.weight")
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()

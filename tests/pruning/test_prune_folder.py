"""What `launch/prune.py` reads and writes: calibration text, the folder, masks of other models, and what it refuses."""

import json
import math

import pytest
import torch
import transformers
from jobs import PATIENCE, ROOT, start
from pruning_models import llama, uneven

from ds_llm.errors import ConfigError, UserError
from ds_llm.models.boost import QwenBoostForCausalLM
from ds_llm.pretrained.loading import load_model
from ds_llm.pruning.calibrate import draw_windows
from ds_llm.pruning.prune import Options, prune
from ds_llm.sparsity.masks import load_masks
from ds_llm.sparsity.targets import prunable


@pytest.fixture(autouse=True)
def fresh():
    print("seed", torch.seed())  # shown when a test fails


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


def test_a_boosted_model_is_refused(dense, tmp_path):
    boosted = QwenBoostForCausalLM.from_sub_models([load_model(dense), load_model(dense)])
    with pytest.raises(UserError, match="a boosted model is not pruned as one: take its models out"):
        prunable(boosted)
    boosted.save_pretrained(tmp_path / "boosted")
    with pytest.raises(
        UserError, match=r"boosted: a boosted model .* extract\), prune each, and join them again"
    ) as one:
        prune(tmp_path / "boosted", tmp_path / "out", Options("magnitude", density=0.5))
    assert "\n" not in str(one.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pattern", "kept"), [(None, 0.05), (None, 0.9), ("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25)])
def test_every_matrix_of_the_folder_keeps_what_was_asked_for(dense, tmp_path, pattern, kept):
    about = prune(dense, tmp_path / "out", Options("magnitude", density=None if pattern else kept, pattern=pattern))
    weights, masks = dict(load_model(tmp_path / "out").named_parameters()), load_masks(tmp_path / "out")
    assert about["pattern"] == (pattern or "unstructured") and len(masks) == 14
    for name, mask in masks.items():
        dense_mask, weight = mask.to_dense(), weights[name]
        assert mask.nnz == round(kept * weight.numel()) and not weight[~dense_mask].any()
        if pattern:
            n, m = map(int, pattern.split(":"))
            assert (dense_mask.view(-1, m).sum(1) == n).all()


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
    job = start("forked-1", arguments, ROOT / "launch" / "prune.py")
    out, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert "kept 50.00% of 13,824 weights in 14 matrices" in out
    assert "Traceback" not in err
    weight = load_model(tmp_path / "out").get_parameter("model.layers.1.mlp.down_proj.weight")
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()

"""Generation from Python: batches against single prompts, streams against whole answers, every sampling option."""

import json
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ds_llm.errors import ConfigError, UserError
from ds_llm.generation.generator import Generator, SamplingParams
from ds_llm.models.decoder import DecoderConfig, DecoderForCausalLM

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 64


def byte_tokenizer(pad: str | None = "<|pad|>") -> PreTrainedTokenizerFast:
    """A token per byte, so that characters span tokens, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|eos|>"} | ({"pad_token": pad} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def loud(model):
    """Weights large enough that different prompts get different answers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def make(family: str = "moe", pad: str | None = "<|pad|>", **options) -> Generator:
    tokenizer = byte_tokenizer(pad)
    sizes = {"vocab_size": len(tokenizer) + 5, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id}
    if family in ("dense", "moe"):
        model = DecoderForCausalLM(DecoderConfig(**sizes | {"use_moe": family == "moe"} | options))
    else:
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": 48, "n_positions": CONTEXT}
        config = getattr(transformers, f"{family}Config")(**sizes | {"tie_word_embeddings": True, "pad_token_id": None})
        model = AutoModelForCausalLM.from_config(config)
    return Generator(loud(model), tokenizer)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make()


def words(number: int, longest: int = 20) -> list[str]:
    return ["".join(random.choices("abcdefgh äß", k=random.randint(1, longest))) for _ in range(number)]


@pytest.mark.parametrize("family", ["dense", "moe", "Llama", "OPT", "GPT2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1},
        {"repetition_penalty": 0.6, "no_repeat_ngram_size": 3, "stop": ("a", "é"), "min_new_tokens": 3},
        {"num_beams": 3, "repetition_penalty": 1.2},
    ],
    ids=["plain", "penalty", "stop", "beams"],
)
def test_batches_equal_single_prompts(family, options):
    generator = make(family, pad=None if family == "dense" else "<|pad|>")  # without one, padding is the end of text
    prompts = words(8)
    single = [generator.generate(prompt, GREEDY, **options) for prompt in prompts]
    assert generator.batch_generate(prompts, GREEDY, batch_size=3, **options) == single
    assert len(set(single)) > 1


def test_batches_equal_single_prompts_at_the_end_of_the_context(generator):
    prompts = ["a" * (CONTEXT - 3), "bcd", "e" * (CONTEXT - 1), "f" * 30]
    params = SamplingParams(temperature=0, max_new_tokens=200, min_new_tokens=200)
    batch = [found[0] for found in generator.complete(prompts, params, batch_size=4)]
    assert [len(one.token_ids) for one in batch] == [3, CONTEXT - 3, 1, CONTEXT - 30]
    assert {one.finish_reason for one in batch} == {"length"}
    assert [one.prompt_tokens for one in batch] == [CONTEXT - 3, 3, CONTEXT - 1, 30]
    assert [one.text for one in batch] == [generator.generate(prompt, params) for prompt in prompts]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 4}, {"stop": ("ab", "b c")}], ids=str)
def test_stream_gives_the_whole_answer_in_pieces(generator, options):
    options = {"max_new_tokens": 24} | options
    for prompt in words(3):
        whole = generator.generate(prompt, GREEDY, **options)
        pieces = list(generator.stream(prompt, GREEDY, **options))
        assert "".join(pieces) == whole and all(pieces)
        called = []
        assert generator.generate(prompt, GREEDY, called.append, **options) == whole
        assert called == pieces


def test_pieces_hold_whole_characters_only():
    generator = make("dense")
    text = "naïve 🙂 日本"
    wanted = generator.tokenizer(text)["input_ids"]

    def force(module, args, kwargs, output):
        logits = torch.full_like(output.logits, -50.0)
        step = int(kwargs["position_ids"][0, -1]) - 1  # the prompt has two tokens
        logits[0, -1, wanted[step] if step < len(wanted) else generator.tokenizer.eos_token_id] = 50.0
        output.logits = logits
        return output

    generator.model.register_forward_hook(force, with_kwargs=True)
    pieces = list(generator.stream("ab", GREEDY, max_new_tokens=40))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert [p for p in pieces if p in ("ï", "🙂", "日", "本")] == ["ï", "🙂", "日", "本"]
    held = list(generator.stream("ab", GREEDY, max_new_tokens=40, stop=["ve 🙃", "日x", "🙂 日"]))
    assert "".join(held) == "naïve " == generator.generate("ab", GREEDY, max_new_tokens=40, stop=["🙂 日"])
    completion = next(generator.complete(["ab"], SamplingParams(temperature=0, stop=("ve",))))[0]
    assert (completion.text, completion.finish_reason) == ("naï", "stop")
    assert generator.tokenizer.decode(completion.token_ids) == "naïve"
    ended = next(generator.complete(["ab"], SamplingParams(temperature=0)))[0]
    assert (ended.text, ended.finish_reason, ended.token_ids) == (text, "stop", wanted)
    cut = next(generator.complete(["ab"], SamplingParams(temperature=0, max_new_tokens=2)))[0]
    assert (cut.text, cut.finish_reason) == ("na", "length")


def test_closing_a_stream_ends_its_generation(generator):
    steps = []
    handle = generator.model.register_forward_hook(lambda *args: steps.append(1))
    stream = generator.stream("abc", temperature=1.0, max_new_tokens=60, min_new_tokens=60)
    next(stream)
    stream.close()
    count = len(steps)
    handle.remove()
    assert 1 <= count < 60
    assert not torch.is_inference_mode_enabled() and generator.generate("abc", GREEDY)


def test_an_error_in_a_stream_reaches_its_reader(generator):
    def fail(*args):
        raise RuntimeError("broken")

    handle = generator.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        list(generator.stream("abc", GREEDY))
    handle.remove()


def test_seed_reproduces_samples_and_leaves_the_global_state_alone(generator):
    options = {"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 20}
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = generator.generate("abc", seed=11, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert generator.generate("abc", seed=11, **options) == first
    assert len({generator.generate("abc", seed=seed, **options) for seed in range(6)}) > 3
    rows = generator.batch_generate(["abc"] * 6, batch_size=2, seed=3, **options)
    assert rows == generator.batch_generate(["abc"] * 6, batch_size=2, seed=3, **options)
    assert len(set(rows)) > 3  # not the same draw in every batch


def distribution(generator: Generator, prompt: str) -> torch.Tensor:
    ids = torch.tensor([generator.encode(prompt)])
    with torch.no_grad():
        return generator.model(input_ids=ids).logits[0, -1, : len(generator.tokenizer)].double()


def allowed(logits: torch.Tensor, p: SamplingParams, prompt: list[int]) -> set[int]:
    """Tokens that the options leave, by their definitions."""
    logits = logits.clone()
    for token in set(prompt):
        logits[token] = (
            logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
        )
    probability = (logits / p.temperature).softmax(0)
    order = probability.argsort(descending=True).tolist()
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        share = probability[order] / probability[order].sum()
        order = [t for i, t in enumerate(order) if share[:i].sum() < p.top_p]
    return {t for t in order if probability[t] >= p.min_p * probability[order[0]]}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.05},
        {"repetition_penalty": 3.0, "top_k": 2},
    ],
    ids=str,
)
def test_samples_stay_within_the_filters_and_use_them(generator, options):
    for prompt in words(2, 12):
        params = SamplingParams(**{"temperature": 2.0, "top_p": 1.0, "max_new_tokens": 1, "seed": 1} | options)
        logits = distribution(generator, prompt)
        expected = allowed(logits, params, generator.encode(prompt)) - generator._ends
        found = next(generator.complete([prompt], SamplingParams(**vars(params) | {"num_return_sequences": 300})))
        seen = {one.token_ids[0] for one in found if one.token_ids}
        assert seen <= expected and len(seen) >= min(len(expected), 2)


def test_temperature_zero_takes_the_likeliest_token(generator):
    for prompt in words(4):
        best = distribution(generator, prompt).argmax().item()
        found = next(generator.complete([prompt], SamplingParams(temperature=0, max_new_tokens=1)))[0]
        assert found.token_ids == ([] if best in generator._ends else [best])


def test_no_ngram_occurs_twice(generator):
    for size in (1, 2, 3):
        for prompt in words(3, 8):
            params = SamplingParams(temperature=0, max_new_tokens=40, no_repeat_ngram_size=size)
            ids = generator.encode(prompt)
            made = ids + next(generator.complete([prompt], params))[0].token_ids
            grams = [tuple(made[i : i + size]) for i in range(len(made) - size + 1)]
            assert len(set(grams[max(0, len(ids) - size + 1) :])) == len(grams[max(0, len(ids) - size + 1) :])


def test_cache_makes_no_difference(generator):
    prompts = words(4)
    with_cache = generator.batch_generate(prompts, GREEDY)
    assert generator.batch_generate(prompts, GREEDY, use_cache=False) == with_cache


def test_several_answers_per_prompt(generator):
    params = SamplingParams(temperature=1.5, max_new_tokens=6, num_return_sequences=3, seed=0)
    found = list(generator.complete(words(5), params, batch_size=2))
    assert [len(part) for part in found] == [3] * 5 and len(
        {tuple(one.token_ids) for part in found for one in part}
    ) > 5
    beams = next(generator.complete(["abc"], SamplingParams(temperature=0, num_beams=4, num_return_sequences=2)))
    assert len(beams) == 2 and beams[0].token_ids != beams[1].token_ids
    for call in (generator.generate, generator.stream, lambda p, **o: generator.batch_generate([p], **o)):
        with pytest.raises(ConfigError, match="num_return_sequences"):
            call("abc", num_return_sequences=2)
    with pytest.raises(ConfigError, match="num_beams"):
        generator.stream("abc", num_beams=2)


def test_chat_renders_the_template_and_ends_at_the_end_of_a_turn(generator):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <|end|>"}]
    rendered = "<|system|>be brief<|end|><|user|>hi <|end|><|end|><|assistant|>"
    assert generator.tokenizer.decode(generator.encode(messages)) == rendered
    assert generator.chat(messages, GREEDY) == generator.generate(rendered, GREEDY)
    assert generator.chat("hi", GREEDY) == generator.generate("<|user|>hi<|end|><|assistant|>", GREEDY)
    vocabulary = generator.tokenizer.get_vocab()
    assert generator._ends == {vocabulary["<|eos|>"], vocabulary["<|end|>"]}


def test_generation_leaves_a_training_model_in_training():
    generator = make("dense", dropout=0.5)
    expected = generator.generate("abc", GREEDY)
    generator.model.train()
    assert generator.generate("abc", GREEDY) == expected and generator.model.training


def test_empty_prompt_starts_a_document(generator):
    assert generator.encode("") == [generator.tokenizer.eos_token_id]
    assert generator.batch_generate(["", "abc"], GREEDY) == [
        generator.generate("", GREEDY),
        generator.generate("abc", GREEDY),
    ]
    assert list(generator.complete([], GREEDY)) == []


def test_tokens_without_a_meaning_are_never_chosen(generator):
    with torch.no_grad():
        weight = generator.model.get_output_embeddings().weight
        kept = weight.clone()
        weight[len(generator.tokenizer) :] = 100.0
    found = next(
        generator.complete(["abc"], SamplingParams(temperature=5.0, top_p=1.0, num_return_sequences=20, seed=1))
    )
    assert max(max(one.token_ids, default=0) for one in found) < len(generator.tokenizer)
    with torch.no_grad():
        weight.copy_(kept)


def test_mistakes_are_told_in_one_line(generator):
    with pytest.raises(UserError, match=f"has {CONTEXT} tokens; the model holds {CONTEXT}"):
        generator.generate("a" * CONTEXT)
    with pytest.raises(UserError, match="holds"):
        generator.stream("a" * 500)  # at once, not when it is read
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"]):
        with pytest.raises(UserError, match=r"message"):
            generator.chat(messages)
    bare = Generator(generator.model, byte_tokenizer())
    bare.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        bare.chat("hi")
    bare.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        bare.chat("hi")
    with pytest.raises(UserError, match="needs its tokenizer"):
        Generator(generator.model)
    with pytest.raises(UserError, match="batch size 0"):
        generator.complete(["a"], GREEDY, batch_size=0)
    larger = byte_tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(10)])
    with pytest.raises(UserError, match="do not belong together"):
        Generator(generator.model, larger)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: -1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature: nan is not a number"),
        ({"top_k": 2.5}, "top_k: 2.5 is not a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens: None is not a whole number"),
        ({"top_p": 0}, "top_p: 0 must be between"),
        ({"top_p": 1.5}, "top_p: 1.5 must be between"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens: 4 is more"),
        ({"stop": ("",)}, "stop: must be text"),
        ({"temperature": 0, "num_return_sequences": 2}, "would be the same"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


def test_defaults_of_the_model_do_not_leak_in():
    generator = make("Llama")
    expected = generator.generate("abc", GREEDY)
    generator.model.generation_config.update(
        **{"repetition_penalty": 9.0, "do_sample": True, "num_beams": 3, "no_repeat_ngram_size": 1, "max_length": 5}
    )
    assert generator.generate("abc", GREEDY) == expected


def test_loads_what_it_is_pointed_to(tmp_path, generator):
    generator.model.save_pretrained(tmp_path / "run" / "model")
    generator.tokenizer.save_pretrained(tmp_path / "run" / "model")
    again = Generator(tmp_path / "run")
    assert again.generate("abc", GREEDY) == generator.generate("abc", GREEDY)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model_type"] == "ds_llm_decoder"

"""Checks that need one process: packing, kernels, recomputation, saving, generation, scoring.

Each compares what a run does with the library's own forward pass of the same small model, and returns a `Finding`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ds_llm.generation.generator import Generator
from ds_llm.generation.sampling import SamplingParams
from ds_llm.models import accelerate
from ds_llm.models.documents import Way
from ds_llm.models.head import attach_loss_head, lm_loss
from ds_llm.models.isolation import LeakError, find_way, prepare
from ds_llm.pretrained import saving
from ds_llm.pretrained.loading import load_model, match_tokenizer
from ds_llm.scoring.forward import Scorer
from ds_llm.scoring.metrics import Sample
from ds_llm.train.start_model import recompute_layers
from ds_llm.verify.report import Finding
from ds_llm.verify.samples import (
    GRADIENTS,
    OUTPUTS,
    batch_of,
    difference,
    documents,
    gradient_difference,
    gradients,
    number,
    plain_loss,
    trained,
    vocabulary,
)
from ds_llm.verify.subject import CPU, SEED, Subject, small_tokenizer

NEW_TOKENS = 6
PROMPTS = (13, 8, 3)  # tokens, the longest first: the order in which a batch of them runs
SCORED = (17, 2, 24, 1, 9)  # tokens of samples
SAVED = 1e-6  # a weight that was read back is the same


def checks(subject: Subject) -> dict[str, Callable[[], Finding]]:
    """The checks by name, in the order of the table."""
    table = {
        "packed documents = each alone": packing,
        "kernels on = off": kernels,
        "recomputed layers on = off": recomputation,
        "saved, loaded: same logits": saved,
        "generation with a cache = without": cache,
        "left padding = none": padding,
        "scores = plain loop": scores,
    }
    return {name: lambda check=check: check(subject) for name, check in table.items()}


def way_of(subject: Subject) -> Way | None:
    """How packed documents are kept apart in the subject's model; None where its runs do not pack."""
    try:
        return find_way(subject.config, subject.attention, CPU)
    except LeakError:
        return None


def for_training(subject: Subject, way: Way | None) -> nn.Module:
    """A small model with loss head, in training mode, that keeps documents apart in this way."""
    model = attach_loss_head(subject.model())
    if way is not None:
        prepare(model, way)
        model.packing_way = way
    return model.train()


def packing(subject: Subject) -> Finding:
    """Losses and gradients of packed rows against those of each document alone, in the way that a run takes."""
    way = find_way(subject.config, subject.attention, CPU)
    plain = subject.model().train()
    rows = documents(vocabulary(plain))
    loss = plain_loss(plain, trained(rows))
    expected = gradients(plain, loss)
    packed = for_training(subject, way)
    found = lm_loss(packed, **batch_of(rows)).loss_sum
    return _losses_and_gradients(str(way), loss, found, expected, gradients(packed, found))


def kernels(subject: Subject) -> Finding:
    """Logits, loss and gradients with the project's kernels and loss head against those of the library."""
    plain, changed = subject.model().train(), subject.model().train()
    done = accelerate(changed)
    rows = documents(vocabulary(plain), packed=False)
    batch = batch_of(rows)
    with torch.no_grad():
        logits = [m(input_ids=batch["input_ids"], use_cache=False).logits.float() for m in (plain, changed)]
    if (wrong := difference(*logits)) > OUTPUTS:
        return Finding(f"logits; {done}", wrong, OUTPUTS)
    attach_loss_head(changed)
    loss = plain_loss(plain, trained(rows))
    expected = gradients(plain, loss)
    found = lm_loss(changed, batch["input_ids"], batch["labels"]).loss_sum
    about = f"loss head; {done}"
    return _losses_and_gradients(about, loss, found, expected, gradients(changed, found))


def recomputation(subject: Subject) -> Finding:
    """Gradients of packed rows with layers computed again in the backward pass against those with layers kept."""
    way = way_of(subject)
    kept, again = for_training(subject, way), for_training(subject, way)
    recompute_layers(again)
    batch = batch_of(documents(vocabulary(kept), packed=way is not None))
    loss, other = (lm_loss(model, **batch).loss_sum for model in (kept, again))
    ran: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.add(module)) for module in again.modules()]
    found = gradients(again, other)
    for hook in hooks:
        hook.remove()
    if not ran:
        return Finding("train.activation_checkpointing has no effect: no layer is computed again", math.inf)
    again_in = [m for m in again.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = [m for m in again_in if any(inner in ran for inner in m.modules())]
    layers = [m for m in layers if not any(inner in layers for inner in m.modules() if inner is not m)]
    about = f"{len(layers)} layers computed again, {'packed rows' if way is not None else 'rows of one document'}"
    return _losses_and_gradients(about, loss, other, gradients(kept, loss), found)


def _losses_and_gradients(about: str, loss: Tensor, found: Tensor, expected: dict, grads: dict) -> Finding:
    """A finding on losses or on gradients, whichever differ more in units of what rounding may change."""
    name, of_gradients = gradient_difference(expected, grads)
    of_loss = number(abs(found.item() / loss.item() - 1))
    if of_loss / OUTPUTS > max(of_gradients / GRADIENTS, 1):
        return Finding(f"the loss; {about}", of_loss, OUTPUTS)
    return Finding(f"the gradient of {name}; {about}" if of_gradients > GRADIENTS else about, of_gradients, GRADIENTS)


def save(subject: Subject, folder: Path) -> nn.Module:
    """Save a small model as a run does; returns it, in evaluation."""
    model = subject.model().eval()
    tokenizer = small_tokenizer(vocabulary(model))
    match_tokenizer(model, tokenizer)
    persistent = model.state_dict().keys()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights |= {name: b for name, b in model.named_buffers() if name in persistent}
    saving.save(model, weights, tokenizer, folder)
    return model


@torch.no_grad()
def saved(subject: Subject) -> Finding:
    """Logits of a model that was saved as a run saves it and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        model = save(subject, Path(folder))
        loaded = load_model(folder, "fp32", subject.attention)
    ids = torch.stack([row[0] for row in documents(vocabulary(model), packed=False)])
    logits = [m(input_ids=ids, use_cache=False).logits for m in (model, loaded)]
    return Finding("written as a run writes it", difference(*logits), SAVED)


def _generator(subject: Subject) -> tuple[Generator, list[list[int]]]:
    model = subject.model().eval()
    size = vocabulary(model)
    random = np.random.default_rng(SEED)
    return Generator(model, small_tokenizer(size)), [random.integers(2, size, n).tolist() for n in PROMPTS]


def _steps(generator: Generator, prompts: list[list[int]], cached: bool = True) -> tuple[list[list[int]], list[Tensor]]:
    """Generate greedily. Returns the tokens of each prompt, and the logits [prompts, vocabulary] of each step."""
    logits: list[Tensor] = []
    head = generator.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *call: logits.append(call[-1][:, -1].float()))
    greedy = SamplingParams(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, temperature=0.0, use_cache=cached)
    try:
        found = [one[0].token_ids for one in generator.complete(prompts, greedy, len(prompts))]
    finally:
        hook.remove()
    return found, logits


def _apart(expected: tuple, found: tuple, row: int = 0) -> tuple[float, int]:
    """Largest difference between the logits of row 0 and of row `row`, and the step where it is.

    Steps count up to the first at which the two rows choose different tokens.
    """
    worst = (0.0, 0)
    for step, (one, other) in enumerate(zip(expected[1], found[1], strict=True)):
        value = difference(one[0], other[row])
        if value > worst[0]:
            worst = (value, step)
        if expected[0][0][step] != found[0][row][step]:
            break
    return worst


def cache(subject: Subject) -> Finding:
    """Greedy tokens and their logits with a cache against those without."""
    generator, prompts = _generator(subject)
    ways = [(_steps(generator, [prompt], False), _steps(generator, [prompt])) for prompt in prompts]
    (wrong, step), prompt = max((_apart(*both), len(p)) for both, p in zip(ways, prompts, strict=True))
    about = f"the logits of token {step + 1} behind a prompt of {prompt}" if wrong > OUTPUTS else ""
    return Finding(about or f"{NEW_TOKENS} greedy tokens behind {len(PROMPTS)} prompts", wrong, OUTPUTS)


def padding(subject: Subject) -> Finding:
    """Logits at each step of prompts in one batch, padded on the left, against those of each alone."""
    generator, prompts = _generator(subject)
    together = _steps(generator, prompts)
    (wrong, step), row = max((_apart(_steps(generator, [p]), together, i), i) for i, p in enumerate(prompts))
    about = f"the logits of token {step + 1} behind {PROMPTS[0] - PROMPTS[row]} tokens of padding"
    return Finding(about if wrong > OUTPUTS else f"prompts of {PROMPTS} tokens in one batch", wrong, OUTPUTS)


@torch.no_grad()
def scores(subject: Subject) -> Finding:
    """Entropy and log-probability of a batch of samples against those from the library's logits of each alone."""
    with tempfile.TemporaryDirectory() as folder:
        model = save(subject, Path(folder))
        scorer = Scorer(folder, ["entropy", "logprob"], dtype="fp32", device="cpu")
    random = np.random.default_rng(SEED)
    size = vocabulary(model)
    samples = [Sample(random.integers(2, size, n), random.random(n) < 0.7) for n in SCORED]
    worst = 0.0
    for sample, row in zip(samples, scorer.score(samples), strict=True):
        if not len(sample.targets):
            continue
        ids = torch.from_numpy(sample.input_ids)
        logs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)[sample.targets - 1]
        expected = {
            "entropy": float(-(logs.exp() * logs).sum(-1).mean()),
            "logprob": float(logs.gather(1, ids[sample.targets][:, None]).mean()),
        }
        for name, value in expected.items():
            found = row[name]
            wrong = math.inf if found is None else number(abs(found - value) / max(abs(value), 1.0))
            worst = max(wrong, worst)
    return Finding(f"entropy and log-probability of {len(SCORED)} samples in one batch", worst, OUTPUTS)

"""Chooses how a causal model of transformers keeps packed documents apart.

No architecture is trusted. A small model of the same configuration (`ds_llm.models.cut`) runs packed documents, and
each document alone, forward and backward. The first way of `ds_llm.models.documents` that gives equal results is taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context

import torch
import transformers
from torch import Tensor, nn

from ds_llm.compat.torch import FakeTensor
from ds_llm.compat.transformers import chosen_attention, supported_kernels
from ds_llm.errors import UserError
from ds_llm.models.backbone import backbone
from ds_llm.models.cut import randomize, small_configs, small_model
from ds_llm.models.documents import KERNEL, Documents, Way, apart, parts, run_each_apart

LENGTHS = ((5, 9, 1, 7), (13, 9))  # tokens of the documents of two rows; longer and shorter than a window
# what rounding may change, relative to the largest value: of every output, and of every gradient
TOLERANCE = {torch.float32: (2e-4, 2e-3), torch.bfloat16: (6e-2, 0.5), torch.float16: (6e-2, 0.5)}
# in 16 bits an expert is now and then another one: this share of the tokens must agree
AGREEING = {torch.float32: 1.0, torch.bfloat16: 0.7, torch.float16: 0.7}
# what documents that do see each other differ by at least, so that the check means something
SEEN = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}
SCALES = (1.0, 0.3)  # of the random weights: large ones saturate what small ones leave open
_ways: dict[str, Way | str] = {}


class LeakError(UserError):
    """Packed documents cannot be kept apart."""


def isolate(model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    """Prepare a causal language model, in place, so that packed documents do not see each other.

    The model may have adapters or be a boosted one. device, dtype: where and in which dtype it will compute; None:
    where it is. Raises `LeakError` where no way keeps documents apart.
    """
    for part in parts(model):
        if getattr(part, "packing_way", None) is None:
            kernel = chosen_attention(part.config.get_text_config()) or "eager"
            weight = next(part.parameters())
            made_of = frozenset(_architecture(part))
            way = find_way(part.config, kernel, device or weight.device, dtype or weight.dtype, made_of)
            prepare(part, way)
            part.packing_way = way


def run_backbone(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    packed: Documents | None = None,
    **options,
):
    """Run the backbone of a causal language model without a cache and return its output.

    Arguments as for `ds_llm.models.head.lm_loss`; options are passed to the backbone.
    """
    body = backbone(model)
    if token_mask is not None and getattr(body, "takes_token_mask", False):
        options["token_mask"] = token_mask
    arguments = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
    whole = "shard" not in options and attention_mask is None and not isinstance(position_ids, FakeTensor)
    if packed is None and whole and position_ids is not None:
        packed = Documents.of(position_ids.expand(len(input_ids), -1))
    if packed is None:
        return body(**arguments, use_cache=False, **options)
    isolate(model)
    ways = [(part, part.packing_way) for part in parts(model)]
    if any(way.takes_bounds for _, way in ways):
        options.update(packed.arguments())
    with apart(ways, packed):
        return body(**arguments, use_cache=False, **options)


def prepare(model: nn.Module, way: Way) -> None:
    """Have the modules of a model that this way names run on each document by itself."""
    for module in model.modules():
        if type(module).__name__ in way.modules and not hasattr(type(module), "each_document_apart"):
            run_each_apart(module)


def _architecture(model: nn.Module) -> set[str]:
    """Class names of the backbone's own modules, those of transformers and of the project, that hold weights other than
    a linear layer's."""
    packages = ("transformers.models.", "ds_llm.models.")
    own = (m for m in backbone(model).modules() if type(m).__module__.startswith(packages))
    return {type(m).__name__ for m in own if not isinstance(m, nn.Linear) and any(True for _ in m.parameters())}


def find_way(
    config,
    attention: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    made_of: frozenset[str] = frozenset(),
) -> Way:
    """How models of a configuration keep documents apart with an attention kernel; found once per process.

    It is tried on the device. A GPU computes in `dtype`, because its kernels differ by dtype; a CPU in float32.
    made_of: class names of modules that the tried model must contain. Raises `LeakError` where there is no way.
    """
    if device.type == "cpu":
        dtype = torch.float32
    key = json.dumps([config.to_dict(), attention, device.type, dtype, sorted(made_of)], sort_keys=True, default=str)
    if key not in _ways:
        with torch.random.fork_rng(), torch.enable_grad(), _one_thread():
            torch.manual_seed(0)
            # in a context of its own: the caller may be recording what modules compute
            _ways[key] = Context().run(_search, config, attention, device, dtype, made_of)
    if isinstance(_ways[key], str):
        raise LeakError(
            f"packed documents would see each other: {_ways[key]}; set data.packing=false, or for pretraining "
            "data.isolate_documents=false"
        )
    return _ways[key]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread. Tensors this small take longer on several, and far longer on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _search(config, attention: str, device: torch.device, dtype: torch.dtype, made_of: frozenset[str]) -> Way | str:
    kind = f"'{config.model_type}' models of transformers {transformers.__version__}"
    problem = None
    try:
        for small in small_configs(config, keep_heads=device.type == "cuda"):
            try:
                model = small_model(small, attention, device, dtype)
                _hidden(model, torch.full((1, 3), 2, device=device), torch.arange(3, device=device)[None])
            except Exception as error:  # numbers of a cut configuration that do not fit together
                problem = problem or (str(error).strip() or type(error).__name__).splitlines()[0]
                continue
            if missing := made_of - _architecture(model):
                problem = problem or f"a small model has no {sorted(missing)[0]}"
                continue
            problems = []
            for kernel in _kernels(model, attention):
                found = _try(small_model(small, attention, device, dtype), kernel)
                if isinstance(found, Way):
                    return found
                problems.append(found)
            return f"{kind} do not keep them apart ({'; '.join(problems)})"
    except UserError as error:
        problem = problem or str(error)
    return f"{kind} could not be checked ({problem})"


def _kernels(model: nn.Module, attention: str) -> list[str]:
    """Attention kernels to try for packed rows, the best first."""
    if attention == "sdpa" or (attention == "eager" and not supported_kernels(model)["sdpa"]):
        return [KERNEL, attention]
    return [attention]


def _try(model: nn.Module, kernel: str) -> Way | str:
    """The way in which a small model keeps documents apart with this kernel, or the reason why there is none."""
    try:
        vocabulary = model.get_input_embeddings().num_embeddings
        rows = torch.randint(2, vocabulary, (len(LENGTHS), sum(LENGTHS[0])), device=next(model.parameters()).device)
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS]).to(rows.device)
        documents = Documents.of(positions)
        with torch.no_grad():
            modules = _leaks(model, rows, positions, documents, Way(kernel))
        way = Way(kernel, modules)
        prepare(model, way)
        seen = []
        for scale in SCALES:
            randomize(model, scale)
            problem, leak = _compare(model, rows, positions, documents, way)
            if problem is not None:
                return problem
            seen.append(leak)
        if max(seen) < SEEN[next(model.parameters()).dtype]:
            return f"the check sees nothing: documents that see each other differ by {max(seen):.1e}"
        return way
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def _leaks(model: nn.Module, rows: Tensor, positions: Tensor, documents: Documents, way: Way) -> tuple[str, ...]:
    """Class names of the innermost modules in which a token sees tokens of another document."""
    calls: dict[nn.Module, tuple] = {}

    def note(module, args, kwargs, _):
        calls.setdefault(module, (args, kwargs))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        _hidden(model, rows, positions, documents, way)
    finally:
        for hook in hooks:
            hook.remove()
    first = documents.ids == 0
    leaking = set()
    for module, (args, kwargs) in calls.items():
        values = [*args, *kwargs.values()]
        inputs = [x for x in values if isinstance(x, Tensor) and x.shape[:2] == rows.shape and x.is_floating_point()]
        if not inputs:
            continue
        changed = [torch.where(first.view(*rows.shape, *[1] * (x.ndim - 2)), torch.randn_like(x), x) for x in inputs]
        other = {id(x): y for x, y in zip(inputs, changed, strict=True)}

        def run(swap: dict, module=module, args=args, kwargs=kwargs) -> Tensor | None:
            return _first_tensor(
                module(*(swap.get(id(x), x) for x in args), **{n: swap.get(id(x), x) for n, x in kwargs.items()})
            )

        with apart([(model, way)], documents):
            before, after = run({}), run(other)
        if before is not None and before.shape[:2] == rows.shape and not _agree(before[~first], after[~first]):
            leaking.add(module)
    innermost = {m for m in leaking if not any(inner in leaking for inner in m.modules() if inner is not m)}
    return tuple(sorted({type(m).__name__ for m in innermost}))


def _first_tensor(output) -> Tensor | None:
    found = output[0] if isinstance(output, tuple) else output
    return found if isinstance(found, Tensor) and found.ndim >= 2 and found.is_floating_point() else None


def _hidden(
    model: nn.Module, rows: Tensor, positions: Tensor, documents: Documents | None = None, way: Way | None = None
) -> Tensor:
    """Last hidden states [B, S, H] of packed rows, kept apart in the given way, or of single documents."""
    if documents is None:
        return backbone(model)(input_ids=rows, position_ids=positions, use_cache=False).last_hidden_state
    bounds = documents.arguments() if way.takes_bounds else {}
    with apart([(model, way)], documents):
        return backbone(model)(input_ids=rows, position_ids=positions, use_cache=False, **bounds).last_hidden_state


def _compare(
    model: nn.Module, rows: Tensor, positions: Tensor, documents: Documents, way: Way
) -> tuple[str | None, float]:
    """Compare packed documents with the same documents alone, in evaluation, training and gradients.

    Returns what differs (None: nothing), and by how much outputs differ where the documents are taken as one.
    """
    flat, at = rows.flatten(), positions.flatten()
    spans = list(itertools.pairwise(documents.bounds))

    def alone() -> Tensor:
        parts = [_hidden(model, flat[s:e][None], at[s:e][None])[0] for s, e in spans]
        return torch.cat(parts).view(*rows.shape, -1)

    def together() -> Tensor:
        return _hidden(model, rows, positions, documents, way)

    model.eval()
    with torch.no_grad():
        expected, found = (run() for run in (alone, together))
        if not _agree(expected, found):
            return f"outputs of packed documents differ by {_difference(expected, found):.1e} of the largest", 0.0
        one = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        leak = _difference(expected, _hidden(model, rows, one))
    model.train()
    weights, gradients = torch.randn_like(expected), []
    for run in (alone, together):
        model.zero_grad(set_to_none=True)
        (run() * weights).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        # a bias that does not change a softmax has a gradient of rounding alone
        size = value.abs().max().clamp_min(0.01 * largest)
        difference = float((found[name] - value).abs().max() / size) if name in found else float("inf")
        if not difference <= TOLERANCE[value.dtype][1]:
            return f"the gradient of {name} differs by {difference:.1e} of the largest", leak
    return None, leak


def _agree(expected: Tensor, found: Tensor) -> bool:
    return _difference(expected, found) <= TOLERANCE[expected.dtype][0]


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference of values [..., H], relative to the largest value, of as many tokens as must agree."""
    share = AGREEING[expected.dtype]
    tokens = (found - expected).flatten(0, -2).abs().amax(-1).float()
    return float(tokens.quantile(share) / expected.abs().max().float().clamp_min(1e-6))

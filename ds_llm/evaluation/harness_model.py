"""A loaded model with the interface of lm-eval, over the ranks of a job; imports lm-eval.

For lm-eval every rank is the only process: it gets all requests and returns all answers. This class deals the rows to
the ranks in batches that do not depend on the number of ranks, so every number of ranks gives the same bits, as in
`ds_llm.evaluation.perplexity`. The output head computes only the scored tokens, with the logits of a chunk at a time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ds_llm.compat.lm_eval import HFLM, get_rolling_token_windows, make_disjoint_window
from ds_llm.distributed.collectives import gather
from ds_llm.models.backbone import backbone
from ds_llm.models.head import attach_loss_head
from ds_llm.pretrained.lengths import max_positions
from ds_llm.progress import progress

GENERATION_BATCHES = 4  # sorted by length together, which saves padding
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context, of its continuation


class HarnessModel(HFLM):
    """A causal language model of `ds_llm.pretrained.loading` for `lm_eval.evaluator.evaluate`.

    model: on its device. tokenizer: the model's. batch_size: rows per forward pass and rank. A context is cut on the
    left where it and the continuation exceed the model's positions; `truncated` counts such requests. lm-eval tokenises
    the prompts, with the special tokens that the tokenizer adds.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, batch_size: int):
        positions = max_positions(model.config)
        super().__init__(
            pretrained=attach_loss_head(model),
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=positions,
        )
        self.truncated = 0
        self._ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """`_loglikelihood_tokens` of texts, without lm-eval's own progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation behind its context, and whether greedy decoding gives it."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            # the last token is only predicted, so requests that differ in it alone (A, B, C, D) share a row
            whole = (*context, *continuation)
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens passes {self.max_length} positions")
            self.truncated += len(whole) > self.max_length + 1
            wanted.setdefault(whole[-(self.max_length + 1) : -1], []).append(number)
        rows = sorted(wanted, key=lambda row: (-len(row), row))
        batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        rank, world = self._ranks
        found = torch.zeros(len(requests), 2, dtype=torch.float64)
        with progress("log-likelihoods", sum(map(len, rows)), "tokens") as task:
            for turn in range(0, len(batches), world):
                if turn + rank < len(batches):
                    batch = batches[turn + rank]
                    numbers = [wanted[row] for row in batch]
                    self._score(batch, [[(n, requests[n][2]) for n in group] for group in numbers], found)
                task.advance(sum(len(row) for batch in batches[turn : turn + world] for row in batch))
        if world > 1:
            # one rank has the values of a request and the others 0, so the sums are exact
            place = self.device if dist.get_backend() == "nccl" else "cpu"
            found = found.to(place)
            dist.all_reduce(found)
        return [(value, bool(greedy)) for value, greedy in found.tolist()]

    def _score(self, rows: list[tuple[int, ...]], groups: list[list[tuple[int, list[int]]]], found: Tensor) -> None:
        """Fill in the values of the requests (number, continuation) that `groups` names for each row."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        places, labels, owners = [], [], []
        for which, (row, group) in enumerate(zip(rows, groups, strict=True)):
            ids[which, : len(row)] = torch.tensor(row)
            for number, continuation in group:
                first = which * width + len(row) - len(continuation)
                places += range(first, first + len(continuation))
                labels += continuation
                owners += [number] * len(continuation)
        extra = {}
        body = backbone(self.model)
        if getattr(body, "takes_token_mask", False):
            extra["token_mask"] = (torch.arange(width) < lengths[:, None]).to(self.device)
        # attention is causal: the padding behind a row cannot reach it
        hidden = body(input_ids=ids.to(self.device), use_cache=False, **extra).last_hidden_state.flatten(0, 1)
        labels = torch.tensor(labels, device=self.device)
        stats = self.model.get_output_embeddings()(hidden[torch.tensor(places, device=self.device)], labels, "stats")
        owners = torch.tensor(owners)
        numbers = owners.unique()
        sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, owners, stats.logprob.double().cpu())
        misses = torch.zeros(len(found), dtype=torch.float64).index_add_(0, owners, 1.0 - stats.hit.double().cpu())
        found[numbers, 0], found[numbers, 1] = sums[numbers], (misses[numbers] == 0).double()

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, cut into windows of the model's positions."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cuts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, cuts):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The model's continuation of each prompt; the ranks share the prompts."""
        rank, world = self._ranks
        mine, texts = requests[rank::world], []
        step = self.batch_size * GENERATION_BATCHES
        with progress("generating", len(mine), "prompts") as task:
            for first in range(0, len(mine), step):
                texts += super().generate_until(mine[first : first + step], disable_tqdm=True)
                task.advance(len(mine[first : first + step]))
        if world == 1:
            return texts
        shares = gather(texts)
        return [shares[number % world][number // world] for number in range(len(requests))]

"""Text generation with any causal language model: one prompt, a batch, a chat, or piece by piece."""

from __future__ import annotations

import os
import queue
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ds_llm.compat.transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
from ds_llm.data.chat_templates import turn_end
from ds_llm.errors import UserError
from ds_llm.generation.sampling import SamplingParams, one_answer
from ds_llm.pretrained.lengths import max_positions
from ds_llm.pretrained.loading import ensure_padding, load_model, load_model_config, load_tokenizer, match_tokenizer

__all__ = ["Completion", "Generator", "SamplingParams"]

Prompt = str | list[dict]  # text to continue, or the messages of a conversation
SORTED_BATCHES = 16  # prompts of so many batches are sorted by length, which saves padding


@dataclass(frozen=True)
class Completion:
    """`token_ids` are those of `text`, up to an end-of-text token or the token that completes a stop string.

    `finish_reason`: "stop" (end-of-text token or stop string) or "length" (`max_new_tokens`, or the model's last
    position).
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int


class Generator:
    """Generates text with a model and its tokenizer.

    model: a causal language model, or what `ds_llm.pretrained.loading.load_model` takes; tokenizer: a tokenizer, or a
    path, needed where `model` is not a path. dtype, attention and device count where the model is loaded here: dtype
    "auto" is the saved one on a GPU and fp32 on a CPU; device is the first GPU, else the CPU. synced: the ranks of the
    process group generate at the same time, each for prompts of its own, and go on until the last of them is done, as
    sharded weights (ZeRO-3) need it.

    A prompt is text, or a list of messages {"role", "content"} that the tokenizer's chat template renders. Options are
    given as `SamplingParams` or by name: `generate(prompt, max_new_tokens=20)`. Every method raises `UserError` for a
    prompt that leaves no room in the model's context.
    """

    def __init__(
        self, model, tokenizer=None, *, dtype: str = "auto", attention: str = "auto", device=None, synced=False
    ):
        if isinstance(model, (str, os.PathLike)):
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            load_model_config(model)  # a wrong name is told before anything is read
            tokenizer = model if tokenizer is None else tokenizer
            if isinstance(tokenizer, (str, os.PathLike)):
                tokenizer = load_tokenizer(tokenizer)
            dtype = "fp32" if dtype == "auto" and device.type == "cpu" else dtype
            model = load_model(model, dtype, attention).to(device)
        if tokenizer is None:
            raise UserError("a model that is already loaded needs its tokenizer: Generator(model, tokenizer)")
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        self.model, self.tokenizer = model, ensure_padding(tokenizer)
        match_tokenizer(self.model, self.tokenizer)
        self.max_positions = max_positions(model.config)
        self.synced = synced
        self._ends = self._end_tokens()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        callback: Callable[[str], None] | None = None,
        **options,
    ) -> str:
        """The text that follows `prompt`; `callback` is given each piece of it as it is made."""
        params = one_answer(params, options, streams=callback is not None)
        return self._run([self.encode(prompt)], params, params.seed, callback)[0][0].text

    def chat(
        self,
        messages: list[dict],
        params: SamplingParams | None = None,
        callback: Callable[[str], None] | None = None,
        **options,
    ) -> str:
        """The assistant's answer to a conversation; see `generate`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(messages, params, callback, **options)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options) -> Iterator[str]:
        """Pieces of the text that follows `prompt`; together they are what `generate` returns.

        Generation runs in a thread and ends when the iterator is closed.
        """
        params, ids = one_answer(params, options, streams=True), self.encode(prompt)
        pieces, cancelled = queue.SimpleQueue(), threading.Event()

        def work():
            try:
                self._run([ids], params, params.seed, pieces.put, cancelled)
                pieces.put(None)
            except BaseException as error:  # raised again where the pieces are read
                pieces.put(error)

        def read():
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            try:
                while (piece := pieces.get()) is not None:
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
            finally:
                cancelled.set()
                thread.join()

        return read()

    def batch_generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, batch_size: int = 8, **options
    ) -> list[str]:
        """The text that follows each prompt. With temperature 0 it is the one that `generate` gives, up to rounding."""
        params = one_answer(params, options)
        return [found[0].text for found in self.complete(prompts, params, batch_size)]

    def complete(
        self, prompts: Sequence[Prompt | list[int]], params: SamplingParams, batch_size: int = 8
    ) -> Iterator[list[Completion]]:
        """For each prompt, in order, its `num_return_sequences` completions. A prompt may also be what `encode` gave.

        Prompts are checked and encoded at once, and padded on the left to the longest of their batch. Batch i is
        sampled with `seed` + i.
        """
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        encoded = [self.encode(prompt) for prompt in prompts]
        return self._batches(encoded, params, batch_size)

    def _batches(self, encoded: list[list[int]], params: SamplingParams, size: int) -> Iterator[list[Completion]]:
        number = 0
        for start in range(0, len(encoded), size * SORTED_BATCHES):
            part = encoded[start : start + size * SORTED_BATCHES]
            order = sorted(range(len(part)), key=lambda i: -len(part[i]))
            found: dict[int, list[Completion]] = {}
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                seed = None if params.seed is None else params.seed + number
                found.update(zip(rows, self._run([part[i] for i in rows], params, seed), strict=True))
                number += 1
            yield from (found[i] for i in range(len(part)))

    def encode(self, prompt: Prompt | list[int]) -> list[int]:
        """Token ids of a prompt. An empty text starts where a document does, at the end-of-text token.

        Raises `UserError` when the prompt leaves the model no room for a token, or cannot be rendered as a chat.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            ids = prompt
        else:
            ids = list(self.tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"])
        if not ids:
            start = self.tokenizer.eos_token_id
            start = self.tokenizer.bos_token_id if start is None else start
            if start is None:
                raise UserError("the prompt is empty, and the tokenizer has no end-of-text token to start from")
            ids = [start]
        if self.max_positions is not None and len(ids) >= self.max_positions:
            raise UserError(
                f"the prompt has {len(ids):,} tokens; the model holds {self.max_positions:,}, the answer included"
            )
        return ids

    def _render(self, messages: list[dict]) -> str:
        if not isinstance(messages, list) or not messages:
            raise UserError("a chat needs a list of messages, each with a role and a content")
        for number, message in enumerate(messages, 1):
            keys = ("role", "content")
            if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
                raise UserError(f"message {number}: needs a role and a content, both text")
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: give plain text, or a model that was trained to chat")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises speaks of the messages
            raise UserError(f"the chat template refuses these messages ({str(error).strip()})") from None

    @torch.no_grad()
    def _run(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seed: int | None,
        callback: Callable[[str], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[list[Completion]]:
        """Completions of one batch of encoded prompts."""
        model, pad = self.model, self.tokenizer.pad_token_id
        device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
        padding = [width - len(ids) for ids in prompts]
        input_ids = torch.tensor([[pad] * n + ids for n, ids in zip(padding, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device)
        rooms = [params.max_new_tokens] * len(prompts)
        if self.max_positions is not None:
            rooms = [min(params.max_new_tokens, self.max_positions - len(ids)) for ids in prompts]
        writer = _Writer(self._cut, params.stop, callback) if callback else None
        stop = _Stop(self._decode, width, rooms, params.stop, writer, cancelled)
        with self._evaluating(), torch.random.fork_rng([device] if device.type == "cuda" else [], seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            rows = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=self._config(params, max(rooms)),
                logits_processor=_processors(params, padding),
                stopping_criteria=StoppingCriteriaList([stop]),
                synced_gpus=self.synced,
            )
        several = params.num_return_sequences
        found = [
            self._completion(row, prompts[i // several], rooms[i // several], params.stop)
            for i, row in enumerate(rows[:, width:].tolist())
        ]
        if writer:
            writer.finish(found[0].text)
        return [found[i : i + several] for i in range(0, len(found), several)]

    def _config(self, params: SamplingParams, max_new_tokens: int) -> GenerationConfig:
        """Sets every value, because transformers takes missing ones from the model's own defaults."""
        sample = params.temperature > 0
        unused = range(len(self.tokenizer), self.model.get_output_embeddings().out_features)
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(params.min_new_tokens, max_new_tokens),
            do_sample=sample,
            temperature=params.temperature if sample else 1.0,
            top_k=params.top_k if sample else 50,  # not used, but the one value that transformers does not warn of
            top_p=params.top_p if sample else 1.0,
            min_p=params.min_p if sample and params.min_p else None,
            typical_p=1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
            repetition_penalty=1.0,  # this and the next: see _processors
            no_repeat_ngram_size=0,
            num_beams=params.num_beams,
            length_penalty=1.0,
            early_stopping=False,
            num_return_sequences=params.num_return_sequences,
            use_cache=params.use_cache,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self._ends) or None,
            suppress_tokens=list(unused) or None,  # rows of the embedding that stand for no token
        )

    def _end_tokens(self) -> set[int]:
        """Tokens that end an answer: those of the tokenizer and the model, and the chat template's end of turn."""
        ends = {self.tokenizer.eos_token_id}
        for config in (self.model.config.get_text_config(), self.model.generation_config):
            value = getattr(config, "eos_token_id", None)
            ends |= set(value) if isinstance(value, (list, tuple)) else {value}
        return (ends | {turn_end(self.tokenizer)}) - {None}

    def _decode(self, ids: list[int], special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _cut(self, row: list[int], stop: Sequence[str]) -> tuple[list[int], str, bool]:
        """Tokens up to the end, their text, and whether there was an end-of-text token or a stop string."""
        end = next((i for i, token in enumerate(row) if token in self._ends), None)
        ids = row if end is None else row[:end]
        if stop and _has_any(self._decode(ids, True), stop):
            count = bisect_left(range(len(ids) + 1), True, key=lambda n: _has_any(self._decode(ids[:n], True), stop))
            text = self._decode(ids[:count], False)
            places = [text.find(string) for string in stop if string in text]
            return ids[:count], text[: min(places, default=len(text))], True
        return ids, self._decode(ids, False), end is not None

    def _completion(self, row: list[int], prompt: list[int], room: int, stop: Sequence[str]) -> Completion:
        ids, text, stopped = self._cut(row[:room], stop)
        return Completion(text, ids, "stop" if stopped else "length", len(prompt))

    @contextmanager
    def _evaluating(self):
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


class _Stop(StoppingCriteria):
    """Ends a row at its own number of new tokens or at a stop string, and all of them when cancelled."""

    def __init__(self, decode, width: int, rooms: list[int], stop: Sequence[str], writer, cancelled):
        self.decode, self.width, self.rooms, self.stop = decode, width, rooms, stop
        self.writer, self.cancelled = writer, cancelled
        # a token has at least a byte, and one more tells where a text that begins in mid-word has its blank
        self.window = max((len(string.encode()) for string in stop), default=0) + 1

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        repeat, made = len(input_ids) // len(self.rooms), input_ids.shape[1] - self.width
        done = [made >= room or (self.cancelled is not None and self.cancelled.is_set()) for room in self.rooms]
        done = [value for value in done for _ in range(repeat)]
        if self.stop:
            tails = input_ids[:, max(self.width, input_ids.shape[1] - self.window) :].tolist()
            done = [d or _has_any(self.decode(ids, True), self.stop) for d, ids in zip(done, tails, strict=True)]
        if self.writer:
            self.writer.write(input_ids[0, self.width :].tolist())
        return torch.tensor(done, device=input_ids.device)


class _Writer:
    """Passes the text of a growing list of tokens to `callback`, up to where later tokens may still change it."""

    def __init__(self, cut, stop: Sequence[str], callback: Callable[[str], None]):
        self.cut, self.stop, self.callback, self.sent = cut, stop, callback, 0

    def write(self, ids: list[int]) -> None:
        _, text, stopped = self.cut(ids, self.stop)
        if not stopped:
            text = text.rstrip("\ufffd")  # the first bytes of a character whose others are to come
            begun = (n for string in self.stop for n in range(1, len(string)) if text.endswith(string[:n]))
            text = text[: len(text) - max(begun, default=0)]
        self.finish(text)

    def finish(self, text: str) -> None:
        if len(text) > self.sent:
            piece, self.sent = text[self.sent :], len(text)
            self.callback(piece)


class _Unpadded(LogitsProcessor):
    """Applies a processor to each row without its padding, so that a row gets the same result in any batch."""

    def __init__(self, processor: LogitsProcessor, padding: list[int]):
        self.processor, self.padding = processor, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        repeat = len(input_ids) // len(self.padding)
        rows = zip(input_ids, scores, strict=True)
        return torch.cat(
            [self.processor(ids[None, self.padding[i // repeat] :], row[None]) for i, (ids, row) in enumerate(rows)]
        )


def _processors(params: SamplingParams, padding: list[int]) -> LogitsProcessorList:
    found = []
    if params.repetition_penalty != 1.0:
        found.append(_Unpadded(RepetitionPenaltyLogitsProcessor(params.repetition_penalty), padding))
    if params.no_repeat_ngram_size:
        found.append(_Unpadded(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size), padding))
    return LogitsProcessorList(found)


def _has_any(text: str, strings: Sequence[str]) -> bool:
    return any(string in text for string in strings)

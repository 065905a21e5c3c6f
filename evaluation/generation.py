"""Answers of a model to prompts, many at a time; each is what the model would say to that prompt alone."""

import contextlib
import hashlib
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from compute.attention import PACKED
from compute.layers import in_eval_mode
from conversations.masking import encode_prompt
from conversations.templates import stop_ids

BATCH_TOKENS = 16_384  # prompts, padding and new tokens together: what the cache of keys and values holds at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are the reference experiment's. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.2
    seed: int = 42

    @property
    def greedy(self):
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt, and whether it ended by itself (with its stop token) rather than at the limit."""

    prompt: str
    text: str
    finished: bool
    tokens: int
    greedy: bool


@torch.no_grad()
def answers(model, tokenizer, prompts, sampling=GREEDY, max_new_tokens=50, system=""):
    """A model's `Answer` to each of some prompts, in their order, after a system message if there is one.

    The global random state is left as it was, so asking a model something never changes its training. What is sampled
    depends on the seed and the prompt, not on the prompts beside it. An answer ends where the model attends to no
    further token; it is empty where the prompt is longer than that.
    """
    encoded = [encode_prompt([*system_message(system), user_message(prompt)], tokenizer) for prompt in prompts]
    said = {number: encoded[0][:0] for number in range(len(prompts))}
    for batch in cut(encoded, tokenizer.model_max_length, max_new_tokens):
        seeds = [seed_of(sampling.seed, encoded[number]) for number in batch]
        new = generate(model, tokenizer, [encoded[number] for number in batch], sampling, max_new_tokens, seeds)
        said |= zip(batch, new, strict=True)
    stops = torch.tensor(stop_ids(tokenizer))
    return [
        Answer(
            prompt,
            tokenizer.decode(said[number], skip_special_tokens=True).strip(),
            bool(torch.isin(said[number][-1:], stops).any()),
            len(said[number]),
            sampling.greedy,
        )
        for number, prompt in enumerate(prompts)
    ]


def system_message(text):
    """A list with a system message of a text, empty where the text is."""
    return [{"role": "system", "content": text}] if text else []


def user_message(text):
    """A user's message."""
    return {"role": "user", "content": text}


def cut(encoded, longest, max_new_tokens):
    """Lists of the numbers of prompts that are answered together: of similar length, within BATCH_TOKENS.

    Prompts near the end of what the model attends to have less room for an answer, and each is alone.
    """
    batches, batch = [], []
    for number in sorted(range(len(encoded)), key=lambda each: len(encoded[each])):
        length = len(encoded[number])
        if length >= longest:
            continue
        if batch and (length + max_new_tokens > longest or (len(batch) + 1) * (length + max_new_tokens) > BATCH_TOKENS):
            batches.append(batch)
            batch = []
        batch.append(number)
    return [*batches, batch] if batch else batches


@torch.no_grad()
def generate(model, tokenizer, prompts, sampling, max_new_tokens, seeds, streamer=None):
    """The ids that a model says to prompts, a tensor each, up to and with its stop token.

    Args:
        prompts: ids, (T,) each, which are padded on the left to the longest.
        seeds: one for each prompt.
        streamer: of transformers; it gets the ids of a single prompt's answer as they come.
    """
    length, stops = max(map(len, prompts)), stop_ids(tokenizer)
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False,  # `chosen_by` samples, so that each prompt has a generator of its own
        max_new_tokens=min(max_new_tokens, tokenizer.model_max_length - length),
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    processors = chosen_by(sampling, seeds, tokenizer.pad_token_id, length)
    # A compiled model would be recompiled, as the cache grows by a token at a time.
    with (
        in_eval_mode(model),
        masked_attention(model),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
    ):
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=processors,
            streamer=streamer,
        ).cpu()
    said = out[:, length:]
    ends = [torch.isin(row, torch.tensor(stops)).nonzero()[:1, 0] for row in said]
    return [row[: end.item() + 1] if len(end) else row for row, end in zip(said, ends, strict=True)]


@contextlib.contextmanager
def masked_attention(model):
    """Attention that respects padding; packed attention has no mask."""
    usual = model.config._attn_implementation
    if usual == PACKED:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if usual == PACKED:
            model.set_attn_implementation(PACKED)


def chosen_by(sampling, seeds, pad_id, length):
    """The processors of logits after which the highest is the next token."""
    chain = []
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenalty(sampling.repetition_penalty, pad_id, length))
    if not sampling.greedy:
        chain += [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p), Noise(seeds)]
    return chain


class RepetitionPenalty(LogitsProcessor):
    """transformers' penalty on tokens that were said, but not on padding: a prompt's answer does not depend on it."""

    def __init__(self, penalty, pad_id, length):
        self.penalize, self.pad_id, self.last = RepetitionPenaltyLogitsProcessor(penalty), pad_id, length - 1

    def __call__(self, input_ids, scores):
        said = torch.where(input_ids == self.pad_id, input_ids[:, self.last :][:, :1], input_ids)
        return self.penalize(said, scores)


class Noise(LogitsProcessor):
    """Gumbel noise on logits: the highest sum is a sample of their softmax. Each row has a generator of its own."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):  # noqa: ARG002  transformers passes both
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log().to(scores)


def seed_of(seed, prompt):
    """The seed of the answer to a prompt, from the ids of it: the same beside any others."""
    digest = hashlib.sha256(f"{seed} {prompt.tolist()}".encode()).digest()
    return int.from_bytes(digest[:7], "big")

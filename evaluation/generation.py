"""Generate answers to prompts, many at a time; each equals the answer to that prompt alone."""

import contextlib
import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from compute.adapters import frozen_dtype
from compute.attention import PACKED
from compute.layers import in_eval_mode, without_router_loss
from compute.layout import cut_padded
from conversations.masking import encode_prompt
from conversations.templates import stop_ids

BATCH_TOKENS = 16_384  # prompts, padding and new tokens of a batch: what the KV cache holds at once


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token; the defaults are the reference experiment's. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.2
    seed: int = 42

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt; finished where it ended with a stop token rather than at the length limit."""

    prompt: str
    text: str
    finished: bool
    tokens: int
    greedy: bool


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 50,
    system: str = "",
) -> list[Answer]:
    """A model's `Answer` to each prompt, in their order; a system message stands before each unless it is empty.

    A prompt and its answer must fit into the model's context length. A sampled answer depends on the seed and its
    prompt, not on the other prompts. The global random state is left unchanged, so generating never changes training.
    """
    encoded = [encode_prompt(make_messages(prompt, system), tokenizer) for prompt in prompts]
    batches = generate_batches(model, tokenizer, encoded, [max_new_tokens] * len(encoded), sampling)
    in_order = sorted(itertools.chain.from_iterable(batches))
    return [Answer(prompt, *rest, sampling.greedy) for prompt, (_, *rest) in zip(prompts, in_order, strict=True)]


def generate_batches(model, tokenizer, prompts, limits, sampling=GREEDY, budget=0):
    """Yield a list for each batch: of each prompt its number, its answer, whether that is finished, and its tokens.

    A prompt's ids, (T,), and its limit, the most tokens of its answer, fit into the context length. A batch has at most
    `budget` tokens: prompts, padding and new ones; 0: `BATCH_TOKENS`.
    """
    budget, longest, stops = budget or BATCH_TOKENS, max(limits, default=0), torch.tensor(stop_ids(tokenizer))

    def count_tokens(number):
        if len(prompts[number]) + longest > tokenizer.model_max_length:
            return max(len(prompts[number]) + limits[number], budget)  # alone: beside it, others might not fit
        return len(prompts[number]) + limits[number]

    for batch in cut_padded(range(len(prompts)), budget, count_tokens):
        rows, most = [prompts[number] for number in batch], max(limits[number] for number in batch)
        answers = []
        for number, ids in zip(batch, generate(model, tokenizer, rows, sampling, most), strict=True):
            ids = ids[: limits[number]]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append((number, text, bool(torch.isin(ids[-1], stops)), len(ids)))
        yield answers


def make_messages(prompt, system=""):
    """The messages of a prompt: a system message (none if empty) and the user's."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]


def generate(model, tokenizer, prompts, sampling, max_new_tokens, streamer=None):
    """The generated ids for each prompt, a list of (T,), up to and including its stop token.

    Prompts are ids, (T,) each; they are padded on the left to the longest. A `BaseStreamer` of transformers receives
    the ids of a single prompt's answer as they are generated.
    """
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = pad(prompts, padding_value=tokenizer.pad_token_id)  # (B, T)
    mask = pad([torch.ones_like(prompt) for prompt in prompts])
    length, stops = ids.shape[1], stop_ids(tokenizer)
    settings = GenerationConfig(
        do_sample=False,  # `GumbelNoise` samples, with a generator for each prompt
        max_new_tokens=min(max_new_tokens, tokenizer.model_max_length - length),
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    processors = []
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenalty(sampling.repetition_penalty, tokenizer.pad_token_id))
    if not sampling.greedy:
        warpers = TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)
        processors += [*warpers, GumbelNoise([derive_seed(sampling.seed, prompt) for prompt in prompts])]
    devices = [model.device] if model.device.type == "cuda" else []
    # transformers fills what these settings leave open from the model's own: a copy that shares its weights has these.
    plain = copy.copy(model)
    plain.generation_config = settings
    dtype = frozen_dtype(model)
    with (
        in_eval_mode(model),
        torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext(),
        masked_attention(model),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),  # the KV cache grows with each token: layers would be recompiled
    ):
        out = plain.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=processors,
            streamer=streamer,
            **without_router_loss(model),
        ).cpu()[:, length:]
    ends = [torch.isin(row, torch.tensor(stops)).nonzero()[:1, 0] for row in out]
    return [row[: end.item() + 1] if len(end) else row for row, end in zip(out, ends, strict=True)]


@contextlib.contextmanager
def masked_attention(model):
    """Attention that respects padding, which packed attention does not."""
    packed = model.config._attn_implementation == PACKED
    if packed:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(PACKED)


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' repetition penalty, but for the padding token: its penalty would depend on the batch."""

    def __init__(self, penalty, pad_id):
        super().__init__(penalty)
        self.pad_id = pad_id

    def __call__(self, input_ids, scores):
        penalized = super().__call__(input_ids, scores)
        penalized[:, self.pad_id] = scores[:, self.pad_id]
        return penalized


class GumbelNoise(LogitsProcessor):
    """Gumbel noise on logits, so that their argmax is a sample of their softmax; each row has its own generator."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):  # noqa: ARG002  transformers passes both
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log().to(scores)


def derive_seed(seed, prompt):
    """A seed for the answer to a prompt, from its ids: the same whatever other prompts there are."""
    digest = hashlib.sha256(f"{seed} {prompt.tolist()}".encode()).digest()
    return int.from_bytes(digest[:7], "big")

"""Answers that do not depend on the prompts beside them, stop by themselves, and disturb nothing."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from compute.self_check import use_layout
from conversations.masking import encode_prompt
from evaluation import generation
from evaluation.generation import GREEDY, Answer, Sampling, generate_answers
from tests.conftest import layout_of

PROMPTS = ["Hi", "What is the capital of France?", "a b c d e f g h i j k l m", "Who?", "Count to 7"]
SAMPLED = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("room", [1, 120, 10_000])
def test_a_batch_answers_as_each_prompt_alone(tiny_model, tiny_tokenizer, monkeypatch, sampling, packed, room):
    use_layout(tiny_model, layout_of(packed))
    alone = [generate_answers(tiny_model, tiny_tokenizer, [prompt], sampling, 12)[0] for prompt in PROMPTS]
    monkeypatch.setattr(generation, "BATCH_TOKENS", room)
    assert generate_answers(tiny_model, tiny_tokenizer, PROMPTS, sampling, 12) == alone
    assert generate_answers(tiny_model, tiny_tokenizer, PROMPTS[::-1], sampling, 12) == alone[::-1]
    assert [one.prompt for one in alone] == PROMPTS


def test_padding_is_not_penalised():
    """The control: with transformers' own penalty the padded row's logits are others'."""
    ids, scores = torch.tensor([[0, 0, 5], [4, 3, 5]]), torch.ones(2, 8)
    assert generation.RepetitionPenalty(2.0, 0)(ids, scores)[0].tolist() == [1, 1, 1, 1, 1, 0.5, 1, 1]
    assert generation.RepetitionPenaltyLogitsProcessor(2.0)(ids, scores)[0].tolist() == [0.5, 1, 1, 1, 1, 0.5, 1, 1]


def test_samples_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -float("inf")]])
    noise = generation.GumbelNoise([7])
    drawn = torch.stack([noise(None, logits).argmax(-1) for _ in range(20_000)]).flatten().bincount(minlength=4)
    torch.testing.assert_close(drawn / 20_000, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_answers_are_seeded_and_leave_the_model_and_the_random_state_alone(tiny_model, tiny_tokenizer):
    use_layout(tiny_model, layout_of(packed=True))
    tiny_model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        generate_answers(tiny_model, tiny_tokenizer, ["Hi"], replace(SAMPLED, seed=seed), 8) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    assert not first[0].finished
    assert first[0].tokens == 8
    assert tiny_model.training
    assert tiny_model.config._attn_implementation == "packed"


def test_two_prompts_of_one_batch_do_not_share_their_noise(tiny_model, tiny_tokenizer):
    with torch.no_grad():  # a head that knows nothing: all tokens are equally likely, and only the noise decides
        tiny_model.model.norm.weight.zero_()
    one, other = generate_answers(tiny_model, tiny_tokenizer, ["Hi", "Ho"], SAMPLED, 8)
    assert one.text != other.text


WILD = {  # each changes an answer, or fails
    "beams": {"num_beams": 3, "length_penalty": 9.0, "early_stopping": True},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 3, "min_p": 0.9, "typical_p": 0.1},
    "penalties": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
    "lengths": {"max_length": 3, "min_length": 90, "min_new_tokens": 15, "max_time": 1e-9, "stop_strings": ["a"]},
    "tokens": {"suppress_tokens": list(range(3, 200)), "begin_suppress_tokens": [5], "bad_words_ids": [[7], [8]]},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 9, "eos_token_id": list(range(259)), "pad_token_id": 4},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2, "do_sample": True},
    "cache": {"use_cache": False, "cache_implementation": "static", "guidance_scale": 7.0, "renormalize_logits": True},
}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("settings", WILD.values(), ids=WILD)
def test_the_models_own_settings_change_no_answer(tiny_model, tiny_tokenizer, sampling, settings):
    expected = generate_answers(tiny_model, tiny_tokenizer, PROMPTS, sampling, 12)
    own = tiny_model.generation_config = GenerationConfig(**settings)
    in_use = []  # by the model itself, which a thread may be saving
    with tiny_model.model.register_forward_hook(lambda *_: in_use.append(tiny_model.generation_config)):
        assert generate_answers(tiny_model, tiny_tokenizer, PROMPTS, sampling, 12) == expected
    assert all(each is own for each in [*in_use, tiny_model.generation_config])
    assert own.to_diff_dict() == GenerationConfig(**settings).to_diff_dict()


def always_generating(token, model, tokenizer):
    """Make a model generate one token whatever its prompt: the last hidden state is made its embedding."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[token] = 1.0


def test_an_answer_ends_at_the_stop_token(tiny_model, tiny_tokenizer):
    always_generating(tiny_tokenizer.eos_token_id, tiny_model, tiny_tokenizer)
    found = generate_answers(tiny_model, tiny_tokenizer, ["Hi", "Who are you?"])
    assert found == [Answer(prompt, "", True, 1, True) for prompt in ("Hi", "Who are you?")]


def test_batches_hold_a_bounded_number_of_tokens(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "BATCH_TOKENS", 120)
    sizes, generate = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda *arguments: sizes.append(arguments[2]) or generate(*arguments))
    generate_answers(tiny_model, tiny_tokenizer, [*PROMPTS, 99 * "x"], GREEDY, 12)
    assert all(len(batch) == 1 or len(batch) * (max(map(len, batch)) + 12) <= 120 for batch in sizes)
    assert sorted(map(len, sizes))[0] == 1 < max(map(len, sizes))
    sizes.clear()
    assert generate_answers(tiny_model, tiny_tokenizer, [], GREEDY, 12) == sizes == []


def test_a_prompt_may_be_a_conversation(tiny_tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Who?"}]
    text = tiny_tokenizer.decode(encode_prompt(chat, tiny_tokenizer))
    assert text == tiny_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert torch.equal(encode_prompt("Hi", tiny_tokenizer), encode_prompt(chat[1:2], tiny_tokenizer))

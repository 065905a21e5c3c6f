"""A tiny model of which a window reaches only some of the weights, which transformers' auto classes can load."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class MixtureConfig(LlamaConfig):
    """Its number of experts; 0: it is a Llama, but for a weight that takes part in nothing."""

    model_type = "tiny_mixture"
    separate_experts: int = 6


class Experts(nn.Module):
    """A mixture of experts that are modules of their own; each token goes to one, and none to the last."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.separate_experts - 1, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.separate_experts))

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        result = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            of_expert = chosen == number
            result[of_expert] = (self.experts[number](flat[of_expert]) * weight[of_expert, None]).to(flat)
        return result.view_as(hidden)


class MixtureForCausalLM(LlamaForCausalLM):
    config_class = MixtureConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].unused = nn.Linear(config.hidden_size, 3)
        if config.separate_experts:
            self.model.layers[0].mlp = Experts(config)
        self.post_init()


AutoConfig.register("tiny_mixture", MixtureConfig)
AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM)


def tiny_mixture(vocabulary, **changes):
    """A `MixtureForCausalLM`, always of the same random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
    return MixtureForCausalLM(MixtureConfig(vocab_size=vocabulary, pad_token_id=2, **(shape | changes)))

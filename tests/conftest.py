"""Tiny models, tokenizers and comparisons built on the spot: no test needs a hub, a GPU or an account."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from general_preference.cpu_settings import CPU_SETTINGS
from general_preference.models.config import PreferenceConfig
from general_preference.models.reward_model import get_reward_model
from scripts.make_tiny_model import train_tokenizer

os.environ.update(CPU_SETTINGS | os.environ)  # scripts started by tests need not start again with them

TEXTS = ["Which throw wins? Name one. The rock, the paper, the scissors; a system prompt äöü 你好."] * 4
HIDDEN, WINDOW = 32, 6
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": (LlamaConfig, COMMON | {"tie_word_embeddings": False}),
    "gemma": (GemmaConfig, COMMON | {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, COMMON | {"tie_word_embeddings": False}),
    "gpt2": (
        GPT2Config,
        {
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        },
    ),
    "qwen3": (Qwen3Config, COMMON),
    "phi3": (Phi3Config, COMMON | {"pad_token_id": 0}),
    "gpt_neox": (GPTNeoXConfig, {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")}),
    "opt": (
        OPTConfig,
        {
            "hidden_size": HIDDEN,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
    ),
    "mixtral": (MixtralConfig, COMMON | {"num_local_experts": 4, "sliding_window": None}),
    "olmo2": (Olmo2Config, COMMON),
    "mistral_window": (MistralConfig, COMMON | {"sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, COMMON | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3TextConfig, COMMON | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
}
MAIN_FAMILIES = ("llama", "gemma", "qwen2", "gpt2")


def pytest_collection_modifyitems(items):
    """The long files first, so that none of them is left over for one worker alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with a chat template, BOS, end and pad tokens."""
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A function: family name -> folder of a randomly initialized causal LM with the shared tokenizer."""
    made = {}

    def make(family: str) -> str:
        if family not in made:
            kind, options = FAMILIES[family]
            torch.manual_seed(0)
            config = kind(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=5, **options)
            model = AutoModelForCausalLM.from_config(config).float()
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "norm" not in name and "ln_" not in name:
                    torch.nn.init.normal_(parameter, std=0.02)  # biases start at zero, which would hide some faults
                elif parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)  # so that attention is far from uniform
            made[family] = str(tmp_path_factory.mktemp(family) / "model")
            model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def make_model(model_folder):
    """A function: (family, head, dim, gate, **options) -> RewardModel in fp32 and eval mode."""

    def make(family="llama", head="gpm", dim=4, gate=True, seed=3, **options):
        preference = PreferenceConfig(head, dim, gate, normalize=head != "bt", temperature=0.1 if head != "bt" else 1.0)
        return get_reward_model(model_folder(family), bf16=False, preference=preference, seed=seed, **options).eval()

    return make


@pytest.fixture(scope="session")
def saved(make_model, model_folder, tmp_path_factory):
    """A function: (family, head, dim, gate) -> folder of a model saved by this package, with its tokenizer."""
    made = {}

    def make(family="llama", head="gpm", dim=4, gate=True) -> str:
        key = (family, head, dim, gate)
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp("saved") / "model")
            make_model(*key).save_pretrained(made[key])
            AutoTokenizer.from_pretrained(model_folder(family)).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def own_environment():
    """Joining as a single process leaves its ranks in the environment; give it back as it was."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def random_comparisons(count: int, vocabulary: int, seed: int = 0, groups: bool = True) -> list[dict]:
    """Tokenized comparisons of random ids and lengths, some of them groups with several preferences."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(6, vocabulary, (length,), generator=generator).tolist()

    comparisons = []
    for index in range(count):
        responses = [[*ids(2, 14), 5] for _ in range(4 if groups and index % 3 == 2 else 2)]
        edges = [(0, 1), (1, 2), (2, 0), (3, 0)] if len(responses) == 4 else [(0, 1)]
        comparisons.append(
            {
                "id": f"c{index}",
                "prompt_ids": [1, *ids(3, 18)],
                "response_ids": responses,
                "first": [first for first, _ in edges],
                "second": [second for _, second in edges],
                "label": [1.0 if index % 4 else 0.8] * len(edges),
                "margin": 0.1 * (index % 3),
            }
        )
    return comparisons

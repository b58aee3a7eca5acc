"""The model that is learned: a causal language model, an embedding head on responses, and a gate on prompts.

One forward pass takes a batch of rows (datasets/packing.py lays them out) and returns the embeddings of all responses
and the gates of all prompts, whatever the head. Backbones are
loaded in loading.py, folders written in saving.py.
"""

import logging
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from general_preference.errors import InputError
from general_preference.models.adapters import add_lora
from general_preference.models.attention import (
    FLEX,
    KERNELS,
    VERIFIED,
    PackedSequences,
    RowLayout,
    attention_mask,
    block_mask,
    row_layout,
    shares_prompts,
)
from general_preference.models.config import (
    HEAD_NAMES,
    PreferenceConfig,
    read_tensors,
    resolve,
    saved_preference,
    trained_preference,
)
from general_preference.models.experts import load_balancing_loss
from general_preference.models.kernels import choose_attention
from general_preference.models.loading import load_backbone, partitioned_loading
from general_preference.models.log_probs import can_fuse, linear_log_probs
from general_preference.models.losses import token_log_probs
from general_preference.models.saving import CardFacts, push_reward_model, read_card_facts, save_reward_model
from general_preference.models.score import normalize_embedding

logger = logging.getLogger(__name__)

# Parts in which token log-probs are computed where the LM head is not one whole matrix. A fixed number, not a fixed
# size, because under ZeRO-3 every use of the LM head is a collective that all processes must join.
LOG_PROB_PARTS = 16


class Fp32Linear(nn.Linear):
    """A bias-free linear layer that computes in fp32 (or better) whatever dtype its weight is stored in."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) of any float dtype -> (..., out_features) in fp32 or better."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype))


class Temperature(nn.Module):
    """A learnable tau > 0, kept as its logarithm so that it stays positive."""

    def __init__(self, value: float):
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor([math.log(value)], dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """(1,) the temperature."""
        return self.log_value.float().exp()


class RewardModel(nn.Module):
    """Causal LM backbone + embedding head + prompt gate.

    `backbone` is the whole causal LM, so its `lm_head` serves the language-model regularizers. `preference` is the
    `PreferenceConfig` that is saved with the weights. Heads and gate run in fp32 whatever the backbone's dtype.
    """

    def __init__(self, backbone: nn.Module, preference: PreferenceConfig, attention: str = "auto"):
        """attention: one of `kernels.CHOICES`; the kernel itself is chosen where the model is run."""
        super().__init__()
        self.backbone = backbone
        self.preference = preference
        self.card = CardFacts()  # what the saved README.md tells beside the head
        hidden = self.config.hidden_size
        self.value_head = Fp32Linear(hidden, preference.dim)
        self.prompt_head = Fp32Linear(hidden, preference.planes) if preference.prompt_gate else None
        self.temperature = Temperature(preference.temperature) if preference.learnable_temperature else None
        self.attention, self._loaded_kernel = attention, self.config._attn_implementation
        self._chosen_for: tuple | None = None
        self.shares_prompts = shares_prompts(self.config)

    @classmethod
    def from_pretrained(cls, path: str, **kwargs) -> "RewardModel":
        """Load a trained preference model from a folder or hub name; see `load_reward_model`."""
        return load_reward_model(path, **kwargs)

    def save_pretrained(self, path: str, state_dict: dict | None = None, **kwargs) -> None:
        """Write a folder that loads with its path alone; see `saving.save_reward_model`."""
        save_reward_model(self, path, state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Upload the model and its card to the hub, as transformers' models do; see `saving.push_reward_model`."""
        return push_reward_model(self, repo_id, **kwargs)

    @property
    def language_model(self) -> nn.Module:
        """The causal LM itself, below an adapter if there is one."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "peft_config") else self.backbone

    @property
    def config(self):
        """The text configuration of the backbone (hidden size, layers, attention implementation)."""
        return self.backbone.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the backbone."""
        return self.language_model.get_input_embeddings().weight.dtype

    @property
    def learned_positions(self) -> int | None:
        """Tokens that fit a table of learned positions; None where positions are computed (rotary, ALiBi)."""
        rotary = getattr(self.config, "rope_parameters", None) is not None
        return None if rotary else getattr(self.config, "max_position_embeddings", None)

    @property
    def row_layout(self) -> RowLayout:
        """How a batch's rows must lie for the kernel that this model runs where it is now."""
        return self.layout_on(self.value_head.weight.device)

    def layout_on(self, device: torch.device) -> RowLayout:
        """Choose the attention kernel for `device`, in this model's dtype and mode, and say how rows must lie for it.

        Raises:
            InputError: the kernel that was asked for cannot run there.
        """
        wanted = (device, self.dtype, self.training)
        if self._chosen_for != wanted:
            choose_attention(self.config, self.attention, self._loaded_kernel, *wanted)
            self._chosen_for = wanted
        return row_layout(self.config, self.shares_prompts)

    def initialize_heads(self, seed: int) -> None:
        """Fill the heads with N(0, 1 / hidden), the same values for the same seed on every process and ZeRO stage."""
        generator = torch.Generator().manual_seed(seed)
        for head in (self.value_head, self.prompt_head):
            if head is not None:
                std = 1 / math.sqrt(self.config.hidden_size)
                values = torch.empty(head.weight.shape).normal_(0.0, std, generator=generator)
                head.weight.data.copy_(values)

    def freeze_unused(self, language_model_head: bool) -> None:
        """Stop gradients of the LM head when no regularizer will use it (a tied one is the embedding and stays)."""
        head = self.language_model.get_output_embeddings()
        tied = head is None or head.weight is self.language_model.get_input_embeddings().weight
        if not language_model_head and not tied:
            head.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: torch.Tensor,
        shared: bool,
        response_ends: torch.Tensor,
        prompt_ends: torch.Tensor,
        sequences: PackedSequences | None = None,
        targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        counted: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Embed every response and gate every prompt of a batch in one pass.

        Args:
            input_ids, position_ids, segments: (R, L) rows as `packing.Batch` describes them.
            shared: whether rows hold several responses behind one prompt.
            response_ends: (N,) where each response's last token stands in the flattened rows.
            prompt_ends: (G,) where each prompt's last token stands.
            sequences: how a packed row attends, for kernels of the kernels below; else the mask is made here.
            targets: (sources, tokens, owners), each (T,): the hidden state at flat position `sources[t]` predicts
                token `tokens[t]`, whose log-prob is added to owner `owners[t]` in [0, N + G). None: no regularizer.
            counted: (R, L) booleans, the tokens over which experts are balanced. None: no load-balancing loss.

        Returns:
            embeddings: (N, D). temperature: (1,), learned or fixed. prompt_hidden_states: (G, hidden).
            gates: (G, P), only if the model has a gate.
            log_probs, counts: (N + G,) summed log-prob in nats and tokens per owner, only with `targets`.
            aux_loss: scalar, see `experts.load_balancing_loss`, only with `counted`.
        """
        run = self._run_backbone(input_ids, position_ids, segments, shared, sequences, counted is not None)
        hidden = run.last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])

        embeddings = self.value_head(hidden[response_ends])
        if self.preference.normalize:
            embeddings = normalize_embedding(embeddings)
        output = {"embeddings": embeddings, "prompt_hidden_states": hidden[prompt_ends]}
        if self.temperature is None:
            output["temperature"] = torch.full((1,), self.preference.temperature, device=hidden.device)
        else:
            output["temperature"] = self.temperature()
        if self.prompt_head is not None:
            output["gates"] = self.gate(output["prompt_hidden_states"])
        if targets is not None:
            owners = len(response_ends) + len(prompt_ends)
            output["log_probs"], output["counts"] = self._log_probs(hidden, targets, owners)
        if counted is not None:
            output["aux_loss"] = load_balancing_loss(run.router_logits, self.config.num_experts_per_tok, counted)
        return output

    def _run_backbone(self, input_ids, position_ids, segments, shared: bool, sequences, routed: bool):
        """What the layers return: `last_hidden_state` (R, L, hidden), and with `routed` also `router_logits`."""
        # Plain right-padded rows count their own positions; some architectures (ALiBi) take no position_ids at all.
        options = {"position_ids": position_ids} if shared else {}
        if sequences is not None:
            if self.config._attn_implementation not in KERNELS:
                raise RuntimeError("packed rows for another kernel: collate with this model's row_layout as it is now")
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # unused; None would make one
            options["sequences"] = sequences
        elif shared and self.config._attn_implementation == FLEX:
            mask = block_mask(segments, position_ids)
        else:
            mask = attention_mask(self.config, segments, position_ids, self.dtype, shared)
        if routed or getattr(self.config, "output_router_logits", False):
            options["output_router_logits"] = routed
        output = self.language_model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False, **options)
        if sequences is not None and sequences.calls == 0:
            raise RuntimeError(f"{self.config.model_type} did not hand the sequences to its attention layers")
        return output

    def gate(self, prompt_hidden_state: torch.Tensor) -> torch.Tensor:
        """Weights of the planes (..., P), >= 0, from the hidden state (..., hidden) of the prompt's last token."""
        logits = self.prompt_head(prompt_hidden_state)
        if self.preference.gate == "scaled_softmax":
            return logits.shape[-1] * torch.softmax(logits / math.sqrt(prompt_hidden_state.shape[-1]), dim=-1)
        return torch.softmax(logits, dim=-1)

    def _log_probs(self, hidden: torch.Tensor, targets, owners: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum token log-probs per owner; logits exist for a few tokens at a time and are made again in backward."""
        sources, tokens, owner = targets
        head = self.language_model.get_output_embeddings()
        # What some families (Cohere, Granite) do between their output layer and their logits.
        scale = (getattr(self.config, "logit_scale", None) or 1) / (getattr(self.config, "logits_scaling", None) or 1)
        predicting = hidden[sources] if scale == 1 else hidden[sources] * scale
        if can_fuse(head) and not self._logit_cap:
            log_probs = linear_log_probs(predicting, head.weight, tokens)
        else:
            parts = zip(predicting.tensor_split(LOG_PROB_PARTS), tokens.tensor_split(LOG_PROB_PARTS), strict=True)
            log_probs = torch.cat([checkpoint(self._part_log_probs, *part, use_reentrant=False) for part in parts])
        sums = torch.zeros(owners, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        sums = sums.index_add(0, owner, log_probs.to(sums.dtype))
        counts = torch.zeros_like(sums).index_add(0, owner, torch.ones_like(owner, dtype=sums.dtype))
        return sums, counts

    @property
    def _logit_cap(self) -> float | None:
        """What Gemma 2 bends its logits to."""
        return getattr(self.config, "final_logit_softcapping", None)

    def _part_log_probs(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.language_model.get_output_embeddings()(hidden)
        if self._logit_cap:
            logits = self._logit_cap * torch.tanh(logits / self._logit_cap)
        return token_log_probs(logits, tokens)

    @torch.no_grad()
    def verify_shared_prompts(self) -> float:
        """Compare one shared-prompt row with separate rows; turn sharing off if they disagree.

        For architectures outside `attention.VERIFIED`, whose layers might look past the mask.

        Returns:
            the largest difference relative to the largest hidden state, 0 for equality. Sharing is kept below 1e-2
            in half precision and 1e-4 in fp32.
        """
        device = self.value_head.weight.device
        vocabulary = self.config.vocab_size
        prompt, first, second = (torch.arange(n, device=device) * 37 % vocabulary for n in (7, 5, 9))
        joined = torch.cat([prompt, first, second])[None]
        positions = torch.cat([torch.arange(7), torch.arange(7, 12), torch.arange(7, 16)])[None].to(device)
        segments = torch.tensor([[0] * 7 + [1] * 5 + [2] * 9], device=device)
        alone = torch.cat([prompt, second])[None]
        training = self.training
        self.eval()
        mask = attention_mask(self.config, segments, positions, self.dtype, True)
        inner = self.language_model.base_model
        shared = inner(input_ids=joined, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        plain = inner(input_ids=alone, attention_mask=torch.ones_like(alone), use_cache=False).last_hidden_state
        self.train(training)
        difference = ((shared[0, 12:] - plain[0, 7:]).abs().max() / plain.abs().max()).item()
        limit = 1e-4 if self.dtype in (torch.float32, torch.float64) else 1e-2
        self.shares_prompts = self.shares_prompts and difference <= limit
        return difference


def get_reward_model(
    model_name_or_path: str,
    *,
    bf16: bool = True,
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    target_modules: str | list[str] | None = None,
    lora_dropout: float = 0.0,
    use_flash_attention_2: bool = False,
    ds_config: dict | None = None,
    init_value_head: bool = False,
    init_prompt_head: bool = False,
    add_prompt_head: bool = False,
    is_general_preference: bool = False,
    value_head_dim: int | None = None,
    preference: PreferenceConfig | None = None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 42,
) -> RewardModel:
    """A preference model to train, on top of a language model or of an earlier preference model.

    Takes the keyword arguments of the paper's function. From a plain language model the heads are new (N(0, 1/hidden),
    by `seed`). From a preference model they are kept, unless `init_value_head` / `init_prompt_head` ask for new ones.

    Args:
        bf16: load the backbone in bfloat16, else in fp32. Heads compute in fp32 either way.
        is_general_preference, value_head_dim, add_prompt_head: the head when `preference` is not given: D = 2 by
            default, 1 for Bradley-Terry.
        preference: the whole head description; wins over the three above.
        ds_config: a DeepSpeed configuration. With ZeRO stage 3 the backbone is loaded partitioned: no process ever
            holds it whole. In 4 bits every process loads all of it, and the engine partitions it later.
        load_in_4bit: the backbone in 4 bits (bitsandbytes), frozen under adapters. Heads are never quantized.
        attn_implementation: one of `kernels.CHOICES`; the kernel is chosen where the model runs.

    Raises:
        InputError: no such model, a folder that is none, or a request that contradicts a checkpoint's own head.
    """
    if preference is None:
        preference = _preference_from_flags(is_general_preference, value_head_dim, add_prompt_head)
    saved = saved_preference(model_name_or_path, trust_remote_code)
    if saved is not None:
        saved.check(
            str(model_name_or_path), head=preference.head, dim=preference.dim, prompt_gate=preference.prompt_gate
        )
    if use_flash_attention_2:
        attn_implementation = "flash_attention_2"
    partitioned = partitioned_loading(ds_config)
    backbone = load_backbone(
        model_name_or_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        load_in_4bit=load_in_4bit,
    )
    if lora_rank > 0:
        if hasattr(backbone, "peft_config"):
            raise InputError(f"{model_name_or_path} already is a LoRA adapter: drop lora_rank to go on training it")
        backbone = add_lora(backbone, lora_rank, lora_alpha, target_modules or "all-linear", lora_dropout, seed)
    model = RewardModel(backbone, preference, attn_implementation)
    model.card.base_model = str(model_name_or_path)
    model.initialize_heads(seed)
    if saved is not None:
        keep = [name for name, new in zip(HEAD_NAMES, (init_value_head, init_prompt_head), strict=True) if not new]
        _copy_heads(model, str(model_name_or_path), keep)
    _check_sharing(model, partitioned)
    return model


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    preference: PreferenceConfig | None = None,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """Load a trained preference model (full, sharded or LoRA adapter) from a folder or hub name.

    Args:
        preference: the head, if the caller has read it already (`saved_preference`).
        device: where the model goes; with accelerate installed its weights go there straight from the files.

    Returns:
        the model in eval mode, its head as the checkpoint describes it.

    Raises:
        InputError: no such model, a plain language model without heads, or weights that cannot be read.
    """
    if preference is None:
        preference = trained_preference(path, trust_remote_code)
    device = torch.device(device)
    backbone = load_backbone(path, dtype, attn_implementation, trust_remote_code, device=device)
    model = RewardModel(backbone, preference, attn_implementation)
    _copy_heads(model, path, HEAD_NAMES)
    model.to(device)  # before the self-check: that is where its kernels have to be right
    model.card = read_card_facts(resolve(path, "README.md"))
    _check_sharing(model)
    model.eval().layout_on(device)  # now, and not with the first batch: a kernel that cannot run should say so early
    return model


def _preference_from_flags(is_general_preference: bool, dim: int | None, gate: bool) -> PreferenceConfig:
    if not is_general_preference:
        return PreferenceConfig("bt", 1 if dim is None else dim, gate)
    return PreferenceConfig("gpm", 2 if dim is None else dim, gate, normalize=True, temperature=0.1)


def _check_sharing(model: RewardModel, partitioned=None) -> None:
    """For an architecture nobody compared yet, compare once; where that is impossible, do not share prompts."""
    if not model.shares_prompts:
        logger.info(
            "%s: responses are run as separate sequences (no exact shared-prompt mask)", model.config.model_type
        )
    elif model.config.model_type not in VERIFIED:
        if partitioned is not None:
            model.shares_prompts = False
            logger.info("%s: not compared yet, so responses are run as separate sequences", model.config.model_type)
            return
        difference = model.verify_shared_prompts()
        verdict = "shared prompts are exact" if model.shares_prompts else "responses are run as separate sequences"
        logger.info("%s: difference of shared prompts %.1e, so %s", model.config.model_type, difference, verdict)


def _copy_heads(model: RewardModel, path: str, names) -> None:
    """Fill the model's heads `names` from the checkpoint at `path`; a head without weights is never left random."""
    tensors = read_tensors(path, names)
    for name in names:
        head = getattr(model, name.split(".")[0])
        if head is None:
            if name in tensors:
                raise InputError(f"{path} has {name}, but its configuration says prompt_gate = False")
            continue
        if name not in tensors:
            raise InputError(f"{path} has no {name}, which its configuration promises")
        if head.weight.shape != tensors[name].shape:
            shapes = tuple(tensors[name].shape), tuple(head.weight.shape)
            raise InputError(f"{path}: {name} has shape {shapes[0]}, but the head needs {shapes[1]}")
        head.weight.data.copy_(tensors[name])

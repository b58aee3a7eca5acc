"""A causal language model over packed rows (datasets/packing.py): its kernel, hidden states and token log-probs."""

import logging

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from general_preference.errors import InputError
from general_preference.models import attention as rows
from general_preference.models.config import learned_positions
from general_preference.models.kernels import choose_kernel
from general_preference.models.losses import can_fuse, linear_log_probs, load_balancing_loss, token_log_probs
from general_preference.models.multimodal import text_layers

logger = logging.getLogger(__name__)

# Parts in which token log-probs are computed where the LM head is not one whole matrix: a fixed number, because under
# ZeRO-3 every use of the LM head is a collective.
LOG_PROB_PARTS = 16


class PackedBackbone(nn.Module):
    """A causal LM that is run over rows of prompts and responses. `backbone` is the LM, or an adapter around it."""

    def __init__(self, backbone: nn.Module, attention: str = "auto"):
        """attention: one of `kernels.CHOICES`."""
        super().__init__()
        self.backbone = backbone
        self.attention, self._loaded_kernel = attention, self.config._attn_implementation
        self._chosen_for: tuple | None = None
        self.shares_prompts = rows.shares_prompts(self.config)

    @property
    def language_model(self) -> nn.Module:
        """The causal LM itself, below an adapter if there is one."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "peft_config") else self.backbone

    @property
    def text_layers(self) -> nn.Module:
        """What maps token ids to hidden states: the LM without its head, of a multimodal one the part for text."""
        return text_layers(self.language_model)

    @property
    def vocabulary_size(self) -> int:
        """Token ids that have an embedding: all below this."""
        embedding = self.language_model.get_input_embeddings()
        return getattr(embedding, "base_layer", embedding).num_embeddings

    @property
    def config(self):
        """The text configuration of the backbone (hidden size, layers, attention implementation)."""
        return self.backbone.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the backbone."""
        return self.language_model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.language_model.get_input_embeddings().weight.device

    @property
    def learned_positions(self) -> int | None:
        """As `config.learned_positions`."""
        return learned_positions(self.config)

    def layout_on(self, device: torch.device | None = None) -> rows.RowLayout:
        """Choose the attention kernel for `device` (default: the model's), dtype and mode; return its row layout.

        Raises:
            InputError: the kernel that was asked for cannot run there.
        """
        wanted = (self.device if device is None else device, self.dtype, self.training)
        if self._chosen_for != wanted:
            self.config._attn_implementation = choose_kernel(self.config, self.attention, self._loaded_kernel, *wanted)
            self._chosen_for = wanted
        return rows.row_layout(self.config, self.shares_prompts)

    def freeze_unused(self, language_model_head: bool) -> None:
        """Freeze the LM head when no regularizer uses it (a tied one is the embedding and stays).

        Raises:
            InputError: a regularizer would use an LM head that the checkpoint lacks.
        """
        if language_model_head and (made_up := getattr(self.language_model, "made_up", None)):
            raise InputError(f"the model's checkpoint has no {made_up}weight: train without a language-model loss")
        head, embedding = self.language_model.get_output_embeddings(), self.language_model.get_input_embeddings()
        if not language_model_head and head is not None and head.weight is not embedding.weight:
            head.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: torch.Tensor,
        shared: bool,
        response_ends: torch.Tensor,
        prompt_ends: torch.Tensor,
        sequences: rows.PackedSequences | None = None,
        targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        counted: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One pass over a `packing.Batch`, whose fields the arguments are.

        Returns what the model's `outputs` gives; with `counted` also aux_loss: scalar, see `load_balancing_loss`.
        """
        packed = (input_ids, position_ids, segments, shared, sequences)
        hidden, router_logits = self.hidden_states(*packed, routed=counted is not None)
        output = self.outputs(hidden, response_ends, prompt_ends, targets)
        if counted is not None:
            output["aux_loss"] = load_balancing_loss(router_logits, self.config.num_experts_per_tok, counted)
        return output

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: torch.Tensor,
        shared: bool,
        sequences: rows.PackedSequences | None = None,
        routed: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Run the layers over the rows (R, L) of a `packing.Batch`, whose fields the arguments are.

        Returns (R * L, hidden) last hidden states of the flattened rows; with `routed` also each layer's router logits.

        Raises:
            RuntimeError: rows packed for another kernel, or an architecture that drops `sequences`.
        """
        # Plain right-padded rows count their own positions; ALiBi models take no position_ids.
        options = {"position_ids": position_ids} if shared else {}
        if sequences is not None:
            if self.config._attn_implementation not in rows.KERNELS:
                raise RuntimeError("rows were packed for another kernel: collate with what layout_on returns now")
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # unused, but None would make one
            options["sequences"] = sequences
        elif shared and self.config._attn_implementation == rows.FLEX:
            mask = rows.block_mask(segments, position_ids)
        else:
            mask = rows.attention_mask(self.config, segments, position_ids, self.dtype, shared)
        if routed or getattr(self.config, "output_router_logits", False):
            options["output_router_logits"] = routed
        output = self.text_layers(input_ids=input_ids, attention_mask=mask, use_cache=False, **options)
        if sequences is not None and sequences.calls == 0:
            raise RuntimeError(f"{self.config.model_type} did not hand the sequences to its attention layers")
        return output.last_hidden_state.flatten(0, 1), output.router_logits if routed else None

    def sequence_log_probs(
        self, hidden: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed token log-probs of `count` sequences from the (R * L, hidden) of `hidden_states`.

        targets: (predict_positions, target_ids, sequence_index), each (T,): hidden state `predict_positions[t]`
        predicts token `target_ids[t]` of sequence `sequence_index[t]`.

        Returns log-probs in nats and token counts, each (count,) in fp32 or better.
        """
        predict_positions, target_ids, sequence_index = targets
        head = self.language_model.get_output_embeddings()
        # What some families (Cohere, Granite) do between their output layer and their logits.
        scale = (getattr(self.config, "logit_scale", None) or 1) / (getattr(self.config, "logits_scaling", None) or 1)
        predicting = hidden[predict_positions] if scale == 1 else hidden[predict_positions] * scale
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2
        if can_fuse(head) and not cap:
            log_probs = linear_log_probs(predicting, head.weight, target_ids)
        else:

            def of_part(hidden, target_ids):
                logits = head(hidden)
                return token_log_probs(cap * torch.tanh(logits / cap) if cap else logits, target_ids)

            parts = zip(*(tensor.tensor_split(LOG_PROB_PARTS) for tensor in (predicting, target_ids)), strict=True)
            log_probs = torch.cat([checkpoint(of_part, *part, use_reentrant=False) for part in parts])
        sums = torch.zeros(count, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        counts = sums.index_add(0, sequence_index, torch.ones_like(sequence_index, dtype=sums.dtype))
        return sums.index_add(0, sequence_index, log_probs.to(sums.dtype)), counts

    @torch.no_grad()
    def verify_shared_prompts(self) -> float:
        """Compare a shared-prompt row with separate rows; turn sharing off above 1e-4 (half precision: 1e-2).

        Returns the largest difference, relative to the largest hidden state.
        """
        prompt, first, second = (torch.arange(n, device=self.device) * 37 % self.config.vocab_size for n in (7, 5, 9))
        positions = torch.tensor([[*range(7), *range(7, 12), *range(7, 16)]], device=self.device)
        segments = torch.tensor([[0] * 7 + [1] * 5 + [2] * 9], device=self.device)
        mask = rows.attention_mask(self.config, segments, positions, self.dtype, True)
        together, alone = torch.cat([prompt, first, second])[None], torch.cat([prompt, second])[None]
        training, run = self.training, self.eval().text_layers
        shared = run(together, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        plain = run(alone, attention_mask=torch.ones_like(alone), use_cache=False).last_hidden_state
        self.train(training)
        difference = ((shared[0, 12:] - plain[0, 7:]).abs().max() / plain.abs().max()).item()
        limit = 1e-4 if self.dtype in (torch.float32, torch.float64) else 1e-2
        self.shares_prompts = self.shares_prompts and difference <= limit
        return difference

    def check_sharing(self, can_run: bool = True) -> None:
        """Verify shared prompts for an architecture outside `attention.VERIFIED`; where the layers cannot run now
        (partitioned weights), they are not shared."""
        reason = "no exact shared-prompt mask"
        if self.shares_prompts and self.config.model_type not in rows.VERIFIED:
            self.shares_prompts = can_run
            reason = f"shared prompts differ by {self.verify_shared_prompts():.1e}" if can_run else "not verified"
            logger.info("%s: %s", self.config.model_type, reason)
        if not self.shares_prompts:
            logger.info("%s: responses are run as separate sequences (%s)", self.config.model_type, reason)

"""RemotePreference: a preference model on an inference server, asked over HTTP; it answers as `GPMPipeline` does.

rm = RemotePreference("http://localhost:8000", "folder or hub name of the served model")
rm.compare(prompt, first, second), rm.preference_matrix(prompt, responses), rm.rank(...), rm.score(...)

Texts become token ids here, with the model's own tokenizer and settings, and no weights are loaded. The server runs the
backbone and its heads (head_server.py): on the prompt with each of K responses and, for the gate, on the prompt alone.
What makes scores of their numbers is the code of every other model.
"""

import os

import torch

from general_preference.datasets.tokenization import load_tokenizer
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.head_server import HeadServer
from general_preference.inference.inputs import check_keywords
from general_preference.inference.scorer import PreferenceScorer
from general_preference.models.config import PreferenceConfig, learned_positions, load_config, resolve
from general_preference.models.heads import trained_preference
from general_preference.models.score import gate_weights, head_embedding

KEY_VARIABLE = "GPM_API_KEY"


@check_keywords
class RemotePreference(PreferenceScorer):
    """Scores, compares and ranks responses with a model that vLLM or SGLang serves.

    Nothing stays open between calls. A fault of the server is a RunError of one line, never a number.
    """

    def __init__(
        self,
        url: str,
        model: str | os.PathLike,
        *,
        served_model: str | None = None,
        api: str = "auto",
        api_key: str | None = None,
        timeout: float = 300.0,
        batch_size: int = 128,
        max_length: int | None = None,
        tau: float | None = None,
        trust_remote_code: bool = False,
    ):
        """Read the tokenizer and settings of `model`; the server is asked with the first comparison.

        Args:
            url: of the server, such as "http://localhost:8000". model: folder or hub name of what it serves, or of the
                trained model which that was exported from.
            served_model: the model's name there; None if the server has only one.
            api: "classify" (POST /classify, vLLM), "embeddings" (POST /v1/embeddings, vLLM and SGLang), or "auto":
                "embeddings" for a model in the layout of sentence-transformers.
            api_key: default the environment variable GPM_API_KEY.
            timeout: seconds without an answer to a request. batch_size: sequences in one, at most.
            max_length, tau: as for `GPMPipeline`.

        Raises:
            InputError (a ValueError): no such model, no httpx, or an argument that cannot be used.
        """
        path, options = os.path.expanduser(model), {"trust_remote_code": trust_remote_code}
        config = load_config(path, **options)
        if os.path.isdir(path) or not hasattr(config, "preference"):
            preference = trained_preference(path, **options, temperature=tau)
        else:  # on the hub: looking at the heads' tensors would download all weights
            preference = PreferenceConfig.from_dict(config.preference)
            preference.check(path, temperature=tau)
        if api == "auto":
            api = "classify" if resolve(path, "modules.json") is None else "embeddings"
        width = preference.dim + preference.planes * preference.prompt_gate
        # Exports say "regression", for which vLLM has no activation, asked for or not; rewards of others have one.
        sigmoid = preference.head == "bt" and config.problem_type != "regression" and api == "classify"
        key = api_key or os.environ.get(KEY_VARIABLE)
        self.server = HeadServer(url, api, served_model, width, key, timeout, batch_size, sigmoid)
        text = config.get_text_config()
        self._hidden_size, limits = text.hidden_size, (learned_positions(text), text.vocab_size)
        self._prepare(preference, load_tokenizer(path, **options), limits, max_length)

    def _embed_rows(self, rows: list[dict]) -> list[EmbeddedPrompt]:
        self.cut.report(self.max_length)
        preference, gated = self.preference, self.preference.prompt_gate
        prompts = [tuple(row["prompt_ids"]) for row in rows]
        asked = [[(*prompt, *ids) for ids in row["response_ids"]] for prompt, row in zip(prompts, rows, strict=True)]
        sequences = list(dict.fromkeys(ids for some in [*asked, prompts * gated] for ids in some))  # equal ones tie
        found = dict(zip(sequences, self.server.outputs(sequences), strict=True))
        embedded = []
        for prompt, some in zip(prompts, asked, strict=True):
            outputs = torch.stack([found[ids][: preference.dim] for ids in some])
            embeddings = head_embedding(outputs, preference.normalize, preference.reward_offset)
            logits = found[prompt][preference.dim :] if gated else None
            gate = None if logits is None else gate_weights(logits, preference.gate, self._hidden_size)
            embedded.append(EmbeddedPrompt(embeddings, None, gate))
        return embedded

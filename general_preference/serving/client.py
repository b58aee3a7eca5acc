"""PreferenceClient: the model of a preference server, asked over HTTP; it answers as `GPMPipeline` does.

rm = PreferenceClient("http://localhost:8000")
rm.compare(prompt, first, second), rm.preference_matrix(prompt, responses), rm.rank(...), rm.score(...), rm.show(...)

Neither weights nor a tokenizer are needed here. `RemotePreference` asks vLLM and SGLang.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from general_preference.errors import InputError, RunError
from general_preference.inference.asking import ask, check_address, connect
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.inputs import check_keywords
from general_preference.inference.remote import KEY_VARIABLE
from general_preference.inference.scorer import PreferenceScorer, Prompt, Response, read_groups
from general_preference.models.config import PreferenceConfig

_AT_ONCE = 32  # requests of one call that are under way together
_CURES = {
    413: "send fewer responses at once, or raise the server's limit",
    422: "change what is sent, or the server's limit",
    404: "correct the url",
}


@check_keywords
class PreferenceClient(PreferenceScorer):
    """Scores, compares and ranks responses with the model of a preference server; picklable.

    Nothing stays open between calls. A fault of the server is a RunError of one line, never a number.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 300.0):
        """Nothing is asked yet.

        Args:
            url: of the server, such as "http://localhost:8000".
            api_key: default the environment variable GPM_API_KEY. timeout: seconds without an answer to a request.

        Raises:
            InputError (a ValueError): no httpx, or an argument that cannot be used.
        """
        if timeout <= 0:
            raise InputError(f"timeout is {timeout}, expected more than 0")
        self.api_key, self.timeout = api_key or os.environ.get(KEY_VARIABLE), timeout
        self.url = check_address(url, self.api_key)

    @functools.cached_property
    def preference(self) -> PreferenceConfig:
        """Head, gate and temperature of the served model."""
        with connect(self.url, self.api_key, self.timeout) as client:
            answer = self._ask(client, "GET", "/model")
        if not isinstance(answer, dict) or "preference" not in answer:
            raise RunError(f"{self.url}/model names no preference: is the url that of a preference server?")
        return PreferenceConfig.from_dict(answer["preference"])

    def embed(self, prompts: list[Prompt], responses: list[list[Response]]) -> list[EmbeddedPrompt]:
        """As `PreferenceScorer.embed`; each prompt is a request, and those of one call are under way together."""
        read = read_groups(prompts, responses)
        bodies = [{"prompt": prompt, "responses": some, "return_embeddings": True} for prompt, some in read]
        with (
            connect(self.url, self.api_key, self.timeout, _AT_ONCE) as client,
            ThreadPoolExecutor(min(_AT_ONCE, max(len(bodies), 1))) as threads,
        ):
            answers = list(threads.map(lambda body: self._ask(client, "POST", "/compare", json=body), bodies))
        return [self._embedded(answer, len(body["responses"])) for answer, body in zip(answers, bodies, strict=True)]

    def _embedded(self, answer, count: int) -> EmbeddedPrompt:
        preference = self.preference
        try:
            embeddings = torch.tensor(answer["embeddings"], dtype=torch.float32)
            gate = torch.tensor(answer["gate"], dtype=torch.float32) if preference.prompt_gate else None
            fits = embeddings.shape == (count, preference.dim) and (gate is None or gate.shape == (preference.planes,))
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits or not torch.isfinite(embeddings).all():
            place = f"{self.url}/compare"
            raise RunError(f"{place} answers no embeddings of its model for {count} responses: has it changed?")
        return EmbeddedPrompt(embeddings, None, gate)

    def _ask(self, client, method: str, route: str, **options):
        kind, less = "a preference server", "send fewer responses at once"
        return ask(client, method, self.url, route, self.timeout, _CURES, kind, less, **options)

"""What the heads of a served model say: token ids in, numbers out over HTTP, and every fault of the server by name.

Called by remote.py. Needs httpx.
"""

from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from general_preference.errors import InputError, NonFiniteError, RunError
from general_preference.inference.asking import ask, check_address, connect

APIS = {"classify": ("/classify", "probs"), "embeddings": ("/v1/embeddings", "embedding")}  # route, numbers' field
_CLOSE = 1e-4  # several rows that are all this close to what an activation makes are so by no accident
_CURES = {
    400: "lower max_length, or change what the server was started with",
    404: "set served_model, or api to the other of classify and embeddings",
}
_ACTIVATIONS = {
    "softmax": 'rows sum to 1, as after a softmax: have it heed use_activation false, or set api to "embeddings"',
    "normalization": "rows have norm 1: have it heed use_activation false, or turn off its normalization",
    "sigmoid": "all lie in [0, 1], as after a sigmoid: have it heed use_activation false, or name the export here",
}


@dataclass
class HeadServer:
    """A server (vLLM, SGLang) that answers D + P numbers of the heads at the last token of a sequence.

    url:          without a route. api: one of APIS. api_key: sent as a bearer token.
    served_model: the model's name there; None is looked up, where there is only one.
    width:        D + P, or D without a gate
    timeout:      seconds of silence while an answer is awaited. batch_size: sequences in one, at most.
    sigmoid:      vLLM would apply one to this model unless told not to, so numbers from 0 to 1 are asked for twice
    """

    url: str
    api: str
    served_model: str | None
    width: int
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    batch_size: int = 128
    sigmoid: bool = False

    def __post_init__(self):
        if self.api not in APIS:
            raise InputError(f"unknown api {self.api!r}: choose auto, {', '.join(APIS)}")
        for name in ("timeout", "batch_size"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected more than 0")
        self.url = check_address(self.url, self.api_key).removesuffix("/v1")

    def outputs(self, sequences: list[tuple[int, ...]]) -> torch.Tensor:
        """(N, width) numbers in fp32 for N sequences of token ids, in their order.

        Raises:
            RunError: no answer, or one that is not the heads' numbers. NonFiniteError: NaN or infinity.
        """
        if not sequences:
            return torch.empty(0, self.width)
        with connect(self.url, self.api_key, self.timeout) as client:
            self.served_model = self.served_model or self._only_model(client)
            starts = tqdm(range(0, len(sequences), self.batch_size), desc="embedding", delay=2)
            outputs = torch.cat([self._numbers(client, sequences[at : at + self.batch_size]) for at in starts])
            if self._activation(outputs):
                self._refuse_activation(client, sequences, outputs)
        return outputs

    def _activation(self, outputs: torch.Tensor) -> str | None:
        """What these rows look as if they had gone through, in the words of _ACTIVATIONS; None for raw numbers."""
        within = outputs.min() >= -_CLOSE and outputs.max() <= 1 + _CLOSE
        if within and (outputs.sum(dim=-1) - 1).abs().max() < _CLOSE:
            return "softmax"
        if (outputs.norm(dim=-1) - 1).abs().max() < _CLOSE:
            return "normalization"
        return "sigmoid" if within and self.sigmoid else None

    def _refuse_activation(self, client, sequences: list[tuple[int, ...]], outputs: torch.Tensor) -> None:
        """RunError if an activation made these numbers; whether they look so by accident, those of prefixes tell."""
        prefixes = (ids[:end] for ids in sequences for end in (1, len(ids) // 2, len(ids) - 1) if end > 0)
        more = list(dict.fromkeys(prefixes))[: self.batch_size] or sequences[:1]
        numbers = self._numbers(client, more)
        found = self._activation(torch.cat([outputs, numbers]))
        if found == "sigmoid" and not torch.allclose(self._numbers(client, more, True), numbers, atol=_CLOSE):
            return  # rewards from 0 to 1
        if found:
            raise RunError(f"{self.url} does not answer the heads' own numbers, since {_ACTIVATIONS[found]}")

    def _only_model(self, client) -> str:
        answer = self._ask(client, "GET", "/v1/models")
        try:
            names = [one["id"] for one in answer["data"]]
        except (KeyError, TypeError) as error:
            raise RunError(f"{self.url}/v1/models names no models: set served_model") from error
        if len(names) != 1:
            raise InputError(f"{self.url} serves {len(names)} models ({', '.join(names)}): set served_model to one")
        return names[0]

    def _numbers(self, client, sequences: list[tuple[int, ...]], use_activation: bool = False) -> torch.Tensor:
        """(N, width) from one request; `use_activation` asks vLLM for probabilities or unit vectors in their place."""
        route, name = APIS[self.api]
        body = {"model": self.served_model, "input": sequences, "use_activation": use_activation}
        answer, place = self._ask(client, "POST", route, json=body), self.url + route
        try:
            rows = [(one["index"], one[name]) for one in answer["data"]]
            order, widths = sorted(index for index, _ in rows), {len(row) for _, row in rows}
            read = (answer.get("usage") or {}).get("prompt_tokens")
            numbers = all(type(value) in (int, float) for _, row in rows for value in row)
        except (KeyError, TypeError, AttributeError):
            numbers = False
        if not numbers:
            raise RunError(f"{place} answers no data with index and {name}: is the url that of vLLM or SGLang?")
        if order != list(range(len(sequences))):
            found = f"{len(order)} rows, {len(set(order))} of them different, to {len(sequences)} sequences"
            raise RunError(f"{place} answers {found}: expected one for each")
        if wrong := widths - {self.width}:
            cure = "serve an export of the model that is named here"
            raise RunError(f"{place} answers {min(wrong)} numbers a sequence, the heads have {self.width}: {cure}")
        if read and read != (sent := sum(map(len, sequences))):
            raise RunError(f"{place} read {read} tokens, but {sent} were sent: have it cut nothing and add nothing")
        outputs = torch.tensor([row for _, row in sorted(rows)], dtype=torch.float32)
        if not torch.isfinite(outputs).all():
            raise NonFiniteError(f"{place} answers numbers that are not finite: serve the model in bfloat16 or float32")
        return outputs

    def _ask(self, client, method: str, route: str, **options):
        """The JSON of the server's answer."""
        kind = "vLLM or SGLang"
        return ask(client, method, self.url, route, self.timeout, _CURES, kind, "lower batch_size", **options)

"""What requests look like: this package's own, rerankers', and those of OpenRLHF, slime and NeMo Gym.

Fields that no one reads are refused by name. What prompts and responses hold is checked where they are tokenized.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

MODES = ("win_rate", "nash", "score", "planes")

_MESSAGES = {"type": "array", "items": {"type": "object"}}
Text = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _MESSAGES]})]  # or messages
Document = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]  # or {"text": ...}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class CompareRequest(_Strict):
    """K responses to one prompt."""

    prompt: Text = Field(description="text of a user, or messages")
    responses: list[Text] = Field(min_length=1, description="texts of an assistant, or messages that follow the prompt")
    mode: Literal[MODES] | None = Field(None, description="what `rewards` are; default as the server was started")
    return_embeddings: bool = False


class GymCompareRequest(_Strict):
    """The same as NeMo Gym sends it."""

    conversation_history: list[dict] = Field(min_length=1)
    response_objs: list[dict] = Field(min_length=1, description="objects of OpenAI's Responses API")
    principle: str | None = None


def _kind(body: object) -> str:
    gym = isinstance(body, dict) and body.keys() & {"conversation_history", "response_objs", "principle"}
    return "NeMo Gym" if gym else "compare"


AnyCompareRequest = Annotated[
    Annotated[CompareRequest, Tag("compare")] | Annotated[GymCompareRequest, Tag("NeMo Gym")], Discriminator(_kind)
]


class RerankRequest(_Strict):
    """Documents as responses to a query, as Jina and vLLM (/v1/rerank) and Cohere (/v2/rerank) have it."""

    model: str | None = None
    query: Text
    documents: list[Document] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class TextsRequest(_Strict):
    """The same as Hugging Face's text-embeddings-inference has it."""

    query: Text
    texts: list[str] = Field(min_length=1)
    raw_scores: bool = Field(False, description="the mean score against the others, a logit, instead of a probability")
    return_text: bool = False
    truncate: bool | None = Field(None, description="false: refuse what does not fit instead of cutting it")


class GroupPlace(_Strict):
    """Which sample of which group this is."""

    id: str | int
    size: int
    index: int
    attempt: int = Field(0, ge=0)


class SampleLabel(_Strict):
    """What the label of a sample must say: with what it is compared, and its prompt in plain messages."""

    messages: list[dict] | None = None
    prompt: Text | None = None
    response: Text | None = None
    group: GroupPlace | None = None
    reference: Text | None = None


class SampleRequest(_Strict):
    """One sample, as slime sends it."""

    prompt: Text
    response: Text
    label: Any = None


class SamplesRequest(_Strict):
    """Samples, as OpenRLHF sends them: each query is the prompt and the response in the policy's chat template."""

    query: list[str] = Field(min_length=1)
    prompts: list[str] | None = None
    labels: list[Any] | None = None


class VerifyRequest(BaseModel):
    """One sample, as NeMo Gym sends it; every other field comes back as it was."""

    model_config = ConfigDict(extra="allow", strict=True)

    responses_create_params: dict
    response: dict
    group: str | int = Field(alias="_ng_group_id", description="of its own for each prompt's occurrence and run")
    attempt: int = Field(0, alias="_ng_group_attempt", ge=0)
    index: int = Field(alias="_ng_rollout_index")
    group_size: int | None = Field(None, description="default as the server was started")
    principle: str | None = None

"""What requests look like: this package's own, rerankers', and those of OpenRLHF, slime and NeMo Gym.

Fields that no one reads are refused by name. Prompts and responses are checked by `datasets.messages`, as everywhere.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

MODES = ("win_rate", "nash", "score", "planes")

_MESSAGES = {"type": "array", "items": {"type": "object"}}
Text = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _MESSAGES]})]  # or messages
_Group = Annotated[str | int, Field(union_mode="left_to_right")]


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

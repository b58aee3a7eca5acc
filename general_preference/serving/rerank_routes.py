"""Reranking in the three shapes that clients speak. A document's relevance is relative to the others of its list."""

import os
import uuid

from fastapi import FastAPI, Response

from general_preference.errors import InputError
from general_preference.serving.batching import count_tokens
from general_preference.serving.protocol import RerankRequest, TextsRequest
from general_preference.serving.refusal import Refused
from general_preference.serving.service import PreferenceService

MEANING = "mean probability of winning against the other documents of this list"
_HEADER = "X-Relevance-Score"


def add_reranking(app: FastAPI, service: PreferenceService) -> None:
    """The routes /rerank, /v1/rerank and /v2/rerank."""

    async def ranked(query, texts: list, name: str, mode: str = "win_rate", cut: bool = True) -> tuple[list, int]:
        """[(index, score), ...], the best first, and the tokens that were read."""
        row = await service.row(query, texts, name)
        if not cut and (row["prompt_cut"] or row["response_cut"]):
            raise Refused(413, f"query and {name} exceed {service.encoder.max_length} tokens, and truncate is false")
        scores = await service.rewards(await service.embed_row(row), mode)
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return [(index, scores[index]) for index in order], count_tokens(row)

    async def results(body: RerankRequest) -> tuple[list[dict], int]:
        check_model(body.model, service.arguments.model)
        texts = [_text(one, f"documents[{index}]") for index, one in enumerate(body.documents)]
        found, tokens = await ranked(body.query, texts, "documents")
        rows = [{"index": index, "relevance_score": score} for index, score in found[: body.top_n]]
        if body.return_documents:
            rows = [row | {"document": {"text": texts[row["index"]]}} for row in rows]
        return rows, tokens

    @app.post("/rerank", tags=["rerank"])
    async def rerank(body: TextsRequest, response: Response) -> list[dict]:
        """As text-embeddings-inference; `score` is a text's mean probability of winning against the others."""
        response.headers[_HEADER] = MEANING.replace("probability of winning", "score") if body.raw_scores else MEANING
        mode = "score" if body.raw_scores else "win_rate"
        found, _ = await ranked(body.query, body.texts, "texts", mode, body.truncate is not False)
        texts = [{"text": body.texts[index]} if body.return_text else {} for index, _ in found]
        return [{"index": index, "score": score} | text for (index, score), text in zip(found, texts, strict=True)]

    @app.post("/v1/rerank", tags=["rerank"])
    async def rerank_v1(body: RerankRequest, response: Response) -> dict:
        """As Jina and vLLM; `relevance_score` is relative to the list of documents."""
        response.headers[_HEADER] = MEANING
        rows, tokens = await results(body)
        return {
            "model": service.arguments.model,
            "usage": {"total_tokens": tokens},
            "results": rows,
            "relevance_score": MEANING,
        }

    @app.post("/v2/rerank", tags=["rerank"])
    async def rerank_v2(body: RerankRequest, response: Response) -> dict:
        """As Cohere; `relevance_score` is relative to the list of documents."""
        response.headers[_HEADER] = MEANING
        rows, tokens = await results(body)
        meta = {"api_version": {"version": "2"}, "tokens": {"input_tokens": tokens}, "relevance_score": MEANING}
        return {"id": str(uuid.uuid4()), "results": rows, "meta": meta}


def check_model(asked: str | None, served: str) -> None:
    """Refuse a request for another model: its numbers would be taken for that model's."""
    if asked not in (None, served, os.path.basename(os.path.normpath(served))):
        raise Refused(404, f"model {asked!r} is not served here, but {served!r} is")


def _text(document: object, name: str) -> str:
    text = document.get("text") if isinstance(document, dict) and document.keys() == {"text"} else document
    if not isinstance(text, str):
        raise InputError(f'{name} is no text and no {{"text": ...}}')
    return text

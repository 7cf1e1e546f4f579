"""An endpoint that sees what the small dataset's people wear, and the weight that an evaluation learned for it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ceca.config import EvaluateConfig, OpenAIConfig
from ceca.data.store import Store
from ceca.evaluation.evaluation import result_name
from ceca.settings import to_mapping
from tests.endpoint import completion, digest_of
from tests.serve.dataset import COLOURS, draw_person

OMEGA = 0.3


class Looks:
    """Reply of a chat server: whether a person of `draw_person` fits a claim.

    Args:
        count: number of people that it knows.
    """

    def __init__(self, count: int):
        self.people = {hashlib.sha256(draw_person(number)).hexdigest()[:12]: number for number in range(count)}
        self.seconds = 0.0  # delay of an answer
        self.silent: set[int] = set()  # numbers of people; questions about them get no answer
        self.away = False  # behind a gateway that says so
        self.asked: Counter[tuple[int, str]] = Counter()  # (person, attribute) → number of questions

    async def __call__(self, body: dict[str, Any], request: Request) -> Response:
        number = self.people[digest_of(body)]
        ((attribute, schema),) = body["response_format"]["json_schema"]["schema"]["properties"].items()
        self.asked[number, attribute] += 1
        if self.away:
            return Response("no backend", 503)
        await asyncio.sleep(60 if number in self.silent else self.seconds)
        value, denied, unknown = schema["enum"]
        seen = wears(number).get(attribute)
        said = unknown if seen is None else value if seen == value else denied
        return completion(json.dumps({attribute: said}))


def wears(number: int) -> dict[str, str]:
    """What a person of `draw_person` wears."""
    upper, lower = COLOURS[number % len(COLOURS)], COLOURS[(3 * number + 1) % len(COLOURS)]
    return {"upper_kind": "shirt", "upper_colour": upper, "lower_kind": "trousers", "lower_colour": lower}


def publish_weight(store: Store, digest: str, endpoint: OpenAIConfig, weight: float) -> None:
    """What `ceca evaluate --rerank-engine openai` publishes of the weight that it learned."""
    config = EvaluateConfig(rerank_engine="openai", openai=endpoint)
    evaluation = {"omega": OMEGA, "config": to_mapping(config), "reranking": {"weight": weight}}
    store.write_json(evaluation, "evaluations", digest, f"{result_name(config)}.json")

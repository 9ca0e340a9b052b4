"""Rows to try a job on: three kinds of request that load a machine differently, made from word lists with a fixed seed.

- classify: one long instruction with examples, shared by all, a short review, an answer of a few tokens: all prefill.
- summarize: a paragraph of its own, an answer of a sentence: balanced.
- write: a short question, a long open answer: all decode.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.manifest import replacing

DEFAULT_ROWS = 240
_SEED = 20
_MAX_TOKENS = {"classify": 4, "summarize": 32, "write": 80}

_CLASSIFY = """You sort customer reviews for an online shop. Read the review and answer with one word: positive, \
negative or mixed. Judge what the customer says about the product, not about the shop, the price or the delivery. A \
review that praises one thing and complains about another is mixed. A question without an opinion is mixed as well.

Review: The kettle boils fast and looks lovely on the counter.
Answer: positive
Review: It broke after two days and the handle gets far too hot.
Answer: negative
Review: Great sound, but the battery hardly lasts an afternoon.
Answer: mixed
Review: My daughter won't put it down. We have ordered a second one.
Answer: positive
Review: The colour in the picture has nothing to do with what arrived.
Answer: negative
Review: Comfortable to wear, although the left strap came loose in the first week.
Answer: mixed

Review: {review}
Answer:"""

_PRODUCTS = (
    "lamp",
    "backpack",
    "blender",
    "keyboard",
    "tent",
    "jacket",
    "coffee grinder",
    "desk chair",
    "bicycle pump",
)
_PRAISE = (
    "works exactly as promised",
    "feels solid in the hand",
    "was easy to put together",
    "has made our mornings simpler",
    "is lighter than the old one",
    "still looks new after a year",
)
_COMPLAINTS = (
    "started to rattle within a week",
    "smells of plastic",
    "has a button that sticks",
    "scratches far too easily",
    "is much smaller than it looks",
    "stopped working in the rain",
)
_TOWNS = ("Aldersund", "Marrow Bay", "Fenwick", "Oststad", "Lower Quill", "Tarn Hollow", "Brightmoor", "Calder")
_PROJECTS = (
    "a tram line along the river",
    "a library in the old mill",
    "a market hall with a glass roof",
    "a solar field behind the station",
    "a swimming pool heated by waste heat",
    "a workshop where people mend what is broken",
)
_REASONS = (
    "because the old one could no longer be repaired",
    "after a vote in which nearly two thirds were in favour",
    "although a group of shop owners had asked for more time",
    "once a regional fund agreed to carry half of the cost",
    "to give young families a reason to stay",
)
_EFFECTS = (
    "The mayor expects about {n} visitors a week in the first year.",
    "Work is to begin in spring and to last {n} weeks.",
    "Some {n} trees will be planted along the new paths.",
    "An engineer who reviewed the plans found {n} points to improve, most of them small.",
    "Local schools have already booked {n} visits for the opening month.",
    "The council set aside a reserve in case prices rise by more than {n} percent.",
)
_TOPICS = (
    "the sea at night",
    "learning to cook for the first time",
    "a clock that runs backwards",
    "how bridges are built",
    "a week without a telephone",
    "the first day of autumn",
    "why maps are drawn with north at the top",
    "a garden on a roof",
    "a lighthouse keeper's last winter",
    "what happens to a letter after it is posted",
    "baking bread for a whole village",
    "the oldest tree in the park",
)
_FORMS = (
    "Write a short story about {topic}.",
    "Explain {topic} to a curious ten-year-old.",
    "Write a friendly letter to a neighbour about {topic}.",
    "Give a list of ideas for a talk about {topic} and explain each.",
    "Write a poem about {topic}.",
    "Write a conversation between two friends about {topic}.",
    "Describe {topic} for a radio programme.",
)


def make_rows(num_rows: int) -> list[dict[str, Any]]:
    """The rows: id, kind, product, prompt, max_tokens. Half classify, three tenths summarize, the rest write."""
    chance = random.Random(_SEED)  # noqa: S311 - reproducible sample text
    num_classify, num_summarize = num_rows // 2, num_rows * 3 // 10
    kinds = ["classify"] * num_classify + ["summarize"] * num_summarize
    kinds += ["write"] * (num_rows - len(kinds))
    chance.shuffle(kinds)
    rows = []
    for number, kind in enumerate(kinds):
        product = chance.choice(_PRODUCTS)
        prompt = {"classify": _review, "summarize": _paragraph, "write": _question}[kind](chance, product)
        rows.append(
            {
                "id": f"{kind}-{number:04d}",
                "kind": kind,
                "product": product if kind == "classify" else None,
                "prompt": prompt,
                "max_tokens": _MAX_TOKENS[kind],
            }
        )
    return rows


def _review(chance: random.Random, product: str) -> str:
    parts = chance.sample(_PRAISE, 2) if chance.random() < 0.4 else [chance.choice(_PRAISE), chance.choice(_COMPLAINTS)]
    if chance.random() < 0.4:
        parts = chance.sample(_COMPLAINTS, 2)
    return _CLASSIFY.format(review=f"The {product} {parts[0]}, and it {parts[1]}.")


def _paragraph(chance: random.Random, _product: str) -> str:
    town, project, reason = chance.choice(_TOWNS), chance.choice(_PROJECTS), chance.choice(_REASONS)
    effects = [text.format(n=chance.randint(12, 480)) for text in chance.sample(_EFFECTS, 3)]
    story = f"The council of {town} has decided to build {project}, {reason}. " + " ".join(effects)
    return f"Summarize this news item in one sentence.\n\n{story}"


def _question(chance: random.Random, _product: str) -> str:
    return chance.choice(_FORMS).format(topic=chance.choice(_TOPICS))


def write(path: Path, num_rows: int = DEFAULT_ROWS) -> dict[str, int]:
    """Write the rows as Parquet; returns how many there are of each kind."""
    rows = make_rows(num_rows)
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("kind", pa.string()),
            ("product", pa.string()),
            ("prompt", pa.string()),
            ("max_tokens", pa.int32()),
        ]
    )
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    return {kind: sum(row["kind"] == kind for row in rows) for kind in _MAX_TOKENS}

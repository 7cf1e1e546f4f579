"""Real vLLM on CPU, with a tiny model of random weights. Its answers are noise.

The engine starts once (20-40 s), holds all conversations and closes. The tests then read the record.
"""

import asyncio
import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from ceca.config import VLLMConfig
from ceca.dialogue import understanding
from ceca.dialogue.attributes import PERSON, UNKNOWN, denied, read_attributes
from ceca.dialogue.conversation import (
    QUESTIONS,
    SUMMARY_REQUEST,
    Answer,
    Dialogue,
    DialogueError,
    EngineDied,
    Subject,
    Turn,
    converse,
)
from ceca.dialogue.tiny import make_tiny_vlm
from ceca.dialogue.verdicts import TOKENS, Claim, judge, wording
from ceca.dialogue.vllm import CPU_BLOCK, VLLMEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ANSWER_TOKENS, SUMMARY_TOKENS, MAX_MODEL_LEN = 16, 24, 1024
MAX_PIXELS = 64 * 28 * 28
CHOICES = {"gender": ("woman", "man"), "hat": ("none", "cap")}
CLAIMS = (Claim("hat", "cap"), Claim("upper_colour", "red"), Claim("shoes_kind", "leather shoes"))
SIZES = ((64, 160), (64, 160), (48, 128), (96, 200), (30, 75), (500, 1200))  # the last one exceeds the pixel budget


def draw(number: int, size: tuple[int, int] = (64, 160)) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


SUBJECTS = tuple(Subject(f"image-{number}", draw(number, size)) for number, size in enumerate(SIZES))


@dataclass
class Record:
    """Answers of the engine, and the processes it started."""

    dialogues: list[Dialogue] = field(default_factory=list)
    again: list[Dialogue] = field(default_factory=list)  # same images, other ids: nothing is in the cache
    turn_by_turn: list[Answer] = field(default_factory=list)
    structured: Dialogue | None = None
    verdicts: list[str] = field(default_factory=list)
    judged: Answer | None = None  # the answer to a further claim about the same image
    read: Answer | None = None  # a searcher's words about the same image
    failures: dict[str, DialogueError] = field(default_factory=dict)
    after_failures: Answer | None = None
    forgotten: list[Answer] = field(default_factory=list)  # two turns; between them vLLM drops all images
    died: EngineDied | None = None  # when a process that prepares images was killed
    processes: list[psutil.Process] = field(default_factory=list)
    guard_exit: int | None = None


async def hold_all(engine: VLLMEngine, record: Record) -> None:
    async def talk(subject: Subject) -> Dialogue:
        lengths = {"answer_tokens": ANSWER_TOKENS, "summary_tokens": SUMMARY_TOKENS}
        return await converse(engine, subject, questions=5, **lengths)

    record.dialogues = await asyncio.gather(*map(talk, SUBJECTS))
    for subject in SUBJECTS:
        record.again.append(await talk(Subject(f"again-{subject.image_id}", subject.image)))

    alone, history = Subject("alone", draw(99)), []
    for question in (*QUESTIONS, SUMMARY_REQUEST):
        record.turn_by_turn.append(await engine.answer(alone, history, question, ANSWER_TOKENS))
        history.append(Turn(question, record.turn_by_turn[-1].text))

    lengths = {"answer_tokens": ANSWER_TOKENS, "summary_tokens": SUMMARY_TOKENS, "attribute_tokens": 200}
    subject = Subject("structured", draw(98))
    record.structured = await converse(engine, subject, questions=1, choices=CHOICES, **lengths)

    subject = Subject("judged", draw(97, SIZES[-1]))
    record.verdicts = [await judge(engine, subject, claim) for claim in CLAIMS[:2]]
    choices = {CLAIMS[2].attribute: (CLAIMS[2].value, denied(CLAIMS[2].value))}
    record.judged = await engine.answer(subject, (), wording(CLAIMS[2]), TOKENS, choices)
    request = understanding.wording("no, the bag was darker", "What is the person carrying, if anything?")
    record.read = await engine.answer(subject, (), request, understanding.TOKENS, PERSON)

    unusable = {
        "too long": (alone, [Turn("Why?", "because " * 2000)]),
        "not an image": (Subject("nope", b"nope"), []),
        "refused shape": (Subject("line", draw(1, (4, 1000))), []),
    }
    for name, (subject, history) in unusable.items():
        with pytest.raises(DialogueError) as caught:
            await engine.answer(subject, history, QUESTIONS[0], ANSWER_TOKENS)
        record.failures[name] = caught.value
    record.after_failures = await engine.answer(alone, [], QUESTIONS[0], ANSWER_TOKENS)

    subject, history = Subject("forgotten", draw(99)), []
    for question in QUESTIONS[:2]:
        record.forgotten.append(await engine.answer(subject, history, question, ANSWER_TOKENS))
        history.append(Turn(question, record.forgotten[-1].text))
        await engine.engine.reset_mm_cache()
        await engine.engine.reset_prefix_cache()

    for process in engine.preparer.pool._processes.values():
        process.kill()
    with pytest.raises(EngineDied) as died:
        await engine.answer(Subject("new", draw(96)), [], QUESTIONS[0], ANSWER_TOKENS)
    record.died = died.value


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def record(tiny: Path) -> Record:
    config = VLLMConfig(
        model=str(tiny), gpus=0, dtype="float32", max_model_len=MAX_MODEL_LEN, max_pixels=MAX_PIXELS, enforce_eager=True
    )
    config = dataclasses.replace(config, image_processes=1)  # without a GPU, a thread does it
    engine, record, here = VLLMEngine(config, temperature=0.0, seed=0), Record(), psutil.Process()
    before = set(here.children(recursive=True))

    async def run() -> None:
        await engine.start()
        try:
            record.processes = [child for child in here.children(recursive=True) if child not in before]
            await hold_all(engine, record)
        finally:
            await engine.close()
        assert engine.guard is not None
        record.guard_exit = engine.guard.returncode
        await engine.close()  # the second call does nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # start() sets it; the context restores the old value
        asyncio.run(run())
    return record


def test_every_conversation_is_complete(record):
    assert len(record.dialogues) == len(SUBJECTS)
    for dialogue in record.dialogues:
        assert [turn.question for turn in dialogue.turns] == list(QUESTIONS)
        assert all(turn.answer for turn in dialogue.turns)
        assert dialogue.summary


def test_tokens_are_counted(record):
    for dialogue in record.dialogues:
        assert dialogue.completion_tokens == 5 * ANSWER_TOKENS + SUMMARY_TOKENS
        assert dialogue.prompt_tokens > dialogue.cached_tokens > 0
    prompts = [answer.prompt_tokens for answer in record.turn_by_turn]
    assert prompts == sorted(set(prompts))  # each turn contains all earlier ones


def test_a_verdict_is_one_of_three_and_the_next_claim_about_an_image_finds_it_in_the_cache(record):
    assert len(record.verdicts) == 2
    assert set(record.verdicts) <= {"fits", "differs", "unseen"}
    answer = json.loads(record.judged.text)  # guided decoding ends it, although this model ends nothing itself
    assert answer["shoes_kind"] in ("leather shoes", "not leather shoes", UNKNOWN)
    assert not record.judged.cut_off
    assert record.judged.cached_tokens >= CPU_BLOCK


def test_a_searchers_words_are_read_whole_beside_the_image_from_the_cache(record):
    assert read_attributes(record.read.text, PERSON) is not None
    assert not record.read.cut_off
    assert record.read.cached_tokens >= CPU_BLOCK


def test_answers_at_the_length_limit_are_cut_off(record):
    """The tiny model never ends an answer before the limit."""
    assert all(answer.cut_off for answer in record.turn_by_turn)
    assert {dialogue.flags for dialogue in record.dialogues} == {("answer_cut_off", "summary_cut_off")}


def test_later_turns_come_from_the_prefix_cache(record):
    assert record.turn_by_turn[0].cached_tokens == 0
    assert record.turn_by_turn[-1].cached_tokens > 0.5 * record.turn_by_turn[-1].prompt_tokens
    cached = [answer.cached_tokens for answer in record.turn_by_turn]
    assert cached == sorted(cached)


def test_all_reusable_tokens_come_from_the_prefix_cache(record):
    before = record.turn_by_turn[0]
    for answer in record.turn_by_turn[1:]:
        reusable = (before.prompt_tokens + before.completion_tokens) // CPU_BLOCK * CPU_BLOCK
        assert answer.reusable_tokens == reusable
        assert answer.cached_tokens >= reusable - CPU_BLOCK  # the key and value of the last token are not computed
        before = answer


def test_a_structured_answer_follows_the_schema_with_any_weights(record):
    assert record.structured.attributes.keys() <= CHOICES.keys()
    assert all(value in CHOICES[name] for name, value in record.structured.attributes.items())
    assert "no_attributes" not in record.structured.flags


def test_greedy_answers_are_repeatable(record):
    """Answers are equal in parallel and in sequence, with and without the cache."""
    assert record.again == record.dialogues


def test_images_of_any_size_fit_the_pixel_budget(record):
    small, large = record.dialogues[4], record.dialogues[5]
    assert small.prompt_tokens < large.prompt_tokens
    assert large.prompt_tokens - small.prompt_tokens <= 6 * MAX_PIXELS // (28 * 28)


def test_an_overlong_conversation_rejects_its_image(record):
    assert record.failures["too long"].reason == "conversation_too_long"
    assert str(MAX_MODEL_LEN) in record.failures["too long"].detail


def test_undecodable_bytes_reject_their_image(record):
    assert record.failures["not an image"].reason == "not_an_image"


def test_an_image_that_the_model_refuses_is_rejected_with_its_cause(record):
    assert record.failures["refused shape"].reason == "refused_prompt"
    assert "ValueError" in record.failures["refused shape"].detail


def test_the_engine_continues_after_a_rejected_image(record):
    assert record.after_failures.text == record.turn_by_turn[0].text


def test_an_image_that_vllm_has_dropped_is_sent_again(record):
    assert [answer.text for answer in record.forgotten] == [answer.text for answer in record.turn_by_turn[:2]]
    assert record.forgotten[1].cached_tokens == 0


def test_a_killed_process_that_prepares_images_is_a_dead_engine_with_advice(record):
    assert "--vllm.image-processes" in str(record.died)


def test_closing_leaves_no_process(record):
    names = [" ".join(process.cmdline()) for process in record.processes if process.is_running()]
    assert record.processes
    assert [name for name in names if "resource_tracker" not in name] == []  # Python's tracker ends with this process
    assert record.guard_exit == 0

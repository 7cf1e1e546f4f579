"""Conversation: questions in the published order, and every turn sees all earlier turns. Choice of the engine."""

import asyncio
import hashlib
from typing import NamedTuple

import pytest

from ceca.config import DialogueConfig, OpenAIConfig, OracleConfig
from ceca.datasets.drawn import VOCABULARY
from ceca.dialogue.conversation import (
    PROMPT_VERSION,
    QUESTIONS,
    SUMMARY_REQUEST,
    Answer,
    Dialogue,
    DialogueError,
    EngineError,
    Subject,
    Turn,
    converse,
)
from ceca.dialogue.engines import generation_settings, make_engine
from ceca.dialogue.openai import OpenAIEngine
from ceca.dialogue.oracle import OracleEngine
from ceca.dialogue.supervised import Supervised
from ceca.dialogue.vllm import VLLMEngine

SUBJECT = Subject("one", b"image")


class Call(NamedTuple):
    """Arguments of an engine's answer()."""

    subject: Subject
    history: tuple[Turn, ...]
    question: str
    max_tokens: int


class Scripted:
    """Engine that answers with the given texts and records its calls."""

    model = "scripted"

    def __init__(self, *texts: str, cut_off: bool = False):
        self.texts, self.cut_off = list(texts), cut_off
        self.calls: list[Call] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def answer(self, subject, history, question, max_tokens, choices=None):
        self.calls.append(Call(subject, tuple(history), question, max_tokens))
        return Answer(self.texts.pop(0), prompt_tokens=10, cached_tokens=4, completion_tokens=3, cut_off=self.cut_off)


def talk(engine: Scripted, questions: int = 5) -> Dialogue:
    return asyncio.run(converse(engine, SUBJECT, questions=questions, answer_tokens=48, summary_tokens=128))


def test_questions_come_in_order_and_the_summary_last():
    engine = Scripted(*"abcde", "all of it")
    dialogue = talk(engine)
    assert [call.question for call in engine.calls] == [*QUESTIONS, SUMMARY_REQUEST]
    assert dialogue.turns == tuple(Turn(question, answer) for question, answer in zip(QUESTIONS, "abcde", strict=True))
    assert dialogue.summary == "all of it"


def test_every_turn_sees_the_image_and_all_earlier_turns():
    engine = Scripted(*"abcde", "s")
    dialogue = talk(engine)
    assert [call.history for call in engine.calls] == [dialogue.turns[:position] for position in range(6)]
    assert all(call.subject is SUBJECT for call in engine.calls)


@pytest.mark.parametrize("questions", [1, 3])
def test_fewer_questions_still_end_in_a_summary(questions):
    engine = Scripted(*"abcde"[:questions], "s")
    dialogue = talk(engine, questions)
    assert len(dialogue.turns) == questions
    assert engine.calls[-1].question == SUMMARY_REQUEST


def test_the_summary_may_be_longer_than_an_answer():
    engine = Scripted(*"abcde", "s")
    talk(engine)
    assert [call.max_tokens for call in engine.calls] == [48] * 5 + [128]


def test_tokens_are_counted_over_all_turns_and_cut_off_answers_flagged():
    dialogue = talk(Scripted(*"abcde", "s", cut_off=True))
    assert (dialogue.prompt_tokens, dialogue.cached_tokens, dialogue.completion_tokens) == (60, 24, 18)
    assert dialogue.flags == ("answer_cut_off", "summary_cut_off")
    assert talk(Scripted(*"abcde", "s")).flags == ()


def test_answers_are_stored_on_one_line():
    dialogue = talk(Scripted(" A man.\n\nShort  hair. ", *"bcde", "\tall\nof it"))
    assert dialogue.turns[0].answer == "A man. Short hair."
    assert dialogue.summary == "all of it"


@pytest.mark.parametrize("texts", [("a", " \n"), ("a", "b", "c", "d", "e", "")], ids=["an answer", "the summary"])
def test_an_empty_answer_rejects_the_image(texts):
    with pytest.raises(DialogueError) as caught:
        talk(Scripted(*texts))
    assert caught.value.reason == "empty_answer"
    assert "scripted" in caught.value.detail


def test_thoughts_stand_neither_in_the_history_nor_in_the_summary():
    engine = Scripted("<think>Hm.</think>a", *"bcde", "So it is.</think>A man.")
    dialogue = talk(engine)
    assert (dialogue.turns[0].answer, dialogue.summary) == ("a", "A man.")
    assert dialogue.flags == ("thoughts_removed",)
    assert engine.calls[1].history[0].answer == "a"


def test_thoughts_alone_reject_the_image_and_say_why():
    with pytest.raises(DialogueError, match=r"nothing but thoughts .*limit of 48 tokens") as caught:
        talk(Scripted("<think>Is it a man? It", cut_off=True))
    assert caught.value.reason == "empty_answer"


def test_a_summary_that_is_a_refusal_rejects_the_image():
    with pytest.raises(DialogueError, match="scripted refuses to describe the person: I'm sorry") as caught:
        talk(Scripted(*"abcde", "I'm sorry, I can't help with that."))
    assert caught.value.reason == "refused"


def test_a_summary_that_says_nothing_rejects_the_image_but_an_answer_may():
    assert talk(Scripted("None.", *"bcde", "A man.")).turns[0].answer == "None."
    with pytest.raises(DialogueError, match="scripted says nothing in its summary: 'N/A'") as caught:
        talk(Scripted(*"abcde", "N/A"))
    assert caught.value.reason == "empty_answer"


def test_a_refused_question_is_flagged_if_the_summary_describes():
    dialogue = talk(Scripted("I'm sorry, I can't identify people.", *"bcde", "A man in a red coat."))
    assert dialogue.flags == ("answer_refused",)


def test_halves_of_characters_are_replaced():
    dialogue = talk(Scripted("a \ud83d b", *"bcde", "A man\0 \ude00."))
    assert (dialogue.turns[0].answer, dialogue.summary) == ("a \ufffd b", "A man \ufffd.")


def test_thoughts_before_a_structured_answer_do_no_harm():
    engine = Scripted(*"abcde", "s", '<think>{"hat": "none"}</think>{"hat": "cap"}')
    choices = {"hat": ("cap", "none")}
    limits = {"questions": 5, "answer_tokens": 48, "summary_tokens": 128}
    dialogue = asyncio.run(converse(engine, SUBJECT, **limits, choices=choices))
    assert dialogue.attributes == {"hat": "cap"}


def test_a_changed_prompt_has_another_version():
    """If this test fails, a prompt has changed: change PROMPT_VERSION and write the new values here."""
    digest = hashlib.sha256("\n".join([*QUESTIONS, SUMMARY_REQUEST]).encode()).hexdigest()[:8]
    assert (PROMPT_VERSION, digest) == ("ceca-1", "c5d2c779")


# --- choice of the engine ---------------------------------------------------------------------------------


def test_the_configuration_names_the_engine():
    supervised = make_engine(DialogueConfig(engine="vllm"))
    assert isinstance(supervised, Supervised)
    assert isinstance(supervised.engine, VLLMEngine)
    assert isinstance(make_engine(DialogueConfig(engine="openai", openai=OpenAIConfig(model="m"))), OpenAIEngine)
    assert isinstance(make_engine(DialogueConfig(engine="oracle"), VOCABULARY), OracleEngine)


def test_engines_name_their_model():
    assert make_engine(DialogueConfig(engine="vllm")).model == "Qwen/Qwen2-VL-7B-Instruct"
    assert make_engine(DialogueConfig(engine="openai", openai=OpenAIConfig(model="m"))).model == "m"
    assert "simulated" in make_engine(DialogueConfig(engine="oracle"), VOCABULARY).model


def test_an_endpoint_needs_a_model_name():
    with pytest.raises(EngineError, match=r"--openai\.model"):
        make_engine(DialogueConfig(engine="openai"))


def test_generation_settings_hold_the_chosen_engine_and_its_settings():
    settings = generation_settings(DialogueConfig(engine="oracle", oracle=OracleConfig(error_rate=0.25), seed=3))
    assert settings["oracle"] == {"error_rate": 0.25, "hidden_error_rate": None, "seed": 0}
    assert settings["seed"] == 3
    assert settings["engine"] == "oracle"
    assert not {"vllm", "openai"} & settings.keys()


def test_generation_settings_leave_out_how_a_job_runs():
    settings = generation_settings(DialogueConfig(engine="vllm", replicas=4))
    assert "replicas" not in settings
    assert "gpus" not in settings["vllm"]
    settings = generation_settings(DialogueConfig(engine="openai", openai=OpenAIConfig(model="m")))
    assert "api_key_variable" not in settings["openai"]

"""A conversation asks in the published order, and every turn sees all earlier ones."""

import asyncio
import hashlib

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


class Scripted:
    """Says what it is given, one text per turn, and remembers how it was asked."""

    model = "scripted"

    def __init__(self, *texts: str, cut_off: bool = False):
        self.texts, self.cut_off = list(texts), cut_off
        self.asked: list[tuple[Subject, tuple[Turn, ...], str, int]] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def answer(self, subject, history, question, max_tokens, choices=None):
        self.asked.append((subject, tuple(history), question, max_tokens))
        return Answer(self.texts.pop(0), prompt_tokens=10, cached_tokens=4, completion_tokens=3, cut_off=self.cut_off)


def talk(engine: Scripted, questions: int = 5) -> Dialogue:
    return asyncio.run(converse(engine, SUBJECT, questions=questions, answer_tokens=48, summary_tokens=128))


def test_questions_come_in_order_and_the_summary_last():
    engine = Scripted(*"abcde", "all of it")
    made = talk(engine)
    assert [question for _, _, question, _ in engine.asked] == [*QUESTIONS, SUMMARY_REQUEST]
    assert made.turns == tuple(Turn(question, answer) for question, answer in zip(QUESTIONS, "abcde", strict=True))
    assert made.summary == "all of it"


def test_every_turn_sees_the_image_and_all_earlier_turns():
    engine = Scripted(*"abcde", "s")
    made = talk(engine)
    assert [history for _, history, _, _ in engine.asked] == [made.turns[:position] for position in range(6)]
    assert all(subject is SUBJECT for subject, _, _, _ in engine.asked)


@pytest.mark.parametrize("questions", [1, 3])
def test_fewer_questions_still_end_in_a_summary(questions):
    engine = Scripted(*"abcde"[:questions], "s")
    made = talk(engine, questions)
    assert len(made.turns) == questions
    assert engine.asked[-1][2] == SUMMARY_REQUEST


def test_the_summary_may_be_longer_than_an_answer():
    engine = Scripted(*"abcde", "s")
    talk(engine)
    assert [most for _, _, _, most in engine.asked] == [48] * 5 + [128]


def test_tokens_are_counted_over_all_turns_and_cut_off_answers_flagged():
    made = talk(Scripted(*"abcde", "s", cut_off=True))
    assert (made.prompt_tokens, made.cached_tokens, made.completion_tokens) == (60, 24, 18)
    assert made.flags == ("answer_cut_off", "summary_cut_off")
    assert talk(Scripted(*"abcde", "s")).flags == ()


def test_answers_are_kept_on_one_line():
    made = talk(Scripted(" A man.\n\nShort  hair. ", *"bcde", "\tall\nof it"))
    assert made.turns[0].answer == "A man. Short hair."
    assert made.summary == "all of it"


@pytest.mark.parametrize("texts", [("a", " \n"), ("a", "b", "c", "d", "e", "")], ids=["an answer", "the summary"])
def test_an_empty_answer_rejects_the_image(texts):
    with pytest.raises(DialogueError) as caught:
        talk(Scripted(*texts))
    assert caught.value.reason == "empty_answer"
    assert "scripted" in caught.value.detail


def test_a_changed_prompt_has_another_version():
    """When this fails, a prompt has changed: give PROMPT_VERSION a new value and write both here."""
    digest = hashlib.sha256("\n".join([*QUESTIONS, SUMMARY_REQUEST]).encode()).hexdigest()[:8]
    assert (PROMPT_VERSION, digest) == ("ceca-1", "c5d2c779")


# --- the engine that a configuration asks for -------------------------------------------------------------


def test_the_configuration_names_the_engine():
    watched = make_engine(DialogueConfig(engine="vllm"))
    assert isinstance(watched, Supervised)
    assert isinstance(watched.engine, VLLMEngine)
    assert isinstance(make_engine(DialogueConfig(engine="openai", openai=OpenAIConfig(model="m"))), OpenAIEngine)
    assert isinstance(make_engine(DialogueConfig(engine="oracle"), VOCABULARY), OracleEngine)


def test_engines_say_which_model_answered():
    assert make_engine(DialogueConfig(engine="vllm")).model == "Qwen/Qwen2-VL-7B-Instruct"
    assert make_engine(DialogueConfig(engine="openai", openai=OpenAIConfig(model="m"))).model == "m"
    assert "simulated" in make_engine(DialogueConfig(engine="oracle"), VOCABULARY).model


def test_an_endpoint_needs_a_model_name():
    with pytest.raises(EngineError, match=r"--openai\.model"):
        make_engine(DialogueConfig(engine="openai"))


def test_the_record_holds_the_chosen_engine_and_what_decides_its_answers():
    settings = generation_settings(DialogueConfig(engine="oracle", oracle=OracleConfig(error_rate=0.25), seed=3))
    assert settings["oracle"] == {"error_rate": 0.25, "hidden_error_rate": None, "seed": 0}
    assert settings["seed"] == 3
    assert settings["engine"] == "oracle"
    assert not {"vllm", "openai"} & settings.keys()


def test_how_a_job_runs_is_not_in_the_record():
    settings = generation_settings(DialogueConfig(engine="vllm", replicas=4))
    assert "replicas" not in settings
    assert "gpus" not in settings["vllm"]
    settings = generation_settings(DialogueConfig(engine="openai", openai=OpenAIConfig(model="m")))
    assert "api_key_variable" not in settings["openai"]

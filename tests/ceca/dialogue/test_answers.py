"""The text of a model's answer: thoughts go, refusals are recognised, every character can be stored."""

from __future__ import annotations

import time

import pytest

from ceca.dialogue.answers import Spoken, one_line, refuses, says_nothing, spoken


@pytest.mark.parametrize(
    "text",
    [
        "<think>Is it a man?</think>A man",
        "<think>\n\n</think>\n\nA man",
        "Is it a man?\n</think>\n\nA man",
        "A man <think>Is it? It may be",
        "<THINK>a<think>b</think>c</think>A man",
        "<think>one</think>A <think>two</think>man",
        "<thinking effort='3'>Is it?</thinking>A man",
        "<reasoning>Is it?</reasoning> A man",
        "<seed:think>Is it?</seed:think>A man",
        "[THINK]Is it?[/THINK]A man",
        "◁think▷Is it?◁/think▷A man",
        "<|begin_of_thought|>Is it?<|end_of_thought|>A man",
        "<|channel|>analysis<|message|>Is it?<|end|><|start|>assistant<|channel|>final<|message|>A man<|return|>",
        "<think>Is it?</think><answer>A man</answer>",
        "<analysis>Is it?</analysis>A man",
        "<scratchpad>Is it?</scratchpad>A man",
        "<reasoning_content>Is it?</reasoning_content>A man",
        "<|START_THINKING|>Is it?<|END_THINKING|><|START_RESPONSE|>A man<|END_RESPONSE|>",
        "analysisIs it a man?\nYes.assistantfinalA man",
        "<|channel>thought Is it?<channel|>A man",
        "<unused94>thought\nIs it?<unused95>A man",
        "<think>Is it?</think><CONCLUSION>A man</CONCLUSION></s>",
    ],
)
def test_thoughts_are_removed_and_known_of(text: str):
    assert spoken(text) == Spoken("A man", True)


@pytest.mark.parametrize("text", ["<think>It may", "It may.</think>", "<think>It may</think>  "])
def test_nothing_but_thoughts_is_no_answer(text: str):
    assert spoken(text) == Spoken("", True)


@pytest.mark.parametrize("text", ["A man who seems to think.", "A man with a <3 on his shirt", "a < b and c > d"])
def test_a_text_without_thoughts_stays(text: str):
    assert spoken(text) == Spoken(text, False)


def test_marks_around_an_answer_are_removed():
    assert spoken("<|begin_of_box|>A man<|end_of_box|>") == Spoken("A man", False)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("A man \ud83d in red", "A man \ufffd in red"),
        ("\ude00 A man", "\ufffd A man"),
        ("\ud83d\ude00 A man", "\U0001f600 A man"),
        ("A\0 man\x1b[0m", "A man [0m"),
        ("\ufeffA man", "\ufeffA man"),
    ],
)
def test_every_character_can_be_stored(text: str, stored: str):
    assert one_line(text) == stored
    stored.encode()


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, I can't help with that.",
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I can’t provide a description of the person in this image.",
        "I'm sorry, but I can't describe what the person is wearing.",
        "I am sorry, but I am unable to identify or describe people in images.",
        "Sorry, I can't help with identifying or describing people in images.",
        "Sorry, I cannot fulfill this request.",
        "I apologize, but I cannot provide a summary of this person.",
        "I apologise, but I'm not able to describe real people.",
        "My apologies, but I am not able to view images.",
        "Unfortunately, I cannot assist with that.",
        "I can't assist with that.",
        "I cannot assist with this request.",
        "I can't help with identifying people. If you'd like, I can describe the clothing, such as a jacket or shoes.",
        "I'm unable to process this image.",
        "I am unable to view the image.",
        "I'm not able to provide descriptions of people. Please describe the clothing and hair and I can help.",
        "As an AI language model, I cannot describe people in images.",
        "As an AI, I don't have the ability to see images.",
        "I must respectfully decline this request.",
        "I must decline.",
        "I won't describe this person.",
        "I will not be able to help with that.",
        "I don't feel comfortable describing this person.",
        "I do not feel comfortable engaging with this image.",
        "I cannot see images, but I am happy to help.",
        "This request violates our content policy.",
        "The image was flagged by our safety system.",
        "It's not appropriate for me to describe individuals.",
        "It is against my guidelines to describe people.",
        "Sorry.",
        "I'm sorry",
        "I'm sorry, but no.",
        "**I'm sorry, but I can't help with that.**",
        "\"I'm sorry, I can't assist.\"",
        "I'm really sorry, but I can't help with that.",
        "I’m afraid I can’t help with that.",
        "I decline to answer.",
        "I refuse to describe this person.",
        "抱歉，我无法协助处理该请求。",
        "很抱歉，我不能描述图片中的人物。",
        "对不起，我无法回答这个问题。",
        "我无法描述图片中的人。",
        "Lo siento, pero no puedo ayudar con eso.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Désolé, je ne peux pas décrire cette personne.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Tut mir leid, ich kann dabei nicht helfen.",
        "Entschuldigung, das kann ich nicht beantworten.",
        "Desculpe, mas não posso ajudar com isso.",
        "Mi dispiace, ma non posso aiutarti.",
        "申し訳ありませんが、そのご要望にはお応えできません。",
        "죄송합니다. 도와드릴 수 없습니다.",
        "Извините, я не могу помочь с этим.",
        "К сожалению, я не могу описать человека.",
        "عذرًا، لا يمكنني المساعدة في ذلك.",
        "Het spijt me, maar ik kan daar niet mee helpen.",
        "Przepraszam, nie mogę w tym pomóc.",
        "Maaf, saya tidak bisa membantu.",
        "I'm sorry, but I'm not able to help with that request. Is there something else you'd like to know?",
        "Apologies, but I can't do that.",
        "I cannot comply with that.",
        "I can’t do that.",
        "I'm sorry, that's not something I can help with.",
        "I cannot and will not describe this person.",
        "Hello! I'm sorry, but I can't assist with that.",
        "Thank you for sharing this image, but I can't describe the people in it.",
        "I am not permitted to describe people.",
        "Your request was rejected as a result of our safety system.",
        "For privacy reasons, I cannot describe this person.",
        "Due to privacy concerns, I can't help with that.",
        "I don't see an image attached. Could you upload it?",
        "There is no image provided.",
        "I have been instructed not to describe people.",
        "It is not possible for me to describe the person.",
        "I’d rather not describe people.",
        "Request blocked.",
        "Omlouvám se, ale s tím nemohu pomoci.",
        "Sajnálom, ebben nem tudok segíteni.",
        "Îmi pare rău, nu pot face asta.",
        "Λυπάμαι, δεν μπορώ να βοηθήσω.",
        "Anteeksi, en voi auttaa siinä.",
    ],
)
def test_a_refusal_is_recognised(text: str):
    assert refuses(one_line(text))


@pytest.mark.parametrize(
    "text",
    [
        "The person is a woman with long black hair. She wears a red jacket and blue jeans.",
        "I cannot see the shoes of the person.",
        "I can't see the face clearly, but the person wears a red jacket and blue jeans.",
        "No, the person is not holding anything.",
        "Sorry, the shoes are not visible in the image.",
        "Unfortunately, the shoes are not visible.",
        "The man is carrying a sign that says \"I'm sorry, I can't help\".",
        "I'm sorry for the confusion. The person is wearing a black coat and grey trousers.",
        "I cannot tell the gender. The person has short hair.",
        'A man in a black t-shirt reading "I can\'t help it" and shorts.',
        "The person can't be seen clearly, but seems to wear a dark coat.",
        "Unknown.",
        "I am unable to see the shoes because the image is cropped. The man wears a white shirt.",
        "about turn 1",
        "a man",
        "I see a woman in a green dress.",
        "It is not clear.",
        "The person is not wearing a hat. I cannot identify the brand of the shoes.",
        "The image shows a sorry-looking man in a coat.",
        "I can't make out the type of shoes.",
        "I cannot determine the gender of the person from this image.",
        "There is no picture on the shirt.",
        "No, there is no photo in the hand.",
        "For the shoes, white and black.",
        "Well, the person wears a red coat.",
        "An analysis of the coat: long and grey.",
    ],
)
def test_a_description_is_no_refusal(text: str):
    assert not refuses(one_line(text))


@pytest.mark.parametrize(
    "text",
    ["<think>", "</think>", "<think>a</think>", "<", "<think ", "I'm sorry ", "I can't ", "as an AI ", "Sorry, "],
)
def test_a_long_text_of_marks_takes_no_time(text: str):
    begun = time.process_time()
    refuses(spoken(text * (200_000 // len(text))).text)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    "text",
    [
        *("N/A", "n/a.", "N.A.", "NA", "None", "none.", "**None**", "null", "nil", "NaN", "Nothing.", "undefined"),
        *("Unknown.", "unavailable", "Not available.", "not applicable", "Not specified", "Unclear", "-", "...", "…"),
        *("{}", "[]", '""', "```", "?", "Summary:", "Summary: N/A", "The description is not available.", "Error"),
        *("No description.", "No description available.", "No answer was given", "no information is available", "。"),
        *("The person is not visible.", "No person visible", "Final answer: None"),
    ],
)
def test_a_summary_without_a_word_that_describes_says_nothing(text: str):
    assert says_nothing(one_line(text))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a man",
            "a person",
            "A woman in red.",
            "Nothing is carried by the man.",
            "A man with no bag.",
            "man",
            "N/A jacket, man",
        ),
        *("The person is unknown but wears a coat.", "None of the clothes is red.", "Navy coat", "一个男人", "мужчина"),
    ],
)
def test_a_short_description_says_something(text: str):
    assert not says_nothing(one_line(text))

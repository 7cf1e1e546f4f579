"""Reader of the dialogues that the authors publish."""

import json

import pytest

from ceca.dialogue.authors import DialogueFormatError, PublishedDialogue, match_paths, read_published

ASKED = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(1, 6)]
TURNS = tuple((turn["question"], turn["answer"]) for turn in ASKED)


def read(content):
    return read_published(json.dumps(content).encode())


def reject_of(content):
    good = {"file_path": "good.jpg", "dialogue": [*ASKED, {"summary": "s"}]}
    dialogues, rejects = read([good, content])
    assert [dialogue.path for dialogue in dialogues] == ["good.jpg"]
    return rejects[0]


@pytest.mark.parametrize("key", ["file_path", "img_path", "image_path", "path"])
def test_a_list_of_dialogues_names_its_images_by_any_of_four_keys(key):
    result = read([{key: "a/1.jpg", "dialogue": [*ASKED, {"summary": "A man."}]}])
    assert result == ([PublishedDialogue("a/1.jpg", TURNS, "A man.")], [])


@pytest.mark.parametrize("inside", [lambda turns: turns, lambda turns: {"dialogue": turns}], ids=["turns", "dialogue"])
def test_an_object_names_its_images_by_its_keys(inside):
    one, two = [*ASKED, {"summary": "A man."}], [*ASKED, {"text": "Another."}]
    dialogues, _ = read({"a/1.jpg": inside(one), "a/2.jpg": inside(two)})
    assert [(dialogue.path, dialogue.summary) for dialogue in dialogues] == [
        ("a/1.jpg", "A man."),
        ("a/2.jpg", "Another."),
    ]


@pytest.mark.parametrize("key", ["summary", "text", "answer"])
def test_the_summary_has_any_of_three_keys(key):
    (dialogue,), _ = read({"1.jpg": [*ASKED, {"question": "summarise", key: " A man\nin black. "}]})
    assert dialogue == PublishedDialogue("1.jpg", TURNS, "A man in black.")


@pytest.mark.parametrize("content", [{"1.jpg": {"summary": "A man."}}, [{"path": "1.jpg", "summary": "A man."}]])
def test_an_entry_may_have_the_summary_alone(content):
    assert read(content) == ([PublishedDialogue("1.jpg", (), "A man.")], [])


def test_the_fifth_turn_may_carry_the_summary():
    (dialogue,), _ = read({"1.jpg": [*ASKED[:4], {"summary": "A man."}]})
    assert dialogue == PublishedDialogue("1.jpg", TURNS[:4], "A man.")


def test_the_key_summary_is_preferred_to_a_later_text():
    (dialogue,), _ = read({"1.jpg": [*ASKED, {"summary": "A man."}, {"text": "You are welcome."}]})
    assert dialogue.summary == "A man."


def test_turns_without_an_answer_are_left_out():
    (dialogue,), _ = read(
        {"1.jpg": [{"text": "Hello."}, {"question": None, "answer": "a"}, *ASKED[2:], {"summary": "s"}]}
    )
    assert dialogue.turns == (("", "a"), *TURNS[2:])


def test_other_keys_and_a_byte_order_mark_are_ignored():
    content = json.dumps([{"id": 3, "file_path": "1.jpg", "dialogue": [*ASKED, {"summary": "s", "score": 1}]}])
    dialogues, rejects = read_published(b"\xef\xbb\xbf" + content.encode())
    assert (len(dialogues), rejects) == (1, [])


def test_an_empty_list_gives_no_dialogues():
    assert read([]) == ([], [])


# --- paths that differ from the dataset's --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "images", "meant"),
    [
        (["a/1.jpg"], ["a/1.jpg", "b/1.jpg"], {"a/1.jpg": "a/1.jpg"}),
        (["1.jpg"], ["imgs/a/1.jpg"], {"1.jpg": "imgs/a/1.jpg"}),
        (["/data/imgs/a/1.jpg"], ["a/1.jpg", "b/1.jpg"], {"/data/imgs/a/1.jpg": "a/1.jpg"}),
        (["C:\\a\\1.jpg"], ["a/1.jpg"], {"C:\\a\\1.jpg": "a/1.jpg"}),
        (["x/a/1.jpg", "x/b/1.jpg"], ["a/1.jpg"], {"x/a/1.jpg": "a/1.jpg"}),
        (["a/1.jpg", "x/1.jpg"], ["a/1.jpg"], {"a/1.jpg": "a/1.jpg"}),
        (["2.jpg"], ["1.jpg", "a/12.jpg"], {}),
    ],
    ids=["equal", "file name", "folders decide", "Windows", "the nearer one", "taken already", "none"],
)
def test_a_path_means_the_image_of_its_file_name_with_most_folders_in_common(named, images, meant):
    assert match_paths(named, images) == meant


@pytest.mark.parametrize(
    ("named", "images", "listed"),
    [
        (["x/1.jpg"], ["a/1.jpg", "b/1.jpg"], "x/1.jpg: a/1.jpg, b/1.jpg"),
        (["x/1.jpg", "y/1.jpg"], ["a/1.jpg"], "a/1.jpg: x/1.jpg, y/1.jpg"),
    ],
    ids=["two images", "two paths"],
)
def test_a_path_that_could_mean_several_images_is_an_error_that_lists_them(named, images, listed):
    with pytest.raises(DialogueFormatError, match="1 file names fit several paths") as caught:
        match_paths(named, images)
    assert listed in str(caught.value)


# --- unusable entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "key", "reason"),
    [
        ({"dialogue": ASKED}, "entry 1", "missing_key"),
        ({"file_path": 7, "dialogue": ASKED}, "entry 1", "missing_key"),
        ("1.jpg", "entry 1", "missing_key"),
        ({"file_path": "1.jpg"}, "1.jpg", "bad_dialogue"),
        ({"file_path": "1.jpg", "dialogue": ["Who?", "A man."]}, "1.jpg", "bad_dialogue"),
        ({"file_path": "1.jpg", "dialogue": [*ASKED[:4]]}, "1.jpg", "no_summary"),
        ({"file_path": "1.jpg", "dialogue": [*ASKED[:4], {"summary": " "}]}, "1.jpg", "no_summary"),
        ({"file_path": "good.jpg", "dialogue": [*ASKED, {"summary": "again"}]}, "good.jpg", "duplicated_dialogue"),
    ],
)
def test_an_unusable_entry_is_rejected_with_its_key_and_the_rest_is_read(entry, key, reason):
    reject = reject_of(entry)
    assert (reject.key, reject.reason) == (key, reason)
    assert reject.detail


# --- unusable files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xd8\xff\xe0 a picture", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"text"', "found str"),
        (b"3", "found int"),
        (b'[{"id": 1, "captions": ["A man."], "split": "test"}]', "none of its 1 entries is a dialogue"),
        (b'{"images": [1, 2], "info": {"year": 2026}}', "none of its 2 entries is a dialogue"),
    ],
)
def test_a_file_of_something_else_is_one_clear_error(content, problem):
    with pytest.raises(DialogueFormatError, match=problem) as caught:
        read_published(content)
    assert "expected" in str(caught.value)

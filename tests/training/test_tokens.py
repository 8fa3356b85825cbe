"""Rows to ids and labels: exact values on a tiny tokenizer, and the text of every refusal."""

import datasets
import pytest
from tiny_tokenizers import CHANGING, CHAT, STRICT, tiny_tokenizer

from anyrank.errors import ConfigError, DataError
from anyrank.training.tokens import TokenReport, tokenize_rows

BOS, EOS, TURN, END, NEWLINE = 0, 1, 3, 4, 203
A, B, AAB, SPACE_AAB = 69, 70, 277, 271  # "a", "b", "aab", " aab"
MANY = [275, 91, 288, 93, 273, 35]  # "How many apples?"
FORTY_TWO, SPACE_FORTY_TWO = 274, 286  # "42", " 42"


def tokenize(*rows, tokenizer=None, chat=None, max_length=None, **options):
    """The rows as [(input_ids, labels)], and the report."""
    made, report = tokenize_rows(
        datasets.Dataset.from_list(list(rows)),
        tokenizer or tiny_tokenizer(chat=chat),
        max_length=max_length,
        **options,
    )
    assert made.column_names == ["input_ids", "labels"]
    return [(row["input_ids"], row["labels"]) for row in made], report


def refusal(*rows, kind=DataError, **options):
    with pytest.raises(kind) as caught:
        tokenize(*rows, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def hide(count, ids):
    """Labels of a row whose first `count` tokens are not taught."""
    return [-100] * count + ids[count:]


# --- text ---


def test_text_teaches_every_token_and_ends():
    ids = [*MANY, EOS]
    assert tokenize({"text": "How many apples?"})[0] == [(ids, ids)]


def test_bos_is_there_if_the_tokenizer_adds_it_and_once():
    ids = [BOS, A, EOS]
    rows = [{"text": "a"}, {"text": "<s>a"}]
    assert tokenize(*rows, tokenizer=tiny_tokenizer(add_bos=True))[0] == [(ids, ids)] * 2
    assert tokenize(*rows)[0] == [(ids[1:], ids[1:]), (ids, ids)]


def test_eos_is_there_once():
    ids = [A, EOS]
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(add_eos=True)):
        assert tokenize({"text": "a"}, tokenizer=tokenizer)[0] == [(ids, ids)]
    assert tokenize({"text": "a</s>"})[0] == [(ids, ids)]


def test_a_tokenizer_without_eos_gets_none():
    row = {"text": "aa"}
    assert tokenize(row, tokenizer=tiny_tokenizer(eos=False))[0] == [([A, A], [A, A])]


# --- prompt and completion ---


def test_a_pair_teaches_the_completion_and_its_end():
    ids = [*MANY, NEWLINE, FORTY_TWO, EOS]
    assert tokenize(pair("How many apples?\n", "42"))[0] == [(ids, hide(7, ids))]
    ids = [BOS, *MANY, SPACE_FORTY_TWO, EOS]
    rows, _ = tokenize(pair("How many apples?", " 42"), tokenizer=tiny_tokenizer(add_bos=True))
    assert rows == [(ids, hide(7, ids))]


def test_a_token_across_the_boundary_is_taught():
    # "aa" alone is a, a; with "b" behind it, it is one token
    assert tokenize(pair("aa", "b"), pair("b aa", "b"))[0] == [
        ([AAB, EOS], [AAB, EOS]),
        ([B, SPACE_AAB, EOS], [-100, SPACE_AAB, EOS]),
    ]


def test_an_empty_prompt_teaches_all_but_bos():
    assert tokenize(pair("", "aab"))[0] == [([AAB, EOS], [AAB, EOS])]
    rows, _ = tokenize(pair("", "aab"), tokenizer=tiny_tokenizer(add_bos=True))
    assert rows == [([BOS, AAB, EOS], [-100, AAB, EOS])]


def test_a_tokenizer_that_adds_eos_by_itself_ends_the_prompt_in_none():
    ids = [*MANY, NEWLINE, FORTY_TWO, EOS]
    rows, _ = tokenize(pair("How many apples?\n", "42"), tokenizer=tiny_tokenizer(add_eos=True))
    assert rows == [(ids, hide(7, ids))]


def test_a_prompt_that_brings_its_own_bos():
    ids = [BOS, A, NEWLINE, A, EOS]
    rows, _ = tokenize(pair("<s>a\n", "a"), tokenizer=tiny_tokenizer(add_bos=True))
    assert rows == [(ids, hide(3, ids))]


def test_a_pair_is_plain_text_whatever_the_chat_template():
    row = pair("How many apples?\n", "42")
    assert tokenize(row, tokenizer=tiny_tokenizer(chat=CHAT))[0] == tokenize(row)[0]


def test_completion_only_false_teaches_every_token():
    ids = [*MANY, NEWLINE, FORTY_TWO, EOS]
    rows, report = tokenize(pair("How many apples?\n", "42"), completion_only=False)
    assert rows == [(ids, ids)]
    assert report.trained_tokens == 9


# --- messages ---

TALK = [
    {"role": "user", "content": "How many apples?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "aab"},
]


def talk_ids(tokenizer):
    """The conversation by hand: ids, and the spans of the two answers."""
    user, assistant = tokenizer(["user\n", "assistant\n"])["input_ids"]
    first = [BOS, TURN, *user, *MANY, END, NEWLINE, TURN, *assistant]
    second = [*first, FORTY_TWO, END, NEWLINE, TURN, *user, A, END, NEWLINE, TURN, *assistant]
    ids = [*second, AAB, END, NEWLINE]
    return ids, [range(len(first), len(first) + 3), range(len(second), len(second) + 3)]


def test_messages_teach_every_assistant_turn_with_its_end():
    tokenizer = tiny_tokenizer(chat=CHAT, add_bos=True)
    ids, spans = talk_ids(tiny_tokenizer())
    labels = [x if any(t in span for span in spans) else -100 for t, x in enumerate(ids)]
    assert [x for x in labels if x != -100] == [FORTY_TWO, END, NEWLINE, AAB, END, NEWLINE]
    assert tokenize({"messages": TALK}, tokenizer=tokenizer)[0] == [(ids, labels)]
    assert tokenize({"messages": TALK}, chat=CHAT)[0] == [(ids, labels)]


def test_completion_only_false_teaches_whole_conversations_of_any_template():
    ids, _ = talk_ids(tiny_tokenizer())
    row = {"messages": TALK}
    assert tokenize(row, chat=CHAT, completion_only=False)[0] == [(ids, ids)]
    rows, _ = tokenize(row, chat=CHANGING, completion_only=False)
    assert rows[0][0] == rows[0][1]


def test_a_conversation_that_an_assistant_opens_is_taught_from_its_start():
    rows, _ = tokenize({"messages": [TALK[1], TALK[2]]}, chat=CHAT)
    (ids, labels) = rows[0]
    end = ids.index(END) + 2  # and the newline
    assert labels == ids[:end] + [-100] * (len(ids) - end)


def test_a_token_across_the_end_of_a_turn_is_taught():
    # turns without marks: the "aa" of the assistant and the "b" of the user are one token
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": "aa"},
        {"role": "user", "content": "b\n"},
    ]
    rows, _ = tokenize({"messages": talk}, chat=template)
    assert rows == [([A, NEWLINE, AAB, NEWLINE], [-100, -100, AAB, -100])]


def test_messages_need_a_chat_template():
    assert refusal({"messages": TALK}) == (
        "rows hold messages, but the tokenizer has no chat template; give one with "
        "--chat_template_path, or rows of prompt and completion"
    )


def test_a_template_that_rewrites_earlier_turns_is_refused():
    one = {"messages": TALK[:2]}
    assert refusal(one, {"messages": TALK}, chat=CHANGING) == (
        "chat template of the tokenizer: it renders differently, once more messages "
        "follow, message 2 of row 2, so the assistant's tokens cannot be told; give another "
        "--chat_template_path, or rows of prompt and completion"
    )
    tokenizer = tiny_tokenizer(chat=CHANGING)
    tokenizer.name_or_path = "org/model"
    assert refusal({"messages": TALK}, tokenizer=tokenizer).startswith(
        "chat template of org/model: it renders differently, once more messages follow, message 2"
    )


def test_a_template_that_does_not_render_its_own_prompt_or_the_answer_is_refused():
    thinking = CHAT.replace("<turn>assistant\n{% endif", "<turn>assistant\n<think>{% endif")
    assert "it has a generation prompt that does not begin message 2 of row 1, so" in refusal(
        {"messages": TALK}, chat=thinking
    )
    wordless = CHAT.replace("{{ m.content }}", "")
    assert "it leaves out the text of message 2 of row 1, so" in refusal(
        {"messages": TALK}, chat=wordless
    )


def test_a_template_that_refuses_a_row_is_named_with_it():
    assert refusal({"messages": TALK}, chat=STRICT) == (
        "chat template of the tokenizer: it refuses row 1 (no such conversation); correct "
        "the row, or give another --chat_template_path"
    )


# --- length ---


def test_truncation_keeps_the_start_and_drops_rows_without_a_label():
    rows, report = tokenize(
        pair("How many apples?\n", "42"),  # 7 + 2
        pair("a\n", "42"),  # 2 + 2
        pair("a\n", "aab aab aab aab aab aab aab"),  # 2 + 8
        max_length=7,
    )
    assert rows[0] == ([A, NEWLINE, FORTY_TWO, EOS], [-100, -100, FORTY_TWO, EOS])
    assert len(rows) == 2
    assert len(rows[1][0]) == 7
    assert EOS not in rows[1][0]
    assert report == TokenReport(
        rows=3, kept=2, truncated=1, dropped=1, tokens=11, trained_tokens=7, longest=10
    )


def test_a_row_without_a_token_to_predict_is_dropped():
    rows, report = tokenize({"text": "a"}, {"text": "aa"}, tokenizer=tiny_tokenizer(eos=False))
    assert rows == [([A, A], [A, A])]
    assert (report.dropped, report.truncated) == (1, 0)


def test_no_row_left():
    assert refusal(pair("a\n", "42"), pair("How many apples?\n", "42"), max_length=2) == (
        "no completion tokens left: all rows (2) were cut at 2 tokens inside of the prompt; "
        "longest prompt 7 tokens; raise --max_length above 7"
    )
    assert refusal({"text": "a"}, tokenizer=tiny_tokenizer(eos=False)) == (
        "no completion tokens left: all rows (1) end where the prompt ends; "
        "needs rows with a completion"
    )


def test_max_length_and_columns_that_make_no_sense():
    assert refusal(pair("a", "b"), max_length=1, kind=ConfigError) == (
        "--max_length 1: needs 2 tokens or more, to predict one"
    )
    assert refusal({"question": "a"}) == (
        "found columns question; needs prompt + completion, messages or text, as load_rows gives "
        "them"
    )
    with pytest.raises(DataError, match="no rows to tokenize; needs at least one"):
        tokenize_rows(datasets.Dataset.from_dict({"text": []}), tiny_tokenizer(), max_length=None)


def test_many_batches_in_order(monkeypatch):
    monkeypatch.setattr("anyrank.training.tokens._BATCH", 2)
    texts = ["a" * (i + 1) for i in range(5)]
    rows, report = tokenize(*({"text": text} for text in texts), max_length=4)
    assert [len(ids) for ids, _ in rows] == [2, 3, 4, 4, 4]
    assert (report.kept, report.truncated, report.tokens, report.longest) == (5, 2, 17, 6)


def test_the_report_in_words():
    report = TokenReport(7473, 7473, 0, 0, 1_583_854, 1_022_045, 633)
    assert report.sentence(None) == (
        "7,473 rows, 1,583,854 tokens, of which 1,022,045 are trained on; "
        "the longest row has 633 tokens."
    )
    report = TokenReport(3, 2, 1, 1, 11, 7, 10)
    assert report.sentence(7) == (
        "2 rows, 11 tokens, of which 7 are trained on; the longest row has 10 tokens.\n"
        "1 row cut at 7 tokens and 1 row dropped, with nothing left to learn from; "
        "--max_length 10 keeps all of them."
    )
    assert (
        TokenReport(2, 1, 0, 1, 2, 2, 2)
        .sentence(None)
        .endswith("\n1 row dropped, with nothing left to learn from.")
    )

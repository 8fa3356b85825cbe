"""Formats to rows, and the text of every refusal of a column or a row."""

import datasets
import pytest
from data_files import PAIR, load, refusal

from anyrank.errors import ConfigError


def test_alpaca(jsonl):
    assert load(
        jsonl(
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hello"},
            {"instruction": "Greet.", "output": "Hello"},
            {"instruction": "Greet.", "input": None, "output": "Hello"},
        )
    ) == [
        {
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
            "completion": "3",
        },
        *[{"prompt": "### Instruction:\nGreet.\n\n### Response:\n", "completion": "Hello"}] * 3,
    ]


def test_a_pair_is_kept_as_it_stands_and_further_columns_are_dropped(jsonl):
    file = jsonl({**PAIR, "id": 7}, {"prompt": "", "completion": " x", "other": None})
    assert load(file) == [PAIR, {"prompt": "", "completion": " x"}]
    assert load(file, prompt_column="prompt", completion_column="completion")[0] == PAIR


def test_named_columns_come_first_and_are_parted_by_a_newline(jsonl):
    file = jsonl(
        {"question": "Why?", "answer": "So.", **PAIR},
        {"question": "Why? ", "answer": "So."},
        {"question": "Why?", "answer": " So."},
        {"question": "", "answer": "So."},
    )
    rows = load(file, prompt_column="question", completion_column="answer")
    assert [row["prompt"] for row in rows] == ["Why?\n", "Why? ", "Why?", ""]
    assert [row["completion"] for row in rows] == ["So.", "So.", " So.", "So."]


def test_one_named_column_pairs_with_the_usual_other(jsonl):
    file = jsonl({"question": "Why?", "completion": "So."})
    assert load(file, prompt_column="question") == [{"prompt": "Why?\n", "completion": "So."}]


MESSAGES = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "tool", "content": "42"},
]


def test_messages(jsonl):
    file = jsonl({"messages": [{**m, "weight": 1} for m in MESSAGES], "prompt": "not a pair"})
    assert load(file) == [{"messages": MESSAGES}]


def test_sharegpt(jsonl):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in MESSAGES]
    assert load(jsonl({"conversations": turns})) == [{"messages": MESSAGES}]


def test_a_pair_of_message_lists_is_one_conversation(jsonl):
    assert load(jsonl({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]})) == [
        {"messages": MESSAGES}
    ]


def test_text(jsonl):
    assert load(jsonl({"text": "a b", "meta": 1})) == [{"text": "a b"}]
    assert load(jsonl({"text": "a b", "body": "c"}), text_column="body") == [{"text": "c"}]


def test_alpaca_comes_before_text(jsonl):
    rows = load(jsonl({"instruction": "Greet.", "output": "Hello", "text": "all of it"}))
    assert list(rows[0]) == ["prompt", "completion"]


def test_unknown_columns_are_listed_with_the_options_to_give(jsonl):
    file = jsonl({"id": 1, "questions": "Why?", "the_answer": "So."})
    assert refusal(file) == (
        f"{file}: found columns id, questions, the_answer; needs instruction + output, prompt + "
        "completion, messages, conversations or text; name yours with --prompt_column questions "
        "--completion_column the_answer (or --dataset_text_field NAME)"
    )
    assert "--prompt_column NAME --completion_column NAME" in refusal(jsonl({"x": "a"}))


def test_a_named_column_that_is_missing(jsonl):
    file = jsonl({"question": "Why?", "answer": "So."})
    start = f"{file}: found columns question, answer, but none is called "
    assert refusal(file, prompt_column="qestion", completion_column="answer") == (
        start + "'qestion'; set --prompt_column to one of them: did you mean question?"
    )
    assert refusal(file, prompt_column="question") == (
        start + "'completion'; set --completion_column to one of them: known: answer"
    )
    assert refusal(file, text_column="body") == (
        start + "'body'; set --dataset_text_field to one of them: known: answer, question"
    )


def test_options_that_make_no_sense(jsonl):
    file = jsonl(PAIR)
    assert refusal(file, ConfigError, limit=0) == (
        "--dataset_limit 0: needs 1 or more rows; leave it out to read all"
    )
    assert refusal(file, ConfigError, text_column="a", prompt_column="b") == (
        "--dataset_text_field a: contradicts --prompt_column and --completion_column; "
        "give the one column or the two"
    )
    assert refusal(file, ConfigError, name="main") == (
        f"--dataset_config main: is for Hub data sets, and {file} is local; leave it out"
    )
    assert refusal(file, ConfigError, split="train[:9]").startswith(
        "--dataset_split train[:9]: is for Hub"
    )


NOTHING = "row has no completion to learn from "


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "a"', "broken JSON (Expecting ',' delimiter at column 15); needs one whole "
         "object per line (or, in a .json file, one array of objects)"),
        ("[1]", "found list [1]; needs a JSON object of columns, such as {...}"),
        ({**PAIR, "completion": ""}, NOTHING + "('completion' is empty)"),
        ({**PAIR, "completion": " \n"}, NOTHING + "('completion' is empty)"),
        ({**PAIR, "completion": None}, "'completion' is null; needs text (a string)"),
        ({**PAIR, "completion": 42}, "'completion' is int 42; needs text (a string)"),
        ({**PAIR, "prompt": None}, "'prompt' is null; needs text (a string)"),
        ({"prompt": "a", "id": 1}, "has no 'completion', only prompt, id; needs it as text"),
        ({**PAIR, "prompt": "\ud800"}, "'prompt' is no valid Unicode (surrogates not allowed)"),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
         "is messages; needs prompt + completion as the rows before"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(jsonl, row, problem):
    file = jsonl(PAIR, "", row)
    assert refusal(file) == f"{file}:3: {problem}; correct or remove the row"


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([], "'messages' is list []; needs a list of messages"),
        (None, "'messages' is null; needs a list of messages"),
        (["Hi"], "messages[0] is str 'Hi'; needs an object with role and content"),
        ([MESSAGES[1]], NOTHING + "('messages' has no assistant turn)"),
        ([{"role": "narrator", "content": "a"}], "messages[0] has the unknown role 'narrator'; "
         "needs one of human, gpt, system, user, assistant, tool"),
        ([{"role": "user", "content": ""}], "messages[0] (user) is empty; needs text"),
        ([{"role": "user", "content": None}],
         "messages[0] 'content' is null; needs text (a string)"),
        ([{"from": "gpt"}], "messages[0] has no 'value', only from; needs it as text"),
        ([{**MESSAGES[2], "tool_calls": [{}]}],
         "messages[0] has tool_calls, which are not read; needs the call as content"),
    ],
)  # fmt: skip
def test_bad_messages(jsonl, turns, problem):
    file = jsonl({"messages": turns})
    assert refusal(file) == f"{file}:1: {problem}; correct or remove the row"


def test_the_first_of_several_bad_rows_is_named_and_the_others_counted(jsonl):
    bad = {**PAIR, "completion": ""}
    text = f":2: {NOTHING}('completion' is empty); correct or remove the row"
    assert refusal(file := jsonl(PAIR, bad, "{")) == f"{file}{text} (1 more row is bad)"
    assert refusal(file := jsonl(PAIR, bad, "{", bad)) == f"{file}{text} (2 more rows are bad)"


def test_bad_rows_of_other_formats_are_named_by_row(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"text": "a"}, 3]')
    assert refusal(file).startswith(f"{file} row 2: found int 3; needs a JSON object")
    file = tmp_path / "a.csv"
    file.write_text('text,n\n"a\nb",1\n"c\nd"\n')
    assert refusal(file).startswith(f"{file}:4: number of cells is 1; needs 2, as the header;")
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(str(file))
    assert refusal(file).startswith(f"{file} row 2: 'text' is null;")
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "\xff"}')
    assert refusal(file).startswith(f"{file}:1: cannot be read ('utf-8' codec can't decode byte")

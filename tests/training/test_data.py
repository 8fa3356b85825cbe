"""Formats to rows, and the text of every refusal. Files are real; the Hub is offline."""

import json
import subprocess
import sys

import datasets
import pytest

from anyrank.errors import ConfigError, DataError
from anyrank.training.data import DataSource, load_rows, split_rows

PAIR = {"prompt": "2+2=", "completion": "4"}


def write(path, *rows):
    """Rows as JSON lines; a str goes in as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def load(dataset, **options):
    return load_rows(DataSource(str(dataset), **options)).to_list()


def refusal(dataset, kind=DataError, **options):
    """The text of the error, which is one line."""
    with pytest.raises(kind) as caught:
        load(dataset, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def jsonl(tmp_path):
    return lambda *rows: write(tmp_path / "rows.jsonl", *rows)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


# --- formats ---


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


# --- files ---


def test_json_is_an_array_or_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("\n [\n" + json.dumps(PAIR) + "]", encoding="utf-8-sig")
    assert load(file) == [PAIR]
    assert load(write(file, PAIR, "", PAIR)) == [PAIR, PAIR]


def test_csv_cells_are_text_as_written(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion,n\n"a, ""b""\nc",42,1\n,NA,2\n\n', encoding="utf-8-sig")
    assert load(file) == [
        {"prompt": 'a, "b"\nc', "completion": "42"},
        {"prompt": "", "completion": "NA"},
    ]


def test_a_long_csv_cell(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "x" * 200_000, encoding="utf-8")
    assert load(file) == [{"text": "x" * 200_000}]


def test_parquet(tmp_path):
    file = tmp_path / "a[1].parquet"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    datasets.Dataset.from_list([{"conversations": turns, "id": 1}] * 3).to_parquet(str(file))
    assert load(file, limit=2) == [{"messages": MESSAGES[1:3]}] * 2


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", {"text": "a"})
    write(tmp_path / "train-00001-of-00002.json", {"text": "b"})
    write(tmp_path / "test.jsonl", {"text": "c"})
    write(tmp_path / "README.md", "# not data")
    assert load(tmp_path) == [{"text": "a"}, {"text": "b"}]
    assert load(tmp_path, split="test") == [{"text": "c"}]
    assert refusal(tmp_path, split="validation") == (
        f"{tmp_path}: no file of split 'validation'; the folder holds test.jsonl, "
        "train-00000-of-00002.jsonl, train-00001-of-00002.json; name a split that a file name "
        "contains, or give one file as --dataset"
    )


def test_files_of_no_split_are_train(tmp_path):
    write(tmp_path / "b.jsonl", {"text": "b"})
    write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "eval.jsonl", {"text": "c"})
    assert load(tmp_path) == [{"text": "a"}, {"text": "b"}]


def test_one_file_is_one_split(jsonl):
    assert load(jsonl(PAIR), split="anything") == [PAIR]


def test_limit_reads_the_first_rows_only(jsonl):
    assert load(jsonl(PAIR, "", PAIR, "broken"), limit=2) == [PAIR, PAIR]


def test_more_rows_than_one_chunk(jsonl, monkeypatch):
    monkeypatch.setattr("anyrank.training.data._CHUNK", 2)
    assert load(jsonl(*({"text": str(i)} for i in range(5)))) == [
        {"text": str(i)} for i in range(5)
    ]


def test_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([PAIR, {**PAIR, "completion": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("org/set", name="main", split="test", limit=1) == [PAIR]
    assert asked == [(("org/set", "main"), {"split": "test"})]
    assert refusal("org/set").startswith("org/set row 2: row has no completion to learn from")


def test_the_modules_are_cheap_to_import():
    code = (
        "import sys, anyrank.training.data, anyrank.training.tokens\n"
        "print({'datasets', 'torch', 'transformers', 'trl', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- refusals: data that cannot be read ---


def test_a_missing_file_names_its_neighbours(tmp_path, jsonl):
    jsonl(PAIR)
    path = tmp_path / "row.jsonl"
    assert refusal(path) == f"{path}: no such file; did you mean rows.jsonl?"
    path = tmp_path / "no" / "row.jsonl"
    assert refusal(path) == (
        f"{path}: no such file; the folder {tmp_path}/no does not exist either; "
        "give an existing path"
    )
    (tmp_path / "no").mkdir()
    assert refusal(path) == (
        f"{path}: no such file; the folder {tmp_path}/no holds no .jsonl, .json, .csv, .parquet "
        "file; give another path"
    )


def test_unknown_extension(tmp_path):
    file = write(tmp_path / "rows.txt", PAIR)
    assert refusal(file) == (
        f"{file}: extension '.txt' is not read; needs .jsonl, .json, .csv, .parquet; "
        "convert it, or rename it to what it holds"
    )


def test_hub_name_out_of_reach():
    assert refusal("nobody/nothing") == (
        "nobody/nothing: no local file or folder, and split 'train' did not come from the Hub "
        "(ConnectionError: Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)); "
        "check name, split and connection, or give the path of a local "
        ".jsonl, .json, .csv, .parquet file"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "text\n")],
)
def test_no_rows(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    assert refusal(file) == f"{file}: no rows; needs at least one, such as {{'text': '...'}}"


def test_a_folder_without_data(tmp_path):
    assert "the folder holds no .jsonl, .json, .csv, .parquet file;" in refusal(tmp_path)


def test_broken_files(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n{"text": "a"},\n{"text": }]')
    assert refusal(file) == (
        f"{file}:3: broken JSON (Expecting value at column 10); needs one array of objects; "
        "correct the file"
    )
    file = tmp_path / "a.csv"
    file.write_text('text\na\n"b" c\n')
    assert refusal(file) == (
        f"{file}:3: broken CSV (',' expected after '\"'); needs quoted cells in UTF-8; correct it"
    )
    file = tmp_path / "a.parquet"
    file.write_bytes(b"nope")
    text = refusal(file)
    assert text.startswith(f"{file}: not read as Parquet (Parquet file size is 4 bytes,")
    assert text.endswith("); write it anew")


# --- refusals: options and columns ---


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


# --- refusals: rows ---

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


# --- a validation split ---

TEN = [{"text": str(i)} for i in range(10)]


@pytest.mark.parametrize(("size", "count"), [(0.3, 3), (3, 3), (9, 9), (0.05001, 1), (1, 1)])
def test_split_rows(size, count):
    train, validation = split_rows(rows := datasets.Dataset.from_list(TEN), size, seed=0)
    assert len(validation) == count
    assert sorted(train["text"][:] + validation["text"][:]) == rows["text"][:]
    assert train["text"][:] == sorted(train["text"])
    assert split_rows(rows, size, seed=0)[1]["text"][:] == validation["text"][:]


def test_the_seed_chooses_the_rows():
    rows = datasets.Dataset.from_list(TEN)
    assert [split_rows(rows, 3, seed)[1]["text"][:] for seed in (0, 1)] == [
        ["0", "6", "9"],
        ["1", "2", "4"],
    ]


def test_split_rows_refuses_an_empty_side():
    rows = datasets.Dataset.from_list(TEN)
    for size, text in [
        (10, "10 holds out 10 of 10 rows and leaves nothing to train on"),
        (0.01, "0.01 holds out 0 of 10 rows and leaves nothing to validate on"),
    ]:
        with pytest.raises(DataError) as caught:
            split_rows(rows, size, seed=0)
        assert str(caught.value) == f"validation rows: {text}; give a count from 1 to 9"
    with pytest.raises(DataError, match=r"1 row\(s\) cannot be split in two; needs 2 or more rows"):
        split_rows(rows.select([0]), 1, seed=0)
    for size in (0, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="needs a fraction between 0 and 1"):
            split_rows(rows, size, seed=0)

"""Files and splits to rows, and the text of every refusal of a file. The Hub is offline."""

import json
import subprocess
import sys

import datasets
import pytest
from data_files import PAIR, load, refusal, write

from anyrank.errors import ConfigError, DataError
from anyrank.training.data import split_rows


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
    wanted = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert load(file, limit=2) == [{"messages": wanted}] * 2


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

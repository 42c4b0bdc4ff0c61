"""Data as people have it: Alpaca, ShareGPT, tools, weights, other encodings and separators, columns of other names."""

import json
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import InvalidRequest
from manylora.lifecycle.data.data import Dataset, Example, read_dataset
from manylora.lifecycle.data.encoding import Encoder
from manylora.lifecycle.data.files import Reading
from manylora.lifecycle.data.look import label_counts, remarks, seen
from tests.lifecycle.helpers import write_rows
from tests.tiny_models import make_tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ASKED = {"role": "user", "content": "Weather in Paris?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "a1", "content": "sunny"}
SAID = {"role": "assistant", "content": "It is sunny."}


def only(tmp_path: Path, row: dict[str, Any]) -> Example:
    [example] = read_dataset(write_rows(tmp_path / "a.jsonl", [row])).examples
    return example


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def test_alpaca_rows_are_questions_and_answers(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Hi!", "input": "", "output": "Hello!", "system": "Be kind.", "history": [["a", "b"]]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")  # as Alpaca's own file is

    dataset = read_dataset(tmp_path / "a.json")

    assert dataset.shape == "completion"
    assert turns(dataset.examples[0]) == [("user", "Add.\n1, 2"), ("assistant", "3")]
    whole = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "Hi!"), ("assistant", "Hello!")]
    assert turns(dataset.examples[1]) == whole
    assert [m.is_learnt for m in dataset.examples[1].messages if m.role == "assistant"] == [False, True]


def test_sharegpt_rows_are_chats_and_their_calls_are_calls(tmp_path: Path) -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Paris"}})
    talk = [("human", "Weather?"), ("function_call", call), ("observation", "sunny"), ("gpt", "It is sunny.")]
    row = {
        "conversations": [{"from": who, "value": said} for who, said in talk],
        "system": "Be brief.",
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
    }

    found = only(tmp_path, row)

    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [message.role for message in found.messages] == roles
    assert json.loads(found.messages[2].calls)[0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert json.loads(found.tools) == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_sharegpt_turns_have_weights(tmp_path: Path) -> None:
    turns = [("human", "q"), ("gpt", "bad"), ("human", "again"), ("gpt", "good")]
    talk: list[dict[str, Any]] = [{"from": who, "value": said} for who, said in turns]
    talk[1]["weight"] = 0

    found = only(tmp_path, {"conversations": talk})

    assert [message.is_learnt for message in found.messages if message.role == "assistant"] == [False, True]


def test_openais_rows_have_tools_weights_parts_and_a_developer(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Paris?"}]}
    developer = {"role": "developer", "content": "Be brief."}
    wrong = {"role": "assistant", "content": "No idea.", "weight": 0}
    row = {"messages": [developer, parts, wrong, ASKED, CALLED, TOLD, {**SAID, "weight": 1}], "tools": [TOOL]}

    found = only(tmp_path, row)

    assert turns(found)[:2] == [("system", "Be brief."), ("user", "Weather in Paris?")]
    assert [m.is_learnt for m in found.messages if m.role == "assistant"] == [False, True, True]
    assert found.messages[4].for_template()["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert found.messages[5].for_template() == {"role": "tool", "content": "sunny", "tool_call_id": "a1"}


def test_what_is_behind_the_last_answer_to_learn_is_left_out(tmp_path: Path) -> None:
    row = {"messages": [ASKED, SAID, ASKED, {**SAID, "weight": 0}]}
    assert turns(only(tmp_path, row)) == [("user", ASKED["content"]), ("assistant", SAID["content"])]


CHAT = {"messages": [ASKED, SAID]}
HALF = {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}


@pytest.mark.parametrize(
    ("first", "row", "said"),
    [
        (CHAT, {"messages": [ASKED, {**SAID, "weight": 0}]}, "every assistant's message has the weight 0"),
        (CHAT, {"messages": [{**ASKED, "weight": 1}, SAID]}, r"messages\[0\].weight must be 0 or 1, and on an assist"),
        (CHAT, {"messages": [ASKED, {**SAID, "weight": 0.5}]}, r"messages\[1\].weight must be 0 or 1"),
        (CHAT, {"messages": [{**ASKED, "tool_calls": [CALL]}, SAID]}, "tool_calls is only in an assistant's"),
        (CHAT, {"messages": [ASKED, {**CALLED, "tool_calls": [{"function": {}}]}]}, "must be an object with name and"),
        (CHAT, {"messages": [ASKED, HALF]}, r"tool_calls\[0\].function.arguments is no JSON"),
        (CHAT, {"messages": [ASKED, SAID], "tools": [{"type": "function"}]}, r"tools\[0\] must be an object"),
        (CHAT, {"messages": [ASKED, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "both strings"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}, "output is empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": 3, "output": "b"}, "instruction must be a string"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "history": "x"}, "list of pairs"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "king", "value": "a"}]},
            r"conversations\[0\].from must be one of",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_row(tmp_path: Path, first: Any, row: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"row 2: .*{said}"):
        read_dataset(write_rows(tmp_path / "a.jsonl", [first, row]))


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    reading = Reading(columns=("prompt=question", "completion = best answer"))
    path = write_rows(tmp_path / "a.jsonl", [{"question": "a", "best answer": "b", "id": 3}])

    assert turns(read_dataset(path, reading=reading).examples[0]) == [("user", "a"), ("assistant", "b")]
    with pytest.raises(InvalidRequest, match="`columns` says which field is which"):
        read_dataset(path)
    with pytest.raises(InvalidRequest, match="is not FIELD=COLUMN"):
        read_dataset(path, reading=Reading(columns=("question",)))


@pytest.mark.parametrize(("separator", "name"), [(";", "a.csv"), ("\t", "a.tsv"), (",", "a.csv")])
def test_the_separator_of_columns_is_seen_in_the_header(tmp_path: Path, separator: str, name: str) -> None:
    rows = [("text", "label"), ('"a; b, c\td"', "x"), ("e", "y")]
    (tmp_path / name).write_text("".join(separator.join(row) + "\n" for row in rows), encoding="utf-8")

    found = read_dataset(tmp_path / name)

    assert [(e.messages[0].content, e.label) for e in found.examples] == [("a; b, c\td", "x"), ("e", "y")]


def test_another_encoding_is_guessed_aloud_and_read_when_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nabc,x\n我爱北京天安门,北京\n".encode("gb18030"))

    with pytest.raises(InvalidRequest, match=r"row 3 is not UTF-8 .*In gb18030 the line begins '我爱北京天安门,北京'"):
        read_dataset(path)
    assert read_dataset(path, reading=Reading(encoding="gb18030")).labels == ("x", "北京")
    with pytest.raises(InvalidRequest, match="'klingon' is no encoding"):
        read_dataset(path, reading=Reading(encoding="klingon"))
    with pytest.raises(InvalidRequest, match="row 3 is not ascii"):
        read_dataset(path, reading=Reading(encoding="ascii"))
    path.write_bytes("text,label\nabc,x\n".encode("utf-16"))
    with pytest.raises(InvalidRequest, match="give `encoding` utf-16"):
        read_dataset(path)
    assert read_dataset(path, reading=Reading(encoding="utf-16")).labels == ("x",)


def test_a_broken_list_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"prompt": "a", "completion": "b"},\n', encoding="utf-8")
    with pytest.raises(InvalidRequest, match="line 3, column 1 is not JSON"):
        read_dataset(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[3]", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="row 1 is a JSON int, not an object"):
        read_dataset(tmp_path / "a.json")


def rows(tmp_path: Path, *pairs: tuple[str, str], shape: tuple[str, str] = ("prompt", "completion")) -> Dataset:
    return read_dataset(write_rows(tmp_path / "a.jsonl", [dict(zip(shape, pair, strict=True)) for pair in pairs]))


def test_odd_rows_are_remarked_on(tmp_path: Path) -> None:
    odd = rows(tmp_path, ("a", "1"), ("b", "2"), ("a", "1"), ("b", "3"), ("?!", "4"), ("c", "5"))

    twice, contrary, empty = remarks(odd)

    assert twice.endswith("so weigh more: 1 (row 3).")
    assert contrary.endswith("for sure: 2 (rows 2, 4).")
    assert empty.endswith("digit: 1 (row 5).")
    assert remarks(rows(tmp_path, ("a", "1"), ("我", "2"))) == []


def test_labels_are_counted(tmp_path: Path) -> None:
    labelled = rows(tmp_path, ("a", "x"), ("b", "y"), ("c", "y"), shape=("text", "label"))
    assert label_counts(labelled) == "labels: y 2, x 1"
    assert label_counts(rows(tmp_path, ("a", "1"))) == ""


def test_a_chat_of_several_turns_is_learnt_as_a_server_renders_it(tmp_path: Path) -> None:
    tokenizer: Any = make_tokenizer()
    wrong = {"role": "assistant", "content": "No idea.", "weight": 0}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, ASKED, wrong, ASKED, SAID, ASKED, SAID]
    dataset = read_dataset(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]))

    [one] = Encoder(tokenizer, max_length=512).encode(dataset, context_length=512)

    asked = [{"role": m["role"], "content": m["content"]} for m in messages[:-1]]
    assert list(one.prompt_ids) == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    learnt = [token for token, is_answer in zip(one.ids, one.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(learnt) == "It is sunny.<|im_end|>" * 2
    [shown] = seen([one], tokenizer)
    assert [text for text, is_learnt in shown.pieces if is_learnt] == ["It is sunny.<|im_end|>"] * 2
    assert "".join(text for text, _ in shown.pieces) == tokenizer.decode(one.ids)


def test_tools_need_a_template_that_knows_them_or_are_told_in_words(tmp_path: Path) -> None:
    tokenizer: Any = make_tokenizer()
    dataset = read_dataset(write_rows(tmp_path / "a.jsonl", [{"messages": [ASKED, CALLED], "tools": [TOOL]}]))

    with pytest.raises(InvalidRequest, match="row 1 has tools, and this base's chat template knows none"):
        Encoder(tokenizer, max_length=512).encode(dataset, context_length=2048)
    with pytest.raises(InvalidRequest, match="for which `render` plain has no place"):
        Encoder(tokenizer, render="plain", max_length=512).encode(dataset, context_length=2048)
    [one] = Encoder(tokenizer, max_length=2048, tool_prompt=True).encode(dataset, context_length=2048)

    assert '"name": "weather"' in tokenizer.decode(one.prompt_ids)
    answer = tokenizer.decode(one.ids[one.first_answer :])
    called = '{"name": "weather", "arguments": {"city": "Paris"}}'
    assert answer == f"<tool_call>\n{called}\n</tool_call><|im_end|>"

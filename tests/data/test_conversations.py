import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_llm.data.conversations import FIELDS, FORMATS, REASONS, Malformed, detect, to_messages, to_pair


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


QA = [user("q"), assistant("a")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": QA}, "messages"),
        ({"conversations": QA, "id": 1}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"instruction": "q", "input": "", "output": "a", "text": "all of it"}, "alpaca"),
        ({"text": "t"}, "text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"chosen": QA, "rejected": QA, "messages": QA}, "preference"),
        ({"text": None, "messages": None}, None),
        ({"prompt": "q"}, None),
        ({}, None),
    ],
)
def test_detects_the_format_by_the_fields(row, format):
    assert detect(row) == format and (format is None or format in FORMATS)


@pytest.mark.parametrize(
    ("row", "messages", "tools"),
    [
        ({"messages": QA}, QA, None),
        ({"conversations": QA, "system": "s"}, [{"role": "system", "content": "s"}, *QA], None),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": ""},
            QA,
            None,
        ),
        (
            {"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]), assistant("a")]},
            [user("qr"), assistant("a")],
            None,
        ),
        (
            {"messages": [user("q"), {**assistant(None, tool_calls=[CALL]), "name": None}], "tools": [TOOL]},
            [user("q"), assistant("", tool_calls=[CALL])],
            [TOOL],
        ),
        (
            {
                "messages": [
                    user("q"),
                    assistant("", tool_calls=[{"name": "add", "arguments": '{"a": 1}'}]),
                    {"role": "tool", "name": "add", "content": ""},
                ],
                "tools": json.dumps([TOOL]),
            },
            [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "name": "add", "content": ""}],
            [TOOL],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a", "weight": 1},
                ],
                "tools": "",
            },
            [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, assistant("a", weight=1)],
            None,
        ),
        ({"prompt": "q", "completion": " a"}, [user("q"), assistant(" a")], None),
        (
            {"prompt": [user("x"), *QA[::-1]], "completion": assistant("b")},
            [user("x"), *QA[::-1], assistant("b")],
            None,
        ),
        ({"instruction": "q", "output": "a"}, QA, None),
        ({"instruction": "q", "input": " \n", "output": "a"}, QA, None),
        ({"instruction": "q", "input": "r", "output": "a"}, [user("q\n\nr"), assistant("a")], None),
    ],
)
def test_rows_become_messages(row, messages, tools):
    before = json.dumps(row)
    assert to_messages(row, detect(row))[:2] == (messages, tools)
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({}, "messages", "missing field"),
        ({"messages": None}, "messages", "missing field"),
        ({"messages": "hi"}, "messages", "wrong type"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": ["hi"]}, "messages", "wrong type"),
        ({"messages": [{"content": "hi"}]}, "messages", "missing field"),
        ({"messages": [{"role": 5, "content": "hi"}]}, "messages", "wrong type"),
        ({"messages": [{"role": "narrator", "content": "hi"}]}, "messages", "unknown role"),
        ({"messages": [user("q"), assistant(None)]}, "messages", "empty"),
        ({"messages": [user(" "), assistant("a")]}, "messages", "empty"),
        ({"messages": [user({"a": 1}), assistant("a")]}, "messages", "wrong type"),
        ({"messages": [user([{"type": "image"}]), assistant("a")]}, "messages", "wrong type"),
        ({"messages": [user("q\ud800"), assistant("a")]}, "messages", "not UTF-8"),
        ({"messages": [user("q"), assistant("", tool_calls=["x"])]}, "messages", "wrong type"),
        ({"messages": [user("q"), assistant("", tool_calls=[{"function": {}}])]}, "messages", "wrong type"),
        (
            {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": "{"}])]},
            "messages",
            "wrong type",
        ),
        (
            {"messages": [user("q"), assistant("", tool_calls=[{"name": "f", "arguments": [1]}])]},
            "messages",
            "wrong type",
        ),
        ({"messages": [user("q"), assistant("a", weight=0.5)]}, "messages", "wrong type"),
        ({"messages": QA, "tools": "{"}, "messages", "wrong type"),
        ({"messages": QA, "tools": {"a": 1}}, "messages", "wrong type"),
        ({"messages": QA, "system": 5}, "messages", "wrong type"),
        ({"prompt": "q"}, "prompt_completion", "missing field"),
        ({"prompt": "q", "completion": 5}, "prompt_completion", "wrong type"),
        ({"prompt": "", "completion": "a"}, "prompt_completion", "empty"),
        ({"instruction": "q", "output": ""}, "alpaca", "empty"),
        ({"instruction": "q", "input": 1, "output": "a"}, "alpaca", "wrong type"),
        ({"instruction": ["q"], "output": "a"}, "alpaca", "wrong type"),
    ],
)
def test_malformed_rows_say_why(row, format, reason):
    with pytest.raises(Malformed) as error:
        to_messages(row, format)
    assert error.value.reason == reason and reason in REASONS


def test_a_reason_says_where():
    with pytest.raises(Malformed, match=r"unknown role \(messages, message 2: 'narrator'\)"):
        to_messages({"messages": [user("q"), {"role": "narrator", "content": "a"}]}, "messages")
    with pytest.raises(Malformed, match=r"missing field \(completion; fields: prompt, answer\)"):
        to_messages({"prompt": "q", "answer": "a"}, "prompt_completion")


@pytest.mark.parametrize("format", ["text", "preference"])
def test_only_conversations_are_conversations(format):
    with pytest.raises(ValueError, match="no single conversation"):
        to_messages({"text": "t"}, format)


OTHER = [user("q"), assistant("b")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": assistant("b")},
        {"chosen": QA, "rejected": OTHER},
        {"prompt": "q", "chosen": QA, "rejected": OTHER},  # the prompt is in both already
    ],
)
def test_pairs_are_two_whole_conversations(row):
    assert to_pair(row) == ((QA, None, {}), (OTHER, None, {}))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "missing field"),
        ({"prompt": "q", "chosen": "a"}, "missing field"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "same answers"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty"),
    ],
)
def test_malformed_pairs_say_why(row, reason):
    with pytest.raises(Malformed) as error:
        to_pair(row)
    assert error.value.reason == reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "text", "type"]
            ),
            inner | st.sampled_from(["user", "assistant", "gpt"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(
    row=st.dictionaries(
        st.sampled_from(
            sorted(
                {field for fields in FIELDS.values() for field in fields}
                | {"conversations", "input", "tools", "system"}
            )
        ),
        VALUES | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": VALUES})),
    )
)
def test_any_row_gives_well_formed_messages_or_a_reason(row):
    for format in ("messages", "prompt_completion", "alpaca", "preference"):
        try:
            found = to_pair(row) if format == "preference" else [to_messages(row, format)]
        except Malformed as error:
            assert error.reason in REASONS
            continue
        for messages, tools, columns in found:
            assert tools is None or all(isinstance(tool, dict) for tool in tools)
            assert messages and not columns
            for message in messages:
                assert message["role"] in ("system", "developer", "user", "assistant", "tool")
                assert isinstance(message["content"], str)
                calls = message.get("tool_calls", [])
                assert all(isinstance(call["function"]["arguments"], dict) for call in calls)


def test_what_is_no_part_of_the_messages_is_kept_for_the_template():
    row = {
        "messages": [user("q"), assistant("a")],
        "enable_thinking": False,
        "source": "web",
        "documents": None,
        "system": "s",
    }
    assert to_messages(row, "messages").columns == {"enable_thinking": False, "source": "web"}
    pair = to_pair({"prompt": "q", "chosen": "a", "rejected": "b", "persona": "kind"})
    assert [side.columns for side in pair] == [{"persona": "kind"}] * 2

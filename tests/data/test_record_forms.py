"""The forms of records: messages with parts, ShareGPT, questions; the same conversation is the same sample in all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_vlm.data.records import sample_from_record
from symphony_vlm.data.sample import ImagePart, ImageRef, Message, Sample
from symphony_vlm.errors import InputError

Record = dict[str, Any]
PNG = "data:image/png;base64,iVBORw0KGgo="
PNG_BYTES = b"\x89PNG\r\n\x1a\n"


def sample(record: Record) -> Sample:
    return sample_from_record(record, where="a.json: record 3", index=3, image_folder=Path("/images"))


def ask(*content: Any, answer: Any = "A", **fields: Any) -> Record:
    question = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def text(value: str, **more: Any) -> Record:
    return {"type": "text", "text": value, **more}


KEYS = [
    "messages",
    "conversations",
    "question",
    "answer",
    "image",
    "images",
    "role",
    "from",
    "content",
    "value",
    "type",
]
KEYS += ["text", "index", "image_url", "url", "bytes", "path", "id", "system"]
IMAGE: Record = {"type": "image"}


def parts(message: Message) -> list[str | int]:
    return [part.index if isinstance(part, ImagePart) else part.text for part in message.parts]


def names(images: tuple[ImageRef, ...]) -> list[str]:
    return [image.name for image in images]


class TestMessages:
    def test_strings_are_llava_text(self) -> None:
        found = sample(ask("<image>What<image>?", images=["a.png", "b.png"], source="x"))
        assert parts(found.messages[0]) == [0, "What", 1, "?"] and parts(found.messages[1]) == ["A"]
        assert names(found.images) == ["a.png", "b.png"] and found.images[0].path == Path("/images/a.png")
        assert (found.id, found.origin, found.meta) == ("3", "a.json: record 3", {"source": "x"})

    def test_parts_keep_their_order_and_markers_in_them_are_text(self) -> None:
        content = [text("Is <image> "), IMAGE, text("like "), text("this: "), IMAGE, text("")]
        found = sample(ask(*content, answer=[text("<image> "), text("it is.")], image=["a", "b"]))
        assert parts(found.messages[0]) == ["Is <image> ", 0, "like this: ", 1]
        assert parts(found.messages[1]) == ["<image> it is."]

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
            {"type": "image_url", "image_url": "a.png"},
            {"type": "input_image", "image_url": "a.png"},
            {"type": "image", "image": "a.png"},
            {"type": "image", "url": "a.png"},
            {"type": "image", "path": "a.png", "text": None, "image_url": {"url": None}},
            {"type": "image", "image": {"bytes": None, "path": "a.png"}},
            {"type": "image", "image": "file:///images/a.png"},
        ],
    )
    def test_images_by_path(self, part: Record) -> None:
        image = sample(ask({"type": "input_text", "text": "Q"}, part)).images[0]
        assert image.path == Path("/images/a.png") and image.data is None

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": PNG}},
            {"type": "image", "image": PNG_BYTES},
            {"type": "image", "image": {"bytes": PNG_BYTES, "path": None}},
            {"type": "image", "base64": "iVBORw0KGgo="},
        ],
    )
    def test_images_by_content(self, part: Record) -> None:
        assert sample(ask(part, text("Q"))).images[0].data == PNG_BYTES

    def test_own_and_inline_images_are_numbered_as_they_appear(self) -> None:
        inline = {"type": "image", "image": "inline.png"}
        found = sample(ask(text("1"), IMAGE, inline, IMAGE, images=["a", "b"]))
        assert parts(found.messages[0]) == ["1", 0, 1, 2] and names(found.images) == ["a", "inline.png", "b"]

    def test_places_that_name_their_image(self) -> None:
        content = [
            text("Q", index=None),
            {"type": "image", "index": 2, "text": None},
            IMAGE,
            {"type": "image", "index": 0},
        ]
        found = sample(ask(*content, images=["a", "b", "c"]))
        assert names(found.images) == ["c", "b", "a"] and parts(found.messages[0]) == ["Q", 0, 1, 2]

    def test_images_without_places_go_first(self) -> None:
        both = [sample(ask("Q", images=["a", "b"])), sample(ask(text("Q"), image=["a", "b"]))]
        assert [parts(found.messages[0]) for found in both] == [[0, 1, "\nQ"]] * 2

    @pytest.mark.parametrize("fields", [{}, {"images": []}, {"image": None, "images": None}])
    def test_text_only_and_system(self, fields: Record) -> None:
        record = ask("Q", **fields)
        record["messages"].insert(0, {"role": "developer", "content": [text("Be "), text("brief.")]})
        found = sample(record)
        assert [message.role for message in found.messages] == ["system", "user", "assistant"]
        assert found.images == () and parts(found.messages[0]) == ["Be brief."]


class TestShareGpt:
    @pytest.mark.parametrize("field", ["conversations", "messages"])
    @pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
    def test_either_turn_in_either_list(self, field: str, who: str, what: str) -> None:
        roles = {"from": ("human", "gpt"), "role": ("user", "assistant")}[who]
        turns = [{who: roles[0], what: "<image>Q"}, {who: roles[1], what: "A"}]
        found = sample({field: turns, "images": "a.png"})
        assert parts(found.messages[0]) == [0, "Q"] and names(found.images) == ["a.png"]

    def test_system_beside_the_turns(self) -> None:
        turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
        found = sample({"system": "Be brief.", "conversations": turns})
        assert found.messages[0].role == "system" and found.messages[0].text == "Be brief." and found.meta == {}
        with pytest.raises(InputError, match="both the field 'system' and a system turn"):
            sample({"system": "x", "conversations": [{"from": "system", "value": "y"}, *turns]})
        # In other data sets it is a name or a number of something.
        assert sample({"system": 4, "conversations": turns}).meta == {"system": 4}


class TestFaults:
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"messages": None}, r"field 'messages' is None; it must be a list of turns"),
            ({"messages": [{}]}, r"'messages\[0\]' is \{\}; it must be"),
            ({"messages": [{"role": "user"}]}, r"'messages\[0\]\.content' is missing.*Fields of this turn: role"),
            ({"messages": [{"from": "human", "content": "Q"}]}, r"'messages\[0\]\.value' is missing"),
            (ask("Q", answer=None), r"'messages\[1\]\.content' is None; it must be a string"),
            (ask("Q", answer=[]), r"'messages\[1\]\.content' is ''; an answer must not be empty"),
            (ask("Q", answer=[IMAGE]), r"'messages\[1\]\.content\[0\]' is an image in a turn of the assistant"),
            (ask(), r"'messages\[0\]\.content' is \[\]; it must hold at least one part"),
            (ask("x", "y"), r"'messages\[0\]\.content\[0\]' is 'x'; it must be \{\"type\": \"text\""),
            (ask({"text": "x"}), r"'messages\[0\]\.content\[0\]' is \{'text': 'x'\}"),
            (ask({"type": ["x"]}), r"content\[0\]' is \{'type': \['x'\]\}"),
            (ask({"type": "video", "video": "x"}), r"content\[0\]' has the type 'video'; it must be"),
            (ask({"type": "text"}), r"'messages\[0\]\.content\[0\]\.text' is None; it must be a string"),
            (ask(text("\ud800")), r"content\[0\]\.text' has half a surrogate pair"),
            (ask({"type": "image_url"}), r"content\[0\]' has no image.*\{\"type\": \"image\"\}"),
            (ask({"type": "image_url", "image_url": {"x": 1}}), r"image_url\.url' is None; it must be a path"),
            (ask({"type": "image", "image": 7}), r"content\[0\]\.image' is 7; it must be a path"),
            (ask({"type": "image", "image": "a", "path": "b"}), r"content\[0\]' has 'image' and 'path'; one of them"),
            (ask({"type": "image", "base64": "a.png"}), r"not valid base64"),
            (ask({"type": "image_url", "image_url": {"url": "https://x/a.png"}}), r"is the web address"),
            (ask(IMAGE, text("Q")), r"1 <image> marker\(s\) in the questions but 0 image\(s\)"),
            (ask(IMAGE, image_path="a"), r"'image_path' is not read"),
            (
                ask("Why <image>?"),
                r"1 <image> marker\(s\).* but 0 image\(s\).*use messages with \{\"type\": \"text\"\}",
            ),
            (ask({"type": "image", "image": "a"}, image="b"), r"0 <image> marker\(s\).* but 1 image\(s\)"),
            (ask({"type": "image", "index": 1}, image="b"), r"image 1 is named by a part, but the record has 1 image"),
            (ask(*[{"type": "image", "index": 0}] * 2, image=["a", "b"]), r"image 0 is named by more than one part"),
            (ask({"type": "image", "index": -1}, image="a"), r"content\[0\]\.index' is -1; it must be the number"),
            ({"messages": [{"role": "tool", "content": "x"}]}, r"'messages\[0\]' is part of a tool call \(role 'tool'"),
            ({"messages": [{"role": "function", "content": "x"}]}, r"tools cannot be trained"),
            (
                {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
                r"'messages\[0\]' is part of a tool call",
            ),
            (
                {"messages": [ask("Q")["messages"][0], {"role": "assistant", "content": "A", "loss": False}]},
                r"'messages\[1\]' has a loss weight of zero",
            ),
            ({"messages": ask("Q")["messages"][:1]}, r"the last of 1 turns is from 'user'"),
            ({"messages": ask("Q")["messages"][1:]}, r"'messages\[0\]\.role' is 'assistant' where human \(or user\)"),
            ({"question": "Q"}, r"field 'answer' is missing"),
            ({"question": None, "answer": "A"}, r"field 'question' is None"),
            (
                {"text": "x", "id": "r"},
                r"\(id 'r'\): field 'conversations' is missing; a record must have either .*: text, id",
            ),
            ({"id": "\ud800", **ask("Q")}, r"field 'id' has half a surrogate pair"),
        ],
    )
    def test_a_fault_names_record_field_and_form(self, bad: Record, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            sample(bad)
        assert str(caught.value).startswith("a.json: record 3") and "\n" not in str(caught.value)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-1, 2) | st.text("ab<image>", max_size=8) | st.binary(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(KEYS),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        )
    )
    def test_nothing_but_input_errors(self, record: Any) -> None:
        try:
            sample(record)
        except InputError as error:
            assert str(error).startswith("a.json: record 3")


PIECES = st.lists(st.none() | st.text("ab <\n\u00e9", min_size=1, max_size=5), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(PIECES, st.text("xyz<image>", min_size=1, max_size=9)), min_size=1, max_size=3),
    st.none() | st.text("abc", min_size=1),
)
def test_the_same_conversation_in_every_form(pairs: list[tuple[list[str | None], str]], system: str | None) -> None:
    import pyarrow as pa

    if not any(piece is None for pieces, _ in pairs for piece in pieces):
        pairs[0][0].append(None)  # without any place images go first: another rule
    images = [f"{number}.png" for number in range(sum(pieces.count(None) for pieces, _ in pairs))]
    llava: list[Record] = [{"from": "system", "value": system}] if system else []
    openai: list[Record] = [{"role": "system", "content": [text(system)]}] if system else []
    inline: list[Record] = list(openai)
    order = iter(images)
    for pieces, answer in pairs:
        question = "".join("<image>" if piece is None else piece for piece in pieces)
        llava += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        reply = {"role": "assistant", "content": [text(answer)]}
        openai += [{"role": "user", "content": [IMAGE if p is None else text(p) for p in pieces]}, reply]
        own = [{"type": "image", "image": next(order)} if piece is None else text(piece) for piece in pieces]
        inline += [{"role": "user", "content": own}, reply]
    strings = [
        {"role": {"human": "user", "gpt": "assistant"}.get(t["from"], t["from"]), "content": t["value"]} for t in llava
    ]
    records: list[Record] = [
        {"conversations": llava, "image": images},
        {"messages": strings, "images": images},
        {"messages": openai, "images": images},
        {"messages": inline},
    ]
    # A table gives every part of a column the same fields, with nulls.
    records += [row for record in records for row in pa.Table.from_pylist([record]).to_pylist()]
    samples = [sample(record) for record in json.loads(json.dumps(records))]
    assert all(found.messages == samples[0].messages and found.images == samples[0].images for found in samples)
    assert names(samples[0].images) == images


def test_a_question_row_equals_its_conversation() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    row = sample({"question": "Q", "answer": "A", "images": ["a"]})
    assert (row.messages, row.images) == (
        (both := sample({"conversations": turns, "image": "a"})).messages,
        both.images,
    )

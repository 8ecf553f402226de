"""Renderings: what each format makes of a reply, whole or in pieces."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redisgate.replies import BASE64, JSON, RESP2
from resp.parser import ErrorReply, Parser
from resp.scanner import FrameScanner, frame_depth
from tests.resp.test_scanner import FRAMES


def as_json(value: Any) -> Any:
    """What the contract says a parsed reply becomes."""
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def as_base64(value: Any) -> Any:
    if isinstance(value, list):
        return [as_base64(item) for item in value]
    if isinstance(value, ErrorReply):
        return base64.b64encode(value.encode()).decode()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def expected(frame: bytes, convert: Any) -> Any:
    value = Parser(text=False).parse(frame)[0]
    if isinstance(value, ErrorReply):
        return {"error": str(value)}
    if value == b"OK":
        return {"result": "OK"}
    return {"result": convert(value)}


def streamed(stream: Any, frames: bytes, count: int, step: int) -> bytes:
    """The body that a stream makes of frames that come `step` bytes at a time."""
    scanner = FrameScanner(count)
    kept, body = b"", b""
    for start in range(0, len(frames), step):
        kept += frames[start : start + step]
        end = scanner.scan(kept, 0, partial_bulks=True)
        body += stream.feed(kept[:end]) if end else b""
        kept = kept[end:]
    return body


@given(FRAMES)
def test_json_and_base64_follow_the_contract(frame: bytes) -> None:
    depth = frame_depth(frame)
    for rendering, convert in ((JSON, as_json), (BASE64, as_base64)):
        status, body = rendering.single(frame, depth)
        assert json.loads(body) == expected(frame, convert)
        assert status == (400 if frame.startswith(b"-") else 200)
    assert RESP2.single(frame, depth)[1] is frame


@given(FRAMES, st.integers(1, 9))
def test_a_streamed_reply_has_the_same_body(frame: bytes, step: int) -> None:
    for rendering in (JSON, BASE64, RESP2):
        whole = rendering.single(frame, frame_depth(frame))[1]
        pieces = streamed(rendering.stream(1, None), frame, 1, step)
        assert pieces == whole if rendering is RESP2 else json.loads(pieces) == json.loads(whole)


@given(
    st.lists(FRAMES, max_size=5),
    st.dictionaries(st.integers(0, 7), st.sampled_from([b"-ERR no\r\n", b"+OK\r\n"]), max_size=3),
    st.integers(1, 9),
)
def test_pipelines_keep_their_order_whole_and_streamed(
    frames: list[bytes], wanted: dict[int, bytes], step: int
) -> None:
    inserts = {index: frame for index, frame in wanted.items() if index < len(frames)}
    replies = [frame for index, frame in enumerate(frames) if index not in inserts]
    items = [inserts.get(index, frame) for index, frame in enumerate(frames)]
    joined = b"".join(replies)
    depth = max((frame_depth(frame) for frame in replies), default=0)
    assert RESP2.pipeline(joined, len(replies), depth, inserts) == (200, b"".join(items))
    for rendering, convert in ((JSON, as_json), (BASE64, as_base64)):
        status, body = rendering.pipeline(joined, len(replies), depth, inserts)
        assert status == 200
        assert json.loads(body) == [expected(item, convert) for item in items]
        if replies:
            stream = rendering.stream(len(replies), inserts)
            assert json.loads(streamed(stream, joined, len(replies), step)) == json.loads(body)
    if replies:
        assert streamed(RESP2.stream(len(replies), inserts), joined, len(replies), step) == b"".join(items)


@given(st.lists(FRAMES, max_size=5), st.integers(1, 9))
def test_transactions_whole_and_streamed(frames: list[bytes], step: int) -> None:
    run = b"+OK\r\n" + b"+QUEUED\r\n" * len(frames) + b"*%d\r\n" % len(frames) + b"".join(frames)
    count = len(frames) + 2
    depth = max(frame_depth(frame) for frame in [*frames, b"*1\r\n" + b":1\r\n"]) + 1
    for rendering, convert in ((JSON, as_json), (BASE64, as_base64)):
        status, body = rendering.transaction(run, count, depth)
        assert status == 200
        assert json.loads(body) == [expected(frame, convert) for frame in frames]
        stream = rendering.transaction_stream(count)
        assert json.loads(streamed(stream, run, count, step)) == json.loads(body)
        assert stream.status == 200


def test_a_discarded_transaction_is_its_first_error() -> None:
    run = b"+OK\r\n+QUEUED\r\n-ERR first\r\n-ERR second\r\n-EXECABORT Transaction discarded\r\n"
    assert JSON.transaction(run, 5, 0) == (400, b'{"error":"ERR first"}')
    stream = JSON.transaction_stream(5)
    assert streamed(stream, run, 5, 3) == b'{"error":"ERR first"}'
    assert stream.status == 400


@pytest.mark.parametrize("depth", [1, 200, 201, 1000, 1024])
def test_deep_replies_are_rendered_whole(depth: int) -> None:
    frame = b"*1\r\n" * depth + b"$1\r\na\r\n"
    assert JSON.single(frame, depth) == (200, b'{"result":' + b"[" * depth + b'"a"' + b"]" * depth + b"}")


def test_a_reply_too_deep_is_an_error_for_its_item_alone() -> None:
    deep = b"*1\r\n" * 8000 + b":1\r\n"
    status, body = JSON.single(deep, 8000)
    assert status == 400
    assert b"nests deeper" in body
    items = json.loads(JSON.pipeline(b":1\r\n" + deep + b":2\r\n", 3, 8000, {})[1])
    assert items[0] == {"result": 1}
    assert "nests deeper" in items[1]["error"]
    assert items[2] == {"result": 2}
    assert RESP2.single(deep, 8000) == (200, deep)

"""The scanner, the parser and the encoder against each other and against hiredis."""

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resp.encoder import encode_command, encode_commands
from resp.errors import ProtocolError
from resp.parser import ErrorReply, Parser
from resp.scanner import FrameScanner, frame_depth, split_frames

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20).map(str.encode)


def bulk(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


SCALARS = st.one_of(
    st.one_of(st.none(), st.binary(max_size=40)).map(bulk),
    LINE.map(lambda line: b"+%b\r\n" % line),
    LINE.map(lambda line: b"-%b\r\n" % line),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: b":%d\r\n" % number),
    st.just(b"*-1\r\n"),
)
FRAMES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4).map(lambda items: b"*%d\r\n%b" % (len(items), b"".join(items))),
    max_leaves=12,
)


@given(st.lists(FRAMES, min_size=1, max_size=5), st.data())
def test_runs_of_replies_end_where_they_end_however_they_are_cut(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frames)
    rest = b"+next\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    scanner = FrameScanner(len(frames))
    buffer, position = b"", 0
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        assert not scanner.done or start == end
        buffer += stream[start:end] + (rest if end == len(stream) and start != end else b"")
        if not scanner.done:
            position = scanner.scan(buffer, position)
    assert scanner.done
    assert buffer[:position] == stream


@given(FRAMES, st.integers(1, 7))
def test_streamed_pieces_are_the_whole_reply(frame: bytes, step: int) -> None:
    scanner = FrameScanner()
    kept, passed = b"", b""
    for start in range(0, len(frame), step):
        kept += frame[start : start + step]
        end = scanner.scan(kept, 0, partial_bulks=True)
        passed += kept[:end]
        kept = kept[end:]
    assert scanner.done
    assert passed == frame
    assert kept == b""


@given(st.lists(FRAMES, max_size=5))
def test_split_frames_gives_each_reply_as_hiredis_reads_it(frames: list[bytes]) -> None:
    assert split_frames(b"".join(frames), len(frames)) == frames
    reader = hiredis.Reader(replyError=ErrorReply)
    reader.feed(b"".join(frames))
    assert Parser(text=False).parse(b"".join(frames), len(frames)) == [reader.gets() for _ in frames]


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=8))
def test_an_encoded_command_is_one_array_of_its_arguments(argv: list[bytes]) -> None:
    assert Parser(text=False).parse(encode_command(argv)) == [argv]
    assert encode_commands([argv, argv]) == encode_command(argv) * 2


@given(st.binary(max_size=60))
def test_garbage_is_an_error_or_incomplete_and_never_a_reply_hiredis_would_not_read(garbage: bytes) -> None:
    scanner = FrameScanner()
    try:
        end = scanner.scan(garbage)
    except ProtocolError:
        return
    if scanner.done:
        assert Parser(text=False).parse(garbage[:end])


@pytest.mark.parametrize(
    "bad",
    [
        b">2\r\n",
        b"%1\r\n",
        b"#t\r\n",
        b"_\r\n",
        b",1.5\r\n",
        b"HTTP/1.1 400\r\n",
        b"$1_0\r\n",
        b"$ 5\r\n",
        b"$+5\r\n",
        b"$-2\r\n",
        b"$05\r\n",
        b"$536870913\r\n",
        b"*2147483647\r\n",
        b"*-2\r\n",
        b"*1a\r\n",
        b":1.5\r\n",
        b":\r\n",
        b"$3\r\nabcd\r\n",
        b"$3\r\nabc\n\r",
        b"+a\nb\r\n",
        b"+" + b"a" * 70_000,
        b"X",
    ],
    ids=lambda bad: repr(bad[:16]),
)
def test_what_is_not_resp2_is_an_error(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameScanner().scan(bad + (b"" if bad == b"X" else b"tail\r\n" * 3))


@pytest.mark.parametrize("depth", [0, 1, 2, 1024, 8000])
def test_depth_is_counted_without_recursion(depth: int) -> None:
    assert frame_depth(b"*1\r\n" * depth + b":1\r\n") == depth


def test_a_parser_survives_a_reply_that_breaks_it() -> None:
    parser = Parser(text=True)
    with pytest.raises(ProtocolError):
        parser.parse(b"*1\r\n" * 2000 + b":1\r\n")
    assert parser.parse(b"+OK\r\n") == ["OK"]
    with pytest.raises(ProtocolError):
        parser.parse(b"+OK\r\n+OK\r\n", 1)
    assert parser.parse(b"$2\r\n\xff\xfe\r\n") == ["��"]

"""From bytes to HTTP/1.1 answers and from bodies to server-sent events, a part at a time.

Both take whatever pieces the network makes of them. Knows nothing of connections and of what an event says.
"""

from __future__ import annotations

_MAX_HEAD_BYTES = 64 * 1024
_END_OF_LINE = b"\r\n"


class BadResponseError(Exception):
    """What came is not HTTP/1.1."""


class ResponseParser:
    """One answer (RFC 9112): its head, and its body in chunks, of a given length, or up to the end.

    Attributes:
        status: of the head; 0 before it has come.
        retry_after_s: when the server asks to come again; None where it does not say.
        is_done: the answer is whole.
        keeps_alive: it is whole, and the connection serves another request.
    """

    def __init__(self) -> None:
        self.status = 0
        self.retry_after_s: int | None = None
        self.is_done = False
        self.keeps_alive = True
        self._buffer = bytearray()
        self._is_chunked = False
        # Bytes of the body, or of the chunk, still to come; None up to the end of the connection.
        self._left: int | None = 0
        self._is_last_chunk = False

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection, now, would be the end of the answer."""
        return self.is_done or (self.status > 0 and not self._is_chunked and self._left is None)

    def feed(self, data: bytes) -> bytes:
        """Return the part of the body that `data` brings.

        Raises:
            BadResponseError: this is not HTTP/1.1.
        """
        self._buffer += data
        while self.status == 0:
            if not self._read_head():
                return b""
        if self._is_chunked:
            return self._read_chunks()
        body = bytes(self._buffer if self._left is None else self._buffer[: self._left])
        del self._buffer[: len(body)]
        if self._left is not None:
            self._left -= len(body)
            self.is_done = self._left == 0
        return body

    def _read_head(self) -> bool:
        """Read the head if it has come; False when more must come. What is interim (1xx) is left out."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise BadResponseError(f"a head of more than {_MAX_HEAD_BYTES} bytes")
            return False
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise BadResponseError(f"expected HTTP/1.1, found {first[:80]!r}")
        status = int(rest[:3])
        if status >= 200:
            self.status = status
            pairs = (line.partition(":") for line in lines)
            self._take_headers({name.lower(): value.strip().lower() for name, _, value in pairs}, version)
        return True

    def _take_headers(self, headers: dict[str, str], version: str) -> None:
        self.keeps_alive = version != "HTTP/1.0" and headers.get("connection") != "close"
        retry_after = headers.get("retry-after", "")
        self.retry_after_s = int(retry_after) if retry_after.isdecimal() else None
        self._is_chunked = headers.get("transfer-encoding", "").endswith("chunked")
        length = headers.get("content-length", "")
        if self._is_chunked or self.status in (204, 304):
            self.is_done = not self._is_chunked
        elif length.isdecimal():
            self._left = int(length)
            self.is_done = self._left == 0
        else:
            self._left, self.keeps_alive = None, False

    def _read_chunks(self) -> bytes:
        body, position = bytearray(), 0
        while not self.is_done:
            end = self._buffer.find(_END_OF_LINE, position)
            if end < 0:
                break
            line = self._buffer[position:end]
            if self._is_last_chunk:
                # Trailers, which say nothing to us, up to an empty line.
                position = end + 2
                self.is_done = not line
                continue
            size = _chunk_size(line)
            if size and len(self._buffer) < end + 2 + size + 2:
                break
            body += self._buffer[end + 2 : end + 2 + size]
            position = end + 2 + (size + 2 if size else 0)
            self._is_last_chunk = size == 0
        del self._buffer[:position]
        return bytes(body)


def _chunk_size(line: bytearray) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as error:
        raise BadResponseError(f"expected the size of a chunk, found {bytes(line[:40])!r}") from error


class EventParser:
    """The data of server-sent events (the HTML standard's `text/event-stream`)."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, body: bytes) -> list[bytes]:
        """Return the data of the events that `body` completes; comments and other fields are left out."""
        self._buffer += body
        if b"\r" in self._buffer:
            self._buffer = self._buffer.replace(_END_OF_LINE, b"\n")
        *events, self._buffer = self._buffer.split(b"\n\n")
        found = []
        for event in events:
            lines = event.split(b"\n")
            data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
            if data:
                found.append(b"\n".join(data))
        return found

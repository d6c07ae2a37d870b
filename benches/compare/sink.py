"""The service that takes uploads: reads a whole body, then answers with the number of bytes read.

nginx can't play this part honestly: `return` answers before it has read the body, and everything else
stores it. This reads into one large buffer and keeps nothing, so that its own cost is the kernel's copy.
GET of anything but / is answered with the file, for transfers both ways at once through one tunnel.
Usage: sink.py PORT FILE
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading

BUFFER = 1 << 20
HEAD_LIMIT = 64 * 1024


def main() -> None:
    port, file = int(sys.argv[1]), sys.argv[2]
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, file), daemon=True).start()


def serve(connection: socket.socket, file: str) -> None:
    """Answers the requests of one connection, one after the other, until the peer leaves."""
    buffer = bytearray(BUFFER)
    rest = b""
    with connection:
        try:
            while True:
                head, rest = read_head(connection, rest)
                if head is None:
                    return
                if re.match(rb"GET /[^ ]", head):
                    send_file(connection, file)
                    continue
                length = content_length(head)
                if length is None:
                    answer(connection, "411 Length Required", "a Content-Length is needed", close=True)
                    return
                if re.search(rb"(?im)^expect:\s*100-continue", head):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                taken = min(len(rest), length)
                rest, left = rest[taken:], length - taken
                while left:
                    count = connection.recv_into(buffer, min(left, BUFFER))
                    if count == 0:
                        return
                    left -= count
                answer(connection, "200 OK", str(length))
        except OSError:
            return


def read_head(connection: socket.socket, received: bytes) -> tuple[bytes | None, bytes]:
    """One request head and what came after it; None when the peer left."""
    while b"\r\n\r\n" not in received:
        more = connection.recv(HEAD_LIMIT)
        if not more or len(received) > HEAD_LIMIT:
            return None, b""
        received += more
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


def content_length(head: bytes) -> int | None:
    """The body's length: 0 for a GET, None if a body comes without a length."""
    if found := re.search(rb"(?im)^content-length:\s*(\d+)\s*$", head):
        return int(found.group(1))
    return None if re.search(rb"(?im)^transfer-encoding:", head) else 0


def send_file(connection: socket.socket, path: str) -> None:
    """Answers with a whole file, as the kernel sends it."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        connection.sendfile(file)


def answer(connection: socket.socket, status: str, text: str, close: bool = False) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n"
    connection.sendall((head + ("Connection: close\r\n" if close else "") + "\r\n" + text).encode())


if __name__ == "__main__":
    main()

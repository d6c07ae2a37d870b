"""gRPC's interoperability cases by grpcio.

    interop.py client HOST:PORT   calls the service of tests/http2/grpc.rs, or this file's
    interop.py server             is that service, and says its port
"""

import sys
import threading
from concurrent import futures

import grpc

ECHO = "x-grpc-test-echo-initial"
ECHO_BIN = "x-grpc-test-echo-trailing-bin"
SPECIAL = "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \U0001f608\t\n"


def pattern(size):
    return bytes(index * 31 % 251 for index in range(size))


def client(address):
    channel = grpc.insecure_channel(
        address, options=[("grpc.max_receive_message_length", 1 << 24)]
    )
    path = "/test.Test/"
    unary = channel.unary_unary(path + "Unary")
    collect = channel.stream_unary(path + "Collect")
    scatter = channel.unary_stream(path + "Scatter")
    ping_pong = channel.stream_stream(path + "PingPong")

    for size in [0, 1, 271828, 3 << 20]:
        assert unary(pattern(size), timeout=10) == pattern(size), size
    sizes = [27182, 8, 1828, 45904, 0, 300000]
    assert collect(map(pattern, sizes), timeout=10) == b"6 374922"
    assert collect(iter([]), timeout=10) == b"0 0"
    lengths = [len(message) for message in scatter(bytes([31, 0, 2, 58]), timeout=10)]
    assert lengths == [31000, 0, 2000, 58000], lengths
    assert list(scatter(b"", timeout=10)) == []

    # Each is sent only after the answer to the one before.
    turn = threading.Semaphore(1)

    def pings():
        for size in sizes:
            turn.acquire()
            yield pattern(size)

    seen = 0
    for message in ping_pong(pings(), timeout=10):
        assert message == pattern(sizes[seen])
        seen += 1
        turn.release()
    assert seen == len(sizes)
    assert list(ping_pong(iter([]), timeout=10)) == []

    value = bytes([0, 0xAB, 0xFF, 10, 0x7F])
    metadata = [(ECHO, "test_initial_metadata_value"), (ECHO_BIN, value)]
    answer, call = unary.with_call(b"x", metadata=metadata, timeout=10)
    told = dict(call.initial_metadata())
    assert answer == b"x"
    assert told[ECHO] == "test_initial_metadata_value"
    assert told[ECHO_BIN] == value

    for code, message in [(2, "test status message"), (2, SPECIAL), (5, ""), (16, "100% %20")]:
        asked = [("x-code", str(code)), ("x-message-bin", message.encode())]
        for failing in [
            lambda: unary(b"", metadata=asked + metadata, timeout=10),
            lambda: list(scatter(b"", metadata=asked + metadata, timeout=10)),
        ]:
            error = fails(failing)
            assert error.code().value[0] == code, error
            assert error.details() == message, error
            assert dict(error.trailing_metadata())[ECHO_BIN] == value, error
    error = fails(lambda: list(ping_pong(iter([b"fail"]), timeout=10)))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "as asked")

    for nothing in ["/test.Test/Nothing", "/test.Nobody/Unary"]:
        error = fails(lambda: channel.unary_unary(nothing)(b"", timeout=10))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error

    error = fails(lambda: unary(b"", metadata=[("x-sleep", "1")], timeout=0.2))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    never = threading.Event()

    def one_and_no_more():
        yield b"one"
        never.wait()

    call = collect.future(one_and_no_more(), timeout=10)
    assert call.cancel() and call.cancelled()
    call = ping_pong(one_and_no_more(), timeout=10)
    assert next(call) == b"one"
    call.cancel()
    assert fails(lambda: list(call)).code() == grpc.StatusCode.CANCELLED
    never.set()
    assert unary(b"still", timeout=10) == b"still"
    print("all is well")


def fails(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("no error")


def asked(context):
    metadata = dict(context.invocation_metadata())
    back = [(name, metadata[name]) for name in (ECHO, ECHO_BIN) if name in metadata]
    if "x-code" in metadata:
        context.set_trailing_metadata(back)
        codes = {code.value[0]: code for code in grpc.StatusCode}
        context.abort(codes[int(metadata["x-code"])], metadata["x-message-bin"].decode())
    context.send_initial_metadata(back)
    return metadata


def unary(request, context):
    if "x-sleep" in asked(context):
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait()
    return request


def collect(requests, context):
    asked(context)
    lengths = [len(request) for request in requests]
    return b"%d %d" % (len(lengths), sum(lengths))


def scatter(request, context):
    asked(context)
    for size in request:
        yield pattern(size * 1000)


def ping_pong(requests, context):
    asked(context)
    for request in requests:
        if request == b"fail":
            context.abort(grpc.StatusCode.DATA_LOSS, "as asked")
        yield request


def server():
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Collect": grpc.stream_unary_rpc_method_handler(collect),
        "Scatter": grpc.unary_stream_rpc_method_handler(scatter),
        "PingPong": grpc.stream_stream_rpc_method_handler(ping_pong),
    }
    running = grpc.server(
        futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", 1 << 24)]
    )
    running.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Test", methods)])
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    print(port, flush=True)
    running.wait_for_termination()


if sys.argv[1] == "client":
    client(sys.argv[2])
else:
    server()

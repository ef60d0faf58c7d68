"""The helper that looks names up, since getaddrinfo() blocks. Run by its path, in an interpreter of its own; imports `os` alone.

Its stdin is a socket whose messages keep their bounds (SOCK_SEQPACKET): "NUMBER NAME" comes in, and when that is known "NUMBER
ok" or "NUMBER CODE why" goes out, followed by lines "4 ADDRESS" and "6 ADDRESS SCOPE". Each name has a thread, so a slow one
keeps nobody waiting; the other side sees to it that there are not too many. It ends when that side does, whatever its threads
are at, and after IDLE_S without a question.
"""

import _socket
import _thread
import os

TITLE = "kqueued: names"  # 15 bytes at most
IDLE_S = 60.0
MAX_ADDRESSES = 32  # of one name, that are told
STACK = 256 * 1024  # bytes, of which a look-up uses a tenth


def look_up(name: str) -> list[str]:
    """The addresses of `name`, the ones to prefer first. OSError when there are none."""
    asked = name.encode() if name.isascii() else name  # of a str it would import the tables of IDNA
    found = _socket.getaddrinfo(asked, None, 0, _socket.SOCK_STREAM)
    lines = []
    for family, _, _, _, at in found:
        words = [str(part) for part in at]  # address, port, and of IPv6 flow and scope
        if family == _socket.AF_INET:
            lines.append(f"4 {words[0]}")
        elif family == _socket.AF_INET6:
            lines.append(f"6 {words[0]} {words[-1]}")
    return lines[:MAX_ADDRESSES]


class _Helper:
    def __init__(self, sock: _socket.socket) -> None:
        self._socket = sock
        self._busy = 0  # threads
        self._lock = _thread.allocate_lock()

    def serve(self) -> None:
        """Until there is no more to do."""
        self._socket.settimeout(IDLE_S)
        while True:
            try:
                question = self._socket.recv(4096)
            except TimeoutError:
                with self._lock:
                    if not self._busy:
                        return
                continue
            if not question:
                return
            with self._lock:
                self._busy += 1
            try:
                _thread.start_new_thread(self._answer, (question,))
            except RuntimeError:  # no thread can be had: the others wait, but this one is answered
                self._answer(question)

    def _answer(self, question: bytes) -> None:
        number, _, name = question.decode().partition(" ")
        try:
            lines = look_up(name)
            answer = "\n".join([f"{number} ok", *lines])
        except OSError as error:
            answer = f"{number} {error.errno} {error.strerror}"
        except Exception as error:  # a name that cannot be encoded
            answer = f"{number} {_socket.EAI_NONAME} {error}"
        try:
            self._socket.send(answer.encode())
        except OSError:
            return  # the other side is gone, as the main thread is about to find out
        finally:
            with self._lock:
                self._busy -= 1


def main() -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    with open("/proc/self/comm", "w") as title:  # what ps shows
        title.write(TITLE)
    _thread.stack_size(STACK)
    try:
        _Helper(_socket.socket(fileno=0)).serve()
    finally:
        os._exit(0)  # threads may be at it still


if __name__ == "__main__":
    main()

"""Ctrl-C: leave within two seconds whatever the main thread is doing; everything on disk is whole at any time."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE = 1.0  # seconds the main thread has to stop by itself
EXIT = 130


@contextmanager
def prompt_exit(message: Callable[[], str]) -> Iterator[None]:
    """Within the block, SIGINT raises KeyboardInterrupt; if that has no effect for a second (a long kernel holds the main
    thread), ``message()`` is printed and the process ends with exit code 130.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            try:
                received = receiver.recv(1)
            except OSError:
                return
            if received and received[0] == signal.SIGINT and not finished.wait(GRACE):
                print(message(), file=sys.stderr, flush=True)
                os._exit(EXIT)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    old = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGINT, before)
        sender.close()

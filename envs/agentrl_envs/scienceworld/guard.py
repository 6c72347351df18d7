"""Runs one JVM and ends it with whoever started it: a script of its own, which imports nothing of ours.

`python guard.py OWNER COMMAND...` prints the JVM's process id; then its output is the JVM's. The JVM is
killed when the owner closes or writes to the guard's input, when the owner is gone, however it went, and when
the guard is told to end. A JVM that hangs cannot refuse; should the guard be killed, the JVM's input ends.
The folder that it runs in is theirs, and is removed at the end.
"""

import os
import select
import shutil
import signal
import subprocess
import sys

CHECK_SECONDS = 1.0
ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main(owner: int, command: list[str]) -> None:
    """Run the command until one of the reasons to end it."""
    # Signals only wake the loop: a handler that raised could do so in the middle of ending the JVM.
    waking, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in {*ENDING, signal.SIGCHLD}:
        signal.signal(number, lambda *_: None)
    java = subprocess.Popen(command, stdin=subprocess.PIPE)
    sys.stdout.write(f"{java.pid}\n")
    sys.stdout.flush()
    # The owner is looked for as well: a forked child of it may hold the other end of the pipe.
    while java.poll() is None and os.getppid() == owner:
        ready, _, _ = select.select([sys.stdin, waking], [], [], CHECK_SECONDS)
        if sys.stdin in ready or (waking in ready and ENDING.intersection(os.read(waking, 4096))):
            break
    java.kill()
    java.wait()
    shutil.rmtree(os.getcwd(), ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

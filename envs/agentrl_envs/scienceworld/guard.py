"""Runs one JVM and ends it with whoever started it: a script of its own, which imports nothing of ours.

`python guard.py OWNER COMMAND...` prints the JVM's process id; then its output is the JVM's. The JVM is
killed when the owner closes or writes to the guard's input, when the owner is gone, however it went, and when
the guard is told to end. A JVM that hangs cannot refuse; should the guard be killed, the JVM's input ends.
"""

import os
import select
import signal
import subprocess
import sys

CHECK_SECONDS = 1.0


def main(owner: int, command: list[str]) -> None:
    """Run the command until one of the reasons to end it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    java = subprocess.Popen(command, stdin=subprocess.PIPE)
    signal.signal(signal.SIGCHLD, lambda *_: None if java.poll() is None else sys.exit())
    try:
        sys.stdout.write(f"{java.pid}\n")
        sys.stdout.flush()
        # The owner is looked for as well: a forked child of it may hold the other end of the pipe.
        while java.poll() is None and os.getppid() == owner:
            if select.select([sys.stdin], [], [], CHECK_SECONDS)[0]:
                break
    finally:
        java.kill()
        java.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

"""Supervisor script that runs one JVM and ends it together with its owner; it imports no module of ours.

`python guard.py OWNER COMMAND...` prints the JVM's process id, followed by the JVM's output. The JVM is
killed (SIGKILL, so a hanging one ends, too) when the owner closes or writes to the guard's input, when the
owner no longer exists for any reason, and when the guard receives a signal to end. If the guard itself is
killed, the JVM's input ends. The working folder belongs to guard and JVM and is removed at the end.
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
    """Run the command until it ends or has to be killed."""
    # Handlers only wake the loop; one that raised could interrupt the killing of the JVM.
    waking, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in {*ENDING, signal.SIGCHLD}:
        signal.signal(number, lambda *_: None)
    java = subprocess.Popen(command, stdin=subprocess.PIPE)
    sys.stdout.write(f"{java.pid}\n")
    sys.stdout.flush()
    # The pipe alone is not enough: a forked child of the owner may hold its other end.
    while java.poll() is None and os.getppid() == owner:
        ready, _, _ = select.select([sys.stdin, waking], [], [], CHECK_SECONDS)
        if sys.stdin in ready or (waking in ready and ENDING.intersection(os.read(waking, 4096))):
            break
    java.kill()
    java.wait()
    shutil.rmtree(os.getcwd(), ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

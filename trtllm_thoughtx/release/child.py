"""Started by path, before each command: the process ends when the one that started it does, then becomes the command.

argv: the process id of the starter, the program and its words. A child that was left alone before it could ask for this ends at once. In
a file of its own, without the package, because every step waits for it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(128 + signal.SIGKILL)
    os.execv(sys.argv[2], sys.argv[2:])

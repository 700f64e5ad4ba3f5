"""Have a warm process run a command as if it were this one: python -S -E ask.py SOCKET SCRIPT [ARGUMENT ...]

It imports nothing that takes time. Killed, it takes the command with it.
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
    asked.connect(sys.argv[1])
    job = {"argv": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd()}  # noqa: PTH109
    socket.send_fds(asked, [json.dumps(job).encode()], [0, 1, 2])
    sys.exit(int(asked.recv(16) or b"1"))

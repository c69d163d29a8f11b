"""Fresh processes, without the seconds that a new interpreter takes to import torch and transformers.

Python's fork server imports these two once. Each process is forked from it, and imports all else itself.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers.modeling_utils", "transformers.pipelines"])


def start(program, *arguments, folder, log="printed.txt", **environment):
    """A process that runs in `folder`, and prints to a file there.

    `program` is a function, whose module the process imports, or a script, which begins with nothing of this package
    imported and finds the arguments in `sys.argv[1:]`.
    """
    process = CONTEXT.Process(target=_run, args=(program, arguments, folder, log, environment))
    process.start()
    return process


def run(program, *arguments, folder, **environment):
    """The same, to an end without errors."""
    process = start(program, *arguments, folder=folder, **environment)
    process.join()
    assert process.exitcode == 0, Path(folder, "printed.txt").read_text()


def run_in_parallel(function, *arguments, processes=2):
    """Real processes that `torch.distributed` knows of, as `torchrun` starts them. An error in one ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = (function, arguments, {**environment, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1})
    torch.multiprocessing.start_processes(_run_rank, arguments, nprocs=processes, start_method="forkserver")


def _run_rank(rank, function, arguments, environment):
    environment = {**environment, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in environment.items()})
    function(*arguments)


def _run(program, arguments, folder, log, environment):
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "wb") as printed:
        for descriptor in (1, 2):
            os.dup2(printed.fileno(), descriptor)
    if callable(program):
        program(*arguments)
    else:
        sys.argv = ["-c", *map(str, arguments)]
        exec(program, {"__name__": "__main__"})

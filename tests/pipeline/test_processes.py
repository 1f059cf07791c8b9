"""A fork of `smolpost run` is like a new program in all that a command can see and leave behind."""

import json
import subprocess
import sys

import pytest

from smolpost.pipeline import processes
from tests.small import ROOT, environment

NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # `processes` sets it while it imports
PARENT = """
import json, sys
from smolpost.pipeline import processes
processes.IMPORTS = ("torch",)
how, *commands = sys.argv[1:]
if how == "programs":
    processes.warm = lambda: False
for command in map(json.loads, commands):
    print("parent", end=" ")
    process = processes.start(tuple(command))
    print(f"ended with {process.wait()}", flush=True)
"""
SEEN = """
import json, os, signal, sys, threading
import torch
print(json.dumps({
    "arguments": sys.argv, "path": sys.path, "folder": os.getcwd(), "name": __name__, "environment": dict(os.environ),
    "handlers": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)],
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
    "product": torch.ones(300, 300).cos().mm(torch.ones(300, 300).sin()).sum().item(),
    "terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
}))
"""
ENDS = {  # program -> the exit code that its parent sees, and its output
    "print('done')": (0, "done\n"),
    "import sys; print('refused', file=sys.stderr); sys.exit(2)": (2, "refused\n"),
    "import sys; sys.exit('a reason')": (1, "a reason\n"),
    "import os, signal; print('killed'); os.kill(os.getpid(), signal.SIGKILL)": (-9, "killed\n"),
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": (-15, ""),
    "import atexit, threading, time; atexit.register(print, 'last')\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()": (0, "thread\nlast\n"),
    "raise ValueError('a fault')": (1, "ValueError: a fault\n"),
}


@pytest.fixture(scope="module", params=["forks", "programs"])
def carried_out(request, tmp_path_factory) -> list[tuple[int, str]]:
    """Exit code and output of SEEN and of each of ENDS."""
    folder, commands = tmp_path_factory.mktemp("programs"), []
    for number, text in enumerate([SEEN, *ENDS]):
        (folder / f"{number}.py").write_text(text)
        commands.append(json.dumps(["python", str(folder / f"{number}.py"), "a=1", "b=2"]))
    around = {name: value for name, value in environment().items() if name != NVML}  # other tests' libraries set it
    done = subprocess.run(
        [sys.executable, "-c", PARENT, request.param, *commands], cwd=ROOT, env=around | {"A": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    parts = [part.rpartition("ended with ") for part in done.stdout.split("parent ")[1:]]
    return [(int(code), output) for output, _, code in parts]


def test_a_command_ends_as_it_would_alone(carried_out):
    for (code, output), wanted in zip(carried_out[1:], ENDS.values(), strict=True):
        assert code == wanted[0] and output.endswith(wanted[1])
        assert output == wanted[1] or "Traceback" in output


def test_a_command_sees_what_it_would_alone(carried_out):
    """Both see this, so they see the same."""
    import torch

    code, output = carried_out[0]
    seen = json.loads(output)
    assert code == 0 and seen["name"] == "__main__" and seen["folder"] == str(ROOT)
    assert seen["arguments"][1:] == ["a=1", "b=2"] and seen["arguments"][0].startswith(seen["path"][0] + "/")
    assert processes.ENVIRONMENT.items() <= seen["environment"].items() and seen["environment"]["A"] == "1"
    assert NVML not in seen["environment"]
    assert seen["handlers"] == ["0", "0"] and seen["blocked"] == [2]
    assert seen["threads"][0] == 1 and seen["threads"][2] == 1 and not seen["terminals"][1]
    assert seen["product"] == torch.ones(300, 300).cos().mm(torch.ones(300, 300).sin()).sum().item()


def test_a_process_that_may_have_computed_is_not_forked():
    """OpenMP's threads do not survive a fork: a child that waits for them waits for ever. pytest has torch."""
    import torch  # noqa: F401

    assert not processes.warm()

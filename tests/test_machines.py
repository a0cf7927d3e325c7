"""Real processes, as many machines: the norm is that of all, and a loss ends all."""

import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 4


def start(processes, *options):
    """Starts all processes of one run, each with one device, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.machines", *options]
    command += ["--coordinator", address, "--processes", str(processes)]
    return [
        subprocess.Popen(
            [*command, "--process", str(process)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process in range(processes)
    ]


@functools.cache
def norms_of(processes):
    """The norm of every step, with each layout."""
    running = start(processes, "--steps", str(STEPS))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        stop(running)
    assert [process.returncode for process in running] == [0] * processes, outputs
    found = re.findall(r"^(\S+), step \d+: .* norm (\S+)$", outputs[0], re.MULTILINE)
    layouts = dict.fromkeys(layout for layout, _ in found)
    return {
        each: [float(norm) for layout, norm in found if layout == each]
        for each in layouts
    }


def stop(running):
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["data-parallel", "fully-sharded"])
def test_norms_are_those_of_one_process(processes, layout):
    expected = norms_of(1)["data-parallel"]
    assert len(expected) == STEPS
    assert max(expected) > 1  # So that the clip has something to do.
    np.testing.assert_allclose(norms_of(processes)[layout], expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others(victim):
    running = start(2, "--steps", "100000")
    deadline = threading.Timer(200, stop, [running])
    deadline.start()
    try:
        while "step 3:" not in (line := running[0].stdout.readline()):
            assert line, "the run ended by itself"
        running[victim].send_signal(signal.SIGKILL)
        lost = time.monotonic()
        output, _ = running[1 - victim].communicate(timeout=100)
        assert time.monotonic() - lost < 60
        assert running[1 - victim].returncode not in (0, None)
        assert re.search("(?i)error|failed|unhealthy|unavailable", output)
    finally:
        deadline.cancel()
        stop(running)
    assert all(process.returncode is not None for process in running)

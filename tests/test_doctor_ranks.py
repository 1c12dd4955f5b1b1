"""hpsafety doctor under torchrun: all ranks meet and one table is printed; a rank that stays away is named."""

import os
import socket
import subprocess
import sys

from tests.stages.test_sft import ROOT


def test_two_ranks_measure_an_all_reduce():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "hpsafety", "doctor"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("all 2 arrived, on 1 node; gloo") == 1 and done.stdout.count("advice") == 1
    table = done.stdout.split("bus GB/s")[1].split("\n")[1:4]
    for line, mib in zip(table, (1, 16, 64), strict=True):
        size, milliseconds, algorithm, bus = map(float, line.split())
        assert size == mib and milliseconds > 0 and algorithm >= 0
        assert abs(bus - algorithm) <= 0.011  # 2 (n - 1) / n is 1 for two ranks


def lonely(rank: str) -> subprocess.CompletedProcess:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {
        "WORLD_SIZE": "3",
        "RANK": rank,
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    env = os.environ | place | {"HPSAFETY_DOCTOR_TIMEOUT": "1", "OMP_NUM_THREADS": "1"}
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    command = [sys.executable, "-m", "hpsafety", "doctor"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_ranks_that_do_not_arrive_are_named():
    done = lonely("0")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("hpsafety doctor: 1 of 3 ranks arrived within 1 s; missing: 1, 2.")


def test_a_store_that_nobody_hosts_is_one_line():
    done = lonely("1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "rank 1 cannot reach MASTER_ADDR:MASTER_PORT 127.0.0.1:" in done.stderr

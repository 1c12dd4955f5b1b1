"""`hpsafety doctor` under torchrun: do all ranks arrive, and how fast is an all-reduce between them?

    torchrun --nproc-per-node 8 -m hpsafety doctor      nccl where there are GPUs, gloo elsewhere

One table, on rank 0. Ranks that do not arrive within HPSAFETY_DOCTOR_TIMEOUT seconds (60) are named.
"""

import datetime
import os
import socket
import time

from hpsafety.errors import RunError

SIZES_MIB, REPEATS = (1, 16, 64), 5
FIRST_LINE = f"{'MiB':>5} {'ms':>10} {'algorithm GB/s':>15} {'bus GB/s':>10}"


def under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _reach(host: str, port: int, deadline: float) -> None:
    """Waits for somebody to listen there, without torch, which prints pages about a connection refused."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RunError(
                    f"rank {os.environ['RANK']} cannot reach MASTER_ADDR:MASTER_PORT {host}:{port} ({error}); check "
                    "the address, the firewall and that rank 0's node has started"
                ) from None
            time.sleep(0.2)


def _meet(rank: int, size: int, timeout: float):
    """A store that all ranks have signed; RunError names those that did not by then."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout
    # torchrun hosts the store itself unless it says otherwise.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts:
        _reach(host, port, deadline)
    wait = datetime.timedelta(seconds=timeout)
    try:
        store = dist.TCPStore(host, port, None, hosts, timeout=wait, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise RunError(f"rank {rank}: no store at {host}:{port}: {str(error).splitlines()[0]}") from None
    prefix = f"hpsafety-doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(prefix, store)
    store.set(f"here-{rank}", socket.gethostname())
    missing = list(range(size))
    while missing and time.monotonic() < deadline:
        missing = [r for r in missing if not store.check([f"here-{r}"])]
        if missing:
            time.sleep(0.05)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        raise RunError(
            f"{size - len(missing)} of {size} ranks arrived within {timeout:.0f} s; missing: {shown}. Check that their "
            f"processes run and reach {host}:{port}; HPSAFETY_DOCTOR_TIMEOUT=N waits longer"
        )
    return store


def _bandwidth(device, megabytes: int, size: int) -> tuple[float, float, float]:
    """(best seconds of an all-reduce of fp32, algorithm and bus bandwidth in bytes a second)."""
    import torch
    import torch.distributed as dist

    data = torch.zeros(megabytes * 2**18, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first sets up connections and is slow
        dist.barrier()
        wait()
        start = time.perf_counter()
        dist.all_reduce(data)
        wait()
        best = min(best, time.perf_counter() - start)
    seconds = torch.tensor([best], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # as fast as the slowest rank saw it
    rate = data.numel() * data.element_size() / float(seconds)
    return float(seconds), rate, rate * 2 * (size - 1) / size


def run() -> None:
    """Every rank calls it; rank 0 prints. Raises RunError."""
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = float(os.environ.get("HPSAFETY_DOCTOR_TIMEOUT", 60))
    store = _meet(rank, size, timeout)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if gpu else "gloo"
    wait = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the ranks met, but {backend} does not start: {str(error).splitlines()[0]}") from None
    try:
        hosts = [store.get(f"here-{r}").decode() for r in range(size)]
        rows = [(mib, *_bandwidth(device, mib, size)) for mib in SIZES_MIB]
        if rank == 0:
            nodes = len(set(hosts))
            print(f"ranks\n  all {size} arrived, on {nodes} node{'s' if nodes > 1 else ''}; {backend}")
            print(f"all-reduce, fp32, best of {REPEATS}, the slowest rank's time\n  {FIRST_LINE}")
            for mib, seconds, algorithm, bus in rows:
                print(
                    f"  {mib:>5} {seconds * 1e3:>10.2f} {algorithm / 1e9:>15.2f} {bus / 1e9:>10.2f}",
                    flush=True,
                )
        dist.barrier()
    finally:
        dist.destroy_process_group()

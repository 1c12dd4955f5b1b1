"""How much memory a PPO run will take: counted from shapes before it starts, compared with its peak when it ends.

All sizes are bytes of one rank. Legend: D width, H query heads, G kv heads, K head dim, F mlp width, r rank of
adapters, e bytes of a number in the dtype of the computation.

Backward keeps of every block, per token: the sums both norms read (2 D), q, k, v and the attention's output
(2 H K + 2 G K), gate and up (2 F), in e bytes each; one fp32 per head; with adapters 4 r more.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hpsafety.config import memory_bytes
from hpsafety.model import lora
from hpsafety.model.config import LlamaConfig
from hpsafety.model.mapped import give_back
from hpsafety.model.names import parameter_shapes
from hpsafety.rollout.kv_cache import DEFAULT_SHARE, free_memory, page_bytes
from hpsafety.rollout.sampler import Settings
from hpsafety.train import distributed
from hpsafety.train.checkpoint import FILE_BYTES
from hpsafety.train.metrics import peak_rss_mb, say

MARGIN = 0.15  # of the plan: what the allocator and libraries may take beside it
MIB = 2**20
LIBRARIES = (
    90 * MIB
)  # measured: TensorBoard, checkpoints, figures and product kernels, which a process loads later


@dataclass(frozen=True, slots=True)
class Role:
    """One model. weights: in memory throughout, with bf16 copies; in_turn: only while it is used."""

    weights: int = 0
    optimiser: int = 0
    gradients: int = 0
    in_turn: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """roles: by name. phases: name -> bytes in all while it runs."""

    roles: dict[str, Role]
    phases: dict[str, int]

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that takes most, and its bytes."""
        return max(self.phases.items(), key=lambda item: item[1])

    def lines(self) -> list[str]:
        """A table of roles, a line of phases."""
        rows = [("", "weights", "optimiser", "gradients", "in turn")]
        for name, role in self.roles.items():
            sizes = (role.weights, role.optimiser, role.gradients, role.in_turn)
            rows.append((name, *(f"{_mib(n):,}" if n else "-" for n in sizes)))
        table = [f"  {row[0]:<16}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
        phases = ", ".join(f"{name} {_mib(n):,}" for name, n in self.phases.items())
        name, peak = self.peak
        head = f"ppo: memory planned per rank, MiB: peak {_mib(peak):,}, in {name}"
        return [head, *table, f"  in all by phase: {phases}"]

    def record(self) -> dict:
        """For the manifest, MiB."""
        phases = {name: _mib(n) for name, n in self.phases.items()}
        return {"planned_mb": _mib(self.peak[1]), "planned_phases_mb": phases}


def _mib(size: int) -> int:
    return math.ceil(size / MIB)


def num_parameters(config: LlamaConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def training(parameters: int, dtype: torch.dtype, ranks: int = 1) -> Role:
    """A model that trains: fp32 weights, gradients and two moments, in shards; alone below fp32, rounded copies too."""
    copies = parameters * dtype.itemsize if dtype != torch.float32 and ranks == 1 else 0
    share = math.ceil(parameters / ranks)
    if not copies:
        return Role(4 * share, 8 * share, 4 * share)
    return Role(
        copies, 12 * share + 4 * share
    )  # fp32 masters; gradients are summed in place that is always held


def saved_per_token(config: LlamaConfig, size: int, rank: int = 0) -> int:
    """Bytes one block keeps of a token for backward (see above)."""
    c = config
    heads = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
    return (2 * c.width + heads + 2 * c.mlp_width + 4 * rank) * size + 4 * c.num_heads


def passing_per_token(config: LlamaConfig, size: int) -> int:
    """Bytes of a token at the widest place of a block without gradients: residual, normed row and update beside gate,
    up and their product, or beside the projection, q, k, v and the attention's output."""
    c = config
    heads = 3 * c.num_heads * c.head_dim + 4 * c.num_kv_heads * c.head_dim
    return (3 * c.width + max(3 * c.mlp_width, heads)) * size


def micro_batch(cfg, longest: int, ranks: int) -> tuple[int, bool]:
    """(tokens of the largest micro-batch, whether a minibatch has several): prompts and samples as long as they get."""
    group = longest + cfg.k * cfg.max_new_tokens
    minibatch = math.ceil(cfg.minibatch // cfg.k / ranks) * group
    tokens = min(max(cfg.tokens_per_batch, group), minibatch)
    return tokens, minibatch > tokens


def make_plan(
    cfg, policy: LlamaConfig, critic: LlamaConfig | None, judges: list[LlamaConfig], dtype: torch.dtype, *,
    longest: int, kv_memory: int, ranks: int = 1, base: int = 0, host: bool = True,
) -> Plan:  # fmt: skip
    """The plan of a PPOConfig on models of these shapes.

    critic     None where there is none
    judges     of the trunks that score: one where both reward models share theirs
    longest    tokens of the longest prompt
    kv_memory  bytes the cache of keys and values may take
    base       bytes of the process without models
    host       the models are in the host's memory, where shards are gathered for saving
    """
    size, frozen = dtype.itemsize, 2 if cfg.frozen == "bf16" else dtype.itemsize
    whole = num_parameters(policy)
    turn = "in_turn" if cfg.frozen == "mapped" else "weights"
    roles = {"process": Role(base)}
    if cfg.lora_rank:
        count = lora.num_parameters(policy, cfg.lora_rank)
        roles["trunk"] = Role(whole * size)
        roles["policy adapters"] = training(count, dtype)
        roles |= {"critic adapters": training(count + policy.width, dtype)} if critic else {}
    else:
        roles["policy"] = training(whole, dtype, ranks)
        roles |= {"critic": training(num_parameters(critic) + critic.width, dtype, ranks)} if critic else {}
        if ranks == 1 or cfg.frozen == "mapped":
            roles["reference"] = Role(**{turn: whole * frozen})
        else:
            roles["reference"] = Role(math.ceil(whole / ranks) * (2 if cfg.frozen == "bf16" else 4))
            roles["sampler"] = Role(whole * size)
    for number, config in enumerate(judges):
        name = "reward models" if len(judges) == 1 else ("safety RM", "helpfulness RM")[number]
        roles[name] = Role(**{turn: (num_parameters(config) + config.width) * frozen})
    held = sum(role.weights + role.optimiser for role in roles.values())
    largest = max(role.in_turn for role in roles.values())  # read whole, then written to its file
    judge = frozen * max(
        num_parameters(c) + c.width for c in judges
    )  # two of them are read and compared first of all
    later = _phases(cfg, policy, judges, roles, size, frozen, longest, kv_memory, ranks)
    phases = {"loading": max(held + largest, base + 2 * judge)} | {
        name: held + more for name, more in later.items()
    }
    merged = _merged(policy, dtype) if cfg.lora_rank else 0
    gathered = 4 * whole if ranks > 1 and host and not cfg.lora_rank else 0
    return Plan(roles, phases | {"saving": held + merged + gathered})


def _merged(config: LlamaConfig, dtype: torch.dtype) -> int:
    """A product's weight and its change in fp32, or any weight widened: adapters are merged a tensor at a time."""
    sizes = {name: 4 * math.prod(shape) for name, shape in parameter_shapes(config).items()}
    change = 2 * max(size for name, size in sizes.items() if name.startswith("blocks."))
    return max(change, 0 if dtype == torch.float32 else max(sizes.values()))


def _phases(cfg, policy, judges, roles, size, frozen, longest, kv_memory, ranks) -> dict[str, int]:
    """What each phase takes beside what is held throughout."""
    tokens, several = micro_batch(cfg, longest, ranks)
    in_turn = {name: role.in_turn for name, role in roles.items()}
    gathered = gathered_bytes(policy, size) if ranks > 1 and not cfg.lora_rank else 0
    rollouts = math.ceil(cfg.batch // cfg.k / ranks) * cfg.k
    running = min(cfg.max_batch, rollouts)
    settings = Settings()
    each = page_bytes(policy, settings.page_size, torch.bfloat16 if size == 2 else torch.float32)
    pages = running * math.ceil(cfg.max_new_tokens / settings.page_size)
    pages += (math.ceil(running / cfg.k) + 1) * math.ceil(longest / settings.page_size)
    prefill = max(longest, min(settings.prefill_tokens, longest * rollouts // cfg.k))
    forward = tokens * passing_per_token(policy, size) + gathered
    judged = max(tokens * passing_per_token(config, frozen) for config in judges)
    judge = max((n for name, n in in_turn.items() if name != "reference"), default=0)
    trained = [role for role in roles.values() if role.optimiser]
    saved = max(sum(role.weights for role in trained), sum(role.optimiser for role in trained))
    return {
        "rollout": min(kv_memory, pages * each) + gathered
        + max(prefill * passing_per_token(policy, size), running * policy.vocab_size * size),
        "score": judge + judged,
        "logprobs": forward + in_turn.get("reference", 0),
        "update": gathered + _update(cfg, policy, roles, tokens, several, size),
        "checkpoint": 2 * min(saved, FILE_BYTES),  # a file is built in memory, from copies of its tensors
    }  # fmt: skip


def _update(cfg, policy, roles, tokens, several, size) -> int:
    """Gradients, and what one model keeps for backward: the other's pass is over by then."""
    if cfg.recompute:
        kept = 2 * policy.width * size * policy.num_layers + saved_per_token(policy, size, cfg.lora_rank)
    else:
        kept = policy.num_layers * saved_per_token(policy, size, cfg.lora_rank)
    kept = tokens * (kept + passing_per_token(policy, size))
    # The embedding's second gradient, about to be added to its first.
    words = 0 if cfg.lora_rank else policy.vocab_size * policy.width * size
    gradients = [role.gradients for role in roles.values() if role.gradients]
    if several or not gradients:
        return sum(gradients) + kept + words
    # A single micro-batch: a model's gradients appear as what was kept for them goes.
    ends = [sum(gradients[: i + 1]) for i in range(len(gradients))]
    return words + max(max(end - own + kept, end) for end, own in zip(ends, gradients, strict=True))


def gathered_bytes(config: LlamaConfig, size: int) -> int:
    """Whole parameters and gradients of two blocks and the root, which sharded models gather for their pass."""
    shapes = parameter_shapes(config)
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.0."))
    root = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("blocks."))
    return (2 * block + root) * 2 * size


# ---- what is and was taken ----


def plan_of(cfg, actor, sampler, scorer, longest: int, dtype: torch.dtype, world) -> Plan:
    """The plan of a run whose models are in place: what the process takes beside them is looked up, the rest counted.

    scorer  its trunks may be parked; the reference is not there yet
    """
    base = 0
    if world.device.type == "cpu":
        modules = {id(m): m for m in (actor.modules(), sampler, *scorer.trunks)}.values()
        held = [p for module in modules for p in module.parameters() if not p.is_meta]
        for optimizer in actor.optimizers().values():
            held += [*optimizer.state().values(), *(optimizer.main_grads or [])]
        sizes = {t.data_ptr(): t.nbytes for t in (distributed.local(t) for t in held)}
        give_back()
        base = max(0, resident() - sum(sizes.values()))
        base += 0 if "torch.utils.tensorboard" in sys.modules else LIBRARIES
    kv_memory = memory_bytes(cfg.kv_memory) or free_memory(world.device) // DEFAULT_SHARE
    critic = None if actor.critic is None else actor.critic.config
    return make_plan(
        cfg, actor.policy.config, critic, [trunk.config for trunk in scorer.trunks], dtype,
        longest=longest, kv_memory=kv_memory, ranks=world.size, base=base,
        host=world.device.type == "cpu",
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory now; where the system does not say, its peak so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return int(peak_rss_mb() * MIB)


def peak_bytes(device: torch.device) -> int:
    """The most this process has taken on the device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(peak_rss_mb() * MIB)


def check_memory(plan: Plan, before: int, world) -> dict:
    """Says the peak beside the plan (a collective call); the record for the manifest.

    before  peak_bytes when the plan was made: a process that had taken more before this run tells nothing about it
    """
    peaks = torch.tensor([peak_bytes(world.device), before], dtype=torch.int64, device=world.device)
    measured, before = distributed.all_max(peaks, world).tolist()
    name, planned = plan.peak
    told = measured > before
    if world.is_main and told:
        line = f"ppo: peak memory {_mib(measured):,} MiB, planned {_mib(planned):,}"
        if measured > planned * (1 + MARGIN):
            line += f": {measured / planned - 1:.0%} over the plan, more than the {MARGIN:.0%} it allows for"
        say(line)
    return plan.record() | {"peak_mb": _mib(measured) if told else None}

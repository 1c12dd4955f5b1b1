"""A lean Llama: one ragged row of tokens in, one hidden row per token out.

Legend: T tokens, D width, H query heads, G kv heads, J = H/G, K head dim, F mlp width, V vocabulary, N predicted
tokens, W wanted rows.
Weights are fused inside and laid out so that they can be sharded: qkv (G, J+2, K, D) on kv groups, gate_up (2, F, D)
on F, o and down on their input columns. Names outside are Hugging Face's (hpsafety/model/io.py).
"""

import torch
import torch.nn.functional as nnf
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpsafety import ops
from hpsafety.model.fused import norm_linear, swiglu_linear
from hpsafety.model.gemm import linear
from hpsafety.model.rope import rope_tables


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Block(nn.Module):
    """One transformer layer on the residual stream. `delta` is the update not yet added: each norm adds it."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        d, f, g, k = c.width, c.mlp_width, c.num_kv_heads, c.head_dim
        j = c.num_heads // g
        self.attn_norm, self.mlp_norm = _parameter(d), _parameter(d)
        self.qkv, self.o = _parameter(g, j + 2, k, d), _parameter(d, g * j * k)
        self.gate_up, self.down = _parameter(2, f, d), _parameter(d, f)
        self.qkv_bias = _parameter(g, j + 2, k) if c.qkv_bias else None
        self.o_bias = _parameter(d) if c.o_bias else None
        self.gate_up_bias = _parameter(2, f) if c.mlp_bias else None
        self.down_bias = _parameter(d) if c.mlp_bias else None
        self.lora = None  # adapters of the four products (model/lora.py)

    def adapter(self, name: str):
        """The named weight's adapter, or None."""
        return None if self.lora is None else self.lora[name].adapter()

    def project_qkv(self, x_TD, delta_TD):
        """(qkv (T, G, J+2, K) before rotation, the residual stream with delta added)."""
        c = self.config
        weight = self.qkv.view(-1, c.width)
        bias = None if self.qkv_bias is None else self.qkv_bias.view(-1)
        adapter = self.adapter("qkv")
        qkv, x_TD = norm_linear(x_TD, self.attn_norm, c.norm_eps, weight, bias, delta_TD, adapter)
        return qkv.view(x_TD.shape[0], *self.qkv.shape[:3]), x_TD

    def project_o(self, out_TI):
        """The attention's update of its output (T, H K)."""
        return linear(out_TI, self.o, self.o_bias, self.adapter("o"))

    def mlp(self, x_TD, delta_TD):
        """(the mlp's update, the residual stream with delta added)."""
        c = self.config
        weight = self.gate_up.view(-1, c.width)
        bias = None if self.gate_up_bias is None else self.gate_up_bias.view(-1)
        adapter = self.adapter("gate_up")
        gate_up, x_TD = norm_linear(x_TD, self.mlp_norm, c.norm_eps, weight, bias, delta_TD, adapter)
        return swiglu_linear(gate_up, self.down, self.down_bias, self.adapter("down")), x_TD

    def forward(self, x_TD, delta_TD, positions_T, segments, cos, sin, rows_W=None):
        """x (T, D), delta (T, D) or None -> (x, delta), so that the next norm adds delta in its own pass.

        rows  (W,) int64 or None: after attention go on with these rows only; x and delta are then (W, D)
        """
        qkv, x_TD = self.project_qkv(x_TD, delta_TD)
        q_THK, k_TGK, v_TGK = ops.rope_qkv(qkv, positions_T, cos, sin)
        out_TI = ops.attention(q_THK, k_TGK, v_TGK, segments).flatten(1)
        if rows_W is not None:
            out_TI, x_TD = out_TI.index_select(0, rows_W), x_TD.index_select(0, rows_W)
        delta_TD, x_TD = self.mlp(x_TD, self.project_o(out_TI))
        return x_TD, delta_TD


class Trunk(nn.Module):
    """The decoder without a head. `tokenizer` (or None) and `generation` (generation_config) travel with it.

    recompute     True keeps only each block's input and runs its forward again in backward.
    weights_file  where a frozen model's weights lie while it is not in use (model/mapped.py); None: in memory
    """

    def __init__(self, config, tokenizer=None, generation: dict | None = None):
        super().__init__()
        self.config, self.tokenizer, self.generation = config, tokenizer, generation or {}
        self.embed = _parameter(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _parameter(config.width)
        self.recompute, self.weights_file = False, None
        self._rope = None

    def rope(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin (max_positions, K/2) fp32, made at the first call."""
        if self._rope is None or self._rope[0].device != device:
            self._rope = rope_tables(self.config, self.config.max_positions, device)
        return self._rope

    def residual(self, batch, rows=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch (hpsafety.data.groups) -> (x, delta), each (T, D): their sum is what the final norm takes.

        rows  (W,) int64 or None: the rows wanted. The last block then computes its o-projection and mlp for these
              alone, and both returns are (W, D).
        """
        cos, sin = self.rope(batch.tokens.device)
        x, delta = nnf.embedding(batch.tokens, self.embed), None
        for index, block in enumerate(self.blocks):
            wanted = rows if index + 1 == len(self.blocks) else None
            inputs = (x, delta, batch.positions, batch.segments, cos, sin, wanted)
            if self.recompute and torch.is_grad_enabled():
                x, delta = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, delta = block(*inputs)
        return x, delta

    def forward(self, batch, rows=None) -> torch.Tensor:
        """Batch -> hidden (T, D) after the final norm, or (W, D) of the wanted rows."""
        x, delta = self.residual(batch, rows)
        return ops.rms_norm(x, self.norm, self.config.norm_eps, delta)[0]


class Llama(Trunk):
    """The decoder with its token head, which may be the embedding itself."""

    def __init__(self, config, tokenizer=None, generation: dict | None = None):
        super().__init__(config, tokenizer, generation)
        self.head = None if config.tied else _parameter(config.vocab_size, config.width)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D): the embedding where the head is tied."""
        return self.embed if self.head is None else self.head

    def logprobs(self, batch, temperature: float = 1.0, entropy: bool = False):
        """(N,) fp32: log p(response token n | its prompt and the response so far), in the batch's order.

        entropy  True returns (logprobs, entropy of each token's distribution in nats)
        """
        rows = self(batch, batch.predict_rows)
        return ops.linear_logprob(rows, self.head_weight, batch.targets, temperature, entropy)

    def nll(self, batch, num_tokens) -> torch.Tensor:
        """-sum of the trained tokens' logprobs / num_tokens, a scalar; rows that are not trained never reach the head.

        num_tokens  the loss denominator: trained tokens over all micro-batches and ranks of the step (SFT's formula)
        """
        rows = self(batch, batch.predict_rows[batch.trained])
        weights = torch.full((rows.shape[0],), 1.0 / num_tokens, device=rows.device)
        return ops.linear_cross_entropy(rows, self.head_weight, batch.targets[batch.trained], weights)[0]

    def trained_rows(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden (n, D) that predicts the trained tokens, head weight (V, D)): all that distillation asks of a
        teacher; other rows end at the last block's attention. The head of a sharded model stays gathered after its
        forward (FSDP2 does not reshard the root), which is why this is no entry point of its own."""
        return self(batch, batch.predict_rows[batch.trained]), self.head_weight

    def divergence(self, batch, teacher_hidden, teacher_weight, kind: str, num_tokens) -> torch.Tensor:
        """Sum over the trained tokens of the divergence between the teacher's next-token distribution and this
        model's (ops.distill_loss), divided by num_tokens (as in nll): a scalar; gradients to this model alone.

        teacher_hidden, teacher_weight  another model's trained_rows of the same tokens, in the same order
        """
        rows, head = self.trained_rows(batch)
        return ops.distill_loss(rows, head, teacher_hidden, teacher_weight, kind).sum() / num_tokens

    def generate(
        self, prompts, k=1, max_new_tokens=64, temperature=1.0, top_p=1.0, top_k=0, seed=0, stop=None
    ):
        """k Rollouts per prompt, in order of (prompt, sample): hpsafety/rollout/generate.py, which stands above."""
        import hpsafety

        return hpsafety.generate(self, prompts, k, max_new_tokens, temperature, top_p, top_k, seed, stop)


def init_weights(model: Trunk, seed: int = 0) -> Trunk:
    """Fresh weights: normal with the config's init_std, norms one, biases zero; for tests and benchmarks."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(0.0, model.config.init_std, generator=generator)
    return model

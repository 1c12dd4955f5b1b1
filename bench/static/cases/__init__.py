"""The calls whose launches are compiled: one file per op, run(shapes, empty), at the shapes of the Llama models.

`run` calls the functions of hpsafety/triton_kernels/<op>.py, forward and backward, with tensors made by
`empty(*shape, dtype=torch.bfloat16)`: fake CUDA tensors, so that nothing runs and every launch is recorded.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes of one model, and of a batch of it: prompts with responses, packed."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    words: int
    prompts: int = 8
    prompt_length: int = 512
    responses: int = 4  # of each prompt
    response_length: int = 256

    @property
    def tokens(self) -> int:
        return self.prompts * (self.prompt_length + self.responses * self.response_length)

    @property
    def trained(self) -> int:
        return self.prompts * self.responses * self.response_length


LLAMA = (
    Shapes(name="7B", width=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, words=32000),
    Shapes(name="13B", width=5120, heads=40, kv_heads=40, head_dim=128, mlp=13824, words=32000),
    Shapes(name="70B", width=8192, heads=64, kv_heads=8, head_dim=128, mlp=28672, words=32000),
    Shapes(name="1B", width=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192, words=128256),
)

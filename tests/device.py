"""Where the GPU kernels run in the tests: on the GPU if there is one, else interpreted or emulated on the CPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def place(args: dict) -> dict:
    """The same arguments on DEVICE; tuples of tensors too."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        return tuple(move(x) for x in value) if isinstance(value, tuple) else value

    return {name: move(value) for name, value in args.items()}

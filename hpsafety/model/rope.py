"""Rotary tables: cos and sin by position, with the scalings that Llama checkpoints use."""

import math

import torch


def inverse_frequencies(config) -> torch.Tensor:
    """(K/2,) fp32 inverse frequencies of a LlamaConfig.

    llama3 scaling (Llama 3.1 release): wavelengths beyond original_max / low_freq_factor are stretched by `factor`,
    those below original_max / high_freq_factor are kept, and between the two the inverse frequencies blend linearly.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    inverse = 1.0 / (config.rope_theta ** (half / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return inverse / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inverse / factor + blend * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def rope_tables(config, num_positions: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (num_positions, K/2) fp32."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)

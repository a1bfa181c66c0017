"""A minimal Qwen3 in plain PyTorch for training on a CPU; ``save`` writes what transformers and vLLM load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    vocab_size: int = 1024
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 384
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 8192


LOOK_BACK_OFFSETS = ((1, 2, 3, 4), (4, 8))  # tokens, by layer and head
LOOK_BACK_FREQUENCIES = 5
LOOK_BACK_SHARPNESS = 1.7


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, geometry: Geometry):
        super().__init__()
        size = geometry.num_heads * geometry.head_dim
        self.head_shape = (geometry.num_heads, geometry.head_dim)
        self.q_proj = nn.Linear(geometry.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(geometry.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(geometry.hidden_size, size, bias=False)
        self.o_proj = nn.Linear(size, geometry.hidden_size, bias=False)
        self.q_norm = RMSNorm(geometry.head_dim, geometry.rms_norm_eps)
        self.k_norm = RMSNorm(geometry.head_dim, geometry.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, *self.head_shape)
        q = _rotate(self.q_norm(self.q_proj(x).view(shape)), cos, sin).transpose(1, 2)
        k = _rotate(self.k_norm(self.k_proj(x).view(shape)), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, length, head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, geometry: Geometry):
        super().__init__()
        self.gate_proj = nn.Linear(geometry.hidden_size, geometry.intermediate_size, bias=False)
        self.up_proj = nn.Linear(geometry.hidden_size, geometry.intermediate_size, bias=False)
        self.down_proj = nn.Linear(geometry.intermediate_size, geometry.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, geometry: Geometry):
        super().__init__()
        self.input_layernorm = RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)
        self.self_attn = Attention(geometry)
        self.post_attention_layernorm = RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)
        self.mlp = MLP(geometry)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class RecallModel(nn.Module):
    """Parameters carry the names of transformers' Qwen3Model, without its ``model.`` prefix."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.geometry = geometry
        self.embed_tokens = nn.Embedding(geometry.vocab_size, geometry.hidden_size)
        self.layers = nn.ModuleList(Layer(geometry) for _ in range(geometry.num_layers))
        self.norm = RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.embed_tokens.weight, std=0.06)
        self._look_back()

    @torch.no_grad()
    def _look_back(self) -> None:
        """Starts some heads as ones that look a fixed number of tokens back.

        Recall needs them to compare what stands before a value with the question. From a plain
        random start they take thousands of steps to appear; from this one, none. A constant
        component of every embedding gives each such head the same query and the same key at every
        position, and rotary position embedding turns the two so that they agree best at OFFSET.
        """
        self.embed_tokens.weight[:, 0] = 0.3
        half = self.geometry.head_dim // 2
        frequencies = self.geometry.rope_theta ** -(torch.arange(LOOK_BACK_FREQUENCIES) / half)
        for layer, offsets in zip(self.layers, LOOK_BACK_OFFSETS, strict=False):  # the later layers have none
            attention = layer.self_attn
            attention.q_norm.weight.fill_(LOOK_BACK_SHARPNESS)
            attention.k_norm.weight.fill_(LOOK_BACK_SHARPNESS)
            for head, offset in enumerate(offsets):
                first = head * self.geometry.head_dim
                for start, weight, angles in (
                    (first, attention.q_proj.weight, -offset * frequencies),
                    (first, attention.k_proj.weight, 0 * frequencies),
                ):
                    weight[start : start + LOOK_BACK_FREQUENCIES, 0] = angles.cos()
                    weight[start + half : start + half + LOOK_BACK_FREQUENCIES, 0] = angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, vocab] for token ids [batch, length]."""
        half = torch.arange(0, self.geometry.head_dim, 2) / self.geometry.head_dim
        angles = torch.arange(ids.shape[1])[:, None] * self.geometry.rope_theta**-half
        cos, sin = angles.cos()[:, None].bfloat16(), angles.sin()[:, None].bfloat16()  # [length, 1, head_dim / 2]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def save(self, folder: Path, *, end_id: int, pad_id: int) -> None:
        """Writes config.json, generation_config.json and model.safetensors (bf16)."""
        geometry = self.geometry
        config = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": geometry.vocab_size,
            "hidden_size": geometry.hidden_size,
            "num_hidden_layers": geometry.num_layers,
            "num_attention_heads": geometry.num_heads,
            "num_key_value_heads": geometry.num_heads,
            "head_dim": geometry.head_dim,
            "intermediate_size": geometry.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": geometry.rms_norm_eps,
            "rope_theta": geometry.rope_theta,
            "max_position_embeddings": geometry.max_positions,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": end_id,
            "pad_token_id": pad_id,
        }
        generation = {"do_sample": False, "eos_token_id": end_id, "pad_token_id": pad_id}
        tensors = {f"model.{name}": value.detach().bfloat16() for name, value in self.state_dict().items()}
        _replace(folder / "config.json", json.dumps(config, indent=2) + "\n")
        _replace(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        temporary = folder / "model.safetensors.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # save_file leaves it to its owner alone
        temporary.rename(folder / "model.safetensors")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the halves of a head paired; x is [batch, length, heads, head_dim]."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

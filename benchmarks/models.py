"""Models to measure whole, with random weights and random data: each as logits and a loss."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model and its data.

    Attributes:
        name: as on the command line.
        trains: a step is forward, backward and optimizer; else forward without gradients.
        make: of ``tiny``; returns the module on the CPU, in float32. Called with its data, it
            returns logits, and a loss if it trains.
        data: of ``tiny``; returns the module's arguments on the CPU.
        needs: a package that has to be installed, or None.
        parts: equal parts of the data that do not depend on each other, and by which the loss is a
            mean; float64 is asked about one at a time.
    """

    name: str
    trains: bool
    make: Callable[[bool], nn.Module]
    data: Callable[[bool], tuple[Tensor, ...]]
    needs: str | None = None
    parts: int = 1

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.name} needs the package {self.needs!r}, which is not installed"
        return None


# An MLP of odd widths.


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(F.gelu(self.up(x)))
        return y, F.mse_loss(y.to(target.dtype), target)


def mlp_data(tiny: bool) -> tuple[Tensor, Tensor]:
    shape = (17, 33) if tiny else (8191, 2047)
    return torch.randn(shape), torch.randn(shape)


# One block of a Llama-style model of about a billion parameters, on an odd number of tokens.


class LlamaBlock(nn.Module):
    """RMSNorm, rotary attention, RMSNorm, SwiGLU; (tokens, width) in and out."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding of (heads, tokens, head width)."""
        half = x.shape[-1] // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32)
        positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
        angles = positions[:, None] * 10000.0 ** (-steps / half)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x[..., :half], x[..., half:]
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            part.view(len(x), self.heads, -1).transpose(0, 1)
            for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(
            self.rotate(q)[None], self.rotate(k)[None], v[None], is_causal=True
        )
        x = x + self.out(attended[0].transpose(0, 1).flatten(1))
        y = self.norm_2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x, F.mse_loss(x.to(target.dtype), target)


def llama_data(tiny: bool) -> tuple[Tensor, Tensor]:
    shape = (15, 32) if tiny else (4093, 2048)
    return torch.randn(shape), torch.randn(shape)


# GPT-2 124M, its vocabulary of 50257 included.


class GPT2(nn.Module):
    def __init__(self, tiny: bool) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 257} if tiny else {}
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, **quiet))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(tokens).logits
        scores = logits[:, :-1].flatten(0, 1).to(self.model.lm_head.weight.dtype)
        return logits, F.cross_entropy(scores, tokens[:, 1:].flatten())


def gpt2_data(tiny: bool) -> tuple[Tensor]:
    return (torch.randint(257, (2, 15)) if tiny else torch.randint(50257, (8, 1024)),)


def vit(tiny: bool) -> nn.Module:
    import timm

    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 3} if tiny else {}
    return timm.create_model("vit_base_patch16_224", pretrained=False, **sizes)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt2", True, GPT2, gpt2_data, "transformers", parts=8),
        Workload(
            "vit",
            False,
            vit,
            lambda tiny: (torch.randn(1 if tiny else 64, 3, 224, 224),),
            "timm",
            parts=4,
        ),
        Workload(
            "llama_block",
            True,
            lambda tiny: LlamaBlock(32, 88, 2) if tiny else LlamaBlock(2048, 8192, 32),
            llama_data,
        ),
        Workload("mlp", True, lambda tiny: MLP(33, 65) if tiny else MLP(2047, 8189), mlp_data),
    )
}

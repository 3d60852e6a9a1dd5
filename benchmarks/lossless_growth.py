"""GPT-2 small and a Llama made twice as wide: time, memory, and building the large model instead.

HyperCloning's own package is not on an index, so its two steps are timed: it initialises the large
model first, and then clones each layer into it by concatenation.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import compare, measure
from kexue.nn.growth import grow_transformer

MEBIBYTE = 2**20


def main() -> None:
    gpt2()
    llama()


def gpt2() -> None:
    """The state dict of GPT-2 small, 124 million parameters, to twice its width."""
    width, layers = 768, 12
    config = {
        "model_type": "gpt2",
        "n_embd": width,
        "n_head": 12,
        "n_layer": layers,
        "n_inner": 4 * width,
        "layer_norm_epsilon": 1e-5,
    }
    sizes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for name, before, after in (
        ("attn.c_attn", width, 3 * width),
        ("attn.c_proj", width, width),
        ("mlp.c_fc", width, 4 * width),
        ("mlp.c_proj", 4 * width, width),
    ):
        for i in range(layers):
            sizes |= {f"h.{i}.{name}.weight": (before, after), f"h.{i}.{name}.bias": (after,)}
    for name in (*(f"h.{i}.ln_{j}" for i in range(layers) for j in (1, 2)), "ln_f"):
        sizes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}

    def grow(noise: float = 0.0) -> dict[str, Tensor]:
        return grow_transformer(
            state, config, hidden_size=2 * width, noise=noise, generator=generator
        ).state_dict

    size, peak = extra_memory(grow)
    seconds = measure(grow, repeats=3)
    print(
        f"GPT-2 small, {sum(t.numel() for t in state.values()) / 1e6:.0f} million parameters, "
        f"to twice the width: {seconds:.2f} s, target 6 s {'met' if seconds <= 6 else 'MISSED'}"
    )
    ratio = peak / size
    print(
        f"  peak of extra memory {peak / MEBIBYTE:.0f} MiB for a result of {size / MEBIBYTE:.0f} "
        f"MiB: {ratio:.2f}, target 1.2 {'met' if ratio <= 1.2 else 'MISSED'}"
    )
    print(f"  with noise {measure(lambda: grow(0.1), repeats=1):.2f} s")


def extra_memory(build: Callable[[], dict[str, Tensor]]) -> tuple[int, int]:
    """Bytes of the result, and of the largest growth of the process while it was built."""
    statm, page = Path("/proc/self/statm"), 4096
    if not statm.exists():
        return 1, 0
    gc.collect()
    start = peak = int(statm.read_text().split()[1]) * page
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, int(statm.read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = build()
    done.set()
    watcher.join()
    return sum(tensor.nbytes for tensor in result.values()), peak - start


def llama() -> None:
    """A Llama of 12 layers, against initialising the larger one and cloning layer by layer."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("transformers is not installed: no comparison with cloning into a model")
        return
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 12,
        "intermediate_size": 1376,
    }
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    config = {**small.config.to_dict(), "model_type": "llama"}
    large_config = grow_transformer(small.state_dict(), config, hidden_size=1024).config

    def ours() -> Any:
        grown = grow_transformer(small.state_dict(), config, hidden_size=1024)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**grown.config))
        model.load_state_dict(grown.state_dict, assign=True)
        # What is no parameter has no value on the meta device: the frequencies are computed anew.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model.eval()

    def theirs() -> Any:
        model = LlamaForCausalLM(LlamaConfig(**large_config))
        with torch.no_grad():
            for (name, old), new in zip(
                small.state_dict().items(), model.parameters(), strict=True
            ):
                new.copy_(cloned(name, old))
        return model.eval()

    tokens = torch.randint(8192, (1, 16))
    with torch.no_grad():
        expected = small(tokens).logits
        for who, model in (("ours", ours()), ("cloned", theirs())):
            found = (model(tokens).logits - expected).abs().max() / expected.abs().max()
            print(f"  Llama, {who}: largest difference of logits {found:.1e} of the largest logit")
    compare(
        "Llama of 12 layers, 512 to 1024, against initialising the large model and cloning",
        ours,
        theirs,
        agree=None,
        target=2,
        repeats=5,
    )


def cloned(name: str, old: Tensor) -> Tensor:
    """Tile a parameter and share the weight of its inputs, as HyperCloning does."""
    if old.ndim == 1:
        return old.repeat(2)
    if "embed_tokens" in name:
        return old.repeat(1, 2)
    if "lm_head" in name:
        return old.repeat(1, 2) / 2
    return old.repeat(2, 2) / 2


if __name__ == "__main__":
    main()

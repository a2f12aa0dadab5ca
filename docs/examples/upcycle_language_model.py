"""A dense language model becomes a mixture of experts inside somebody else's training loop.

    python docs/examples/upcycle_language_model.py [FOLDER]

Trains a tiny Qwen3 on the bytes of this file with a plain PyTorch loop, upcycles it in place, trains on with the same
loop and one more line, saves it and opens it again. Ten seconds on one CPU core, and nothing is downloaded.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import symphony_vlm as sv  # before transformers: it teaches the Auto classes the saved model's type

# isort: split
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def batches(steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Stretches of 64 bytes of this file, eight at a time."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 64, (8,), generator=generator)
        ids = torch.stack([text[start : start + 64] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def train(model: PreTrainedModel, steps: int, seed: int) -> None:
    """A training loop as anybody may have it, but for its last line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()  # expert graphs are counted in training mode alone
    for batch in batches(steps, seed):
        model(**batch).loss.backward()  # with the balance and z losses in it, once there are experts
        optimizer.step()
        optimizer.zero_grad()
        sv.update_expert_graphs(model)  # does nothing in a model without expert graphs


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    """Mean next-byte loss in evaluation mode, on the same stretches each time."""
    model.eval()
    found = [model(**batch) for batch in batches(8, seed=99)]
    return sum(float(output.loss) for output in found) / len(found)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    train(model, steps=60, seed=0)
    print(f"dense: loss {loss(model):.3f}, {model.num_parameters():,} parameters")

    ids = next(batches(1, seed=7))["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    sv.upcycle_(model, sv.MoEConfig(num_experts=4, num_experts_per_tok=2, router="symphony_smoe"))
    with torch.no_grad():
        after = model(input_ids=ids).logits
    difference = float((after - before).abs().max())
    print(f"upcycled: {model.num_parameters():,} parameters, largest difference of the logits {difference:.1e}")

    train(model, steps=60, seed=1)
    print(f"sparse: loss {loss(model):.3f} with the router losses")
    graph = model.model.layers[0].mlp.router.expert_graph
    print(f"expert graph of layer 0 after {int(graph.num_updates)} steps:")
    print("\n".join(" ".join(f"{value:.2f}" for value in row) for row in graph.adjacency_EE.tolist()))

    model.save_pretrained(folder)
    again = sv.load_language_model(folder)
    print(f"opened again: loss {loss(again):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/upcycle_language_model"))

"""`python -m eval.methods.reselection`: which layer of a target should choose anew in TidalDecode.

The paper (Yang et al. 2024, arXiv 2410.05076) compares layers by the accuracy of needle tasks, once
for a model. Every needle text is read once; its answer is then one call for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.command_line.loading import called, exit_with
from data.conversations import prompt_ids
from data.corpora.long_context import generated
from modules.contracts.target import Target
from modules.sparse_kv.tidal import TidalDecode, reselection_scores
from modules.target.loading import AUTO, load_target


def needle_texts(
    target: Target, tokens: int, count: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Ids of needle prompts of about so many tokens, and of their answers."""
    return [
        (
            prompt_ids([{"role": "user", "content": prompt.text}], target.tokenizer),
            target.tokenizer.encode(prompt.answers[0], add_special_tokens=False),
        )
        for prompt in generated("needle", tokens, count, seed)
    ]


def table(scores: dict[int, tuple[float, float]]) -> str:
    """A Markdown table of the layers, best first."""
    ranked = sorted(scores.items(), key=lambda item: item[1], reverse=True)
    lines = [f"| {layer} | {right:.3f} | {said:.3f} |" for layer, (right, said) in ranked]
    return "\n".join(["| layer | first choices | log probability |", "|---|---|---|", *lines])


def compare(
    target: str = "smollm2-135m",
    tokens: int = 4096,
    count: int = 4,
    budget: int = 256,
    first: int = 2,
    dtype: str = AUTO,
    device: str | None = None,
    seed: int = 0,
) -> None:
    """Compare re-selection layers of a target on needle texts, best first.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m.
        tokens: of a text, about.
        count: texts.
        budget: slots that sparse layers read.
        first: the selection layer.
        dtype: of the target; auto is bfloat16 on a GPU that multiplies it and float32 elsewhere.
        device: a torch device; by default the GPU if there is one.
        seed: of the texts.

    Raises:
        ValueError: a count below 1, no such target, a layer that it does not have, or a text longer
            than its context.
    """
    for name, value in (("tokens", tokens), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    policy, loaded = TidalDecode(budget, first), load_target(target, dtype, device)
    if first + 1 >= loaded.shape.num_layers:
        raise ValueError(
            f"first {first} leaves none of the target's {loaded.shape.num_layers} layers to choose "
            "anew: lower it"
        )
    texts = needle_texts(loaded, tokens, count, seed)
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    if longest > loaded.max_positions:
        raise ValueError(
            f"tokens {tokens}: a text of {longest} exceeds the target's context of "
            f"{loaded.max_positions}: lower it"
        )
    print(table(reselection_scores(loaded, texts, policy)))


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and compare; returns the exit status."""
    return called(
        compare,
        arguments,
        "eval.methods.reselection",
        "Which layer of a target should choose anew in TidalDecode.",
    )


if __name__ == "__main__":
    exit_with(command)

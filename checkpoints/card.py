"""The model card of a trained component: what it is, what was measured, how it was made and how to use it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.core.drafter import Drafter

if TYPE_CHECKING:
    from checkpoints.provenance import Provenance
    from modules.core.trainable import Trainable

_KINDS = {"drafter": "A speculative-decoding component: it serves",
          "rule": "A lossy acceptance rule for speculative decoding: it judges drafts for",
          "adapters": "Low-rank adapters: they change"}
_MEANINGS = {
    r"probe/tau": "tokens per target call on a few held-out prompts, greedy, bonus token counted",
    r"val/loss": "held-out loss",
    r"val/top(\d+)_(\d+)": r"held-out share of tokens among the \1 likeliest at draft step \2",
    r"val/cross_entropy_(\d+)": r"held-out cross-entropy at draft step \1",
    r"val/preference_accuracy": "held-out share of pairs whose chosen response has the higher reward",
    r"val/reward_margin": "held-out mean reward of the chosen response minus that of the rejected one",
    r"held_out/auc": "how often a right held-out token scores above a wrong one",
    r"held_out/threshold": "score from which on a token is accepted, set on held-out tokens",
    r"held_out/accepted_(right|wrong)": r"share of the \1 held-out tokens that the threshold accepts",
}


def model_card(trainable: Trainable, config: Mapping[str, Any], provenance: Provenance) -> str:
    """Markdown with a YAML header the Hub understands."""
    parts = [_header(config, provenance), _what(trainable, config, provenance), _measured(provenance.measured),
             _training(provenance), _use(trainable, provenance), _origin(provenance)]
    return "\n".join(part for part in parts if part)


def _header(config: Mapping[str, Any], provenance: Provenance) -> str:
    target = provenance.target["name"]
    base = f"base_model: {target}\n" if "/" in target and not target.startswith(("/", ".")) else ""
    return (f"---\nlibrary_name: slipstream\ntags: [speculative-decoding, {config['drafter_type']}]\n{base}---\n\n"
            f"# {config['class']} for {target}\n")


def _what(trainable: Trainable, config: Mapping[str, Any], provenance: Provenance) -> str:
    summary = " ".join((type(trainable).__doc__ or config["class"]).split("\n\n")[0].split())
    total = sum(parameter.numel() for parameter in trainable.parameters())
    trained = sum(parameter.numel() for parameter in trainable.declared_parameters())
    name, weights = provenance.target["name"], provenance.target["fingerprint"]
    return (f"{summary}\n\n{_KINDS[_kind(trainable)]} the target `{name}` with weights `{weights}`. "
            f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M of them trained.\n")


def _measured(measured: Mapping[str, float]) -> str:
    if not measured:
        return "## Measured\n\nNothing was measured in this run.\n"
    rows = [f"| {name} | {value:.4f} | {_meaning(name)} |" for name, value in sorted(measured.items())]
    return "\n".join(["## Measured", "", "| figure | value | meaning |", "|---|---:|---|", *rows, "",
                      "Figures are those of the weights in this folder, measured during training.", ""])


def _meaning(name: str) -> str:
    found = ((re.fullmatch(pattern, name), text) for pattern, text in _MEANINGS.items())
    return next((match.expand(text) for match, text in found if match), "")


def _training(provenance: Provenance) -> str:
    data = "\n".join(f"- {name}: {value}" for name, value in provenance.data.items())
    return f"## Training\n\n    {provenance.command}\n\nData:\n\n{data or '- not recorded'}\n"


def _use(trainable: Trainable, provenance: Provenance) -> str:
    made = {"drafter": "SpeculativeDecoder(target, component)",
            "adapters": "SpeculativeDecoder(component.adapt(target))",
            "rule": 'SpeculativeDecoder(target, load_pretrained("DRAFTER", target), component.acceptance_rule(target))'}
    code = textwrap.dedent(f"""\
        ```python
        from checkpoints.pretrained import load_pretrained
        from data.conversations import prompt_ids
        from modules.core.drafter import Sampling
        from modules.core.loading import load_target
        from modules.decoding.decoder import SpeculativeDecoder

        target = load_target("{provenance.target['name']}")
        component = load_pretrained("THIS_FOLDER_OR_HUB_ID", target)
        decoder = {made[_kind(trainable)]}
        prompt = prompt_ids([{{"role": "user", "content": "Why is the sky blue?"}}], target.tokenizer)
        print(target.tokenizer.decode(decoder.decode([prompt], Sampling(), limit=64)[0].ids))
        ```""")
    return f"## Use\n\n{code}\n"


def _kind(trainable: Trainable) -> str:
    """`drafter`, `rule` (a judge) or `adapters` (a changed target)."""
    if isinstance(trainable, Drafter):
        return "drafter"
    return "rule" if hasattr(trainable, "acceptance_rule") else "adapters"


def _origin(provenance: Provenance) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in provenance.packages.items())
    return f"## Made with\n\nRevision `{provenance.git_revision or 'unknown'}`, {provenance.created}. {packages}.\n"

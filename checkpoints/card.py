"""The model card of a trained component: description, figures, training and use."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from checkpoints.formats.exported import HUB_NAMES, served_name
from checkpoints.formats.known import FORMATS, formats_of
from checkpoints.markdown import block, code, plain
from checkpoints.measurement import Measurement, conditions, dataset, table
from modules.contracts.drafter import Drafter
from modules.target.gguf_name import title

if TYPE_CHECKING:
    from checkpoints.provenance import Provenance
    from modules.contracts.trainable import Trainable

_KINDS = {
    "drafter": "A speculative-decoding component: it serves",
    "rule": "A lossy acceptance rule for speculative decoding: it judges drafts for",
    "adapters": "Low-rank adapters: they change",
}
_MEANINGS = {
    r"probe/tau": "tokens per target call on a few held-out prompts, greedy, bonus token counted",
    r"val/loss": "held-out loss",
    r"val/top(\d+)_(\d+)": r"held-out share of tokens among the \1 likeliest at draft step \2",
    r"val/cross_entropy_(\d+)": r"held-out cross-entropy at draft step \1",
    r"val/expected_length_(\d+)": r"how often a sampled held-out chain has ended at draft step \1",
    r"val/((?:forward|reverse)_kl|kl_mixture|jensen_shannon|total_variation|lk|lk_hybrid)_(\d+)": (
        r"held-out loss \1 from the target's distribution at draft step \2"
    ),
    r"val/preference_accuracy": "held-out share of pairs whose chosen response has the higher "
    "reward",
    r"val/reward_margin": "held-out mean reward of the chosen response minus that of the rejected "
    "one",
    r"held_out/auc": "how often a right held-out token scores above a wrong one",
    r"held_out/threshold": "score from which on a token is accepted",
    r"held_out/calibrated_threshold": "the score that held-out answers would choose",
    r"held_out/accepted_(right|wrong)": r"share of held-out \1 tokens that the threshold accepts",
}


@dataclass(frozen=True)
class Publishing:
    """Additional content of the card of a published component.

    repo: the Hub id, or the folder that is written instead.
    license: the component's license.
    measurement: figures from a report.
    """

    repo: str
    license: str
    measurement: Measurement | None = None


LICENSES = {"smollm2-135m": "apache-2.0"}
"""Licences of known targets; a drafter's initial weights are often its target's."""
_NO_ENGINE = "No serving engine loads this kind of component; it runs in this project's decoder."


def model_card(
    trainable: Trainable,
    config: Mapping[str, Any],
    provenance: Provenance,
    publishing: Publishing | None = None,
) -> str:
    """The card as Markdown, with the Hub's YAML header."""
    measurement = publishing.measurement if publishing else None
    # Sections in order; an empty one is left out.
    parts = [
        _header(config, provenance, publishing),
        _what(trainable, config, provenance),
        _evaluated(measurement) if measurement else "",
        _measured(provenance.measured),
        _training(provenance),
        _use(trainable, provenance, publishing.repo if publishing else None),
        _serve(trainable, provenance, publishing.repo) if publishing else "",
        _origin(provenance),
    ]
    return "\n".join(part for part in parts if part)


def _header(
    config: Mapping[str, Any], provenance: Provenance, publishing: Publishing | None
) -> str:
    data = ModelCardData(
        base_model=hub_name(provenance.target["name"]),
        library_name="slipstream",
        pipeline_tag="text-generation",
        license=publishing.license if publishing else None,
        tags=["slipstream", "speculative-decoding", config["drafter_type"]],
        model_name=publishing.repo.rsplit("/", 1)[-1] if publishing else None,
        eval_results=_results(publishing.measurement, provenance) if publishing else None,
    )
    heading = f"# {plain(config['class'])} for {plain(title(provenance.target['name']))}"
    return f"---\n{data.to_yaml()}\n---\n\n{heading}\n"


def hub_name(target: str) -> str | None:
    """The Hub id of a target, or None: the embedded target's, or the name if it is not a path."""
    named = (
        target.count("/") == 1
        and not target.startswith(("/", ".", "~"))
        and not Path(target).exists()
    )
    return HUB_NAMES.get(target, target if named else None)


def _results(measurement: Measurement | None, provenance: Provenance) -> list[EvalResult] | None:
    """Entries of `model-index`: a report's figures, or else those measured during training."""
    if measurement is not None:
        return [
            _result(
                dataset(measurement),
                kind,
                name,
                value,
                f"temperature {row['temperature']:g}, batch size {row['batch_size']}",
            )
            for row in measurement.rows
            for kind, name, value in (
                ("speedup", "speedup over plain decoding", row["speedup"]["micro"]),
                ("mean_accepted_tokens", "tokens per target call", row["mean_accepted_tokens"]),
                ("tokens_per_second", "tokens per second", row["tokens_per_second"]),
            )
            if value is not None
        ]
    tau = provenance.measured.get("probe/tau")
    return (
        None
        if tau is None
        else [_result("held-out prompts", "mean_accepted_tokens", "tokens per target call", tau)]
    )


def _result(
    prompts: str, kind: str, name: str, value: float, config: str | None = None
) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^a-z0-9_.-]+", "-", prompts.lower()),
        dataset_name=prompts,
        dataset_config=config,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )


def _what(trainable: Trainable, config: Mapping[str, Any], provenance: Provenance) -> str:
    summary = " ".join((type(trainable).__doc__ or config["class"]).split("\n\n")[0].split())
    total = sum(parameter.numel() for parameter in trainable.parameters())
    name, weights = title(provenance.target["name"]), provenance.target["fingerprint"]
    return (
        f"{summary}\n\n{_KINDS[_kind(trainable)]} the target {code(name)} with weights "
        f"{code(weights)}. {total / 1e6:.2f} M parameters, {trainable.trained_size / 1e6:.2f} M of "
        "them trained.\n"
    )


def _evaluated(measured: Measurement) -> str:
    whole = "The whole report is `report.json`."
    return f"## Evaluation\n\n{table(measured)}\n\n{conditions(measured)} {whole}\n"


def _measured(measured: Mapping[str, float]) -> str:
    if not measured:
        return "## Measured while training\n\nNothing was measured in this run.\n"
    rows = [
        f"| {plain(name)} | {value:.4f} | {_meaning(name)} |"
        for name, value in sorted(measured.items())
    ]
    return "\n".join(
        [
            "## Measured while training",
            "",
            "| figure | value | meaning |",
            "|---|---:|---|",
            *rows,
            "",
            "Figures are those of the weights in this folder, measured during training.",
            "",
        ]
    )


def _meaning(name: str) -> str:
    matches = ((re.fullmatch(pattern, name), text) for pattern, text in _MEANINGS.items())
    return next((match.expand(text) for match, text in matches if match), "")


def _training(provenance: Provenance) -> str:
    data = "\n".join(
        f"- {plain(name)}: {plain(value)}"
        for name, value in provenance.data.items()
        if value is not None
    )
    return f"## Training\n\n{block(provenance.command)}\n\nData:\n\n{data or '- not recorded'}\n"


def _use(trainable: Trainable, provenance: Provenance, repo: str | None) -> str:
    made = {
        "drafter": "SpeculativeDecoder(target, component)",
        "adapters": "SpeculativeDecoder(component.adapt(target))",
        "rule": 'SpeculativeDecoder(target, load_pretrained("DRAFTER", target).to(target.device),\n'
        "                             component.acceptance_rule(target))",
    }
    # The example loads target and component by name and decodes one question.
    named, folder = (
        json.dumps(provenance.target["name"]),
        json.dumps(repo or "THIS_FOLDER_OR_HUB_ID"),
    )
    example = textwrap.dedent(f"""\
        ```python
        from checkpoints.pretrained import load_pretrained
        from data.conversations import prompt_ids
        from modules.contracts.sampling import Sampling
        from modules.target.loading import load_target, own_device
        from modules.decoding.decoder import SpeculativeDecoder

        target = load_target({named}, device=own_device())
        component = load_pretrained({folder}, target).to(target.device, target.dtype)
        decoder = {made[_kind(trainable)]}
        question = {{"role": "user", "content": "Why is the sky blue?"}}
        prompt = prompt_ids([question], target.tokenizer)
        print(target.tokenizer.decode(decoder.decode([prompt], Sampling(), limit=64)[0].ids))
        ```""")
    return f"## Use\n\nIn a checkout of Slipstream:\n\n{example}\n"


def _serve(trainable: Trainable, provenance: Provenance, repo: str) -> str:
    """Commands for every format that holds this class; the export refuses settings that an engine
    cannot run.
    """
    forms, name = formats_of(type(trainable)), provenance.target["name"]
    target = shlex.quote(" ".join(name.split()))
    if not forms:
        return f"## Serve\n\n{_NO_ENGINE}\n"
    # One block per format: the export, then the start of the engine.
    parts = []
    for form in forms:
        usage = FORMATS[form].usage(trainable, target).replace("FOLDER", f"exports/{form}")
        command = f"python -m checkpoints.export --format {form} {repo} exports/{form}"
        engines = " and ".join(FORMATS[form].ENGINES)
        parts.append(f"{engines}:\n\n```\n{command}\n{usage}\n```\n")
    introduction = (
        "Export it in a checkout of Slipstream, then start the engine with the result and "
        f"{code(served_name(name))}. The export refuses, with the reason, what an engine would run "
        "differently."
    )
    return "\n".join([f"## Serve\n\n{introduction}\n", *parts])


def _kind(trainable: Trainable) -> str:
    """`drafter`, `rule` (a judge) or `adapters` (a changed target)."""
    if isinstance(trainable, Drafter):
        return "drafter"
    return "rule" if hasattr(trainable, "acceptance_rule") else "adapters"


def _origin(provenance: Provenance) -> str:
    packages = ", ".join(
        plain(f"{name} {version}") for name, version in provenance.packages.items()
    )
    revision, day = provenance.git_revision or "unknown", provenance.created[:10]
    return f"## Made with\n\nRevision {code(revision)}, {plain(day)}. {packages}.\n"

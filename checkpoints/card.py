"""The model card of a trained component: description, figures, training and use."""

from __future__ import annotations

import json
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from checkpoints.formats.exported import HUB_NAMES, served_name
from checkpoints.formats.known import FORMATS, formats_of
from checkpoints.markdown import block, code, plain
from checkpoints.measurement import Measurement, conditions, dataset, table
from configs.command_line.redaction import portable
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
    served: commands that start an engine with the published repository as it is.
    """

    repo: str
    license: str
    measurement: Measurement | None = None
    served: tuple[str, ...] = ()


LICENSES = {"smollm2-135m": "apache-2.0"}
"""Licences of known targets; a drafter's initial weights are often its target's."""
_TAGGED = ("vLLM", "SGLang")
"""Engines that are tags, as the Hub writes them in small letters."""
_LONGEST_NAME = 96
"""The Hub's limit."""
_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE = re.compile(r".*\.(?:jsonl?|parquet|gguf|gz)")
_NO_ENGINE = "No serving engine loads this kind of component; it runs in this project's decoder."


def model_card(
    trainable: Trainable,
    config: Mapping[str, Any],
    provenance: Provenance,
    publishing: Publishing | None = None,
) -> str:
    """The card as Markdown, with the Hub's YAML header, and without places of this machine."""
    measurement = publishing.measurement if publishing else None
    head = _header(trainable, config, provenance, publishing)
    # A GGUF file's own name can only be read by its path.
    name = portable(title(provenance.target["name"]))
    provenance = replace(provenance, **portable(asdict(provenance)))
    # Sections in order; an empty one is left out.
    parts = [
        head,
        _what(trainable, config, provenance, name),
        _evaluated(measurement) if measurement else "",
        _measured(provenance.measured),
        _training(provenance),
        _use(trainable, provenance, publishing.repo if publishing else None),
        _serve(trainable, provenance, publishing) if publishing else "",
        _origin(provenance),
    ]
    return "\n".join(part for part in parts if part)


def _header(
    trainable: Trainable,
    config: Mapping[str, Any],
    provenance: Provenance,
    publishing: Publishing | None,
) -> str:
    """Metadata and heading, from the unchanged provenance: which names are Hub ids shows there."""
    data = ModelCardData(
        base_model=hub_name(provenance.target["name"]),
        library_name="slipstream",
        pipeline_tag="text-generation",
        license=publishing.license if publishing else None,
        datasets=hub_datasets(provenance.data) or None,
        tags=tags(trainable, str(config["drafter_type"])),
        model_name=publishing.repo.rsplit("/", 1)[-1] if publishing else None,
        eval_results=_results(publishing.measurement, provenance) if publishing else None,
    )
    heading = f"# {plain(config['class'])} for {plain(portable(title(provenance.target['name'])))}"
    return f"---\n{data.to_yaml()}\n---\n\n{heading}\n"


def tags(trainable: Trainable, method: str) -> list[str]:
    """Tags as others search them: what it is, its method, the engines that can serve it, the papers
    that its module names.
    """
    drafts = ["draft-model"] if isinstance(trainable, Drafter) else []
    engines = {engine for form in formats_of(type(trainable)) for engine in FORMATS[form].ENGINES}
    served = [name.lower() for name in _TAGGED if any(each.startswith(name) for each in engines)]
    module = sys.modules[type(trainable).__module__]
    papers = dict.fromkeys(_ARXIV.findall(module.__doc__ or ""))
    words = ["slipstream", "speculative-decoding", *drafts, method, *served]
    return [*words, *(f"arxiv:{paper}" for paper in papers)]


def suggested_name(kind: str, target: str) -> str:
    """`<Target>-<Method>`, a repository's name as others choose it.

    Args:
        kind: name of the component's class.
        target: the target's name; a path gives its last part.
    """
    last = re.split(r"[\\/]", title(served_name(target)).rstrip("\\/"))[-1]
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", last)[: _LONGEST_NAME - len(kind) - 1]
    # The Hub allows neither `--` nor `..`, and no name ends in either.
    return re.sub(r"([.-])[.-]+", r"\1", f"{model}-{kind}").strip("-.")


def hub_name(target: str) -> str | None:
    """The Hub id of a target, or None: the embedded target's, or the name if it is not a path."""
    return HUB_NAMES.get(target, target if _is_hub_id(target) else None)


def hub_datasets(data: Mapping[str, Any]) -> list[str]:
    """Hub ids among the training data, without revisions."""
    named = data.get("train")
    names = named if isinstance(named, (list, tuple)) else [named]
    ids = (name.partition("@")[0] for name in names if isinstance(name, str))
    return list(dict.fromkeys(filter(_is_hub_id, ids)))


def _is_hub_id(name: str) -> bool:
    """Whether a name is USER/NAME and neither a file nor a folder of this machine."""
    return (
        _HUB_ID.fullmatch(name) is not None
        and not _FILE.fullmatch(name)
        and not Path(name).exists()
    )


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


def _what(
    trainable: Trainable, config: Mapping[str, Any], provenance: Provenance, name: str
) -> str:
    summary = " ".join((type(trainable).__doc__ or config["class"]).split("\n\n")[0].split())
    total = sum(parameter.numel() for parameter in trainable.parameters())
    weights = provenance.target["fingerprint"]
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


def _serve(trainable: Trainable, provenance: Provenance, publishing: Publishing) -> str:
    """Commands for every format that holds this class; the export refuses settings that an engine
    cannot run.
    """
    forms, name = formats_of(type(trainable)), provenance.target["name"]
    target = shlex.quote(" ".join(name.split()))
    if not forms:
        return f"## Serve\n\n{_NO_ENGINE}\n"
    # 1. The repository as it is, where an engine's files are in it.
    parts = []
    if publishing.served:
        parts.append(f"This repository as it is:\n\n{block(chr(10).join(publishing.served))}\n")
    # 2. One block per format: the export, then the start of the engine.
    for form in forms:
        usage = FORMATS[form].usage(trainable, target).replace("FOLDER", f"exports/{form}")
        command = f"python -m checkpoints.export --format {form} {publishing.repo} exports/{form}"
        engines = " and ".join(FORMATS[form].ENGINES)
        parts.append(f"{engines}:\n\n```\n{command}\n{usage}\n```\n")
    introduction = (
        "Export it in a checkout of Slipstream, then start the engine with the result and "
        f"{code(served_name(name))}. The export refuses, with the reason, what an engine would run "
        "differently."
    )
    place = 1 if publishing.served else 0
    return "\n".join(["## Serve\n", *parts[:place], f"{introduction}\n", *parts[place:]])


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

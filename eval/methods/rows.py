"""The rows of an evaluation: as configured (`Method`) and ready to run (`Row`)."""

from __future__ import annotations

import inspect
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from checkpoints.pretrained import load_pretrained
from configs.command_line.class_paths import Kind, named_class, part_kinds
from configs.command_line.unknown_keys import meant
from data.conversations import prompt_ids
from data.reading.files import read_jsonl
from modules.acceptance.rules import RULES, AcceptanceRule, check_pairing, rule_named
from modules.contracts.drafter import Drafter, TreeBuilder
from modules.contracts.sampling import Sampling
from modules.contracts.target import Target
from modules.cost_model.budget import best_budget, budgets_on, try_budgets
from modules.cost_model.latency_table import stored_latency
from modules.decoding.decoder import Composite, Decoder, SpeculativeDecoder
from modules.decoding.translation import in_target_ids
from modules.runtime.argument_types import check_scalars
from modules.target.loading import missing_here

logger = logging.getLogger(__name__)
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")

AUTOREGRESSIVE = "autoregressive"
EXPORT_NOTES = "export_notes"
"""Key of a row's `quality`: how the engine's drafter differs from the exported one."""
TRAINING_PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts" / "prompts.jsonl"
MOST_NODES = 1 << 16
"""Of a tree in one call; published ones have below a thousand."""
Precision = Literal["float32", "bfloat16", "float16"]
ClassSpec = Mapping[str, Any]
"""`{class_path: package.module.Class, init_args: {…}}`."""


@dataclass(frozen=True)
class Method:
    """One row as a config names it: a drafter with a builder, a rule and a budget, or another
    decoder.

    Args:
        name: label in the report; by default the drafter's folder or the class in lower case.
        drafter: a run folder, a drafter folder, a Hub id, or a class `{class_path, init_args}` that
            needs no training (`Independent` with a small `model` is one).
        decoder: instead of a drafter, a class `{class_path, init_args}` that takes the target, such
            as `eval.methods.huggingface.HuggingFaceGenerate`.
        builder: a tree builder `{class_path, init_args}` instead of the drafter's own.
        rule: acceptance rule; by default the lossless one that fits the trees and the temperature.
            A name; a class `{class_path, init_args}`; or a trained judge: its folder or Hub id, or
            `{trained, init_args}`, such as `{trained: runs/judge, init_args: {threshold: 0.7}}`.
        budget: drafted nodes per call at most; by default the drafter's own. `auto` tries sizes on
            a few embedded prompts and takes the fastest predicted from this device's latencies; it
            drafts nothing where none promises to be faster than plain decoding.
        temperature: by default the evaluation's.
        precision: of the drafter's weights, by default the evaluation's `draft_precision`. Drafts
            may be coarse: what is emitted stays the target's.
        control: a negative control, which accepts too much on purpose; reports state whether its
            answers are found worse than plain decoding's by the target's log likelihood.
    """

    name: str = ""
    drafter: str | dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    builder: dict[str, Any] | None = None
    rule: str | dict[str, Any] | None = None
    budget: int | Literal["auto"] | None = None
    temperature: float | None = None
    precision: Precision | None = None
    control: bool = False

    @property
    def label(self) -> str:
        """The configured name, or one derived from the folder or class."""
        if self.name:
            return self.name
        # A saved drafter is called after its run folder.
        source = self.drafter if self.drafter is not None else self.decoder
        if isinstance(source, str):
            path = Path(source)
            return (
                path.parent.name
                if path.name == "drafter" and path.parent.name
                else path.resolve().name
            )
        # A class is called after its `name`, or its module.
        wanted = Kind.DECODER if self.drafter is None else Kind.DRAFTER
        kind = class_of(source or {}, "methods", wanted, 1)
        named = getattr(kind, "name", None)
        return named if isinstance(named, str) else kind.__module__.rsplit(".", 1)[-1]

    def check(self) -> None:
        """Refuse settings that can never run, before anything is loaded.

        Raises:
            ValueError: the key, its value and the fix.
        """
        # Keys that exclude each other.
        where = f"methods: {self.name or self.drafter or self.decoder}"
        if (self.drafter is None) == (self.decoder is None):
            raise ValueError(
                f"{where}: give either `drafter` or `decoder` (the autoregressive row is always "
                "there)"
            )
        if self.decoder is not None and (
            self.builder or self.rule or self.precision or self.budget is not None
        ):
            raise ValueError(
                f"{where}: builder, rule, budget and precision belong to a `drafter`, not to a "
                "`decoder`"
            )
        # Bounds of the budget; the rule against the temperature.
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(f"{where}: budget {self.budget} drafts nothing: give at least 1")
        if isinstance(self.budget, int) and self.budget > MOST_NODES:
            raise ValueError(
                f"{where}: budget {self.budget} is more than {MOST_NODES} nodes: lower it"
            )
        if self.rule == "greedy" and (self.temperature or 0) > 0:
            raise ValueError(
                f"{where}: rule 'greedy' does not sample at temperature {self.temperature:g}: "
                "leave the rule out"
            )
        # A drafter's folder or Hub id, without loading it.
        if isinstance(self.drafter, str) and Path(self.drafter).is_dir():
            _folder_exists(Path(self.drafter), where)
        elif isinstance(self.drafter, str) and (
            "/" not in self.drafter or missing_here(self.drafter)
        ):
            raise ValueError(
                f"{where}: drafter {self.drafter!r} does not exist: give a run, its folder or a "
                "Hub id"
            )
        # Classes and their arguments.
        for spec, kind, positional in (
            (self.drafter, Kind.DRAFTER, 1),
            (self.decoder, Kind.DECODER, 1),
            (self.builder, Kind.BUILDER, 0),
        ):
            if isinstance(spec, Mapping):
                _check_class(spec, where, kind, positional)
        # The rule, and whether it fits the trees of the builder.
        if self.rule is not None:
            _check_rule(self.rule, where)
        if self.builder is not None and isinstance(self.rule, str) and self.rule in RULES:
            check_pairing(
                rule_named(self.rule), construct(self.builder, where, Kind.BUILDER).sibling_draw
            )


def _check_class(spec: ClassSpec, where: str, kind: Kind, positional: int) -> None:
    """Check the class of a spec, and of drafters and decoders those that its `init_args` name in
    turn.
    """
    made, arguments = class_of(spec, where, kind, positional), spec.get("init_args") or {}
    # A policy needs no target to refuse its settings.
    if kind is Kind.POLICY:
        construct(spec, where, kind)
    if kind not in (Kind.DRAFTER, Kind.DECODER):
        return
    # Arguments that are drafters or builders are specs themselves.
    for name, part in part_kinds(made, where).items():
        if isinstance(arguments.get(name), Mapping):
            inside = f"{where}: {name}"
            _check_class(arguments[name], inside, part, int(part is Kind.DRAFTER))


def _folder_exists(folder: Path, where: str) -> None:
    if not any((place / "config.json").is_file() for place in (folder, folder / "drafter")):
        raise ValueError(
            f"{where}: {folder} holds no drafter (no config.json): give a finished run"
        )


def _check_rule(rule: str | Mapping[str, Any], where: str) -> None:
    # A class of its own kind.
    if isinstance(rule, Mapping) and "trained" not in rule:
        class_of(rule, where, Kind.RULE)
        return
    # A trained component, a rule's name, or neither.
    folder, _ = _trained(rule, where)
    if Path(folder).is_dir():
        _folder_exists(Path(folder), where)
    elif isinstance(rule, str) and "/" not in rule:
        rule_named(rule)
    elif "/" not in folder or missing_here(folder):
        raise ValueError(
            f"{where}: rule {folder!r} does not exist: give a rule's name, a judge's run or a Hub "
            "id"
        )


def _trained(rule: str | Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id of a trained rule, and its settings."""
    if isinstance(rule, str):
        return rule, {}
    unknown = sorted(set(rule) - {"trained", "init_args"})
    if unknown or not isinstance(rule["trained"], str):
        raise ValueError(
            f"{where}: {unknown[0] if unknown else 'trained'} is wrong in {dict(rule)}: give "
            "`trained` (a folder or Hub id) and perhaps `init_args`"
        )
    return rule["trained"], dict(rule.get("init_args") or {})


def acceptance_rule(rule: str | Mapping[str, Any], target: Target, where: str) -> AcceptanceRule:
    """The rule that a method names: one of `RULES`, a class, or a trained component that gives one.

    Raises:
        ValueError: no such rule, a component that gives none, or settings that it does not take.
    """
    # Rules without training.
    if isinstance(rule, str) and rule in RULES:
        return rule_named(rule)
    if isinstance(rule, Mapping) and "trained" not in rule:
        return construct(rule, where, Kind.RULE)
    # A trained component that provides a rule.
    folder, settings = _trained(rule, where)
    component = load_pretrained(folder, target).to(target.device)
    if not hasattr(component, "acceptance_rule"):
        raise ValueError(
            f"{where}: rule {folder!r} is a {type(component).__name__}, which accepts nothing: "
            "give a judge"
        )
    try:
        return cast(Any, component).acceptance_rule(target, **settings)
    except TypeError as error:
        raise ValueError(f"{where}: rule {folder!r}: init_args: {error}") from error


def class_of(spec: ClassSpec, where: str, kind: Kind, positional: int = 0) -> Callable[..., Any]:
    """The class that a spec names, with its `init_args` checked against the constructor.

    Args:
        spec: `{class_path, init_args}`.
        where: prefix of error messages.
        kind: base class that is required.
        positional: number of positional arguments that the caller will put first.

    Raises:
        ValueError: an unknown key, a class that does not exist, is not allowed or of another kind,
            an unknown or missing constructor argument, or one of another type.
    """
    unknown = sorted(set(spec) - {"class_path", "init_args"})
    path = spec.get("class_path")
    if unknown or not isinstance(path, str) or "." not in path:
        raise ValueError(
            f"{where}: {unknown[0] if unknown else 'class_path'} is wrong in {dict(spec)}: give "
            "`class_path` (package.module.Class) and perhaps `init_args`"
        )
    cls = named_class(path, kind, where)
    # Binding checks the argument names without constructing anything.
    signature = inspect.signature(cls)
    try:
        signature.bind(*[None] * positional, **dict(spec.get("init_args") or {}))
    except (TypeError, ValueError) as error:
        unexpected = _UNEXPECTED.search(str(error))
        names = list(signature.parameters)[positional:]
        near = "" if unexpected is None else meant(unexpected[1], names)
        raise ValueError(f"{where}: init_args of {path}: {error}{near}") from error
    check_scalars(cls, spec.get("init_args") or {}, where)
    return cls


def construct(spec: ClassSpec, where: str, kind: Kind, *positional: Any) -> Any:
    """An instance of the class that a spec names, with `positional` arguments first; `where` is in
    front of what its constructor refuses, too.
    """
    made = class_of(spec, where, kind, len(positional))
    try:
        return made(*positional, **spec.get("init_args") or {})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@dataclass
class Row:
    """A row that is ready to run.

    baseline: name of the autoregressive row on the same target at the same temperature; that row
    names itself.
    draft_precision: of the drafter's weights, if not the target's.
    drafter_parameters: number of trained parameters; a frozen copy of the target's (S2D's
    embedding) does not count.
    batch_size: prompts decoded together. yardstick: name of the row whose tokens it is compared
    with, where that is not its baseline.
    """

    name: str
    decoder: Decoder
    target: Target
    sampling: Sampling
    baseline: str
    claims_lossless: bool = True
    engine: str = "slipstream"
    builder: str = ""
    rule: str = ""
    budget: int | None = None
    measured_budget: bool = False
    draft_precision: str | None = None
    drafter_parameters: int = 0
    quality: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    yardstick: str = ""

    @property
    def greedy(self) -> bool:
        """Whether answers can be compared token by token."""
        return self.sampling.temperature == 0


def unique_labels(methods: Sequence[Method]) -> list[str]:
    """The methods' names.

    Raises:
        ValueError: two methods share a name, or one takes the baseline's.
    """
    labels = [method.label for method in methods]
    repeated = sorted(
        {label for label in labels if labels.count(label) > 1 or label == AUTOREGRESSIVE}
    )
    if repeated:
        raise ValueError(
            f"methods: the name {repeated[0]!r} is taken twice: give each row its own `name`"
        )
    return labels


def build_rows(
    methods: Sequence[Method],
    target: Target,
    sampling: Sampling,
    precision: Precision | None = None,
    batch_size: int = 1,
) -> list[Row]:
    """Load the parts of every method, and add an autoregressive row for each pair of target and
    temperature.

    Args:
        methods: checked methods.
        target: what they serve. A drafter that adapts it (Medusa-2) brings its own target and
            baseline.
        sampling: the evaluation's sampling; a method may have its own temperature.
        precision: of drafters whose method names none; by default the target's.
        batch_size: prompts decoded together, for which `budget: auto` is measured.
    """
    loaded: dict[str, tuple[Drafter, Target]] = {}
    rows = [_autoregressive(AUTOREGRESSIVE, target, sampling)]
    for method, label in zip(methods, unique_labels(methods)):
        # A method may have its own temperature.
        row_sampling = (
            sampling
            if method.temperature is None
            else replace(sampling, temperature=method.temperature)
        )
        row = (
            _decoder_row(method, label, target, row_sampling)
            if method.decoder is not None
            else _drafter_row(
                replace(method, precision=method.precision or precision),
                label,
                target,
                row_sampling,
                loaded,
                batch_size,
            )
        )
        # The plain decoding that it is compared with, added where it is missing.
        row.baseline = _baseline_for(row, rows)
        if method.control:
            row.quality = {**row.quality, "control": True}
        rows.append(row)
    return rows


def _autoregressive(name: str, target: Target, sampling: Sampling) -> Row:
    decoder = SpeculativeDecoder(target, name=name)
    return Row(
        name, decoder, target, sampling, name, rule=decoder.rule_for(sampling).name, budget=0
    )


def _baseline_for(row: Row, rows: list[Row]) -> str:
    """The matching autoregressive row's name; the row is made when there is none yet."""
    # Reuse a baseline on the same target with the same sampling.
    for other in rows:
        if (
            other.name == other.baseline
            and other.target is row.target
            and other.sampling == row.sampling
        ):
            return other.name
    # The first baseline has the plain name, others say how they differ.
    adapted = "" if row.target is rows[0].target else f" of {row.name}"
    heat = "" if row.sampling == rows[0].sampling else f" at {row.sampling.temperature:g}"
    rows.append(_autoregressive(f"{AUTOREGRESSIVE}{adapted}{heat}", row.target, row.sampling))
    return rows[-1].name


def _decoder_row(method: Method, label: str, target: Target, sampling: Sampling) -> Row:
    where = f"methods: {label}"
    spec = _with_parts(method.decoder or {}, target, where, None, Kind.DECODER)
    decoder: Decoder = construct(spec, where, Kind.DECODER, target)
    parts = decoder.parts().values() if isinstance(decoder, Composite) else ()
    return Row(
        label,
        decoder,
        target,
        sampling,
        "",
        getattr(decoder, "claims_lossless", True),
        getattr(decoder, "engine", "slipstream"),
        drafter_parameters=sum(part.trained_size for part in parts if isinstance(part, Drafter)),
    )


def _drafter_row(
    method: Method,
    label: str,
    target: Target,
    sampling: Sampling,
    loaded: dict[str, tuple[Drafter, Target]],
    batch_size: int,
) -> Row:
    where = f"methods: {label}"
    # Rows of one drafter and precision share its weights.
    key = f"{method.drafter if isinstance(method.drafter, str) else label} {method.precision}"
    if key not in loaded:
        fresh = load_drafter(method.drafter or "", target, where, method.precision)
        loaded[key] = fresh, fresh.adapt(target)
    drafter, adapted = loaded[key]
    # Builder and rule, each optional.
    builder = construct(method.builder, where, Kind.BUILDER) if method.builder else None
    rule = acceptance_rule(method.rule, adapted, where) if method.rule else None
    if rule is not None and rule.name == "greedy" and sampling.temperature > 0:
        fitting = SpeculativeDecoder(adapted, drafter, None, builder).rule_for(sampling).name
        raise ValueError(
            f"{where}: rule 'greedy' does not sample at temperature above 0: use {fitting!r}"
        )
    # The budget: configured, the drafter's default, or measured here.
    budget = None if method.budget == "auto" else method.budget
    decoder = SpeculativeDecoder(adapted, drafter, rule, builder, budget, label)
    if method.budget == "auto":
        decoder.budget = automatic_budget(decoder, sampling, batch_size)
    used = decoder.rule_for(sampling)
    return Row(
        label,
        decoder,
        adapted,
        sampling,
        "",
        used.lossless,
        builder=builder_name(drafter, builder),
        rule=used.name,
        budget=decoder.nodes,
        measured_budget=method.budget == "auto",
        draft_precision=method.precision,
        drafter_parameters=drafter.trained_size,
    )


def automatic_budget(
    decoder: SpeculativeDecoder, sampling: Sampling, batch_size: int = 1, prompts: int = 4
) -> int:
    """The tree size with the highest predicted speedup on this device for so many prompts at once,
    tried on training prompts that no evaluation contains."""
    rows = itertools.islice(read_jsonl(TRAINING_PROMPTS), max(prompts, batch_size))
    tokenizer, widths = (
        decoder.target.tokenizer,
        [1, *(n + 1 for n in budgets_on(decoder.target.device))],
    )
    # Times of calls by width, then acceptance at every size.
    stored = stored_latency(decoder.target, widths=widths, batch=batch_size)
    conversations = [
        prompt_ids([{"role": "user", "content": row["prompt"]}], tokenizer) for row in rows
    ]
    trials = try_budgets(decoder, stored, conversations, sampling, batch=batch_size)
    for trial in trials:
        logger.info(
            "%s with %d nodes: %.2f tokens per call, drafting %.1f ms, %.2f times plain decoding",
            decoder.name,
            trial.budget,
            trial.tokens_per_call,
            trial.draft_seconds * 1e3,
            trial.predicted_speedup,
        )
    return best_budget(trials)


def load_drafter(
    source: str | ClassSpec,
    target: Target,
    where: str = "drafter",
    precision: Precision | None = None,
) -> Drafter:
    """A drafter ready to decode: from a folder or the Hub, or made from a class that needs no
    training, such as `Independent` with the name of any small `model` of the target's tokenizer.

    Args:
        source: run folder, drafter folder, Hub id, or `{class_path, init_args}`.
        target: target it drafts for.
        where: prefix of error messages.
        precision: of its weights; by default the target's.

    Raises:
        ValueError: a missing folder, another target's drafter, or a component that does not draft.
    """
    # Saved weights, or a class with its own parts constructed first.
    if isinstance(source, str):
        drafter = load_pretrained(source, target)
    else:
        drafter = construct(
            _with_parts(source, target, where, precision), where, Kind.DRAFTER, target.shape
        )
        # Weights that begin as another model's, such as a small language model's.
        if isinstance(drafter, Drafter):
            drafter.initialise(target)
    if not isinstance(drafter, Drafter):
        raise ValueError(
            f"{where}: {source} is a {type(drafter).__name__}, which does not draft: give a drafter"
        )
    return drafter.to(
        target.device, getattr(torch, precision) if precision else target.dtype
    ).eval()


def _with_parts(
    source: ClassSpec,
    target: Target,
    where: str,
    precision: Precision | None,
    made: Kind = Kind.DRAFTER,
) -> ClassSpec:
    """The spec of a drafter, or of what `made` says, with drafters and builders constructed in
    place of their specs in `init_args` (RASD's partner).
    """
    arguments = dict(source.get("init_args") or {})
    for name, kind in part_kinds(class_of(source, where, made, 1), where).items():
        spec = arguments.get(name)
        if kind is Kind.DRAFTER and isinstance(spec, (str, Mapping)):
            arguments[name] = _part(spec, target, f"{where}: {name}", precision)
        elif kind in (Kind.BUILDER, Kind.POLICY) and isinstance(spec, Mapping):
            arguments[name] = construct(spec, f"{where}: {name}", kind)
    return {**source, "init_args": arguments}


def _part(
    source: str | ClassSpec, target: Target, where: str, precision: Precision | None
) -> Drafter:
    """A drafter that is part of another one, in the target's ids.

    Raises:
        ValueError: it adapts its target.
    """
    drafter = load_drafter(source, target, where, precision)
    if drafter.adapt(target) is not target:
        raise ValueError(f"{where} {source!r} adapts its target: name one that does not")
    return in_target_ids(drafter, target)


def builder_name(drafter: Drafter, builder: TreeBuilder | None) -> str:
    """The class of the tree builder that runs, or `own` for a drafter that makes its own trees."""
    if builder is not None:
        return type(builder).__name__
    if type(drafter).propose is not Drafter.propose:
        return "own"
    return type(drafter.builder).__name__

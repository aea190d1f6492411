"""`python -m eval.project REPORT --hardware h100`: a projection of speedups to other hardware,
without measurements there.

Only acceptance (τ, rows per call, draft depth) is taken from the report; every time is calculated
from data-sheet figures by a roofline (Williams et al. 2009): a pass of a model with W weights over
R rows takes

    max(2 W / bandwidth, 2 W R / FLOP rate) + overhead of a call

with 16-bit weights. One call of the target per step, and one pass of a drafter's weights per
drafted depth. The projection is optimistic: it neglects the KV cache, kernels below their limits
and drafters' work on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jsonargparse import ArgumentParser

from checkpoints.markdown import plain
from checkpoints.reports import load_report
from configs.command_line.bounded_yaml import load_yaml
from configs.command_line.loading import CONFIGS, exit_with, parse
from eval.metrics.speed_model import is_baseline
from eval.report.markdown import number, times

HARDWARE = CONFIGS / "hardware"
WEIGHT_BYTES = 2
LABEL = "PROJECTION, not a measurement"


@dataclass(frozen=True)
class Hardware:
    """Data-sheet figures from a file of configs/hardware.

    name: shown in the output. bytes_per_second: memory bandwidth. flops_per_second: dense 16-bit
    matrix products.
    call_seconds: overhead of one pass, an assumption.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    call_seconds: float

    def seconds(self, weights: int, rows: float) -> float:
        """Seconds of one pass of a model with so many weights over some rows."""
        return (
            max(
                WEIGHT_BYTES * weights / self.bytes_per_second,
                2 * weights * rows / self.flops_per_second,
            )
            + self.call_seconds
        )


def load_hardware(name: str) -> Hardware:
    """The hardware of `configs/hardware/NAME.yaml`.

    Raises:
        ValueError: no such file, or a key that is missing, unknown or not above zero.
    """
    file = HARDWARE / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in HARDWARE.glob("*.yaml")))
        raise ValueError(f"--hardware {name!r} is not under configs/hardware: use one of {names}")
    values = load_yaml(file)
    return read_hardware(values if isinstance(values, dict) else {}, file.name)


def read_hardware(values: Mapping[str, Any], where: str) -> Hardware:
    """`Hardware` from a file's values, checked; errors name the file `where`."""
    # The keys are exactly the fields.
    keys = [field.name for field in fields(Hardware)]
    for key in {*keys} ^ {*values}:
        wrong = "missing" if key in keys else "unknown"
        raise ValueError(f"hardware {where}: {key} is {wrong}: give {', '.join(keys)}")
    # All figures are positive numbers.
    for key in keys[1:]:
        if not isinstance(values[key], (int, float)) or values[key] <= 0:
            raise ValueError(
                f"hardware {where}: {key} {values[key]!r} is no number above zero: write it as "
                "1.0e+12"
            )
    return Hardware(str(values["name"]), *(float(values[key]) for key in keys[1:]))


def projected_speedup(
    method: Mapping[str, Any], parameters: int, hardware: Hardware
) -> float | None:
    """τ t(B) / (t(rows of a call times B) + drafting), with B sequences together; None without
    recorded calls.

    Args:
        method: its entry in the report.
        parameters: of its target.
        hardware: hardware to project to.
    """
    tau, rows, batch = method["mean_accepted_tokens"], rows_per_call(method), method["batch_size"]
    if tau is None or rows is None:
        return None
    verifying = hardware.seconds(parameters, rows * batch)
    return (
        tau * hardware.seconds(parameters, batch) / (verifying + drafting_seconds(method, hardware))
    )


def rows_per_call(method: Mapping[str, Any]) -> float | None:
    """Mean rows of a target call, from the speed model or else the drafted nodes; None without
    either.
    """
    if method.get("speed_model"):
        return method["speed_model"]["rows_per_call"]
    nodes = method["quality"].get("drafted_nodes_per_call")
    return None if nodes is None else nodes + 1


def drafting_seconds(method: Mapping[str, Any], hardware: Hardware) -> float:
    """Seconds of one pass of the drafter's weights per drafted depth; 0 without weights."""
    if not method.get("drafter_parameters"):
        return 0.0
    depth = max(1, len(method.get("conditional_acceptance_by_depth") or ()))
    return depth * hardware.seconds(method["drafter_parameters"], method["batch_size"])


def projection(report: Mapping[str, Any], hardware: Hardware) -> Iterable[str]:
    """Lines of Markdown: the label, the caveats and the table.

    Raises:
        ValueError: a method ran on a target that the report does not describe.
    """
    # 1. Every method needs the parameters of its target.
    parameters = {target["name"]: target["parameters"] for target in report["targets"]}
    drafting = [method for method in report["methods"] if not is_baseline(method)]
    for method in drafting:
        if method["target"] not in parameters:
            raise ValueError(
                f"report: {method['name']!r} ran on {method['target']!r}, which is not among its "
                "targets: measure it again"
            )
    # 2. What was assumed.
    yield f"# {LABEL}: {hardware.name}\n"
    yield (
        f"Calculated for 16-bit weights from {hardware.bytes_per_second / 1e9:.0f} GB/s, "
        f"{hardware.flops_per_second / 1e12:.0f} TFLOP/s and an assumed "
        f"{hardware.call_seconds * 1e6:.0f} µs per pass. Only τ and rows per call were measured "
        f"(on {report['environment']['device']}); the KV cache, kernels short of their limits and "
        "drafting on the host are left out, which flatters; a drafter's weights are read once per "
        "drafted depth, which is too much for heads that serve one depth each.\n"
    )
    # 3. One row per drafting method.
    yield "| method | τ, measured | rows per call | projected speedup |\n|---|---:|---:|---:|"
    for method in drafting:
        projected = projected_speedup(method, parameters[method["target"]], hardware)
        measured = number(method["mean_accepted_tokens"]), number(rows_per_call(method), 1)
        cells = plain(method["name"]), *measured, times(projected)
        yield f"| {' | '.join(cells)} |"


def command(arguments: Sequence[str]) -> int:
    """Print the projection; returns the exit status. Raises ValueError for a user's mistake."""
    parser = ArgumentParser(
        prog="python -m eval.project",
        exit_on_error=False,
        description="Project speedups to other hardware from measured acceptance.",
    )
    parser.add_argument("report", type=str, help="a report.json or its folder")
    parser.add_argument("--hardware", type=str, required=True, help="a file under configs/hardware")
    settings = parse(parser, arguments)
    hardware = load_hardware(settings.hardware)
    for line in projection(load_report(settings.report), hardware):
        print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command, arguments)


if __name__ == "__main__":
    main()

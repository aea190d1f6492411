"""A GGUF file's own name, read from its first bytes."""

import struct
from pathlib import Path

import pytest

from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance
from eval.report.markdown import describe
from modules.drafters.heads.medusa import Medusa
from modules.target.gguf_name import title
from tests.fakes import tiny_target


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(folder: Path, *keys: tuple[str, int, bytes], name: str = "model.Q4_0.gguf") -> str:
    file = folder / name
    body = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in keys)
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(keys)) + body)
    return str(file)


NAME = ("general.name", 8, text("Qwen2.5 Coder 0.5B"))


@pytest.mark.parametrize(
    "before",
    [
        (),
        (("general.architecture", 8, text("qwen2")), ("general.size", 4, struct.pack("<I", 7))),
        (
            ("general.languages", 9, struct.pack("<IQ", 8, 2) + text("en") + text("de")),
            ("general.flags", 9, struct.pack("<IQ", 7, 3) + b"\1\0\1"),
        ),
    ],
)
def test_the_name_in_the_file_is_what_readers_see(tmp_path, before):
    file = gguf(tmp_path, *before, NAME)
    assert title(file) == "Qwen2.5 Coder 0.5B"
    assert title(f"{file}+medusa2") == "Qwen2.5 Coder 0.5B+medusa2"


def test_a_file_that_does_not_tell_is_called_by_its_own_name_and_never_by_its_folder(tmp_path):
    nameless = gguf(tmp_path, ("general.architecture", 8, text("qwen2")), name="a.gguf")
    late = gguf(tmp_path, ("qwen2.blocks", 4, b"\0" * 4), NAME, name="b.gguf")
    endless = gguf(tmp_path, ("general.name", 8, struct.pack("<Q", 1 << 62)), name="c.gguf")
    (tmp_path / "d.gguf").write_bytes(b"no such format, but long enough")
    (tmp_path / "e.gguf").write_bytes(b"")
    assert [title(name) for name in (nameless, late, endless)] == ["a", "b", "c"]
    assert [title(str(tmp_path / name)) for name in ("d.gguf", "e.gguf", "gone.gguf")] == [
        "d",
        "e",
        "gone",
    ]


def test_other_names_stay_as_they_are():
    names = ("smollm2-135m", "Qwen/Qwen3-8B", "/models/llama", "tiny-llama+medusa2")
    assert [title(name) for name in names] == list(names)


def test_reports_and_cards_call_a_target_by_it(tmp_path):
    target = tiny_target()
    target.name = gguf(tmp_path, NAME)
    assert describe(target)["name"] == "Qwen2.5 Coder 0.5B"
    folder = save_pretrained(
        Medusa(target.shape, heads=2), tmp_path / "drafter", Provenance.of(target)
    )
    card = (folder / "README.md").read_text()
    assert "# Medusa for Qwen2.5 Coder 0.5B" in card and "the target `Qwen2.5 Coder 0.5B`" in card

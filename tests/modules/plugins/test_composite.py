"""A drafter beside another one, whose arguments have names of its own: an evaluation loads it, and
finds what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from configs.command_line.class_paths import Kind, part_kinds
from eval.methods.rows import Method, load_drafter
from eval.tasks.contamination import known_to
from modules.contracts.drafter import Context, Drafter, DraftState, Part, TreeBuilder
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.rasd import Rasd
from modules.trees.reranked import RerankedTree
from tests.fakes import ScriptedDrafter, tiny_target

if TYPE_CHECKING:
    from fractions import Fraction


class Alternating(Drafter):
    """Leaves every step to its `second` drafter, by the trees that `shaped` grows."""

    def __init__(
        self,
        shape: TargetShape,
        second: Drafter,
        shaped: TreeBuilder | None = None,
        library: str = "here",
    ) -> None:
        super().__init__()
        self.second, self.shaped, self.library = second, shaped, library

    sibling_draw = ScriptedDrafter.sibling_draw

    def parts(self) -> Mapping[str, Part]:
        return {"second": self.second, "library": Path(self.library)}

    def loss(self, batch: Any, target: Any, progress: float) -> Any:
        raise NotImplementedError

    def start(self, context: Context) -> DraftState:
        return self.second.start(context)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        return self.second.propose(state, budget)

    def absorb(self, state: DraftState, verified: Any, accepted: Any) -> DraftState:
        return self.second.absorb(state, verified, accepted)


class Unreadable(Alternating):
    """Declares a type that is not there at run time."""

    def __init__(self, shape: TargetShape, second: Fraction) -> None:
        raise NotImplementedError


HERE = "tests.modules.plugins.test_composite"
SPEC = {
    "class_path": f"{HERE}.Alternating",
    "init_args": {
        "second": {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"},
        "shaped": {
            "class_path": "modules.trees.reranked.RerankedTree",
            "init_args": {"depth": 2, "width": 2},
        },
    },
}


def test_parts_are_found_by_declared_types() -> None:
    assert part_kinds(Alternating, "x") == {"second": Kind.DRAFTER, "shaped": Kind.BUILDER}
    assert part_kinds(Rasd, "x") == {"partner": Kind.DRAFTER, "builder": Kind.BUILDER}
    with pytest.raises(ValueError, match="x: types of Unreadable.* outside of TYPE_CHECKING"):
        part_kinds(Unreadable, "x")


def test_an_evaluation_loads_the_parts() -> None:
    target = tiny_target()
    Method("x", SPEC).check()
    found = load_drafter(SPEC, target)
    assert isinstance(found, Alternating) and isinstance(found.shaped, RerankedTree)
    assert type(found.second).__name__ == "PromptLookup"
    wrong = {**SPEC, "init_args": {"second": {"class_path": "modules.trees.trie.Trie"}}}
    with pytest.raises(ValueError, match="second: class_path .* is no drafter"):
        Method("x", wrong).check()


def test_what_its_parts_were_made_from_is_known(tmp_path: Path) -> None:
    target = tiny_target()
    second = ScriptedDrafter(target.shape)
    second.loaded_from = "runs/second"
    (tmp_path / "datastore.json").touch()
    drafter = Alternating(target.shape, second, library=str(tmp_path))
    drafter.loaded_from = "runs/whole"
    found = known_to(
        Method("x", "runs/whole", rule="runs/judge"), SpeculativeDecoder(target, drafter)
    )
    assert found == [
        ("trained", "runs/whole"),
        ("trained", "runs/second"),
        ("datastore", str(tmp_path)),
        ("trained", "runs/judge"),
    ]

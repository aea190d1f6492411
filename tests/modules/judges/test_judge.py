"""The judge: its arithmetic, the row it looks at, and what it lets through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.acceptance.rules import AcceptanceRule, Draws
from modules.contracts.batches import LabelledBatch, TextBatch
from modules.contracts.drafter import Drafter, TreeBuilder
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.judges.judge import (
    NOTHING,
    Judge,
    calibrated_threshold,
    class_weights,
    moment_sums,
    repeats,
)
from modules.losses.metrics import area_under_curve
from modules.target.target import Target
from modules.trees.sampled.chain import SampledChain
from tests.fakes import ScriptedDrafter, tiny_target

PROMPTS = [[7, 8, 9, 10, 11], [20, 21], [30, 31, 32]]
RIGHT, WRONG, PLACE = 70, 71, 9


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def shaken(target: Target, **arguments) -> Judge:
    torch.manual_seed(1)
    judge = Judge(target.shape, **arguments).double().eval()
    with torch.no_grad():
        judge.linear.weight.normal_()
        judge.mean_H.normal_()
        judge.deviation_H.uniform_(0.5, 2)
    return judge


def decoded(
    target: Target,
    drafter: Drafter,
    rule: AcceptanceRule | None,
    sampling: Sampling,
    builder: TreeBuilder | None = None,
) -> list[tuple[list[int], list[int]]]:
    traces = SpeculativeDecoder(target, drafter, rule, builder).decode(PROMPTS, sampling, 16)
    return [(trace.ids, trace.accepted) for trace in traces]


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("builder", [None, SampledChain(3)], ids=["tree", "chain"])
def test_a_threshold_above_1_is_the_lossless_rule(target, builder, temperature):
    drafter = Medusa(target.shape, heads=3, draft_vocabulary=None).double().eval()
    drafter.initialise(target)
    rule, sampling = shaken(target).acceptance_rule(target, 1.01), Sampling(temperature, seed=5)
    assert not rule.lossless and rule.states == ("pre_norm",)
    assert decoded(target, drafter, rule, sampling, builder) == decoded(
        target, drafter, None, sampling, builder
    )


def test_a_threshold_of_0_accepts_the_drafters_own_text(target):
    """Token by token: three drafts, each the one behind the target's choice, then the target's."""
    drafter, judge = ScriptedDrafter(target.shape, right=0.0, depth=3), shaken(target)
    with torch.no_grad():
        judge.linear.bias.fill_(-1e6)
    rule = judge.acceptance_rule(target, 0.0, guard=False)
    for prompt, (ids, accepted) in zip(PROMPTS, decoded(target, drafter, rule, Sampling())):
        said: list[int] = []
        while len(said) < 16 and not (said and said[-1] in target.eos_ids):
            logits = target.model(input_ids=torch.tensor([prompt + said])).logits[0, -1]
            drafted = len(said) % 4 != 0
            said.append((int(logits.argmax()) + drafted) % target.shape.vocab_size)
        assert ids == said and set(accepted[:-1]) == {4} and sum(accepted) == len(ids) - 1


def repeated(path: list[int], longest: int) -> bool:
    return any(len(path) >= 2 * p and path[-p:] == path[-2 * p : -p] for p in range(1, longest + 1))


@pytest.mark.parametrize("longest", [0, 1, 2, 3])
def test_repetitions_are_those_of_a_path(longest):
    """Against lists of the tokens on every path of random trees over two tokens, with padding."""
    generator, seen = torch.Generator().manual_seed(longest), 0
    for _ in range(8):
        parents = [
            -1,
            *(int(torch.randint(max(0, n - 3), n, (), generator=generator)) for n in range(1, 14)),
            14,
        ]
        tokens = torch.randint(2, (15,), generator=generator).tolist()
        tree = TokenTree(torch.tensor([tokens]), Topology(torch.tensor([parents])))
        found = repeats(tree, longest)[0].tolist()
        paths: list[list[int]] = []
        for n, parent in enumerate(parents[:14]):
            paths.append([*(paths[parent] if n else []), tokens[n]])
        assert found[:14] == [repeated(path, longest) for path in paths] and not found[14]
        seen += sum(found)
    assert (seen > 8) == (longest > 0)


class StutteringDrafter(ScriptedDrafter):
    """Says two tokens in turn."""

    def _future(self, target: Target, ids: list[int]) -> list[int]:
        return [70 + (len(ids) + level) % 2 for level in range(self.depth)]


def test_the_judge_may_be_kept_from_waving_repetitions_through(target):
    drafter, judge = StutteringDrafter(target.shape, depth=5), shaken(target)
    with torch.no_grad():
        judge.linear.bias.fill_(-1e6)
    for repetition, longest in ((0, 6), (1, 6), (2, 4)):
        rule = judge.acceptance_rule(target, 0.0, guard=False, repetition=repetition)
        for ids, accepted in decoded(target, drafter, rule, Sampling()):
            # a b a b would be the second time that the drafter says a b.
            assert max(accepted) == longest and len(ids) == 16
    with pytest.raises(ValueError, match="rule judge: repetition must be 0"):
        judge.acceptance_rule(target, repetition=-1)


def test_special_tokens_are_left_to_the_standard_rule(target):
    judge = shaken(target)
    rule = judge.acceptance_rule(target, 0.0)
    assert set(rule.special) >= target.eos_ids and set(rule.special) >= set(
        target.tokenizer.all_special_ids
    )
    chain = TokenTree.chain(torch.tensor([[9, *sorted(target.eos_ids), 10]]))
    states = torch.zeros(1, 3, target.shape.hidden_size, dtype=torch.float64)
    logits = torch.zeros(1, 3, target.shape.vocab_size, dtype=torch.float64)
    good = rule.good(
        chain, Verified(chain, logits, {"pre_norm": states}), Draws(Sampling(), [torch.Generator()])
    )
    assert good.tolist() == [[True, False, True]]


def test_a_node_is_judged_by_its_own_row_and_more_of_a_tree_is_good_at_lower_thresholds(target):
    """Exactly the nodes whose own states score at least the threshold: not their parents' or their
    children's.
    """
    judge, tree = shaken(target), TokenTree.chain(torch.tensor([[9, 10, 11, 12, 13, 14]]))
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 6, target.shape.hidden_size, dtype=torch.float64, generator=generator)
    logits = torch.zeros(1, 6, target.shape.vocab_size, dtype=torch.float64)
    scores = [float(judge.scores(states[0, n]).detach()) for n in range(6)]
    assert len(set(scores)) == 6
    shares = []
    for threshold in sorted(scores, reverse=True):
        rule = judge.acceptance_rule(target, threshold - 1e-9, guard=False)
        good = rule.good(
            tree,
            Verified(tree, logits, {"pre_norm": states}),
            Draws(Sampling(), [torch.Generator()]),
        )
        assert good[0].tolist() == [score >= threshold - 1e-9 for score in scores]
        shares.append(int(good.sum()))
    assert shares == [1, 2, 3, 4, 5, 6]


def test_acceptance_grows_as_the_threshold_falls(target):
    judge = shaken(target)
    means = []
    for threshold in (NOTHING, 0.7, 0.3, 0.0):
        drafter = ScriptedDrafter(target.shape, right=0.5, depth=3)
        calls = [
            n
            for _, accepted in decoded(
                target, drafter, judge.acceptance_rule(target, threshold), Sampling()
            )
            for n in accepted
        ]
        means.append(sum(calls) / len(calls))
    assert means[0] < means[-1] and means[1] <= means[-1]


# -- the row it looks at ---------------------------------------------------------------------------


def labelled(target: Target, seed: int, shift: int = 0, shuffle: bool = False) -> LabelledBatch:
    """The same contexts twice, followed by a right and by a wrong token; `shift` -1 looks at the
    row before it.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(5, 9, (24, 12), generator=generator).repeat(2, 1)
    labels = torch.zeros_like(contexts)
    contexts[:24, PLACE], contexts[24:, PLACE] = RIGHT, WRONG
    labels[:24, PLACE] = 1
    if shuffle:
        labels[:, PLACE] = labels[torch.randperm(48, generator=generator), PLACE]
    mask = torch.zeros_like(contexts, dtype=torch.bool)
    mask[:, PLACE] = True
    text = TextBatch(contexts, mask, torch.arange(12).expand(48, -1), torch.zeros_like(contexts))
    text.states = {
        name: state.roll(-shift, 1) for name, state in target.features(text, ("pre_norm",)).items()
    }
    return LabelledBatch(text, labels)


def fitted(target: Target, **options) -> Judge:
    """A head whose threshold is to be set on held-out tokens."""
    judge = Judge(target.shape, threshold=None).double().train()
    optimizer = torch.optim.Adam(judge.declared_parameters(), 0.05)
    batches = [labelled(target, seed, **options) for seed in range(8)]
    for step in range(160):
        optimizer.zero_grad()
        judge.loss(batches[step % 8], target, 0.0).total.backward()
        optimizer.step()
    return judge.eval()


def held_out(judge: Judge, target: Target, **options) -> dict[str, float]:
    return judge.finish([labelled(target, 1000 + i, **options) for i in range(3)], target).figures


def test_the_state_behind_a_wrong_token_tells_and_the_one_before_cannot(target):
    judge = fitted(target)
    figures = held_out(judge, target)
    assert figures["held_out/auc"] >= 0.9
    assert figures["held_out/accepted_right"] > figures["held_out/accepted_wrong"]
    assert float(judge.threshold) == pytest.approx(figures["held_out/threshold"])
    before = labelled(target, 1000, shift=-1)
    row = labelled(target, 1000).text.states["pre_norm"][:, PLACE - 1]
    assert torch.equal(before.text.states["pre_norm"][:, PLACE], row)
    assert held_out(fitted(target, shift=-1), target, shift=-1)["held_out/auc"] == pytest.approx(
        0.5, abs=1e-3
    )
    batch = labelled(target, 1000)
    with torch.no_grad():
        scores = judge.scores(batch.text.states["pre_norm"])
    assert float(scores[24:, PLACE].mean()) < float(scores[24:, PLACE - 1].mean())


def test_the_threshold_is_the_papers_unless_it_is_to_be_calibrated(target, caplog):
    """Its shares are then those of all held-out tokens, in questions with even and odd numbers."""
    judge = Judge(target.shape).double().eval()
    judge.load_state_dict({**fitted(target).state_dict(), "threshold": torch.tensor(0.5)})
    batch = labelled(target, 1000)
    batch.questions = (torch.arange(48) % 24 % 2)[:, None].expand(-1, 12)
    figures = judge.finish([batch], target).figures
    assert float(judge.threshold) == figures["held_out/threshold"] == 0.5
    with torch.no_grad():
        scores = judge.scores(batch.text.states["pre_norm"][:, PLACE])
    right = batch.labels[:, PLACE] == 1
    for name, kind in (("right", right), ("wrong", ~right)):
        share = float((scores[kind] >= 0.5).double().mean())
        assert figures[f"held_out/accepted_{name}"] == pytest.approx(share)
    calibrated = calibrated_threshold(scores, right, 0.9)
    assert figures["held_out/calibrated_threshold"] == pytest.approx(calibrated)
    assert calibrated != 0.5 and judge.acceptance_rule(target).threshold == 0.5
    alone = replace(batch, questions=torch.zeros(48, 12, dtype=torch.long))
    judge.finish([alone], target)
    assert not caplog.records


def test_the_threshold_is_judged_on_answers_it_was_not_set_on(target, caplog):
    """Among questions with odd numbers scores are turned round: the threshold does not see them,
    its shares do.
    """
    judge = fitted(target)
    batch = labelled(target, 1000)
    batch.questions = (torch.arange(48) % 24 % 2)[:, None].expand(-1, 12)
    same = judge.finish([batch], target).figures
    turned = replace(batch, labels=batch.labels.clone())
    turned.labels[1::2, PLACE] = 1 - turned.labels[1::2, PLACE]
    figures = judge.finish([turned], target).figures
    assert figures["held_out/threshold"] == same["held_out/threshold"]
    assert figures["held_out/accepted_right"] == same["held_out/accepted_wrong"]
    assert figures["held_out/accepted_wrong"] == same["held_out/accepted_right"] > 0.5
    assert not caplog.records
    alone = replace(batch, questions=torch.zeros(48, 12, dtype=torch.long))
    assert judge.finish([alone], target).figures["held_out/accepted_right"] > 0.5
    assert "too few held-out answers" in caplog.text


def test_numbers_are_judged_among_themselves(target):
    """A head that calls every number wrong has a good area over all tokens, and none among the
    numbers.
    """
    digit = target.tokenizer("7", add_special_tokens=False)["input_ids"][0]
    ids = torch.tensor([[20, 21, 22, digit, digit, 23]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    text = TextBatch(ids, mask, torch.arange(6)[None], torch.zeros_like(ids))
    text.states["pre_norm"] = (
        (ids == digit)[..., None].double().expand(-1, -1, target.shape.hidden_size)
    )
    judge = Judge(target.shape).double().eval()
    with torch.no_grad():
        judge.linear.weight.fill_(-1.0)
    figures = judge.finish(
        [LabelledBatch(text, torch.tensor([[1, 1, 1, 1, 0, 1]]))], target
    ).figures
    assert (
        figures["held_out/auc"] == pytest.approx(4.5 / 5) and figures["held_out/auc_numbers"] == 0.5
    )


def test_shuffled_labels_teach_nothing(target):
    assert held_out(fitted(target, shuffle=True), target)["held_out/auc"] < 0.9
    figures = held_out(fitted(target, shuffle=True), target, shuffle=True)
    assert abs(figures["held_out/auc"] - 0.5) < 0.2


# -- arithmetic ------------------------------------------------------------------------------------


def test_scores_are_standardised_and_fold_into_one_product(target):
    judge = shaken(target)
    states = torch.randn(3, 5, target.shape.hidden_size, dtype=torch.float64)
    slow = judge.linear((states - judge.mean_H) / judge.deviation_H)[..., 0].sigmoid()
    torch.testing.assert_close(judge.scores(states), slow)


def test_training_gathers_mean_and_deviation_of_all_states(target):
    judge = Judge(target.shape).double().train()
    batches = [labelled(target, seed) for seed in range(3)]
    for batch in batches:
        judge.loss(batch, target, 0.0)
    everything = torch.cat([batch.text.states["pre_norm"][:, PLACE] for batch in batches])
    torch.testing.assert_close(judge.mean_H, everything.mean(0))
    torch.testing.assert_close(judge.deviation_H, everything.std(0, correction=0))
    judge.eval().loss(batches[0], target, 0.0)
    assert float(judge.seen) == len(everything)


def test_the_loss_against_a_slow_reference(target):
    for focus in (0.0, 2.0):
        judge, batch = shaken(target, focus=focus, largest_weight=5.0), labelled(target, 0)
        judge.linear.weight.data *= 0.1
        batch.labels[:40, PLACE] = 1
        batch.labels[40:, PLACE] = 0
        total, weights = 0.0, 0.0
        for b in range(48):
            p = float(judge.scores(batch.text.states["pre_norm"][b, PLACE]).detach())
            right = bool(batch.labels[b, PLACE])
            p, weight = (p, 1.0) if right else (1 - p, min(40 / 8, 5.0))
            total -= weight * (1 - p) ** focus * float(torch.tensor(p).log())
            weights += weight
        assert float(judge.loss(batch, target, 0.0).total.detach()) == pytest.approx(
            total / weights, rel=1e-4
        )


def test_moments_of_two_processes_are_those_of_all_states(target):
    one, two = (Judge(target.shape).double() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for count in (9, 12):
        states = torch.randn(count, target.shape.hidden_size, generator=generator).double()
        states[:4] += 30
        one._observe(moment_sums(states))
        two._observe((moment_sums(states[:4]) + moment_sums(states[4:])) / 2)
    torch.testing.assert_close(two.mean_H, one.mean_H)
    torch.testing.assert_close(two.deviation_H, one.deviation_H)
    assert two.seen == one.seen / 2 and one.deviation_H.min() > 10


def test_class_weights_are_capped():
    labels = torch.tensor([1.0] * 30 + [0.0])
    assert class_weights(labels, 20.0)[0].tolist() == [1.0] * 30 + [20.0]
    assert class_weights(1 - labels, 20.0)[0].tolist() == [1.0] * 31
    assert class_weights(torch.ones(3), 20.0)[0].tolist() == [1.0] * 3


def scored(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(60, generator=generator) < 0.8
    scores = (torch.rand(60, generator=generator) * 10).round() / 20 + 0.4 * right
    return scores.double(), right


def test_area_and_threshold_against_slow_references():
    for seed in range(4):
        scores, right = scored(seed)
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a in scores[right].tolist()
            for b in scores[~right].tolist()
        ]
        assert area_under_curve(scores, right) == pytest.approx(sum(pairs) / len(pairs))
        assert area_under_curve(-scores, right) == pytest.approx(1 - sum(pairs) / len(pairs))

        def precision(level: float, scores: Tensor = scores, right: Tensor = right) -> float:
            rates = [float((scores[one] >= level).double().mean()) for one in (right, ~right)]
            return rates[0] / sum(rates)

        for wanted in (0.5, 0.8, 0.95):
            levels = [
                level for level in scores.unique().tolist() if precision(level) >= wanted - 1e-9
            ]
            found = calibrated_threshold(scores, right, wanted)
            assert found == pytest.approx(min(levels) if levels else NOTHING)
    assert area_under_curve(scores, torch.ones(60, dtype=torch.bool)) == 0.5
    assert calibrated_threshold(scores, torch.ones(60, dtype=torch.bool), 0.9) == NOTHING
    worst = calibrated_threshold(torch.tensor([0.9, 0.1]), torch.tensor([False, True]), 0.9)
    assert worst == NOTHING


def test_the_threshold_of_very_many_tokens_needs_no_table_of_pairs():
    """A table of levels by tokens would hold 4e10 entries here."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(200_000, generator=generator) < 0.9
    scores = torch.rand(200_000, generator=generator).double() + 0.3 * right
    found = calibrated_threshold(scores, right, 0.9)
    rates = [float((scores[one] >= found).double().mean()) for one in (right, ~right)]
    assert rates[0] / sum(rates) == pytest.approx(0.9, abs=1e-3)


def test_wrong_settings_are_named(target):
    for arguments, key in (
        ({"precision": 1.5}, "precision"),
        ({"threshold": -0.1}, "threshold"),
        ({"largest_weight": 0.0}, "largest_weight"),
        ({"focus": -1.0}, "focus"),
    ):
        with pytest.raises(ValueError, match=key):
            Judge(target.shape, **arguments)

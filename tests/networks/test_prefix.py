"""The prefix decoder: what each question sees, in which order the slots come, and that a cache changes nothing."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.networks import PrefixDecoder
from nar_t2i.networks.attention import StaticCache
from nar_t2i.networks.prefix import lattice_order, lattice_stages
from nar_t2i.types import TokenSpec, TokenState
from tests.inference.test_confidence import make_condition

SPEC = TokenSpec((4, 4), "categorical", 7)
STAGES = [1, 1, 3]


@pytest.fixture(params=[False, True], ids=["plain", "grid convolution"])
def network(request):
    return make_network(request.param)


def make_network(grid=True, spec=SPEC, stages=STAGES, std=0.3):
    torch.manual_seed(0)
    network = PrefixDecoder(spec, (8,), width=16, depth=3, heads=2, grid_convolution=grid, stages=stages).double().eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network


def tokens_of(rows=2, seed=0):
    return torch.randint(7, (rows, 16), generator=torch.Generator().manual_seed(seed))


def prepared(network, rows=2):
    return network.prepare(make_condition(rows, torch.float64)[0])


def whole(network, tokens):
    return network(TokenState(tokens, torch.zeros_like(tokens, dtype=torch.bool)), prepared(network, len(tokens))).logits


def test_the_order_goes_from_coarse_to_fine():
    assert lattice_order((4, 4)) == [0, 10, 2, 8, 5, 15, 7, 13, 1, 11, 3, 9, 4, 14, 6, 12]
    assert lattice_order((8,)) == [0, 4, 2, 6, 1, 5, 3, 7]
    for shape in ((8, 8), (3, 5), (7,), (1, 1)):
        order = lattice_order(shape)
        assert sorted(order) == list(range(len(order)))
    grid = torch.tensor(lattice_order((8, 8))[:16])
    assert ((grid // 8) % 2 == 0).all() and ((grid % 8) % 2 == 0).all()


def test_stages_double_up_to_a_half():
    assert lattice_stages(64) == [1, 3, 4, 8, 16] and sum(lattice_stages(1024)) == 512
    assert lattice_stages(5) == lattice_stages(2) == [1] and sum(lattice_stages(100)) <= 50


def test_a_slot_is_told_from_those_before_it(network):
    """And from none of the last stage."""
    tokens, order, scanned = tokens_of(), network.order.tolist(), sum(STAGES)
    logits = whole(network, tokens)
    for rank, slot in enumerate(order):
        changed = tokens.clone()
        changed[:, slot] = (changed[:, slot] + 1) % 7
        differs = (whole(network, changed) != logits).any(-1).any(0)[order]
        assert not differs[: rank + 1].any()
        assert differs[rank + 1 :].all() if rank < scanned else not differs.any()


def test_a_lesson_asks_from_the_stage_before_and_from_all_before(network):
    tokens, lesson, order = tokens_of(), network.lesson, network.order.tolist()
    about = network.about(lesson.slots, lesson.asked).tolist()
    assert sorted(order.index(slot) for slot in about) == sorted([*range(16), 3, 4])
    assert [[order.index(about[entry]) for entry in stage] for stage in lesson.questions] == [[], [], [3, 4], [*range(6, 16)]]
    told = network(network.along(lesson, tokens), prepared(network)).logits
    scan = whole(network, tokens)
    from_the_stage_before = list(lesson.questions[2])
    for entry, slot in enumerate(about):
        if entry not in from_the_stage_before:
            torch.testing.assert_close(told[:, entry], scan[:, slot], rtol=1e-9, atol=1e-9)
    for rank in range(5):
        changed = tokens.clone()
        changed[:, order[rank]] = (changed[:, order[rank]] + 1) % 7
        now = network(network.along(lesson, changed), prepared(network)).logits
        assert ((now != told).any(-1).any(0)[from_the_stage_before] == (rank < 2)).all()


@pytest.mark.parametrize("stages", [[1, 1, 3], [1] * 5, [2, 3]])
def test_a_cache_changes_nothing(network, stages):
    """Of what a token says about the next slot, and of questions about those behind it."""
    tokens, order = tokens_of(), network.order
    logits, cache, start, before = whole(network, tokens), StaticCache(32), 0, order[:0]
    for size in [*stages, 16 - sum(stages)]:
        here = order[start : start + size]
        slots = torch.cat([before, here if start == 0 else here[1:]])
        asked = torch.arange(len(slots)) >= len(before)
        state = TokenState(tokens[:, slots], asked.expand(2, -1), slots.expand(2, -1))
        said = network(state, prepared(network), cache=cache).logits
        known = [*before[1:], here[0]] if start else [here[0]]
        torch.testing.assert_close(said[:, : len(known)], logits[:, known], rtol=1e-9, atol=1e-9)
        all_slots = torch.cat([order[:start], here])
        state = TokenState(tokens[:, all_slots], (torch.arange(len(all_slots)) >= start).expand(2, -1), all_slots.expand(2, -1))
        torch.testing.assert_close(
            said[:, len(known) :], network(state, prepared(network)).logits[:, start + 1 :], rtol=1e-9, atol=1e-9
        )
        cache.crop(start)
        start, before = start + size, here


def test_tokens_need_not_be_found(network):
    state, text = network.along(network.lesson, tokens_of()), prepared(network)
    found = network(state, text).logits
    torch.testing.assert_close(network.head(network._hidden(state, text, None, None)).logits, found, rtol=1e-9, atol=1e-9)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        network = make_network()
        network.activation_checkpointing = checkpointed
        whole(network, tokens_of()).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("stages", [[0, 1], [16], [8, 9], [-1]])
def test_stages_that_leave_no_last_one_are_refused(stages):
    with pytest.raises(UserError, match="stages"):
        make_network(stages=stages)

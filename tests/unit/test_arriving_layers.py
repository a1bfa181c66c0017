"""Which requests may run while layers of their KV arrive, and what their passes wait for."""

import pytest
import torch

from memos_vllm.integration.arriving_layers import ArrivingLayers
from memos_vllm.store.layer_groups import layer_groups
from memos_vllm.store.ops import Result

PLANES = {"layer.0": (0, 1), "layer.1": (2, 3), "layer.2": (4, 5), "shared": (0, 1)}


def arriving():
    """Six planes in three groups: a layer's K and V are in the same but for those of no layer."""
    return ArrivingLayers(layer_groups([torch.zeros(2, 8)] * 6, 3), PLANES)


def ended(op_id, ok=True):
    return Result(op_id, ok, None if ok else "device lost", () if ok else (1,), 0, 0.0)


def test_a_request_may_run_when_each_of_its_loads_has_begun_or_ended():
    layers = arriving()
    assert layers.may_run(set()), "all of them have ended"
    assert not layers.may_run({1, 2})
    layers.begun({1})
    assert not layers.may_run({1, 2})
    layers.begun({2})
    assert layers.may_run({1, 2})


def test_a_load_that_has_ended_is_forgotten():
    layers = arriving()
    layers.begun({1})
    layers.ended([ended(1)])
    assert not layers.may_run({1})


def test_a_failure_after_a_pass_has_read_it_is_raised():
    layers = arriving()
    layers.begun({1, 2})
    assert layers.may_run({1})
    layers.ended([ended(2, ok=False), ended(3, ok=False)])  # vLLM recomputes these
    layers.expect((1,))
    with pytest.raises(RuntimeError, match="did not arrive: device lost"):
        layers.ended([ended(1, ok=False)])


def test_a_failure_that_no_pass_has_read_is_vllms_unless_a_pass_was_planned_meanwhile():
    """The request was aborted, say, or waits for another rank; with asynchronous scheduling it may be on its way."""
    layers = arriving()
    layers.begun({1, 2})
    assert layers.may_run({1}) and layers.may_run({2})
    layers.ended([ended(1, ok=False), ended(2)])
    layers.expect((2,))
    with pytest.raises(RuntimeError, match="about to run did not arrive"):
        layers.expect((1,))


def test_a_pass_waits_once_for_each_group_before_its_first_layer():
    layers = arriving()
    assert layers.is_whole
    layers.expect((7, 8))
    assert not layers.is_whole
    assert sorted(layers.take("layer.0")) == [(7, 0), (8, 0)]
    assert list(layers.take("layer.0")) == list(layers.take("shared")) == []
    assert sorted(layers.take("layer.1")) == [(7, 1), (8, 1)]
    layers.expect((7, 8))  # the next step, in which they have not ended yet
    assert sorted(layers.take("layer.0")) == []
    assert sorted(layers.take("layer.2")) == [(7, 2), (8, 2)]
    assert layers.is_whole


def test_a_layer_that_shares_an_earlier_ones_kv_waits_for_it():
    layers = arriving()
    layers.expect((7,))
    assert list(layers.take("shared")) == [(7, 0)]


def test_a_layer_whose_planes_lie_in_two_groups_waits_for_both():
    layers = ArrivingLayers(layer_groups([torch.zeros(2, 8)] * 4, 4), {"layer.0": (0, 1), "layer.1": (2, 3)})
    layers.expect((7,))
    assert sorted(layers.take("layer.1")) == [(7, 2), (7, 3)]


def test_an_unknown_layer_and_a_pass_that_does_not_ask_wait_for_all():
    layers = arriving()
    layers.expect((7,))
    assert sorted(layers.take("another.layer")) == [(7, 0), (7, 1), (7, 2)]
    layers.expect((7, 8))
    assert sorted(layers.take_all()) == [(8, 0), (8, 1), (8, 2)]


def test_an_operation_that_ended_can_be_expected_again_under_another_number():
    layers = arriving()
    layers.expect((7,))
    list(layers.take_all())
    layers.expect(())
    layers.expect((8,))
    assert sorted(layers.take_all()) == [(8, 0), (8, 1), (8, 2)]


def test_without_groups_nothing_arrives_in_parts():
    layers = ArrivingLayers()
    layers.ended([ended(1)])
    assert layers.may_run(set()) and not layers.may_run({2})
    assert list(layers.take("layer.0")) == list(layers.take_all()) == []

"""Numbers that another node gives, which ComfyUI does not hold to the limits of the widget."""

from __future__ import annotations

import asyncio
import inspect
import math

import pytest
from comfy_api.latest import io

from concept_attention import comfy_entrypoint
from concept_attention.nodes.concept_mask import ConceptMask

NODES = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())


def numbers(inputs: list[io.Input], inside: tuple[str, str] | None = None) -> list[tuple]:
    """Every Int and Float of a schema, and the dynamic combo and its option that it is inside of."""
    found = []
    for each in inputs:
        if isinstance(each, io.DynamicCombo.Input):
            for option in each.options:
                found += numbers(option.inputs, (each.id, option.key))
        elif isinstance(each, io.Int.Input | io.Float.Input):
            found.append((each, inside))
    return found


ALL = [(node, *number) for node in NODES for number in numbers(node.define_schema().inputs)]
NAMES = [f"{node.__name__}.{number.id}" for node, number, _ in ALL]


def execute(node: type[io.ComfyNode], name: str, inside: tuple[str, str] | None, value: float) -> None:
    """The node with this number and nothing else."""
    given = dict.fromkeys(inspect.signature(node.execute).parameters)
    if inside is None:
        given[name] = value
    else:
        combo, option = inside
        given[combo] = {combo: option, name: value}
    node.execute(**given)


def refusal(node: type[io.ComfyNode], name: str, inside: tuple[str, str] | None, value: float) -> str:
    """What the node says, which cannot run with nothing else."""
    try:
        execute(node, name, inside, value)
    except (AttributeError, TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("it ran")


def test_numbers_inside_of_dynamic_combos_are_found():
    assert {"ConceptMask.threshold", "ConceptMask.fraction", "ConceptFigure.steps"} <= set(NAMES)


@pytest.mark.parametrize("node,number,inside", ALL, ids=NAMES)
def test_a_number_outside_its_limits_is_an_error_that_names_it_and_them(node, number, inside):
    for value in (number.min - 1, number.max + 1, math.nan, math.inf, -math.inf, 10**30, -(10**30)):
        assert refusal(node, number.id, inside, value) == (
            f'{node.define_schema().display_name}: "{number.id}" is {value}; '
            f"it goes from {number.min} to {number.max}."
        )


@pytest.mark.parametrize("node,number,inside", ALL, ids=NAMES)
def test_the_limits_themselves_are_inside(node, number, inside):
    for value in (number.min, number.max):
        assert "it goes from" not in refusal(node, number.id, inside, value)


def test_a_number_of_an_option_that_is_not_chosen_is_held_to_nothing():
    assert '"fraction" is 7.0' in refusal(ConceptMask, "fraction", ("method", "top fraction"), 7.0)
    assert "it goes from" not in refusal(ConceptMask, "fraction", ("method", "fixed"), 7.0)

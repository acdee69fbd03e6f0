"""The graph of an exported program: read from its JSON, and interpreted node by node.

A node calls an operator of `tools/program_operators.py` with values that inputs and earlier nodes made, and constants.
A block under ``torch.no_grad()`` is a node with a graph of its own; other nodes with graphs (conditions, loops, maps)
are refused like any operator that is not on the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from switchdit.engine.inert_pickle import DAMAGE
from switchdit.errors import UserError
from tools.program_operators import Operator, check_memory, find_operator
from tools.pt2_archive import DTYPES, STRIDED

NO_GRAD = "torch.ops.higher_order.wrap_with_set_grad_enabled"
DEVICE = object()  # stands for the device of the run, whichever the program was exported on
MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}


@dataclass(frozen=True)
class Name:
    """A value that an input or a node makes."""

    name: str
    types: tuple[type, ...]


@dataclass
class Step:
    """A node. outputs: their names; a list of names for a list of tensors. frees: what no later node uses."""

    name: str
    target: str
    call: Operator | Graph
    arguments: dict[str, Any]
    outputs: list[Any]
    frees: set[str] = field(default_factory=set)


@dataclass
class Graph:
    inputs: list[str]
    steps: list[Step]
    outputs: list[str]


def parse_graph(graph: dict[str, Any]) -> Graph:
    """The JSON of a graph -> its nodes, every operator found; `UserError` for one that is not run from a file."""
    steps = [parse_node(node) for node in graph["nodes"]]
    outputs = [value["as_tensor"]["name"] for value in graph["outputs"]]
    needed = set(outputs)
    for step in reversed(steps):
        mentioned = {value.name for value in tree_leaves(step.arguments) if isinstance(value, Name)}
        mentioned |= {name for name in tree_leaves(step.outputs) if name is not None}
        step.frees = mentioned - needed
        needed |= mentioned
    return Graph([value["as_tensor"]["name"] for value in graph["inputs"]], steps, outputs)


def parse_node(node: dict[str, Any]) -> Step:
    target, inputs = node["target"], node["inputs"]
    name = str(node.get("name") or target)[:100]
    outputs = [parse_output(output) for output in node["outputs"]]
    if target == NO_GRAD:  # a block under torch.no_grad(): its graph, called with the tensors that follow
        _, block, *given = (value["arg"] for value in inputs)
        arguments = {str(i): parse_argument(value, name) for i, value in enumerate(given)}
        return Step(name, target, parse_graph(block["as_graph"]["graph"]), arguments, outputs)
    operator = find_operator(target)
    arguments = {value["name"]: parse_argument(value["arg"], name) for value in inputs}
    if operator.arguments is not None and (unknown := arguments.keys() - operator.arguments.keys()):
        raise UserError(f"node '{name}': {target} has no argument '{min(unknown)[:100]}'")
    return Step(name, target, operator, arguments, outputs)


def parse_argument(argument: dict[str, Any], node: str) -> Any:
    """One value of the schema's union ``{as_<kind>: value}``; values of nodes become `Name`."""
    ((kind, value),) = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_int" | "as_ints" | "as_bool" | "as_bools" | "as_string":
            return value
        case "as_float":
            return float(value)  # infinities are written as strings
        case "as_floats":
            return [float(number) for number in value]
        case "as_tensor":
            return Name(value["name"], (Tensor,))
        case "as_tensors":
            return [Name(tensor["name"], (Tensor,)) for tensor in value]
        case "as_optional_tensor":
            return parse_argument(value, node)
        case "as_optional_tensors":
            return [parse_argument(tensor, node) for tensor in value]
        case "as_sym_int" | "as_sym_bool" | "as_sym_float":
            ((kind, number),) = value.items()
            return Name(number, (bool, int, float)) if kind == "as_name" else number
        case "as_sym_ints" | "as_sym_bools" | "as_sym_floats":
            return [parse_argument({"as_sym_int": number}, node) for number in value]
        case "as_scalar_type" if value in DTYPES:
            return DTYPES[value]
        case "as_memory_format" if value in MEMORY_FORMATS:
            return MEMORY_FORMATS[value]
        case "as_layout" if value == STRIDED:
            return torch.strided
        case "as_device":
            return DEVICE
    raise UserError(f"node '{node}' has the argument {kind} {str(value)[:50]}, which is not supported")


def parse_output(output: dict[str, Any]) -> Any:
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return [tensor["name"] for tensor in value]
    return None if kind == "as_none" else value.get("name", value.get("as_name"))


Sizes = tuple[str, list[Any]]  # of a node: its name; the numbers that it made, the shapes for tensors


def run_graph(
    graph: Graph, given: dict[str, Any], device: torch.device, visit: Callable[[Sizes], None]
) -> list[Tensor]:
    """The outputs of a graph for the values of its inputs; `UserError`, naming the node, for one that fails.

    ``visit`` is called after each node, with the sizes of what later nodes use.
    """
    made: dict[str, Any] = {}
    for step in graph.steps:
        used: list[Any] = []
        try:
            arguments = {name: filled(value, given, made, device) for name, value in step.arguments.items()}
            if isinstance(step.call, Graph):
                inputs = dict(zip(step.call.inputs, arguments.values(), strict=True))
                results = tuple(run_graph(step.call, inputs, device, visit))
            else:
                results = step.call(arguments)
            for name, result in zip(step.outputs, results if isinstance(results, tuple) else [results], strict=False):
                names, values = (name, result) if isinstance(name, list) else ([name], [result])
                made.update(zip(names, values, strict=True))
                used += [made[name] for name in names if name is not None and name not in step.frees]
        except UserError:
            raise
        except (*DAMAGE, AssertionError) as problem:
            raise UserError(f"node '{step.name}' ({step.target}) fails: {first_line(problem)}") from problem
        visit((step.name, [tuple(value.shape) if isinstance(value, Tensor) else value for value in used]))
        for name in step.frees:
            made.pop(name, None)
        if device.type == "meta":
            storages = [value.untyped_storage() for value in made.values() if isinstance(value, Tensor)]
            check_memory(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
    return [made[name] if name in made else given[name] for name in graph.outputs]


def filled(value: Any, given: dict[str, Any], made: dict[str, Any], device: torch.device) -> Any:
    """An argument with values in the place of names."""
    if isinstance(value, list):
        return [filled(part, given, made, device) for part in value]
    if value is DEVICE:
        return device
    if not isinstance(value, Name):
        return value
    found = made[value.name] if value.name in made else given[value.name]
    if not isinstance(found, value.types):
        raise ValueError(f"'{value.name}' is of another type than it says")
    return found


def first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]
